"""Output: rows as a table, JSON, CSV or Markdown, whole even where no terminal shows them."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

FORMATS = ("table", "json", "csv", "md")
_WIDE = 10_000  # columns of a pipe: rich would take 80 and cut or fold what does not fit

Row = Mapping[str, Any]


def console() -> Console:
    """A console on stdout that never cuts a table off in a pipe; ``NO_COLOR`` is respected."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def megabytes(size: float) -> str:
    """``1.05`` of 1,050,000 bytes."""
    return f"{size / 1e6:.2f}"


def percent(share: float | None) -> str:
    """``31 %`` of 0.31; small shares keep two digits, an unknown one is a question mark."""
    if share is None:
        return "?"
    if share == 0:
        return "0"
    return f"{100 * share:.3g} %"


def text(value: Any) -> str:
    """A cell: lists joined by commas, floats in four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return str(value)


def write_table(columns: Sequence[str], rows: Sequence[Row], title: str, caption: str = "") -> None:
    """A rich table with numbers to the right; plain text in a pipe."""
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row[column], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(text(row[column]) for column in columns))
    show(table)


def show(table: Table) -> None:
    """Print a table; in a pipe without the spaces that fill its lines."""
    if sys.stdout.isatty():
        console().print(table, markup=False)
        return
    shown = console()
    with shown.capture() as captured:
        shown.print(table, markup=False)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def write_csv(columns: Sequence[str], rows: Sequence[Row], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_exact(row[column]) for column in columns] for row in rows)


def write_markdown(columns: Sequence[str], rows: Sequence[Row], file: TextIO) -> None:
    def line(cells: Sequence[str]) -> None:
        print("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |", file=file)

    line(columns)
    line(["---"] * len(columns))
    for row in rows:
        line([text(row[column]) for column in columns])


def write_json(value: Any, file: TextIO) -> None:
    print(json.dumps(value, indent=1), file=file)


def _exact(value: Any) -> str:
    """As `text`, floats in full: a CSV is read by programs."""
    return repr(value) if isinstance(value, float) else text(value)
