"""The cases that a model is proven with: none has the sizes that it was traced at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rotary_export.bundle.dims import BATCH, PAST, SEQ
from rotary_export.proof.models.cases import MASKS, STATIC_MASK, CaseSpec
from rotary_export.proof.models.input_values import InputValues

# Two of a size would hide that one was taken for the other; 0 and 1 are constants to torch.export.
TRACED = {BATCH: 2, SEQ: 7, PAST: 5}
LONGEST_CASE = 1024  # of sizes at which a branch or a threshold is tried
LONG_LENGTHS = (1000, 3000)
_LONGEST_THRESHOLD = 4096  # that a sequence of one row is made for
_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What the cases depend on.

    Attributes:
        sources: Where the values of each input come from.
        traced: The sizes it was traced at.
        thresholds: Lengths at which its angles change (longrope, dynamic).
        longest: Positions that the model accepts; None: any number.
        last: Positions that its config names, though it may accept more; None: unknown.
        max_size: By name of a size, the largest that the graph accepts.
        min_size: The smallest, where it is more than 1.
        sizes_to_verify: Sizes at which the model takes another branch than the traced one.
        seed: Of the random numbers of every case.
        quick: Fewer cases, and none of them long.
    """

    sources: Mapping[str, InputValues]
    traced: Mapping[str, int]
    thresholds: Sequence[int] = ()
    longest: int | None = None
    last: int | None = None
    max_size: Mapping[str, int] = field(default_factory=dict)
    min_size: Mapping[str, int] = field(default_factory=dict)
    sizes_to_verify: Sequence[Mapping[str, int]] = ()
    seed: int = 0
    quick: bool = False

    @property
    def limit(self) -> int:
        """The most tokens, those of a cache included."""
        return min(self.longest or _UNLIMITED, self.max_size.get(SEQ, _UNLIMITED))

    @property
    def moves(self) -> bool:
        """Whether positions are an input that can be moved."""
        return any(source.role == "position_ids" for source in self.sources.values())

    @property
    def has_axes(self) -> bool:
        """Whether positions have three axes, as those of an image's patches."""
        return any(source.has_axes for source in self.sources.values())

    @property
    def is_masked(self) -> bool:
        """Whether there is a mask by which rows can be padded."""
        return any(source.role in MASKS for source in self.sources.values())

    @property
    def is_static(self) -> bool:
        """Whether the graph has a cache of a fixed length: rows are padded at the right alone."""
        return any(source.role == STATIC_MASK for source in self.sources.values())

    def choose_sizes(self, batch: int, seq: int, past: int) -> dict[str, int]:
        """Return every size, none larger than it may be; others follow the batch."""
        wanted = {BATCH: batch, PAST: min(past, self.limit // 2)}
        wanted[SEQ] = min(seq, self.limit - (wanted[PAST] if PAST in self.traced else 0))
        chosen = {name: wanted.get(name, size + batch) for name, size in self.traced.items()}
        return {name: self._clamp(name, size) for name, size in chosen.items()}

    @property
    def smallest(self) -> dict[str, int]:
        """Every size as small as it may be."""
        return {name: self.min_size.get(name, 1) for name in self.traced}

    def _clamp(self, name: str, size: int) -> int:
        size = max(size, self.min_size.get(name, size))
        return min(size, self.max_size.get(name, size))


def plan_cases(plan: Plan) -> list[CaseSpec]:
    """Choose the cases: sizes, padding, moved positions, thresholds, branches, long sequences.

    A name is that of one case: of several that differ in their seed alone, the first is kept.
    """
    if not plan.traced:
        specs = [CaseSpec(seed=1)]
    else:
        specs = _plan_small(plan)
        if not plan.quick:
            specs += _plan_moved(plan) + _plan_long(plan)
        specs += _plan_thresholds(plan) + _plan_branches(plan)
    named = {spec.name: spec for spec in reversed(specs)}
    kept = [spec for spec in specs if named[spec.name] is spec]
    return [replace(spec, seed=spec.seed + 10_000 * plan.seed) for spec in kept]


def _plan_small(plan: Plan) -> list[CaseSpec]:
    seq, past = plan.traced.get(SEQ, 1), plan.traced.get(PAST, 0)
    specs = [
        CaseSpec(plan.choose_sizes(3, max(1, seq // 2), past + 3), seed=1),
        CaseSpec(plan.choose_sizes(1, 2 * seq + 5, past + 6), seed=2),
        CaseSpec(plan.choose_sizes(3, 1, past + 1), seed=3),
        CaseSpec(plan.smallest, seed=3),
    ]
    if PAST in plan.traced:  # the first step, with an empty cache
        own = not any(source.role == "past" for source in plan.sources.values())
        specs.append(CaseSpec(plan.choose_sizes(2, seq + 1, 0), seed=3, optional=own))
    if plan.has_axes:
        specs.append(CaseSpec(plan.choose_sizes(3, seq + 6, past), seed=6, grid=True))
    if plan.is_masked or plan.is_static:
        for side in ("right",) if plan.is_static else ("left", "right"):
            sizes = plan.choose_sizes(3, seq + 2, past)
            specs.append(CaseSpec(sizes, seed=5, padding=side))
    return specs


def _plan_moved(plan: Plan) -> list[CaseSpec]:
    """Plan positions further on: a hundred, to the last one, and with a jump in each row.

    Only differences of positions matter to a rotation, so that a jump alone shows that a graph
    ignores them. Without a mask, models of transformers take a jump for the start of a sequence.
    """
    if not plan.moves:
        return []
    seq, past = plan.traced.get(SEQ, 1), plan.traced.get(PAST, 0)
    sizes = plan.choose_sizes(3, seq + 4, past)
    before = sizes.get(SEQ, 1) + sizes.get(PAST, 0)
    offsets = {min(100, plan.limit - before)}
    if plan.last is not None:
        offsets.add(plan.last - before)
    specs = [
        CaseSpec(sizes, seed=4, offset=offset, optional=True)
        for offset in sorted(offsets)
        if offset > 0
    ]
    if plan.is_masked and plan.limit - before > 9:
        specs.append(CaseSpec(sizes, seed=4, jump=True, optional=True))
    return specs


def _plan_long(plan: Plan) -> list[CaseSpec]:
    """Plan about 1,000 and 3,000 tokens, or as many as the model accepts."""
    if SEQ not in plan.traced:
        return []
    past = plan.traced.get(PAST, 0)
    most = min(plan.limit, plan.last or plan.limit)
    lengths = sorted({min(length, most) for length in LONG_LENGTHS})
    sizes = [
        plan.choose_sizes(1, length - past, past)
        for length in lengths
        if length > 2 * plan.traced[SEQ] + past + 5
    ]
    if sizes and PAST in plan.traced:  # one more token after a long prompt
        sizes.append(plan.choose_sizes(1, 1, lengths[0] - 1))
    return [CaseSpec(size, seed=8, optional=True) for size in sizes]


def _plan_thresholds(plan: Plan) -> list[CaseSpec]:
    """Plan both sides of each length at which the angles change."""
    seq, past = plan.traced.get(SEQ, 1), plan.traced.get(PAST, 0)
    specs = []
    for threshold in plan.thresholds:
        if threshold <= LONGEST_CASE and SEQ in plan.traced:
            before = past if PAST in plan.traced else 0
            for length in (threshold, threshold + 1, threshold + 5):
                sizes = plan.choose_sizes(2, max(1, length - before), past)
                specs.append(CaseSpec(sizes, seed=length))
        elif plan.moves:
            sizes = plan.choose_sizes(2, seq + 1, past)
            for offset in (threshold - 2, threshold + 3):
                specs.append(CaseSpec(sizes, seed=6, offset=offset))
        elif threshold <= _LONGEST_THRESHOLD and SEQ in plan.traced and not plan.quick:
            before = past if PAST in plan.traced else 0
            for length in (threshold, threshold + 1):
                sizes = plan.choose_sizes(1, length - before, past)
                specs.append(CaseSpec(sizes, seed=length, optional=True))
    return specs


def _plan_branches(plan: Plan) -> list[CaseSpec]:
    """Plan sizes at which the model takes another branch than the traced one."""
    sizes = plan.choose_sizes(3, plan.traced.get(SEQ, 1) + 1, plan.traced.get(PAST, 0))
    return [CaseSpec(sizes | dict(point), seed=7) for point in plan.sizes_to_verify]


def list_unreached(plan: Plan) -> dict[str, str]:
    """List the lengths at which the angles change, and that no case of `plan_cases` reaches."""
    reached = _LONGEST_THRESHOLD if SEQ in plan.traced else 0
    if plan.quick:
        reached = min(reached, LONGEST_CASE)
    if not plan.traced or plan.moves:
        return {}
    return {
        f"lengths > {size}, where its angles change": (
            f"more than {reached}, and no position_ids to reach it with: only tables were compared"
        )
        for size in plan.thresholds
        if size > reached
    }
