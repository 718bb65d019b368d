"""Inputs of a model at any size: to trace it with, and to prove it with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.dims import (
    BATCH,
    PAST,
    SEQ,
    TOTAL,
    compute_dim,
    is_past,
    name_output,
)
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.proof.comparison import to_comparable
from rotary_export.proof.models.input_values import InputValues
from rotary_export.runtime.session import resolve_shape
from rotary_export.types import Array

EXAMPLE = "the example"
MASKS = ("mask", "square_mask")  # roles of inputs by which rows are padded
STATIC_MASK = "static_mask"  # role of the mask of a static cache: padded at the right alone
_LONG = 512  # tokens from which on a sample of the rows is compared
_SAMPLED = 64
Run = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # by output


@dataclass(frozen=True)
class CaseSpec:
    """How the inputs of a case are made; a manifest contains it.

    Attributes:
        sizes: Of the dynamic dimensions.
        seed: Of the random numbers.
        offset: Added to position ids.
        stagger: Each row of position ids starts one later.
        jump: In the middle of each row, position ids jump, each by another distance.
        padding: "left" or "right": rows are padded, each by another length; "": not at all.
        optional: A model may refuse such inputs; the case is then left out.
        grid: Position ids of several axes differ, as those of the patches of an image do.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    offset: int = 0
    stagger: bool = False
    jump: bool = False
    padding: str = ""
    optional: bool = False
    grid: bool = False

    @property
    def name(self) -> str:
        """Sizes and what is particular, human-readable."""
        words = [f"{name} {size}" for name, size in self.sizes.items()]
        words += [f"position_ids + {self.offset}"] if self.offset else []
        words += ["position_ids with a jump"] if self.jump else []
        words += ["position_ids of an image"] if self.grid else []
        words += [f"padded at the {self.padding}"] if self.padding else []
        return ", ".join(words) or "as traced"

    @property
    def length(self) -> int:
        """Tokens that the model runs at once."""
        return self.sizes.get(SEQ, 1)

    @property
    def is_long(self) -> bool:
        """Whether it takes so long to run that a sample of its rows must do."""
        return self.length + self.sizes.get(PAST, 0) >= _LONG

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as a manifest contains it."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: Human-readable; that of its spec, or EXAMPLE.
        tensors: In order.
        keep: (batch_size, seq_len) bool: rows that are not padding; None: all.
        spec: How it was made; None: the example.
    """

    name: str
    tensors: tuple[Tensor, ...]
    keep: Tensor | None = None
    spec: CaseSpec | None = None

    def read_outputs(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Copy what is compared of a model's outputs: all of them, or a sample of long ones."""
        return {name: to_comparable(self._sample(value)).copy() for name, value in outputs.items()}

    def _sample(self, value: Tensor) -> Tensor:
        if self.spec is None or not self.spec.is_long:
            return value
        total = self.spec.length + self.spec.sizes.get(PAST, 0)
        for axis, size in enumerate(value.shape):
            if size in (self.spec.length, total) and size >= _LONG:
                value = value.index_select(axis, _sample_rows(size))
        return value

    def _find_row(self, dim: str, at: int) -> int:
        """Return the row of a whole output that a row of what was read is."""
        if self.spec is None or not self.spec.is_long:
            return at
        size = compute_dim(dim, self.spec.sizes)
        return int(_sample_rows(size)[at]) if size >= _LONG else at

    def select(self, output: Array) -> Array:
        """Return an output whose padded rows are 0."""
        if self.keep is None or output.shape[:2] != tuple(self.keep.shape):
            return output
        keep = self.keep.numpy().reshape(*self.keep.shape, *[1] * (output.ndim - 2))
        return np.where(keep, output, np.zeros((), output.dtype))

    def locate(self, index: Sequence[int], dims: Sequence[int | str]) -> str:
        """Name an element of an output: its batch row and position.

        Args:
            index: In what `read_outputs` returns.
            dims: Of the output, as the graph declares it.
        """
        names = {BATCH: "batch row", SEQ: "position", TOTAL: "position"}
        words = []
        for dim, at in zip(dims, index, strict=False):
            if dim in names:
                words.append(f"{names[str(dim)]} {self._find_row(str(dim), at)}")
        return ", ".join(words)


