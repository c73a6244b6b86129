"""Files: written whole or not at all; read as data, never as code, and only in a sensible size."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("fxcompress")

_complained: set[Path] = set()  # folders that cannot be written to, each named once


def write(path: Path, content: str | bytes) -> None:
    """Put ``content`` into a file under its final name, complete, or leave what was there.

    A process that reads meanwhile, or is killed here, or a disk that runs full never gives half a
    file.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    own = f"{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}"
    temporary = path.with_name(f".{path.name}.{own}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def keep(path: Path, content: str | bytes) -> None:
    """As :func:`write`, for what only saves later processes some work: no disk is no failure."""
    try:
        write(path, content)
    except OSError as error:
        if path.parent not in _complained:
            _complained.add(path.parent)
            log.warning(
                "nothing is kept in %s (%s), so later processes start afresh; set "
                "TORCHINDUCTOR_CACHE_DIR to a folder with space that you may write to",
                path.parent,
                error.strerror or error,
            )


def read_json(path: Path, largest: int) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read. ValueError: no JSON, or more than ``largest`` bytes.
    """
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{size / 1e6:.0f} MB are more than any of ours takes")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
