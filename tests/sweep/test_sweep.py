"""The sweep over models: a few in the default suite, all of them as slow tests.

All at once, resumable, with a table: ``python tests/sweep/sweep.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from sweep import FAMILIES, ROWS, read, subjects  # noqa: E402
from trial import FAILED, PASSED, attempt  # noqa: E402

SLICE = {
    "module": [
        "module:nn.Conv2d[0]",
        "module:nn.MaxPool2d[0]",
        "module:nn.GroupNorm[0]",
        "module:nn.BCELoss[1]",
        "module:nn.LSTMCell[0]",
    ],
    "transformers": ["transformers:llama"],
}
NEEDS = {"module": "expecttest", "transformers": "transformers", "vision": "torchvision"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [n for names in SLICE.values() for n in names])
def test_a_slice(name: str) -> None:
    family = name.partition(":")[0]
    pytest.importorskip(NEEDS[family])
    (subject,) = (s for s in subjects(family) if s.name == name)
    row = attempt(subject)
    assert row.status == PASSED, row.reason
    assert row.ratio is not None
    assert row.ratio > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all(family: str) -> None:
    pytest.importorskip(NEEDS[family])
    rows = [attempt(subject) for subject in subjects(family)]
    assert not [(row.name, row.reason) for row in rows if row.status == FAILED]


def test_no_row_of_the_table_is_a_failure() -> None:
    assert not [row.name for row in read(ROWS) if row.status == FAILED]
