"""The tables of a trace against the model's own."""

from __future__ import annotations

import pytest
import torch

from rotary_export.errors import CheckFailedError
from rotary_export.models.find.replacement import Replacement
from rotary_export.models.prove.own_tables import OwnTables, TableRecorder
from rotary_export.proof.models.cases import Case

COS, SIN = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
CASE = Case("one", (torch.arange(5)[None],))


class Traced:
    def __init__(self, cos, sin):
        self.tables = {"cos_cache": cos, "sin_cache": sin}

    def compute_tables(self, tensors):
        return [self.tables]


def compare(cos, sin, dtype=torch.float32):
    recorder = TableRecorder(Replacement())
    recorder._tables["one"] = [OwnTables(COS, SIN, dtype, 5)]
    return {row.output: row for row in recorder.compare(Traced(cos, sin), ["position_ids"], [CASE])}


def test_equal_tables_of_another_batch_pass():
    rows = compare(COS.expand(3, 5, 4), SIN)
    assert all(row.passed and row.eager.max_abs == 0 for row in rows.values())


def test_a_difference_names_its_place():
    changed = SIN.clone()
    changed[0, 3, 1] += 1e-4
    rows = compare(COS, changed)
    assert rows["cos_cache"].passed
    assert not rows["sin_cache"].passed
    assert rows["sin_cache"].place == "batch row 0, position 3"
    assert compare(COS, changed, torch.float16)["sin_cache"].passed  # the function rounds them


@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 4, 4)], ids=str)
def test_another_shape_is_a_difference(shape):
    rows = compare(torch.zeros(shape), torch.zeros(shape))
    assert not any(row.passed for row in rows.values())


def test_a_complex_number_is_a_difference():
    """A trace may compute a power of a negative number where the model takes another branch."""
    assert compare(COS + 0j, SIN)["cos_cache"].passed
    row = compare(COS + 1e-9j, SIN)["cos_cache"]
    assert (row.passed, row.eager.max_abs) == (False, float("inf"))


def test_a_trace_that_can_not_run_is_refused():
    class Fails(Traced):
        def compute_tables(self, tensors):
            raise RuntimeError("size 7")

    recorder = TableRecorder(Replacement())
    recorder._tables["one"] = [OwnTables(COS, SIN, torch.float32, 5)]
    with pytest.raises(CheckFailedError, match=r"the trace fails at one: RuntimeError: size 7"):
        recorder.compare(Fails(COS, SIN), ["position_ids"], [CASE])
