"""Overrides: rules by which the user fixes the representation of some saved tensors.

A rule names tensors by the module that made them, by operator or by their own name, and says what
they get::

    {"match": "layers.*.mlp.act", "bits": 4}
    {"match": "op:aten.convolution", "keep": True}
    {"match": "tensor:relu_3", "codec": "rotate(bits=2)"}
    {"match": "op:addmm", "representation": "recompute"}
    {"match": "decoder.*", "representation": "offload"}

Patterns are shell patterns (``*``, ``?``, ``[…]``; ``*`` crosses dots). Where several rules match a
tensor, the last one holds. What no rule matches is planned as ever; what is exact anyway (masks,
small integers, tensors that no reader looks at, tensors rebuilt from another one) or cannot be
coded stays as it is, except that ``keep`` keeps it where it is saved.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from fxcompress.choose import bytes_of, codable_choice, is_codable, why_not_offload
from fxcompress.codecs import codec
from fxcompress.errors import SettingsError
from fxcompress.evidence import TensorEvidence
from fxcompress.ladder import cost
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, OFFLOAD, RECOMPUTE, Choice
from fxcompress.program import Option, is_exact, is_rebuilt
from fxcompress.provenance import module_path

log = logging.getLogger("fxcompress")

Ladder = Sequence[Option]


@dataclass(frozen=True)
class Rule:
    """What the tensors that ``match`` get; exactly one of the others.

    Attributes:
        match: pattern of module paths as ``named_modules`` spells them; of operators after
            ``op:`` (``op:convolution``, ``op:aten.convolution``, ``op:aten.mul.*``); of names in
            the plan after ``tensor:``.
        bits: the least noisy codec of at most so many bits an element, scales apart.
        codec: this codec.
        keep: the tensor as it is.
        representation: ``recompute``: rebuilt in the backward, where a short chain of steps leads
            to it from saved tensors that are not rebuilt themselves; ``offload``: in host memory,
            on devices that have a memory of their own.
    """

    match: str
    bits: float | None = None
    codec: str | None = None
    keep: bool = False
    representation: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match.strip():
            raise SettingsError(
                f"override {self}: match must be a pattern, as 'layers.*.act', 'op:mul' or "
                "'tensor:relu_3'"
            )
        if not isinstance(self.keep, bool):
            raise SettingsError(f"override {self}: keep is True or absent")
        given = [x for x in (self.bits, self.codec, self.representation) if x is not None]
        if len(given) + self.keep != 1:
            raise SettingsError(
                f"override {self}: give exactly one of bits, codec, keep=True, representation"
            )
        if self.representation not in {None, RECOMPUTE, OFFLOAD}:
            raise SettingsError(
                f"override {self}: representation is {RECOMPUTE!r}, {OFFLOAD!r} or absent"
            )
        if self.bits is not None:
            is_number = isinstance(self.bits, int | float) and not isinstance(self.bits, bool)
            if not (is_number and math.isfinite(self.bits) and self.bits > 0):
                raise SettingsError(f"override {self}: bits must be a number above 0, as 4 or 0.5")
        if self.codec is not None:
            if not isinstance(self.codec, str):
                raise SettingsError(f"override {self}: codec must be a spec, as 'rotate(bits=2)'")
            codec(self.codec)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return str({k: v for k, v in given.items() if v is not None and v is not False})

    def matches(self, node: fx.Node) -> bool:
        """The rule is about the tensor that this forward node makes."""
        kind, colon, pattern = self.match.partition(":")
        if not colon:
            return fnmatchcase(module_path(node), self.match)
        if kind == "op":
            return any(fnmatchcase(name, pattern) for name in _op_names(node))
        if kind == "tensor":
            return fnmatchcase(node.name, pattern)
        return kind == "module" and fnmatchcase(module_path(node), pattern)


def parse(given: Any) -> tuple[Rule, ...]:
    """Rules from dictionaries, from JSON text of a list of them, or from rules.

    Raises:
        SettingsError: not that, an unknown key or a bad value. CodecError: an unknown codec.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise SettingsError(f"overrides are not JSON ({error}): {given!r}") from None
    if isinstance(given, Mapping | Rule):
        given = [given]
    if not isinstance(given, Sequence):
        raise SettingsError(f"overrides={given!r} is not a list of rules: {_EXAMPLE}")
    return tuple(_rule(each) for each in given)


