"""For all tests: one thread to a process, and plans by one table of times, not by a busy clock."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Tests run in as many processes as there are cores (pytest-xdist): threads of one would only wait
# for those of another. Before torch is imported, and for the processes that tests start. What
# threads share among themselves has tests that ask for several.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from fxcompress import costs

# No test fails for the clock of a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Of an AMD EPYC, 2 cores, rounded.
BITS = range(1, 9)
TIMES = costs.Rates(
    coders={
        **{f"affine(bits={b})": 0.8 for b in BITS},
        **{f"dither(bits={b})": 1.15 for b in range(3, 9)},
        **{f"rotate(bits={b})": 1.5 + 0.3 * b for b in range(1, 6)},
        **{f"subsample(rate={r})": 0.4 + 2.8 * r for r in (0.5, 0.25, 0.125, 0.0625)},
    },
    basis=4.5,
    call=5.5e-5,
    basis_call=2.2e-4,
    flops=1e11,
    bytes=2.2e9,
    host_bytes=0.0,
)


@pytest.fixture(autouse=True)
def steady_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    own = costs._own
    if request.module.__name__ != "test_costs":
        monkeypatch.setattr(costs, "_own", lambda device: TIMES if device == "cpu" else own(device))
