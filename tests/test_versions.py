"""Releases of PyTorch: unknown ones are refused at import; what the matrix of releases reports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fxcompress
from fxcompress import torch_private


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cpu", "2.15.0a0+git123", "2.15.3+cu130"])
def test_known_releases(version: str) -> None:
    torch_private.check_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.5.0+cu124", "2.10.9", "2.16.0", "3.0.0a0"])
def test_unknown_releases_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(torch_private.UNTESTED, raising=False)
    with pytest.raises(fxcompress.FxCompressError) as caught:
        torch_private.check_version(version)
    assert version in str(caught.value)
    assert "pip install 'torch>=2.11,<2.16'" in str(caught.value)
    monkeypatch.setenv(torch_private.UNTESTED, "1")
    torch_private.check_version(version)


def test_refused_before_anything_else_is_imported() -> None:
    """An old PyTorch lacks names that other modules import: the message has to come first."""
    script = """
import torch
torch.__version__ = "2.4.0"
del torch.library.Library, torch.Tag
import fxcompress
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.rstrip().splitlines()[-1].startswith("fxcompress.errors.FxCompressError: fx")


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "version_matrix.py"
    spec = importlib.util.spec_from_file_location("version_matrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["version_matrix"] = module
    spec.loader.exec_module(module)
    return module


def test_logs_are_understood(matrix: ModuleType) -> None:
    read = matrix.read_log
    good = read("2.15", "2.15.0", "tests/a.py::b[x y] PASSED [ 50%]\ntests/a.py::c PASSED [100%]\n")
    assert (good.passed, good.failed, good.ok) == (2, 0, True)
    log = "tests/a.py::b FAILED [ 9%]\ntests/a.py::c PASSED [ 99%]\nERROR tests/d.py\n"
    bad = read("2.11", "2.11.0", log)
    assert (bad.passed, bad.failed, bad.ok) == (1, 2, False)
    assert bad.failures == ("tests/a.py::b", "tests/d.py")
    nothing = read("2.13", "2.13.0", "no tests ran in 0.1s")
    assert not nothing.ok
    assert "no test ran" in nothing.note
    cut = read("2.13", "2.13.0", "tests/a.py::b PASSED [  1%]\n", note="stopped after 3 s")
    assert (cut.passed, cut.ok) == (1, False)


def test_the_matrix_is_what_is_supported(matrix: ModuleType) -> None:
    (low, high) = torch_private.SUPPORTED
    releases = [tuple(map(int, release.split("."))) for release in matrix.RELEASES]
    assert min(releases) == low
    assert max(releases) == (high[0], high[1] - 1)
    assert all((Path(__file__).parent / f"{name}.py").is_file() for name in matrix.TESTS)
