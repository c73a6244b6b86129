"""The quick tests on several PyTorch releases, each in a fresh environment.

    python tools/version_matrix.py                    # all releases, the quick tests
    python tools/version_matrix.py 2.11 2.15 --tests tests/test_graphs.py tests/test_ops.py

A release is the newest patch of it that pip's index has; one that it lacks is reported as such. The
last line is one JSON object; what pytest wrote is in pytest.txt of the environment's folder. Exit
status: 0 all passed, 1 a test failed, 3 no release could be installed. Each environment takes some
minutes to install and up to 7 GB of disk; with `--work` they are kept there, and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("2.11", "2.13", "2.14", "2.15")
# What stands nearest to PyTorch: graphs, operators, gradients, modes, and the kernels' loader.
TESTS = (
    *("test_rng", "test_ops", "test_graphs", "test_gradients", "test_backend", "test_modes"),
    *("test_codecs", "test_cpu_kernels", "test_calibrate", "test_planner", "test_policies"),
)
# Not all of the extra `dev`: a torchvision for the newest release may not be out yet.
NEEDED = ("pytest>=8", "hypothesis>=6.100", "jsonschema>=4.18")
IN_ONE_PROCESS = ("-o", "addopts=", "-m", "not slow", "-vv", "--tb=short", "-p", "no:cacheprovider")
NOTHING_INSTALLED = 3


@dataclass(frozen=True)
class Result:
    """One release.

    Attributes:
        torch: what was installed; empty if nothing could be.
        passed, failed: tests; errors count as failed.
        failures: names of the tests that failed.
        note: why nothing ran, or not all.
    """

    release: str
    torch: str = ""
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.passed > 0 and self.failed == 0 and not self.note


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print a line a release and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("releases", nargs="*", default=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--tests", nargs="+", default=[f"tests/{name}.py" for name in TESTS])
    parser.add_argument("--work", type=Path, help="folder of environments to keep and use again")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a release may test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        results = []
        for release in args.releases:
            results.append(run_release(release, work, args.tests, args.timeout))
            print(_line(results[-1]), flush=True)
    print(json.dumps({"tests": args.tests, "releases": [asdict(r) for r in results]}))
    if not any(r.torch for r in results):
        return NOTHING_INSTALLED
    return 0 if all(r.ok for r in results) else 1


def run_release(release: str, work: Path, tests: Sequence[str], timeout: float) -> Result:
    """Install one release and run the tests on it, on one core."""
    folder = work / f"torch-{release}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = [f"torch=={release}.*", "-e", str(ROOT), *NEEDED]
    if _torch_of(python).startswith(
        f"{release}."
    ):  # made by an earlier run, with all that it needs
        wanted = ["--no-deps", "-e", str(ROOT)]
    try:
        _output(python, "-m", "pip", "install", "-q", *wanted)
        torch = _torch_of(python)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
        return Result(release, note="; ".join(lines)[-300:] or f"exit code {error.returncode}")
    log = folder / "pytest.txt"
    start = time.perf_counter()
    note = ""
    with log.open("w") as file:
        try:
            subprocess.run(
                [python, "-m", "pytest", *IN_ONE_PROCESS, *tests],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            note = f"stopped after {timeout:.0f} s"
    return read_log(release, torch, log.read_text(), time.perf_counter() - start, note)


def read_log(release: str, torch: str, log: str, seconds: float = 0.0, note: str = "") -> Result:
    """What `pytest -vv` wrote, to its end or as far as it came."""
    found = re.findall(r"^(tests/\S.*?) (PASSED|FAILED|ERROR)\b", log, flags=re.MULTILINE)
    found += [(name, "ERROR") for name in re.findall(r"^ERROR (tests/\S+)$", log, re.MULTILINE)]
    passed = sum(verdict == "PASSED" for _, verdict in found)
    failures = tuple(dict.fromkeys(name for name, verdict in found if verdict != "PASSED"))
    if not found and not note:
        note = f"no test ran: {log.rstrip().rpartition(chr(10))[2][:200]}"
    return Result(release, torch, passed, len(failures), seconds, failures, note)


def _torch_of(python: Path) -> str:
    """The version that is installed there; empty if there is none."""
    try:
        return _output(python, "-c", "import torch; print(torch.__version__)").split()[-1]
    except subprocess.CalledProcessError:
        return ""


def _output(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return done.stdout


def _line(result: Result) -> str:
    if not result.torch:
        return f"torch {result.release}: {result.note}"
    counts = f"{result.passed} passed, {result.failed} failed in {result.seconds:.0f} s"
    counts += f" ({result.note})" if result.note else ""
    return "\n  ".join([f"torch {result.torch}: {counts}", *result.failures])


if __name__ == "__main__":
    sys.exit(main())