_EXAMPLE = 'give them as [{"match": "layers.*.act", "bits": 4}]'


def _rule(given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    if not isinstance(given, Mapping):
        raise SettingsError(f"override {given!r} is not a rule: {_EXAMPLE}")
    known = [f.name for f in fields(Rule)]
    for name in given:
        if name not in known:
            raise SettingsError(
                f"override {dict(given)}: unknown key {name!r}; known: {', '.join(known)}"
            )
    if "match" not in given:
        raise SettingsError(f"override {dict(given)}: match is missing; {_EXAMPLE}")
    return Rule(**given)


def apply(
    rules: Sequence[Rule],
    candidates: Sequence[Candidate],
    ladders: Sequence[Ladder],
    evidence: Mapping[str, TensorEvidence],
) -> tuple[list[Ladder], frozenset[str]]:
    """(ladders of which the matched ones are what their rule says, names of the matched tensors).

    Raises:
        SettingsError: a rule asks for fewer bits than any codec of a matched tensor has.
    """
    found = list(ladders)
    matched: set[str] = set()
    for i, candidate in enumerate(candidates):
        rule = next((r for r in reversed(rules) if r.matches(candidate.saved.forward)), None)
        if rule is not None:
            matched.add(candidate.name)
            found[i] = _ruled(candidate, ladders[i], rule, evidence.get(candidate.name))
    return reconciled(candidates, found), frozenset(matched)


def warn_unmatched(rules: Sequence[Rule], candidates: Sequence[Candidate]) -> None:
    """Log each rule that matches no saved tensor of a graph, with what comes close."""
    nodes = [c.saved.forward for c in candidates]
    for rule in rules:
        if any(rule.matches(node) for node in nodes):
            continue
        kind, colon, pattern = rule.match.partition(":")
        if not colon or kind not in {"op", "tensor"}:
            names = {module_path(n) for n in nodes}
            pattern = pattern if colon else kind
        else:
            names = {prop.op_name(n) if kind == "op" else n.name for n in nodes}
        close = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.3)
        hint = f"; close: {', '.join(close)}" if close else ""
        log.warning("override %s matches no saved tensor of this graph%s", rule, hint)


def _ruled(
    candidate: Candidate, ladder: Ladder, rule: Rule, evidence: TensorEvidence | None
) -> list[Option]:
    reason = f"by the override for {rule.match}"
    if rule.keep:
        return [Option(Choice(candidate, KEEP, reason), 0.0)]
    if rule.representation is not None:
        found = [o for o in ladder if o.choice.representation == rule.representation]
        if not found:
            why = why_not_offload(candidate) if rule.representation == OFFLOAD else ""
            log.warning("override %s: %s", rule, why or f"nothing rebuilds {candidate.name}")
        return found or list(ladder)
    if not is_codable(candidate):
        log.info("override %s: %s stays, %s", rule, candidate.name, ladder[0].choice.reason)
        return list(ladder[:1])
    if rule.codec is None:
        assert rule.bits is not None
        coded = {_width(o.choice, evidence): o for o in reversed(ladder) if o.choice.codec_spec}
        options = [o for width, o in coded.items() if width <= rule.bits]
        if not options and candidate.floor_bits > max(rule.bits, 1) and coded:
            options, reason = [coded[min(coded)]], "an exponential reads it"
        if not options:
            raise SettingsError(
                f"override {rule}: {candidate.name} has no codec of {rule.bits:g} bits or less; "
                + (f"the fewest is {min(coded):g}" if coded else "none makes it smaller")
            )
        least = min(options, key=lambda o: o.noise)
        return [replace(least, choice=replace(least.choice, reason=reason))]
    choice = codable_choice(candidate, rule.codec)
    choice = choice if choice.reason else replace(choice, reason=reason)
    if choice.representation != codec(rule.codec).spec:
        log.warning(
            "override %s: %s gets %s instead, %s",
            rule, candidate.name, choice.representation, choice.reason,
        )  # fmt: skip
    return [Option(choice, noise_of(choice, ladder, evidence))]


