"""Where the values of a model's inputs come from, at sizes other than the example's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotary_export.bundle.dims import SEQ, TOTAL, is_past

_AXES = 3
_MASKED = 1e4  # numbers as large as that stand for infinity in a mask
_MOST_ROWS = 16  # of an example, along each dimension that may vary
_COORDINATES = re.compile(r"(^|[_.])(ids?|pos|positions?|coords?|coordinates|grid)($|[_.])")
_POSITIONS = re.compile(r"(^|_)pos(itions?)?(_ids)?$")
_OFFSETS = re.compile(r"(^|_)(cu|cum|cumulative|offsets?|indptr|ptr|splits|starts?)($|_)")
_TABLES = re.compile(r"cos|sin(?!g)|freq|rotary|rope|angle", re.IGNORECASE)


@dataclass(frozen=True)
class InputValues:
    """Where the values of an input come from.

    Attributes:
        role: "ids" (whole numbers, any in `limits`), "position_ids" (moved at will), "counted"
            (positions from 0 on), "mask" (1: a real position), "static_mask" (1: a slot of a static
            cache that is filled), "square_mask" (what each token sees), "past" (what the model
            returns for earlier tokens), "values" (normal, as `spread`), "offsets" (rising from 0 to
            the number of tokens), "rows" (the example's own, repeated or cut).
        limits: Smallest and largest id.
        value: Of "rows": the example's values, nested lists. Of "square_mask": the value of what
            is seen, that of what is hidden, and whether later tokens are hidden. Of "offsets":
            the sizes whose product is the number of tokens. Of "position_ids" of several axes:
            how many.
        spread: Mean and standard deviation of the example.
    """

    role: str
    limits: tuple[int, int] = (0, 0)
    value: Any = None
    spread: tuple[float, float] = (0.0, 1.0)

    @property
    def has_axes(self) -> bool:
        """Whether it contains positions of three axes: time, height, width."""
        return self.role == "position_ids" and self.value == _AXES

    def repeat_rows(self, shape: Sequence[int]) -> Tensor:
        """Return the example's values in another shape: rows are repeated or cut."""
        made = torch.tensor(self.value)
        for axis, size in enumerate(shape):
            if made.shape[axis] != size:
                made = made.index_select(axis, torch.arange(size) % made.shape[axis])
        return made


def choose_values(
    name: str,
    value: Tensor,
    dims: Sequence[int | str],
    limits: tuple[int, int] | None,
    holds_tables: bool = False,
    total: Sequence[int | str] = (),
) -> InputValues:
    """Choose how to make more of an example input.

    Args:
        name: Of the input.
        value: The example.
        dims: Of the input; a name is a size that may vary.
        limits: Of its ids, if they are known.
        holds_tables: As `find_tables` found it.
        total: As `find_offsets` found it.
    """
    if total and any(isinstance(dim, str) for dim in (*dims, *total)):
        return InputValues("offsets", value=list(total))
    if is_past(name):
        return InputValues("past", spread=_measure_spread(value))
    if name == "position_ids" and value.dim() > 1:
        return InputValues("position_ids", value=value.shape[0] if value.dim() > 2 else None)
    if is_positions(name, value) and value.dim() == 2 and _counts(value):
        return InputValues("position_ids")
    if "mask" in name and value.dim() == 2 and set(value.unique().tolist()) <= {0, 1}:
        return InputValues("mask")
    if "mask" in name and value.dim() > 1 and value.numel() and _is_mask_of_scores(dims):
        return InputValues("square_mask", value=_read_square_mask(value))
    if value.is_floating_point() and not holds_tables and _holds_whole_numbers(name, value):
        return InputValues("ids", (int(value.min()), int(value.max())))
    if value.is_floating_point() and not holds_tables:
        return InputValues("values", spread=_measure_spread(value))
    if not value.is_floating_point() and value.dim() == 2 and value.numel() and "grid" not in name:
        return InputValues("ids", limits or (int(value.min()), int(value.max())))
    for axis, dim in enumerate(dims):
        if isinstance(dim, str):
            value = value.narrow(axis, 0, min(value.shape[axis], _MOST_ROWS))
    return InputValues("rows", value=value.tolist())


def choose_static(values: InputValues) -> InputValues:
    """Change how an input is made to what a static cache needs: a token's slot is its position.

    So positions are counted, slots that were not written are hidden, and an empty cache is zeros.
    """
    if values.role == "position_ids":
        return replace(values, role="counted")
    if values.role == "mask":
        return replace(values, role="static_mask")
    return replace(values, spread=(0.0, 0.0)) if values.role == "past" else values


def is_positions(name: str, value: Tensor) -> bool:
    """Return whether an input is one of positions, by its name: "pos", "input_pos", "positions"."""
    return not value.is_floating_point() and bool(_POSITIONS.search(name))


def _counts(value: Tensor) -> bool:
    """Return whether rows of numbers go up by 0 or 1."""
    steps = value.long().diff()
    return steps.numel() > 0 and bool(((steps == 0) | (steps == 1)).all())


def _is_mask_of_scores(dims: Sequence[int | str]) -> bool:
    """Return whether the last sizes are those of new tokens, or 1, and of all tokens."""
    return dims[-2] in (SEQ, 1) and dims[-1] in (SEQ, TOTAL)


def _read_square_mask(value: Tensor) -> list[Any]:
    """Return the value of what is seen and of what is hidden, and whether later tokens are hidden.

    A floating-point mask is added to scores. In another one, 1 is what is seen, unless the example
    hides each token from itself, or a single row is mostly 0.
    """
    rows, total = value.shape[-2:]
    hides_later = rows > 1 and bool((value[..., 0, -1] != value[..., 0, 0]).all())
    if value.is_floating_point():
        return [0.0, torch.finfo(value.dtype).min, hides_later]
    if rows == 1:
        sees_ones = bool(value.double().mean() >= 0.5)
    else:
        sees_ones = bool(value.diagonal(total - rows, -2, -1).any())
    return [1, 0, hides_later] if sees_ones else [0, 1, hides_later]


def _holds_whole_numbers(name: str, value: Tensor) -> bool:
    """Return whether a floating-point input contains coordinates or flags: fractions are none.

    An example of one number, such as zeros, is a placeholder, unless its name says otherwise.
    """
    known = value.numel() > 0 and bool(value.isfinite().all())
    if not known or not torch.equal(value, value.round()) or value.abs().max() >= _MASKED:
        return False
    return bool((value != value.flatten()[0]).any()) or bool(_COORDINATES.search(name))


def find_tables(tensors: Mapping[str, Tensor]) -> set[str]:
    """Find the inputs that contain cosines, sines or angles: random numbers are none.

    - Their name says so.
    - They are cosines and sines by value: the squares of two inputs, or of two parts of one, add up
      to 1.
    """
    wide = {
        name: value.detach().double()
        for name, value in tensors.items()
        if value.is_floating_point() and value.dim() > 1 and value.numel() > 1 and not is_past(name)
    }
    found = {name for name in wide if _TABLES.search(name)}
    for name, value in wide.items():
        parts = [value.chunk(2, -1), (value[..., 0::2], value[..., 1::2]), value.chunk(2, 0)]
        if any(_is_circle(*both) for both in parts if len(both) == 2):
            found.add(name)
        found.update(other for other in wide if _is_circle(value, wide[other]) and other != name)
    return found


def find_offsets(
    tensors: Mapping[str, Tensor], dims: Mapping[str, Sequence[int | str]]
) -> dict[str, list[int | str]]:
    """Find the inputs that tell where each of several packed sequences begins and ends.

    They rise from 0 to the number of tokens: `cu_seqlens`.

    Args:
        tensors: The example inputs, by name.
        dims: Their sizes; a name is a size that may vary.

    Returns:
        By name of the input, the sizes of others whose product is the number of tokens.
    """
    found: dict[str, list[int | str]] = {}
    for name in (name for name, value in tensors.items() if _rises(name, value)):
        others = {other: value for other, value in tensors.items() if other != name}
        rows = [(value.shape[:1], dims[other][:1]) for other, value in others.items()]
        rows += [(value.shape[1:2], dims[other][1:2]) for other, value in others.items()]
        rows += [(value.shape[:2], dims[other][:2]) for other, value in others.items()]
        last = int(tensors[name][-1])
        fitting = [list(d) for sizes, d in rows if len(sizes) and math.prod(sizes) == last]
        fitting.sort(key=lambda d: not any(isinstance(dim, str) for dim in d))  # stable
        if fitting:
            found[name] = fitting[0]
    return found


def _rises(name: str, value: Tensor) -> bool:
    """Return whether whole numbers rise from 0; those that count are none without such a name."""
    if value.is_floating_point() or value.is_complex() or value.dim() != 1 or value.numel() < 2:
        return False
    if value.dtype == torch.bool or is_positions(name, value) or value[0] != 0:
        return False
    steps = value.long().diff()
    counts = bool((steps == 1).all()) and not _OFFSETS.search(name)
    return bool((steps >= 0).all()) and bool(value[-1] > 0) and not counts


def _is_circle(cos: Tensor, sin: Tensor) -> bool:
    """Return whether two tensors are cosines and sines, also rounded to a half type; no flags."""
    if cos.shape != sin.shape or torch.equal(cos, cos.round()):
        return False
    return bool(((cos.square() + sin.square() - 1).abs() < 0.02).all())


def _measure_spread(value: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of an example; of a constant one, 0 and 1."""
    finite = value.detach().double()
    finite = finite[finite.abs() < _MASKED]
    if finite.numel() < 2 or not finite.std():
        return 0.0, 1.0
    return float(finite.mean()), float(finite.std())


def write_input_values(sources: Mapping[str, InputValues]) -> list[dict[str, Any]]:
    """Return sources as a manifest contains them."""
    return [{"input": name, **asdict(source)} for name, source in sources.items()]


def read_input_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, InputValues]:
    """Read what `write_input_values` wrote.

    Raises:
        LookupError, TypeError: Something is missing or of another kind.
    """
    return {
        row["input"]: InputValues(
            row["role"], tuple(row["limits"]), row["value"], tuple(row["spread"])
        )
        for row in rows
    }
