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
  noise, if not at 4 bits then at 8 (a bias of the second order); `biased`: off by more, for the
  reason given.
  `nothing saved`: no activation is saved, so there is nothing to do.
  `fell back`: all of it is left as plain would have it.
  `plain fails`: torch.compile without us cannot train it, for the reason given.
- *lossless*, *4 bits*: plain's saved bytes over ours. *noise*, *bias*: of the whole gradient,
  relative, of `uniform4`; of 16 draws, up to 0.6 of the noise is chance (then 128 are drawn).
  *predicted*: the noise that a calibration on the step predicts, and how far off that is, over the
  models of a family: of the few elements that most modules save, 16 draws are a rough measure.
- *note*: graphs that were left as they were, and why.
"""
# Why a model is biased at 8 bits, too.
CAUSES = {
    "module:nn.TransformerEncoderLayer[0]": "PyTorch draws its inputs from −9 to 9, so that scores "
    "of attention reach 27 and softmax bends their noise; the formula of its backward in float64, "
    "with the same decoded queries, is as biased",
}
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
        parts.extend(_prediction(mine))
        parts.append("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        parts.extend("| " + " | ".join(_cells(r)) + " |" for r in mine)
    path.write_text("\n".join(parts) + "\n")


def _count(rows: Sequence[Row]) -> str:
    models = {r.name.partition("[")[0] for r in rows}
    counts = Counter(r.status for r in rows)
    each = (PASSED, NOTHING, PLAIN_FAILS, FELL_BACK, BIASED, FAILED)
    found = ", ".join(f"{counts[status]} {status}" for status in each if counts[status])
    return f"{len(models)} models, {len(rows)} trials: {found}"


def _prediction(rows: Sequence[Row]) -> list[str]:
    """How predicted and measured noise compare, in a line; nothing where none was predicted."""
    known = [(r.name.partition(":")[2], r.noise, r.predicted) for r in rows]
    ratios = sorted((p / n, name) for name, n, p in known if n and p)
    if not ratios:
        return []
    (least, lowest), (most, highest) = ratios[0], ratios[-1]
    low, middle, high = (ratios[round(q * (len(ratios) - 1))][0] for q in (0.1, 0.5, 0.9))
    near = sum(1 / 1.5 < r < 1.5 for r, _ in ratios)
    return [
        f"Predicted over measured noise of {len(ratios)} trials: median {middle:.2f}, a tenth each "
        f"below {low:.2f} and above {high:.2f}; {near} within a factor of 1.5; from {least:.2f} "
        f"({lowest}) to {most:.2f} ({highest}).\n"
    ]


def _cells(row: Row) -> list[str]:
    notes = [row.reason] if row.reason else []
    if row.status == BIASED and row.name in CAUSES:
        notes.append(CAUSES[row.name])
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
        "; ".join(notes).replace("|", "\\|"),
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else format(value, form)
