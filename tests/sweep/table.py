"""The table of the sweep, as Markdown, from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trial import BIASED, FAILED, FELL_BACK, NOTHING, PASSED, PLAIN_FAILS, Row

HEAD = """\
# Models tried

Written by `python tests/sweep/sweep.py --table`; each model with random weights, one training step,
batch 2, every saved tensor coded however small (`min_bytes=0`).

- *run as*: `graphs`: the graphs that PyTorch cuts the model into, plain and rewritten, op by op on
  the same values (tests/side_by_side.py); `aot_eager`: torch.compile with `inner="aot_eager"`
  beside policy `inductor`; `inductor`: the same with code generation.
- *status*: `passed`: under `lossless`, outputs, random state and gradients equal plain's, bit for
  bit but for `inductor` (*lossless error*, relative); under `uniform4`, outputs equal, gradients
  finite, their mean over seeds within chance of the exact ones or off by less than 0.3 of the
  noise, if not at 4 bits then at 8 (a bias of the second order); `biased`: off by more.
  `nothing saved`: no activation is saved, so there is nothing to do.
  `fell back`: all of it is left as plain would have it.
  `plain fails`: torch.compile without us cannot train it, for the reason given.
- *lossless*, *4 bits*: plain's saved bytes over ours. *noise*, *bias*: of the whole gradient,
  relative, of `uniform4`; of 16 draws, up to 0.6 of the noise is chance (then 128 are drawn).
  *predicted*: the noise that a calibration on the step predicts.
- *note*: graphs that were left as they were, and why.
"""
COLUMNS = (
    "model",
    "run as",
    "status",
    "graphs",
    "saved MB",
    "lossless",
    "4 bits",
    "lossless error",
    "noise",
    "bias",
    "predicted",
    "note",
)


def write(rows: Sequence[Row], path: Path) -> None:
    """One table a family, after a count of what became of the models."""
    parts = [HEAD]
    for family in dict.fromkeys(r.name.partition(":")[0] for r in rows):
        mine = [r for r in rows if r.name.startswith(f"{family}:")]
        parts.append(f"\n## {family}: {_count(mine)}\n")
        parts.append("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        parts.extend("| " + " | ".join(_cells(r)) + " |" for r in mine)
    path.write_text("\n".join(parts) + "\n")


def _count(rows: Sequence[Row]) -> str:
    models = {r.name.partition("[")[0] for r in rows}
    counts = Counter(r.status for r in rows)
    each = (PASSED, NOTHING, PLAIN_FAILS, FELL_BACK, BIASED, FAILED)
    found = ", ".join(f"{counts[status]} {status}" for status in each if counts[status])
    return f"{len(models)} models, {len(rows)} trials: {found}"


def _cells(row: Row) -> list[str]:
    return [
        row.name.partition(":")[2].replace("|", "\\|"),
        row.inner,
        row.status,
        str(row.graphs or ""),
        f"{row.saved_mb:.3g}" if row.graphs else "",
        _number(row.lossless_ratio, ".2f"),
        _number(row.ratio, ".2f"),
        _number(row.difference, ".0e"),
        _number(row.noise, ".1e"),
        _number(row.bias, ".1e"),
        _number(row.predicted, ".1e"),
        row.reason.replace("|", "\\|"),
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else format(value, form)
