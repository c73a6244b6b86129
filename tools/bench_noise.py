"""`fxcompress bench noise`: gradient noise of each policy at equal saved bytes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fxcompress import rng
from fxcompress.calibrate import evidence_of
from fxcompress.choose import bytes_of, is_codable, mask_bytes
from fxcompress.costs import clock_of
from fxcompress.errors import SettingsError
from fxcompress.evidence import Calibration, signature
from fxcompress.ladder import hedges, ladder
from fxcompress.passes.analyse import analyse
from fxcompress.passes.rewrite import RECOMPUTE, Choice, rewrite
from fxcompress.peak import timeline
from fxcompress.planner import tie_storages, with_passes
from fxcompress.policies import Situation, policy
from fxcompress.program import TIME_PRICE
from fxcompress.record import Recording, gradients
from fxcompress.sensitivity import Sensitivity, price, sensitivity
from fxcompress.solve import build, least_noise, least_saved
from fxcompress.tools import harness, models
from fxcompress.tools.feed import feed, recorded, train

MB = 1e6
MIN_BYTES = 16384
PROBES = 32  # of a prediction: with 8, that of one query in a ViT was off twofold, by chance
TOLERANCE = 1.01  # "equal bytes": a policy may spend this much more than it is matched to


@dataclass(frozen=True)
class Row:
    """One policy. Variance, bias and prediction are relative to the exact gradient's square.

    `bias` is the squared bias over the seeds, corrected for chance; `bias_chance` one standard
    deviation of what chance alone gives it. `level` is the knob that met the bytes.
    """

    saved_mb: float
    grad_variance: float
    predicted_variance: float
    bias: float
    bias_chance: float
    level: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench noise`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument(
        "--policies",
        default="uniform2,rotate2,auto",
        help="also auto@32: at 1/32 of plain Inductor's saved bytes, whatever the others spend",
    )
    parser.add_argument(
        "--match-bytes", metavar="POLICY", help="tune each policy to the saved bytes of this one"
    )
    parser.add_argument(
        "--bytes-factor", type=float, default=1.0, help="of the bytes matched to, as 0.5"
    )
    parser.add_argument(
        "--ratio", type=float, help="tune each policy to 1/RATIO of plain Inductor's saved bytes"
    )
    parser.add_argument(
        "--drift-steps", type=int, default=0, help="AdamW steps between calibrating and measuring"
    )
    parser.add_argument(
        "--time-price", type=float, default=TIME_PRICE, help="of policy auto; 0: only noise counts"
    )
    parser.add_argument("--data", type=Path, help="JPEG folders, or a text file for the GPT")
    parser.add_argument("--warm-steps", type=int, default=200, help="AdamW steps beforehand")
    parser.add_argument("--seeds", type=int, default=16, help="noise streams to average over")
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and with --json one line of JSON."""
    names = harness.split_policies(args.policies)
    for name in (*names, *([args.match_bytes] if args.match_bytes else [])):
        _ratio_of(name)
    if args.ratio and args.match_bytes:
        raise SettingsError("give --match-bytes or --ratio, not both")
    if args.seeds < 2:
        raise SettingsError("--seeds must be 2 or more: bias is told from noise by their mean")
    done = harness.results(
        args,
        *("model", "batch", "size", "data", "warm_steps", "drift_steps", "match_bytes", "seed"),
        *("bytes_factor", "ratio", "seeds", "time_price"),
    )
    with harness.bars() as bars:
        setting = cache(partial(_set, args, bars))  # trained only if something is missing
        first = done.part("setting", lambda: setting().about)
        target = first["plain_saved_mb"] * MB / args.ratio if args.ratio else None
        if args.match_bytes:
            matched = done.part(f"bytes of {args.match_bytes}", _spent, setting, args.match_bytes)
            target = matched * args.bytes_factor
        rows = {
            name: Row(**done.part(name, _row, setting, name, target, args))
            for name in bars.track(names, description="noise of each policy")
        }
    about = {
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "warm_steps": args.warm_steps,
        "match_bytes": args.match_bytes,
        "bytes_factor": args.bytes_factor,
        "ratio": args.ratio,
        "drift_steps": args.drift_steps,
        "time_price": args.time_price,
        **first,
        "seed": args.seed,
        "seeds": args.seeds,
        "machine": harness.machine(),
    }
    _print(rows, about)
    if args.json:
        print(json.dumps({"policies": {name: asdict(row) for name, row in rows.items()}, **about}))
    return 0


