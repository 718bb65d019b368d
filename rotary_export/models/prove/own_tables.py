"""The tables of a traced model against those of the model's own functions, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.dims import is_past
from rotary_export.errors import CheckFailedError
from rotary_export.models.error_text import describe_error
from rotary_export.models.find.replace import CheckedCall, replace_calls
from rotary_export.models.find.replacement import Replacement
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.proof.comparison import compare, to_comparable
from rotary_export.proof.models.cases import Case
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Row

RUNTIME = "the trace"


@dataclass(frozen=True)
class OwnTables:
    """The tables of one tensor that the model rotates.

    Attributes:
        cos: (B or 1, S, R/2).
        sin: As cos.
        dtype: Of the result.
        last: The largest number of positions along one axis.
    """

    cos: Tensor
    sin: Tensor
    dtype: torch.dtype
    last: int

    def find_radius(self) -> float:
        """Return the largest magnitude of cos and sin; an attention factor is not 1."""
        tables = [table for table in (self.cos, self.sin) if table.numel()]
        return max([float(table.abs().max()) for table in tables], default=1.0)


class TableRecorder:
    """Keeps the tables of the model's own functions, by case.

    Args:
        found: The model's rotary calls.
    """

    def __init__(self, found: Replacement) -> None:
        self._found = found
        self._tables: dict[str, list[OwnTables]] = {}

    @contextmanager
    def record(self, case: Case) -> Iterator[None]:
        """Record one run of the model, which the context contains; check the op in it.

        Raises:
            CheckFailedError: The op differs from one of the model's functions.
        """
        found: list[OwnTables] = []

        def keep(call: CheckedCall) -> None:
            rotated = call.ys[:1] if call.lowering.joined else call.ys  # one node rotates both
            for tables, y in zip(call.tables, rotated, strict=False):
                last = max(s for name, s in call.lowering.list_sizes(y) if name in "BS")
                found.append(OwnTables(*tables, y.dtype, last))

        with replace_calls(self._found, check=True, record=keep):
            yield
        self._tables[case.name] = found

    def compare(
        self, traced: TracedRotary, names: Sequence[str], cases: Sequence[Case]
    ) -> list[Row]:
        """Compare what was recorded with a traced model.

        Args:
            traced: The traced model.
            names: Of the inputs, in order.
            cases: Which were recorded.

        Returns:
            The largest error of cos and of sin, of all cases.

        Raises:
            CheckFailedError: The trace can't run for a case.
        """
        rows: dict[str, Row] = {}
        for case in cases:
            tensors = dict(zip(names, case.tensors, strict=True))
            try:
                found = traced.compute_tables(tensors)
            except Exception as error:  # whatever torch raises at sizes that the trace can't have
                raise CheckFailedError(
                    f"the trace fails at {case.name}: {describe_error(error)}"
                ) from error
            own = self._tables[case.name]
            if len(own) != len(found):  # another branch of the model
                continue
            last = max([_count_positions(tensors), *(each.last for each in own)])
            done: set[tuple[int, int]] = set()  # layers share their tables
            for want, got in zip(own, found, strict=True):
                if (pair := (id(want.cos), id(got["cos_cache"]))) in done:
                    continue
                done.add(pair)
                # The angle is rounded, and in a half model the function rounds its tables.
                angle = float(compute_ulp(np.asarray(float(last)), "float32"))
                unit = max(angle, torch.finfo(want.dtype).eps) * want.find_radius()
                for name, table in (("cos_cache", want.cos), ("sin_cache", want.sin)):
                    row = _compare(name, got[name], table, unit, case)
                    if name not in rows or row.eager_share >= rows[name].eager_share:
                        rows[name] = row
        return [*rows.values()]


def _count_positions(tensors: Mapping[str, Tensor]) -> int:
    """Return the largest position + 1 that the inputs contain, at least 1."""
    ids = [tensors[name] for name in ("position_ids", "cache_position") if name in tensors]
    cached = [value.shape[2] for name, value in tensors.items() if is_past(name)]
    return max([1, *(int(value.max()) + 1 for value in ids if value.numel()), *cached])


def _compare(name: str, got: Tensor, want: Tensor, unit: float, case: Case) -> Row:
    """Compare tables, in a unit."""
    if got.shape[1:] == want.shape[1:]:  # else they differ; the batch may be 1
        got, want = torch.broadcast_tensors(got, want)
    if got.is_complex():  # as a power of a negative number: no cosine
        got = torch.where(got.imag == 0, got.real, torch.nan)
    left, right = (to_comparable(each).astype(np.float64) for each in (got, want))
    error = compare(left, right, np.asarray([unit]))
    row, position, *_ = (*error.worst, 0, 0)
    place = f"batch row {row}, position {position}"
    return Row("tables", name, RUNTIME, "", "far-tables", None, error, case=case.name, place=place)