def _width(choice: Choice, evidence: TensorEvidence | None) -> float:
    """Bits an element, scales apart: as the codec says, as it was fitted, or by its bytes."""
    assert choice.codec_spec is not None
    fitted = {spec: bits for bits, spec in evidence.transforms.items()} if evidence else {}
    named = getattr(codec(choice.codec_spec), "bits", fitted.get(choice.codec_spec))
    if named is not None:
        return float(named)
    return 8 * bytes_of(choice, {}) / max(math.prod(choice.candidate.stored_shape), 1)


def noise_of(choice: Choice, ladder: Ladder, evidence: TensorEvidence | None) -> float:
    """As measured; else as the ladder's next smaller codec, or its noisiest."""
    spec = choice.codec_spec
    if spec is None:
        return 0.0
    if evidence is not None and spec in evidence.prices:
        return cost(evidence.prices[spec])
    size = bytes_of(choice, {})
    smaller = [o for o in ladder if o.choice.codec_spec and bytes_of(o.choice, {}) <= size]
    return min((o.noise for o in smaller), default=max((o.noise for o in ladder), default=0.0))


def reconciled(candidates: Sequence[Candidate], ladders: list[Ladder]) -> list[Ladder]:
    """What rules ask of a tensor that those of others do not allow is not done.

    A view of a buffer that stays whole because of another view stays too; and what would be rebuilt
    is kept where its roots are not there to start from.
    """
    only_kept = {
        prop.storage_root(c.saved.forward): c.name
        for c, found in zip(candidates, ladders, strict=True)
        if all(o.choice.representation == KEEP for o in found)
    }
    settled: list[Ladder] = []
    for candidate, ladder in zip(candidates, ladders, strict=True):
        owner = only_kept.get(prop.storage_root(candidate.saved.forward))
        if owner is not None and all(o.choice.representation != KEEP for o in ladder):
            reason = f"shares its memory with {owner}, which is kept"
            log.warning("override of %s is not followed: it %s", candidate.name, reason)
            ladder = [Option(Choice(candidate, KEEP, reason), 0.0)]
        settled.append(ladder)
    _keep_without_roots(candidates, settled)
    return settled


def _keep_without_roots(candidates: Sequence[Candidate], ladders: list[Ladder]) -> None:
    """Take the option to rebuild from tensors that cannot be rebuilt, roots first."""
    buffers: dict[fx.Node, list[int]] = {}
    for i, candidate in enumerate(candidates):
        buffers.setdefault(prop.storage_root(candidate.saved.forward), []).append(i)
    for views in buffers.values():
        if not any(is_rebuilt(o) for i in views for o in ladders[i]):
            continue
        recipes = [r for i in views if (r := candidates[i].recipe) is not None]
        roots = {prop.storage_root(node) for recipe in recipes for node in recipe.roots}
        needed = [j for root in roots for j in buffers.get(root, ())]
        passes = {name for i in views for o in ladders[i] for name, _ in o.passes}

        def serves(j: int, passes: set[str] = passes) -> bool:
            coded = any(o.choice.codec_spec is not None for o in ladders[j])
            return any(map(is_exact, ladders[j])) or (coded and candidates[j].name in passes)

        lacks = [j for j in needed if not serves(j)]
        lacks += [j for j in views if not any(map(is_rebuilt, ladders[j]))]
        for i in views if lacks else ():
            left = [o for o in ladders[i] if not is_rebuilt(o)]
            if not left:
                reason = f"cannot be rebuilt without {candidates[lacks[0]].name}"
                log.warning("override of %s is not followed: it %s", candidates[i].name, reason)
                left = [Option(Choice(candidates[i], KEEP, reason), 0.0)]
            ladders[i] = left


def _op_names(node: fx.Node) -> set[str]:
    names = {prop.op_name(node)}
    if isinstance(node.target, torch._ops.OpOverload):
        names |= {str(node.target), str(node.target).rpartition(".")[0]}
    elif prop.op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        names |= _op_names(node.args[0])
    return names