@dataclass(frozen=True)
class Setting:
    """The trained model on the batch that all policies are measured on."""

    recordings: tuple[Recording, ...]
    sensitivities: tuple[Sensitivity, ...]
    calibration: Calibration
    exact: Tensor
    about: dict[str, Any]


def _spent(setting: Callable[[], Setting], name: str) -> int:
    """Bytes that a policy saves without being tuned."""
    found = setting()
    chosen, _ = _choose(found.recordings, name, found.calibration, None)
    return sum(map(_saved, chosen))


def _ratio_of(name: str) -> float | None:
    """Of ``policy@R``: by how much plain Inductor's saved bytes shrink.

    Raises:
        SettingsError: no such policy, or something else after the @.
    """
    found = harness.settings_of(name)
    if found.get("budget_mb") is not None:
        raise SettingsError(f"{name!r}: noise is compared at equal bytes, not within a budget")
    ratio: float | None = found.get("ratio_saved")
    return ratio


def _row(
    setting: Callable[[], Setting], name: str, target: float | None, args: argparse.Namespace
) -> Row:
    found = setting()
    if ratio := _ratio_of(name):
        name, target = name.partition("@")[0], found.about["plain_saved_mb"] * MB / ratio
    chosen, level = _choose(found.recordings, name, found.calibration, target, args.time_price)
    return _measure(found.recordings, found.sensitivities, chosen, found.exact, args.seeds, level)


def _set(args: argparse.Namespace, bars: Progress) -> Setting:
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    source, data = feed(task, args.data, args.batch, args.size, args.seed)
    loss = train(source, args.warm_steps, bars=bars)
    calibration = evidence_of(recorded(source, MIN_BYTES), recorded(source, MIN_BYTES))
    if args.drift_steps:
        loss = train(source, args.drift_steps, bars=bars)
    recordings = recorded(source, MIN_BYTES)
    return Setting(
        recordings,
        tuple(sensitivity(r, is_codable, probes=PROBES, seed=1) for r in recordings),
        calibration,
        _flat(recordings, [r.cut for r in recordings]),
        {
            "data": data,
            "warm_loss": loss,
            "plain_saved_mb": sum(r.plain_saved_bytes for r in recordings) / MB,
        },
    )


def _choose(
    recordings: Sequence[Recording],
    name: str,
    calibration: Calibration,
    target: float | None,
    time_price: float = TIME_PRICE,
) -> tuple[list[tuple[Choice, ...]], float | None]:
    """Choices for each graph, and the level of the policy's knob that spends `target` bytes."""
    found = policy(name)
    if found.solves:
        if target is None:
            raise SettingsError(f"policy {name!r} needs --match-bytes or --ratio to plan for")
        shares = [target * _share(r, recordings) for r in recordings]
        pairs = zip(recordings, shares, strict=True)
        return [_solved(r, calibration, share, time_price) for r, share in pairs], None
    if found.choose is None:
        raise SettingsError(f"policy {name!r} adds no noise to measure")

    def at(level: float | None) -> list[tuple[Choice, ...]]:
        assert found.choose is not None
        return [
            tie_storages(
                found.choose(
                    Situation(r.candidates, level, evidence=calibration.of(signature(r.cut)) or {})
                )
            )
            for r in recordings
        ]

    if target is None or not found.levels:
        return at(None), None
    for level in found.levels:  # from the most bytes to the fewest
        choices = at(level)
        if sum(map(_saved, choices)) <= target * TOLERANCE:
            return choices, level
    return at(found.levels[-1]), found.levels[-1]


def _solved(
    recording: Recording, calibration: Calibration, limit: float, time_price: float
) -> tuple[Choice, ...]:
    """What policy auto would choose for this many saved bytes."""
    evidence = calibration.of(signature(recording.cut)) or {}
    clock = clock_of(recording.cut, recording.candidates, time_price)
    weights = hedges(evidence)
    ladders = [
        ladder(c, 256, evidence.get(c.name), clock, weights.get(c.name, 1.0))
        for c in recording.candidates
    ]
    memory = timeline(recording.cut, recording.candidates, channels_last=recording.channels_last)
    program = build(with_passes(recording.candidates, ladders, evidence), memory)
    found = least_noise(program, saved=limit) or least_saved(program)
    assert found is not None  # nothing else is asked of it
    return found.choices


