"""The solver against brute force, and its limits: infeasible programs, no time, many tensors."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxcompress import greedy
from fxcompress.choose import bytes_of
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.capture import Saved
from fxcompress.passes.recipes import Recipe
from fxcompress.passes.rewrite import KEEP, RECOMPUTE, Choice, hoisted_nodes
from fxcompress.peak import Timeline
from fxcompress.solve import (
    GAP,
    TIE,
    Option,
    Solution,
    build,
    least_noise,
    least_peak,
    least_saved,
)

ELEMENTS = 4096
BITS = (8, 6, 5, 4, 3, 2, 1)
ROUNDING = 1.0  # bytes: a plan that is as large as the limit may be lost to the solver's tolerance


@dataclass(frozen=True)
class Brute:
    """One combination of options and what it comes to."""

    choices: tuple[Choice, ...]
    peak: float
    saved: float
    noise: float
    cost: float


@dataclass(frozen=True)
class Problem:
    """Ladders of some tensors on a timeline."""

    ladders: list[list[Option]]
    step: Timeline

    @cached_property
    def plans(self) -> list[Brute]:
        """Every combination of options that treats views of one buffer alike, and rebuilds only
        from tensors that are there."""
        columns = {
            o.choice: (self.step.of(o.choice), bytes_of(o.choice, {}), o.noise, o.cost)
            for ladder in self.ladders
            for o in ladder
        }
        found = []
        for combination in itertools.product(*self.ladders):
            fates: dict[fx.Node, set[str]] = {}
            for option in combination:
                root, what = _root(option.choice.candidate), option.choice.representation
                fate = what if what in {KEEP, RECOMPUTE} else "coded"
                fates.setdefault(root, set()).add(fate)
            option = {o.choice.candidate.saved.forward: o for o in combination}
            ways = [
                (o, option[root], dict(self.first(o).passes))
                for o in combination
                if o.choice.representation == RECOMPUTE and o.choice.candidate.recipe is not None
                for root in o.choice.candidate.recipe.roots
            ]
            has_roots = all(
                r.choice.representation == KEEP
                or (r.choice.codec_spec is not None and r.choice.candidate.name in passes)
                for _, r, passes in ways
            )
            if has_roots and all(len(states) == 1 for states in fates.values()):
                choices = tuple(option.choice for option in combination)
                masks = hoisted_nodes(choices)
                alive = self.step.base + sum(columns[c][0] for c in choices)
                alive = alive + sum(self.step.masks[m] for m in masks)
                saved = sum(columns[c][1] for c in choices)
                saved += sum(self.step.mask_payload[m] for m in masks)
                noise = sum(columns[c][2] for c in choices)
                cost = sum(columns[c][3] for c in choices)
                pairs = {
                    (_root(o.choice.candidate), r.choice): (r, passes[r.choice.candidate.name])
                    for o, r, passes in ways
                    if r.choice.codec_spec is not None
                }
                for root_option, share in pairs.values():
                    noise += share * root_option.noise
                    cost += share * root_option.noise * root_option.weight
                for o, r, _ in ways:
                    if r.choice.codec_spec is not None:
                        alive = alive + self.step.of_root(o.choice, r.choice)
                found.append(Brute(choices, float(alive.max()), saved, noise, cost))
        return found

    def first(self, option: Option) -> Option:
        """The same of the first view of the buffer: it says what noise passes."""
        root = _root(option.choice.candidate)
        return next(
            o
            for ladder in self.ladders
            for o in ladder
            if _root(o.choice.candidate) is root and o.choice.representation == RECOMPUTE
        )

    def of(self, solution: Solution | None) -> Brute:
        """What was found, as brute force has it."""
        assert solution is not None
        return next(b for b in self.plans if b.choices == solution.choices)


def _root(candidate: Candidate) -> fx.Node:
    node = candidate.saved.forward
    return node.args[0] if node.target is torch.ops.aten.view.default else node


def problem(
    spans: Sequence[tuple[int, int, int]],
    noises: Sequence[Sequence[float]],
    *,
    length: int,
    base: Sequence[float] = (),
    masked: Sequence[int] = (),
    views: bool = False,
    rebuilt: Mapping[int, tuple[Mapping[int, float | None], float]] | None = None,
) -> Problem:
    """Tensors saved from ``born`` over the turn of the step until ``needed``.

    Args:
        spans: (born, last forward reader, needed) positions of each.
        noises: of each tensor's codecs, from 8 bits down.
        masked: tensors with an exact reader; neighbours in the list share their mask.
        views: the last two tensors are views of one buffer.
        rebuilt: tensors that may be rebuilt, each with those it starts from and how much of their
            noise it passes (None: it bears none), and the slowdown.
    """
    nodes: list[fx.Node] = []
    again: dict[str, np.ndarray] = {}
    graph, backward = fx.Graph(), fx.Graph()
    fake = torch.empty(ELEMENTS, device="meta")
    buffer = graph.placeholder("buffer")
    buffer.meta["val"] = fake
    masks: dict[fx.Node, np.ndarray] = {}
    payloads: dict[fx.Node, int] = {}
    kept, dropped, decoded, held = {}, {}, {}, {}
    ladders = []
    for i, (born, used, needed) in enumerate(spans):
        is_view = views and i >= len(spans) - 2
        node = (
            graph.call_function(torch.ops.aten.view.default, (buffer, [ELEMENTS]))
            if is_view
            else graph.placeholder(f"x{i}")
        )
        node.meta["val"] = fake
        nodes.append(node)
        recipe, slowdown, passes = None, 0.0, ()
        if rebuilt is not None and i in rebuilt:
            roots, slowdown = rebuilt[i]
            passes = tuple((f"s{r}", share) for r, share in roots.items() if share is not None)
            recipe = Recipe((node,), tuple(nodes[r] for r in roots), (), 1.0, False)
        received = backward.placeholder(f"s{i}")
        received.meta["val"] = fake
        exact: tuple[fx.Node, ...] = ()
        if i in masked:
            if i - 1 in masked and i % 2:
                exact = (list(masks)[-1],)
            else:
                mask = backward.call_function(torch.ops.aten.le.Scalar, (received, 0))
                mask.meta["val"] = fake.bool()
                exact, payloads[mask] = (mask,), ELEMENTS // 8
                masks[mask] = _span(used, needed, ELEMENTS // 8, length)
        size = 4 * ELEMENTS
        candidate = Candidate(
            Saved(node, received), size, size, (received,), exact, (), (), 1, "", None, (0,), 0,
            recipe,
        )  # fmt: skip
        name = candidate.name
        kept[name] = _span(born, needed, size, length)
        dropped[name] = _span(born, used, size, length)
        decoded[name] = _span(needed, needed, size, length)
        held[name] = _span(used, needed, 1, length)
        again[name] = _span(needed - 1, needed, size, length)
        ladders.append(
            [Option(Choice(candidate, KEEP), 0.0)]
            + [Option(Choice(candidate, RECOMPUTE), 0.0, slowdown, 1.0, passes)]
            * (recipe is not None)
            + [
                Option(Choice(candidate, f"affine(bits={b})"), n)
                for b, n in zip(BITS, noises[i], strict=False)
            ]
        )
    names = tuple(f"n{p}" for p in range(length))
    whole = np.array(base, dtype=float) if len(base) else np.zeros(length)
    step = Timeline(
        base=whole,
        plain_extra=np.zeros(length),
        kept=kept,
        dropped=dropped,
        prepared=dict.fromkeys(decoded, np.zeros(length)),
        decoded=decoded,
        fetched={},
        held=held,
        coding={},
        rebuilt=again,
        rebuilding={n: np.append(np.diff(a) > 0, False).astype(float) for n, a in again.items()},
        masks=masks,
        mask_payload=payloads,
        names=names,
        forward_nodes=length // 2,
    )
    return Problem(ladders, step)


def _span(first: int, last: int, size: float, length: int) -> np.ndarray:
    found = np.zeros(length)
    found[first : last + 1] = size
    return found


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(2, 4))
    length = 12
    spans = []
    for _ in range(count):
        born = draw(st.integers(0, 4))
        spans.append((born, draw(st.integers(born, 5)), draw(st.integers(6, 11))))
    noise = st.floats(1e-6, 1e3)
    noises = [
        sorted(draw(st.lists(noise, min_size=1, max_size=4, unique=True))) for _ in range(count)
    ]
    base = draw(st.lists(st.integers(0, 3 * ELEMENTS), min_size=length, max_size=length))
    masked = draw(st.lists(st.integers(0, count - 1), unique=True).map(sorted))
    rebuilt = {}
    for i in draw(st.sets(st.integers(1, count - 1))):
        shares = st.none() | st.sampled_from([0.0, 0.5, 2.0])
        roots = draw(st.dictionaries(st.integers(0, i - 1), shares, min_size=1, max_size=2))
        rebuilt[i] = (roots, draw(st.sampled_from([0.0, 1e-3, 0.1, 10.0])))
    views = draw(st.booleans())
    if views and count - 2 in rebuilt.get(count - 1, ({},))[0]:
        del rebuilt[count - 1]  # no view is rebuilt from its own buffer
    return problem(
        spans, noises, length=length, base=base, masked=masked, views=views, rebuilt=rebuilt
    )


shares = st.floats(0.05, 1.0)


@settings(max_examples=60)
@given(problems(), shares)
def test_least_noise_under_a_peak(given: Problem, share: float) -> None:
    lowest, highest = min(p.peak for p in given.plans), max(p.peak for p in given.plans)
    limit = lowest + share * (highest - lowest)
    best = min((p.cost for p in given.plans if p.peak < limit - ROUNDING), default=math.inf)
    found = least_noise(build(given.ladders, given.step), peak=limit)
    brute = given.of(found)
    assert brute.peak <= limit
    assert given.step.peak(brute.choices) == pytest.approx(brute.peak, abs=1)
    assert found is not None
    assert found.noise == pytest.approx(brute.noise)
    assert found.gap is not None
    assert brute.cost <= best * (1 + GAP) * (1 + 2 * TIE) + 1e-12


@settings(max_examples=40)
@given(problems(), shares)
def test_least_noise_under_saved_bytes(given: Problem, share: float) -> None:
    lowest, highest = min(p.saved for p in given.plans), max(p.saved for p in given.plans)
    limit = lowest + share * (highest - lowest)
    best = min((p.cost for p in given.plans if p.saved < limit - ROUNDING), default=math.inf)
    found = given.of(least_noise(build(given.ladders, given.step), saved=limit))
    assert found.saved <= limit
    assert found.cost <= best * (1 + GAP) * (1 + 2 * TIE) + 1e-12


@settings(max_examples=40)
@given(problems(), st.none() | st.floats(1e-6, 2e3))
def test_least_peak_under_a_noise(given: Problem, noise: float | None) -> None:
    best = min(p.peak for p in given.plans if noise is None or p.noise <= noise)
    found = given.of(least_peak(build(given.ladders, given.step), noise=noise))
    assert noise is None or found.noise <= noise * (1 + 1e-9) + 1e-11
    assert best <= found.peak <= best * (1 + GAP) + 1


@settings(max_examples=30)
@given(problems())
def test_least_saved(given: Problem) -> None:
    best = min(p.saved for p in given.plans)
    found = given.of(least_saved(build(given.ladders, given.step)))
    assert best <= found.saved <= best * (1 + GAP)


@settings(max_examples=40)
@given(problems())
def test_a_peak_out_of_reach(given: Problem) -> None:
    lowest = min(p.peak for p in given.plans)
    program = build(given.ladders, given.step)
    assert least_noise(program, peak=lowest - 8) is None
    assert least_noise(program, saved=0) is None
    assert greedy.within(program, peak=lowest - 8) is None


@settings(max_examples=40)
@given(problems(), shares)
def test_greedy_plans_keep_every_rule(given: Problem, share: float) -> None:
    program = build(given.ladders, given.step)
    taken = greedy.lowest(program)
    assert taken is not None
    of = {p.choices: p for p in given.plans}
    lowest = of[program.choices(taken)]
    assert float(program.total(taken).max()) == pytest.approx(lowest.peak, abs=1)
    limit = lowest.peak + share * (max(p.peak for p in given.plans) - lowest.peak)
    within = greedy.within(program, peak=limit)
    if within is not None:
        assert of[program.choices(within)].peak <= limit


@settings(max_examples=20)
@given(problems(), shares)
def test_without_time_the_greedy_plan_is_taken(given: Problem, share: float) -> None:
    program = build(given.ladders, given.step)
    lowest = greedy.lowest(program)
    assert lowest is not None
    found = least_peak(program, seconds=0)
    assert found is not None
    assert found.gap is None
    assert given.of(found).peak == pytest.approx(float(program.total(lowest).max()), abs=1)
    limit = given.of(found).peak + share * (max(p.peak for p in given.plans) - given.of(found).peak)
    quick, taken = least_noise(program, peak=limit, seconds=0), greedy.within(program, peak=limit)
    assert (quick is None) == (taken is None)
    assert quick is None or given.of(quick).peak <= limit


def test_equal_noise_takes_fewer_bytes() -> None:
    given = problem([(0, 1, 8), (1, 2, 7)], [[0.0, 0.0, 0.0]] * 2, length=10)
    found = least_noise(build(given.ladders, given.step), peak=1e9)
    assert found is not None
    assert {c.representation for c in found.choices} == {"affine(bits=5)"}
    assert found.noise == 0


def test_noise_free_plans_come_first() -> None:
    """However little noise the bytes would cost."""
    given = problem([(0, 1, 8), (1, 2, 7)], [[1e-15]] * 2, length=10)
    found = least_noise(build(given.ladders, given.step), peak=1e9)
    assert found is not None
    assert {c.representation for c in found.choices} == {KEEP}


def test_noise_of_many_sizes() -> None:
    """A tensor may be 10¹² times as noisy as another, and the small ones still matter."""
    noises = [[10.0 ** (k - j) for j in range(3)][::-1] for k in (-9, -6, 0, 3)]
    given = problem([(i, i + 1, 11 - i) for i in range(4)], noises, length=14)
    program = build(given.ladders, given.step)
    peaks = [p.peak for p in given.plans]
    for limit in np.linspace(min(peaks), max(peaks), 15):
        best = min(p.noise for p in given.plans if p.peak <= limit)
        found = given.of(least_noise(program, peak=float(limit)))
        assert found.noise <= best * (1 + GAP) * (1 + 2 * TIE)


def deep(tensors: int, options: int, seed: int = 0) -> Problem:
    """A network of as many layers: each saves a tensor until the backward comes back to it."""
    rng = np.random.default_rng(seed)
    per, length = 4, 8 * tensors + 20
    spans = [(per * i, per * i + 3, length - 5 - per * i) for i in range(tensors)]
    noises = []
    for _ in range(tensors):
        worst = 10 ** rng.uniform(-6, 0)
        noises.append([worst * 4.0 ** (k - options) for k in range(options - 1)])
    base = rng.uniform(0, 8 * ELEMENTS, length).round()
    given = problem(spans, [n[: len(BITS)] for n in noises], length=length, base=base)
    ladders = [
        [
            ladder[0],
            *(
                Option(Choice(ladder[0].choice.candidate, f"affine(bits={b},group={g})"), n)
                for (b, g), n in zip(itertools.product(BITS, (64, 256)), noises[i], strict=False)
            ),
        ]
        for i, ladder in enumerate(given.ladders)
    ]
    return Problem(ladders, given.step)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_deep_network(share: float) -> None:
    """The plan is within the gap that it reports; the greedy one is above."""
    given = deep(60, 8)
    program = build(given.ladders, given.step)
    lowest = least_peak(program)
    assert lowest is not None
    keep = [ladder[0].choice for ladder in given.ladders]
    low, high = given.step.peak(lowest.choices), given.step.peak(keep)
    limit = low + share * (high - low)
    found, taken = least_noise(program, peak=limit), greedy.within(program, peak=limit)
    assert found is not None
    assert taken is not None
    assert given.step.peak(found.choices) <= limit
    assert found.gap is not None
    assert found.gap <= GAP
    assert found.noise <= float(program.noise @ taken)


@pytest.mark.slow
def test_a_thousand_tensors() -> None:
    """Prints the seconds; `pytest -m slow -s`."""
    given = deep(1000, 12)
    start = time.perf_counter()
    program = build(given.ladders, given.step)
    built = time.perf_counter()
    lowest = least_peak(program)
    assert lowest is not None
    solved = time.perf_counter()
    print(f"\nbuild {built - start:.2f} s, least peak {solved - built:.2f} s (gap {lowest.gap})")
    keep = [ladder[0].choice for ladder in given.ladders]
    low, high = given.step.peak(lowest.choices), given.step.peak(keep)
    for share in (0.02, 0.1, 0.3, 0.6):
        start = time.perf_counter()
        found = least_noise(program, peak=low + share * (high - low))
        seconds = time.perf_counter() - start
        assert found is not None
        assert found.gap is not None
        assert found.gap <= GAP
        assert given.step.peak(found.choices) <= low + share * (high - low)
        print(f"least noise at {share:.0%}: {seconds:.2f} s, gap {found.gap:.1e}")


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS writes to the process's own stdout, past Python's."""
    given = deep(60, 8)
    program = build(given.ladders, given.step)
    keep = [ladder[0].choice for ladder in given.ladders]
    lowest = least_peak(program)
    assert lowest is not None
    low, high = given.step.peak(lowest.choices), given.step.peak(keep)
    print("before")
    for share in (0.05, 0.1, 0.2, 0.4):
        assert least_noise(program, peak=low + share * (high - low)) is not None
    print("after")
    assert capfd.readouterr().out.split() == ["before", "after"]
