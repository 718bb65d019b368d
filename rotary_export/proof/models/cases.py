"""Inputs of a model at any size: to trace it with, and to prove it with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.dims import BATCH, PAST, SEQ, is_past, name_output
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.runtime.session import resolve_shape
from rotary_export.types import Array

# Two of a size would hide that one was taken for the other; 0 and 1 are constants to torch.export.
TRACED = {BATCH: 2, SEQ: 7, PAST: 5}
_MASKED = 1e4
LONGEST_CASE = 1024  # longer ones take too long to be run
Run = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # by output


@dataclass(frozen=True)
class InputValues:
    """Where the values of an input come from.

    Attributes:
        role: "ids" (any in `limits`), "position_ids", "mask" (1: a real position), "past" (what
            the model returns for earlier tokens), "values" (normal, as `spread`), "fixed" (the
            example's own).
        limits: Smallest and largest id.
        value: Of a fixed input, nested lists.
        spread: Mean and standard deviation of the example.
    """

    role: str
    limits: tuple[int, int] = (0, 0)
    value: Any = None
    spread: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: Sizes and what is particular, human-readable.
        tensors: In order.
        keep: (batch_size, seq_len) bool: rows that are not padding; None: all.
    """

    name: str
    tensors: tuple[Tensor, ...]
    keep: Tensor | None = None

    def select(self, output: Array) -> Array:
        """Return the elements of an output that are not padding."""
        if self.keep is None or output.shape[:2] != tuple(self.keep.shape):
            return output
        return np.asarray(output[self.keep.numpy()])


def choose_values(name: str, value: Tensor, limits: tuple[int, int] | None) -> InputValues:
    """Choose how to make more of an example input.

    Args:
        name: Of the input.
        value: The example.
        limits: Of its ids, if they are known.
    """
    if is_past(name):
        return InputValues("past", spread=_measure_spread(value))
    if name == "position_ids":
        return InputValues("position_ids")
    if "mask" in name and value.dim() == 2 and set(value.unique().tolist()) <= {0, 1}:
        return InputValues("mask")
    if value.is_floating_point():
        return InputValues("values", spread=_measure_spread(value))
    if value.dim() == 2 and value.numel() and "grid" not in name:
        return InputValues("ids", limits or (int(value.min()), int(value.max())))
    return InputValues("fixed", value=value.tolist())


def _measure_spread(value: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of an example; of a constant one, 0 and 1.

    Numbers as large as those by which a mask stands for infinity are left out.
    """
    finite = value.detach().double()
    finite = finite[finite.abs() < _MASKED]
    if finite.numel() < 2 or not finite.std():
        return 0.0, 1.0
    return float(finite.mean()), float(finite.std())


def make_case(
    infos: Sequence[TensorInfo],
    sources: Mapping[str, InputValues],
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    offset: int = 0,
    stagger: bool = False,
    padded: bool = False,
    run: Run | None = None,
) -> Case:
    """Make the inputs of a model.

    Args:
        infos: The inputs.
        sources: What to fill them with.
        sizes: Of the dynamic dimensions.
        seed: Of the random numbers.
        offset: Added to position ids.
        stagger: Each row of position ids starts one later.
        padded: Rows are padded at the left, each by another length; needs a mask.
        run: Runs the model, which fills its cache; None: the cache is normal, as `spread`.

    Returns:
        The case.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_info = next((i for i in infos if sources[i.name].role == "mask"), None)
    mask, keep = None, None
    if mask_info is not None:
        batch, total = resolve_shape(mask_info, sizes)
        pads = torch.arange(batch) % 3 + 1 if padded else torch.zeros(batch, dtype=torch.int64)
        mask = torch.arange(total) >= pads.clamp(max=total - 1)[:, None]  # (B, total)
        keep = mask[:, total - sizes.get(SEQ, total) :] if padded else None
    past = _fill_past(infos, sources, sizes, seed, offset, stagger, run) if run else {}
    tensors = []
    for info in infos:
        shape, source = resolve_shape(info, sizes), sources[info.name]
        dtype = getattr(torch, info.dtype)
        if source.role == "fixed":
            made = torch.tensor(source.value)
        elif source.role == "mask":
            assert mask is not None
            made = mask if padded and info is mask_info else torch.ones(shape)
        elif source.role == "ids":
            low, high = source.limits
            made = torch.randint(low, high + 1, shape, generator=generator)
        elif source.role == "position_ids":
            made = _make_positions(shape, sizes, mask if padded else None, offset, stagger)
        elif info.name in past:
            made = past[info.name]
        else:
            mean, deviation = source.spread
            made = torch.randn(shape, generator=generator) * deviation + mean
        tensors.append(made.to(dtype).reshape(shape).contiguous())
    words = [f"{name} {size}" for name, size in sizes.items()]
    words += [f"position_ids + {offset}"] if offset else []
    words += ["padded at the left"] if padded else []
    return Case(", ".join(words) or "as traced", tuple(tensors), keep)


def _fill_past(
    infos: Sequence[TensorInfo],
    sources: Mapping[str, InputValues],
    sizes: Mapping[str, int],
    seed: int,
    offset: int,
    stagger: bool,
    run: Run,
) -> dict[str, Tensor]:
    """Run the tokens before a case; return what the model keeps of them, by input."""
    if not sizes.get(PAST) or SEQ not in sizes:
        return {}
    before = {**sizes, SEQ: sizes[PAST], PAST: 0}
    prompt = make_case(infos, sources, before, seed=seed + 1000, offset=offset, stagger=stagger)
    outputs = run(prompt.tensors)
    names = [info.name for info in infos if is_past(info.name)]
    return {name: outputs[name_output(name)] for name in names if name_output(name) in outputs}


def _make_positions(
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    mask: Tensor | None,
    offset: int,
    stagger: bool,
) -> Tensor:
    """Make (..., B or 1, S) positions, which count real rows where there is a mask."""
    rows, seq_len = shape[-2:]
    if mask is not None and mask.shape[0] == rows:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]
    else:
        positions = torch.arange(seq_len).repeat(rows, 1) + sizes.get(PAST, 0)
    if stagger:
        positions = positions + torch.arange(rows)[:, None]
    return (positions + offset).expand(shape)


def make_cases(
    infos: Sequence[TensorInfo],
    sources: Mapping[str, InputValues],
    traced: Mapping[str, int],
    thresholds: Sequence[int],
    longest: int | None,
    max_size: Mapping[str, int],
    sizes_to_verify: Sequence[Mapping[str, int]],
    run: Run,
) -> list[Case]:
    """Make the cases that a model is proven with: none has the sizes that it was traced at.

    Args:
        infos: The inputs.
        sources: What to fill them with.
        traced: The sizes it was traced at.
        thresholds: Lengths at which its angles change (longrope, dynamic).
        longest: Positions that the model accepts; None: any.
        max_size: By name of a size, the largest that the graph accepts.
        sizes_to_verify: Sizes at which the model takes another branch than the traced one.
        run: Runs the model, which fills its cache.
    """
    make = functools.partial(make_case, infos, sources, run=run)
    roles = {source.role for source in sources.values()}
    limit = min(longest or 1 << 30, max_size.get(SEQ, 1 << 30))

    def sizes(batch: int, seq: int, past: int) -> dict[str, int]:
        wanted = {BATCH: batch, PAST: min(past, limit // 2)}
        wanted[SEQ] = min(seq, limit - (wanted[PAST] if PAST in traced else 0))
        chosen = {name: wanted.get(name, size + batch) for name, size in traced.items()}
        return {name: min(size, max_size.get(name, size)) for name, size in chosen.items()}

    if not traced:
        return [make({}, seed=1)]
    seq, past = traced.get(SEQ, 1), traced.get(PAST, 0)
    cases = [
        make(sizes(3, max(1, seq // 2), past + 3), seed=1),
        make(sizes(1, 2 * seq + 5, past + 6), seed=2),
        make(sizes(3, 1, past + 1), seed=3),
        make(dict.fromkeys(traced, 1), seed=3),
    ]
    if PAST in traced:  # the first step, with an empty cache
        cases.append(make(sizes(2, seq + 1, 0), seed=3))
    room = limit - 2 * seq - 3 * past
    if "position_ids" in roles and room > 1:
        offset = min(100, room)
        cases.append(make(sizes(3, seq + 4, past), seed=4, offset=offset, stagger=False))
    if "mask" in roles:
        cases.append(make(sizes(3, seq + 2, past), seed=5, padded=True))
    for threshold in thresholds:
        if threshold <= LONGEST_CASE and SEQ in traced:
            before = past if PAST in traced else 0
            for length in (threshold, threshold + 1, threshold + 5):
                case = make(sizes(2, max(1, length - before), past), seed=length)
                cases.append(case)
        elif "position_ids" in roles:
            for offset in (threshold - 2, threshold + 3):
                cases.append(make(sizes(2, seq + 1, past), seed=6, offset=offset))
    for point in sizes_to_verify:
        cases.append(make(sizes(3, seq + 1, past) | dict(point), seed=7))
    return cases


def list_unverified(
    sources: Mapping[str, InputValues], traced: Mapping[str, int], thresholds: Sequence[int]
) -> list[int]:
    """Return the thresholds that none of `make_cases` reaches."""
    if not traced or any(source.role == "position_ids" for source in sources.values()):
        return []
    return [size for size in thresholds if size > LONGEST_CASE or SEQ not in traced]