def _share(recording: Recording, recordings: Sequence[Recording]) -> float:
    return recording.plain_saved_bytes / sum(r.plain_saved_bytes for r in recordings)


def _saved(choices: Sequence[Choice]) -> int:
    masks = mask_bytes(choices)
    return sum(bytes_of(c, masks) for c in choices)


def _measure(
    recordings: Sequence[Recording],
    sensitivities: Sequence[Sensitivity],
    chosen: Sequence[Sequence[Choice]],
    exact: Tensor,
    seeds: int,
    level: float | None,
) -> Row:
    rewritten = [_rewritten(r, c) for r, c in zip(recordings, chosen, strict=True)]
    total = torch.zeros_like(exact)
    square = 0.0
    for seed in range(seeds):
        rng.manual_seed(seed)
        error = _flat(recordings, rewritten) - exact
        total += error
        square += float(error.square().sum()) / seeds
    norm = float(exact.square().sum())
    mean = float((total / seeds).square().sum())
    # E|mean|² = bias² + variance/n, and E|error|² = bias² + variance.
    bias = (mean - square / seeds) / (1 - 1 / seeds)
    variance = square - max(bias, 0.0)
    chance = variance / seeds * (2 / _freedom(exact)) ** 0.5
    predicted = 0.0
    for found, choices in zip(sensitivities, chosen, strict=True):
        specs = {c.candidate.name: c.codec_spec for c in choices}
        rebuilt = {c.candidate.name for c in choices if c.representation == RECOMPUTE}
        for tensor in found.tensors:
            spec = specs.get(tensor.candidate.name)
            if spec is not None and tensor.weights is not None:
                through = found.passed.get(tensor.candidate.name, {})
                again = sum(share for first, share in through.items() if first in rebuilt)
                one = price(tensor, spec, 1.0)
                predicted += (1 + again * one.passing) * one.variance
    return Row(
        saved_mb=sum(map(_saved, chosen)) / MB,
        grad_variance=variance / norm,
        predicted_variance=predicted / norm,
        bias=max(bias, 0.0) / norm,
        bias_chance=chance / norm,
        level=level,
    )


def _freedom(gradient: Tensor) -> float:
    """About how many independent directions the noise has: an estimate for the error bar."""
    return min(float(gradient.numel()), 100.0)


def _rewritten(recording: Recording, choices: Sequence[Choice]) -> Any:
    """A copy of the recording's graphs with these choices applied."""
    cut = recording.cut.copy()
    own = {c.name: c for c in analyse(cut, MIN_BYTES, channels_last=recording.channels_last)}
    moved = [replace(c, candidate=own[c.candidate.name]) for c in choices]
    return rewrite(cut, moved, "", channels_last=recording.channels_last)


def _flat(recordings: Sequence[Recording], cuts: Sequence[Any]) -> Tensor:
    """The whole parameter gradient, float64."""
    parts = [
        g.flatten().double()
        for r, cut in zip(recordings, cuts, strict=True)
        for g in gradients(r, cut)
    ]
    return torch.cat(parts)


def _print(rows: dict[str, Row], about: dict[str, Any]) -> None:
    title = f"{about['model']}, batch {about['batch']}, size {about['size']}"
    if about["match_bytes"]:
        title += f", at {about['bytes_factor']:g}× the bytes of {about['match_bytes']}"
    elif about["ratio"]:
        title += f", at 1/{about['ratio']:g} of plain Inductor's bytes"
    table = Table(title=title)
    table.add_column("policy")
    for heading in ("level", "saved MB", "variance", "predicted", "squared bias", "chance"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            "-" if row.level is None else f"{row.level:g}",
            f"{row.saved_mb:.2f}",
            f"{row.grad_variance:.3g}",
            f"{row.predicted_variance:.3g}",
            f"{row.bias:.1e}",
            f"{row.bias_chance:.0e}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(harness.describe(about["machine"]), highlight=False)
    console.print(
        f"{about['data']}; {about['warm_steps']} steps first, "
        f"{about['drift_steps']} after calibrating, loss {about['warm_loss']:.3f}; "
        f"plain Inductor saves {about['plain_saved_mb']:.2f} MB; seed {about['seed']}, "
        f"{about['seeds']} noise streams"
    )
