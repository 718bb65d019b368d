"""The tables of a traced model against those of the model's own functions, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.dims import is_past
from rotary_export.models.find.replace import CheckedCall, replace_calls
from rotary_export.models.find.replacement import Replacement
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.proof.comparison import compare, to_comparable
from rotary_export.proof.models.cases import Case
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Row

RUNTIME = "the trace"


class TableCheck:
    """Compares tables while the model runs its cases.

    Args:
        found: The model's rotary calls.
        traced: The traced model.
        names: Of the inputs, in order.

    Attributes:
        rows: The largest error of cos and of sin, of all cases.
    """

    def __init__(self, found: Replacement, traced: TracedRotary, names: Sequence[str]) -> None:
        self._found = found
        self._traced = traced
        self._names = names
        self.rows: dict[str, Row] = {}

    @contextmanager
    def check(self, case: Case) -> Iterator[None]:
        """Compare the tables of one run of the model, which the context contains.

        Raises:
            CheckFailedError: The op differs from one of the model's functions.
        """
        calls: list[CheckedCall] = []
        with replace_calls(self._found, check=True, record=calls.append):
            yield
        tensors = dict(zip(self._names, case.tensors, strict=True))
        traced = self._traced.compute_tables(tensors)
        own = [
            (*tables, x.dtype)
            for call in calls
            for tables, x in zip(call.tables, call.xs, strict=True)
            if x is call.xs[0] or not call.lowering.joined
        ]
        if len(own) != len(traced):  # another branch of the model
            return
        last = max([_count_positions(tensors), *(cos.shape[1] for cos, _, _ in own)])
        done: set[tuple[int, int]] = set()  # layers share their tables
        for (cos, sin, dtype), tables in zip(own, traced, strict=True):
            if (pair := (id(cos), id(tables["cos_cache"]))) not in done:
                done.add(pair)
                # The angle is rounded, and in a half model the function rounds its tables.
                angle = float(compute_ulp(np.asarray(float(last)), "float32"))
                unit = max(angle, torch.finfo(dtype).eps)
                for name, want in (("cos_cache", cos), ("sin_cache", sin)):
                    row = _compare(name, tables[name], want, unit, case)
                    if name not in self.rows or row.eager_share >= self.rows[name].eager_share:
                        self.rows[name] = row


def _count_positions(tensors: Mapping[str, Tensor]) -> int:
    """Return the largest position + 1 that the inputs contain, at least 1."""
    ids = [tensors[name] for name in ("position_ids", "cache_position") if name in tensors]
    cached = [value.shape[2] for name, value in tensors.items() if is_past(name)]
    return max([1, *(int(value.max()) + 1 for value in ids if value.numel()), *cached])


def _compare(name: str, got: Tensor, want: Tensor, unit: float, case: Case) -> Row:
    """Compare tables in a unit of cos and sin, times the largest magnitude."""
    largest = float(want.abs().max()) if want.numel() else 1.0
    got, want = torch.broadcast_tensors(got, want)
    left, right = (to_comparable(each).astype(np.float64) for each in (got, want))
    error = compare(left, right, np.asarray([unit * largest]))
    return Row("tables", name, RUNTIME, "", "far-tables", None, error, case=case.name)
