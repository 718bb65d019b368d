"""Prompts as an array of token ids and its mask, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotary_export.errors import RotaryExportError
from rotary_export.runtime.tensors import is_torch, to_numpy
from rotary_export.types import Array


@dataclass(frozen=True)
class Prompts:
    """The tokens of several rows, padded at the left.

    Attributes:
        ids: (B, S) int64.
        mask: (B, S) int64, 1: a token, 0: padding.
    """

    ids: Array
    mask: Array

    @property
    def longest(self) -> int:
        """How many tokens the longest row has, without padding."""
        return int(self.mask.sum(axis=1).max())


def read_prompts(
    input_ids: Any,
    attention_mask: Any,
    num_tokens: int,
    pad_token_id: int = 0,
    is_padding: bool = False,
) -> Prompts:
    """Read and check prompts.

    Args:
        input_ids: (B, S) of integers, numpy or torch; or a list of ids for each row, which may be
            of unequal lengths: they are padded at the left.
        attention_mask: (B, S), 1 or True: a token; None: all are tokens, except for what
            `is_padding` finds.
        num_tokens: Ids are below it.
        pad_token_id: What shorter rows are padded with.
        is_padding: Without a mask, `pad_token_id` in `input_ids` is padding.

    Raises:
        RotaryExportError: They are not that, a row is empty or is padded at the right, or an id is
            unknown; the message names the first one.
    """
    if is_ragged(input_ids):
        ids, mask = _pad(input_ids, pad_token_id)
        if attention_mask is not None:
            raise RotaryExportError("attention_mask must be None where rows are lists of ids")
    else:
        ids = _read_array("input_ids", input_ids)
        if attention_mask is None:
            found = ids != pad_token_id if is_padding else np.ones(ids.shape, bool)
            mask = found.astype(np.int64)
        else:
            mask = _read_array("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise RotaryExportError(
            f"attention_mask must have the shape of input_ids, {ids.shape}, got {mask.shape}"
        )
    bad = np.argwhere((mask != 0) & (mask != 1))
    if len(bad):
        raise RotaryExportError(f"attention_mask must be 0 or 1, got {mask[tuple(bad[0])]}")
    ended = np.flatnonzero(mask[:, -1] == 0)
    if len(ended):
        raise RotaryExportError(
            f"rows must be padded at the left, got padding at the end of row {ended[0]}"
        )
    check_ids(ids, num_tokens)
    return Prompts(ids, mask)


def align_left(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Move each row's tokens to its beginning, where a static cache has them.

    Args:
        ids: (B, S) int64.
        mask: (B, S) int64, 1: a token.

    Returns:
        (B, S) ids, padded at the right with 0, and how many tokens each row has.
    """
    order = np.argsort(mask == 0, axis=1, kind="stable")
    moved = np.take_along_axis(ids * mask, order, axis=1)
    return moved, mask.sum(axis=1)


def check_ids(ids: Array, num_tokens: int) -> None:
    """Refuse token ids that the model has not.

    Raises:
        RotaryExportError: With the first one.
    """
    bad = np.argwhere((ids < 0) | (ids >= num_tokens))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        where = f"row {at[0]}" + (f", column {at[1]}" if len(at) > 1 else "")
        raise RotaryExportError(
            f"token ids must be >= 0 and < {num_tokens}, got {ids[at]} in {where}"
        )


def is_ragged(value: Any) -> bool:
    """Return whether a value is a list of rows."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(isinstance(row, Sequence) and not isinstance(row, (str, bytes)) for row in value)
    )


def read_row(name: str, values: Any, size: int | None = None) -> Array:
    """Read one integer for each row.

    Args:
        name: Of the argument, for errors.
        values: (B,) of integers.
        size: B; None: any.

    Raises:
        RotaryExportError: They are not that.
    """
    array = to_numpy(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or size not in (None, len(array)):
        required = "(batch_size,)" if size is None else f"({size},)"
        raise RotaryExportError(
            f"{name} must be integers of shape {required}, got {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Array, Array]:
    for index, row in enumerate(rows):
        if not len(row) or not all(type(each) is int for each in row):
            raise RotaryExportError(f"row {index} must be a list of token ids, got {row!r:.60}")
    size = max(map(len, rows), default=0)
    if not size:
        raise RotaryExportError("input_ids must have at least one row, got none")
    try:
        ids = np.array([[pad_token_id] * (size - len(row)) + [*row] for row in rows], np.int64)
    except OverflowError:
        raise RotaryExportError("token ids must be of 64 bits, got larger ones") from None
    mask = [[0] * (size - len(row)) + [1] * len(row) for row in rows]
    return ids, np.array(mask, np.int64)


def _read_array(name: str, value: Any) -> Array:
    if is_torch(value) and value.device.type != "cpu":
        raise RotaryExportError(f"{name} must be in CPU memory, got {value.device}")
    array = to_numpy(value) if is_torch(value) or isinstance(value, np.ndarray) else None
    if array is None or array.dtype.kind not in "iub" or array.ndim != 2 or not array.size:
        got = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise RotaryExportError(
            f"{name} must be integers of shape (batch_size, seq_len), neither 0, got {got}"
        )
    return array.astype(np.int64)