def _sample_rows(size: int) -> Tensor:
    """Return the rows of a long output that are compared, the first and the last included."""
    return torch.linspace(0, size - 1, _SAMPLED).long()


def make_case(
    infos: Sequence[TensorInfo],
    sources: Mapping[str, InputValues],
    spec: CaseSpec,
    run: Run | None = None,
) -> Case:
    """Make the inputs of a model.

    Args:
        infos: The inputs.
        sources: What to fill them with.
        spec: Sizes, and what is particular.
        run: Runs the model, which fills its cache; None: the cache is normal, as `spread`.

    Returns:
        The case.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    sizes = spec.sizes
    mask, keep = None, None
    mask_info = next((i for i in infos if sources[i.name].role in MASKS), None)
    if mask_info is not None and spec.padding:
        batch, *_, total = resolve_shape(mask_info, sizes)
        mask = _make_mask(batch, total, spec.padding)
        if not mask_info.name.startswith("encoder_"):
            keep = mask[:, mask.shape[1] - sizes.get(SEQ, mask.shape[1]) :]
    slots = None
    slots_info = next((i for i in infos if sources[i.name].role == STATIC_MASK), None)
    if slots_info is not None:
        slots = _fill_slots(resolve_shape(slots_info, sizes), spec)
        keep = slots[:, sizes.get(PAST, 0) :][:, : spec.length]
    past = _fill_past(infos, sources, spec, run) if run else {}
    tensors = []
    for info in infos:
        shape, source = resolve_shape(info, sizes), sources[info.name]
        if source.role == "rows":
            made = source.repeat_rows(shape)
        elif source.role == "mask":
            made = torch.ones(shape) if mask is None or info is not mask_info else mask
        elif source.role == STATIC_MASK and slots is not None:
            made = slots
        elif source.role == "square_mask":
            made = _make_square_mask(shape, source, mask)
        elif source.role == "ids":
            low, high = source.limits
            made = torch.randint(low, high + 1, shape, generator=generator)
        elif source.role == "offsets":
            made = _make_offsets(shape[0], source, sizes, generator)
        elif source.role in ("position_ids", "counted"):
            made = _make_positions(shape, spec, mask, moves=source.role == "position_ids")
        elif info.name in past:
            made = past[info.name]
        else:
            mean, deviation = source.spread
            made = torch.randn(shape, generator=generator) * deviation + mean
        tensors.append(made.to(getattr(torch, info.dtype)).reshape(shape).contiguous())
    return Case(spec.name, tuple(tensors), keep, spec)


def _make_mask(batch: int, total: int, padding: str) -> Tensor:
    """Make a mask (B, total) of rows that are padded by 1, 2 or 3, but never wholly."""
    pads = (torch.arange(batch) % 3 + 1).clamp(max=total - 1)[:, None]
    rows = torch.arange(total)
    return rows >= pads if padding == "left" else rows < total - pads


def _fill_slots(shape: tuple[int, ...], spec: CaseSpec) -> Tensor:
    """Make a mask (B, max_cache_len) of the slots of a static cache that hold a token, new or old.

    Padded at the right, rows have 1, 2 or 3 tokens less, but one at least.
    """
    batch, count = shape
    filled = spec.sizes.get(PAST, 0) + spec.length
    pads = (torch.arange(batch) % 3 + 1).clamp(max=spec.length - 1) if spec.padding else 0
    lengths = torch.full((batch,), filled) - pads
    return torch.arange(count) < lengths[:, None]


def _make_square_mask(shape: Sequence[int], source: InputValues, mask: Tensor | None) -> Tensor:
    """Make a mask (..., S, total); each token sees itself, also where it is padding.

    Args:
        shape: Of the mask.
        source: The values in it.
        mask: (B, total): what is not padding; None: all.
    """
    seen, hidden, hides_later = source.value
    rows, total = shape[-2:]
    own = torch.eye(total, dtype=torch.bool)[total - rows :]
    visible = torch.ones(shape, dtype=torch.bool)
    if hides_later:
        visible &= torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
    if mask is not None and len(shape) > 2 and mask.shape[0] == shape[0]:
        visible &= mask.reshape(mask.shape[0], *[1] * (len(shape) - 2), total)
    return torch.where(visible | own, seen, hidden)


def _make_offsets(
    count: int, source: InputValues, sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    """Make offsets of packed sequences of random lengths, none empty if there are enough tokens."""
    total = math.prod(compute_dim(str(dim), sizes) for dim in source.value)
    inner = torch.randperm(max(total - 1, 0), generator=generator)[: count - 2] + 1
    missing = count - 2 - len(inner)
    ends = torch.tensor([total] * (missing + 1))
    return torch.cat((torch.zeros(1, dtype=torch.int64), inner.sort().values, ends))


def _fill_past(
    infos: Sequence[TensorInfo], sources: Mapping[str, InputValues], spec: CaseSpec, run: Run
) -> dict[str, Tensor]:
    """Run the tokens before a case; return what the model keeps of them, by input."""
    if not spec.sizes.get(PAST) or SEQ not in spec.sizes:
        return {}
    length = spec.sizes[PAST]
    cached = [info for info in infos if is_past(info.name)]
    names = [info.name for info in cached]
    prompt = replace(spec, seed=spec.seed + 1000, padding="")

    def run_step(seq: int, past: int, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = replace(prompt, sizes={**spec.sizes, SEQ: seq, PAST: past}, seed=prompt.seed + past)
        made = make_case(infos, sources, step).tensors
        tensors = [kept.get(i.name, tensor) for i, tensor in zip(infos, made, strict=True)]
        outputs = run(tensors)
        return {name: outputs[name_output(name)] for name in names if name_output(name) in outputs}

    found = run_step(length, 0, {})
    kept_lengths = {info.name: resolve_shape(info, spec.sizes)[2] for info in cached}
    if all(tensor.shape[2] == kept_lengths[name] for name, tensor in found.items()):
        return found
    kept: dict[str, Tensor] = {}  # a model that accepts one token at a time, once it has a cache
    for past in range(length):
        kept = run_step(1, past, kept)
    return kept


def _make_positions(
    shape: tuple[int, ...], spec: CaseSpec, mask: Tensor | None, *, moves: bool
) -> Tensor:
    """Make (..., B or 1, S) positions, which count real rows where there is a mask."""
    rows, seq_len = shape[-2:]
    if mask is not None and mask.shape[0] == rows:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]
    else:
        positions = torch.arange(seq_len).repeat(rows, 1) + spec.sizes.get(PAST, 0)
    if moves:
        positions = positions + spec.offset
        if spec.stagger:
            positions = positions + torch.arange(rows)[:, None]
        if spec.jump:
            distances = 2 * torch.arange(rows)[:, None] + 3
            positions = positions + distances * (torch.arange(seq_len) >= seq_len // 2)
        if spec.grid:
            positions = _make_grid(positions)
    return positions.expand(shape)


def _make_grid(positions: Tensor) -> Tensor:
    """Make (3, B, S) positions of an image's patches: time, height, width.

    Args:
        positions: (B, S), of which the first of each row is where the image begins.
    """
    patches, columns = torch.arange(positions.shape[1]), math.isqrt(positions.shape[1]) + 1
    axes = torch.stack((0 * patches, patches // columns, patches % columns))
    return positions[None, :, :1] + axes[:, None]
