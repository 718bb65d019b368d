"""The model itself, run on cases: what is drawn again, left out or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.proof.models import reference as module
from rotary_export.proof.models.cases import CaseSpec
from rotary_export.proof.models.input_values import InputValues
from rotary_export.proof.models.reference import Reference

INFO = TensorInfo("x", "float32", ("batch_size", "seq_len", 4))


class Difference(nn.Module):
    """The difference of a layer's output from a constant: all of it is rounding, or none."""

    def __init__(self, seeds_that_cancel):
        super().__init__()
        self.layer = nn.Identity()
        self.cancelled = [draw(seed) for seed in seeds_that_cancel]

    def forward(self, x):
        if x.shape[1] > 100:
            raise IndexError("index 100 is out of range")
        hidden = self.layer(x)
        if any(torch.equal(x, other) for other in self.cancelled):
            return hidden - x + 1e-7
        return hidden + 0.0


def draw(seed):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def measure(model, *specs):
    reference = Reference(
        model, lambda tensors: {"y": model(*tensors)}, [INFO], {"x": InputValues("values")}
    )
    return reference, reference.measure(specs, lambda step: None)


SIZES = {"batch_size": 2, "seq_len": 3}


def test_a_case_that_tells_nothing_is_drawn_again():
    _, (kept,) = measure(Difference([]), CaseSpec(SIZES, seed=1))
    assert kept.case.spec.seed == 1
    _, (drawn,) = measure(Difference([1]), CaseSpec(SIZES, seed=1))
    assert drawn.case.spec.seed == 101
    assert drawn.case.name == kept.case.name


def test_after_three_draws_it_stays():
    _, (last,) = measure(Difference([1, 101, 201]), CaseSpec(SIZES, seed=1))
    assert last.case.spec.seed == 201
    assert "rounding alone moves it" in module.find_ill_conditioned(last)["y"]


def test_an_optional_case_that_fails_is_left_out():
    long = CaseSpec({"batch_size": 1, "seq_len": 101}, optional=True)
    reference, measured = measure(Difference([]), long, CaseSpec(SIZES))
    assert [each.case.name for each in measured] == ["batch_size 2, seq_len 3"]
    assert reference.left_out == {long.name: "the model fails: index 100 is out of range"}


def test_any_other_that_fails_is_an_error():
    with pytest.raises(RotaryExportError, match="fails at batch_size 1, seq_len 101: index 100"):
        measure(Difference([]), CaseSpec({"batch_size": 1, "seq_len": 101}))


def test_a_long_case_that_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_RUN", 0.0)
    long = CaseSpec({"batch_size": 1, "seq_len": 600}, optional=True)
    reference, measured = measure(Difference([]), CaseSpec(SIZES), long)
    assert len(measured) == 1
    assert "each of its runs would take about 0 s" in reference.left_out[long.name]


def test_a_long_case_whose_outputs_are_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "_SPARE", 600 * 4 * 4 - 1)  # bytes of y: 600 rows of 4 in float32
    long = CaseSpec({"batch_size": 1, "seq_len": 600}, optional=True)
    reference, measured = measure(Difference([]), CaseSpec(SIZES), long)
    assert len(measured) == 1
    assert "its outputs alone would take about 0.0 GiB" in reference.left_out[long.name]
    monkeypatch.setattr(module, "_SPARE", 600 * 4 * 4)
    reference, measured = measure(Difference([]), CaseSpec(SIZES), long)
    assert "index 100 is out of range" in reference.left_out[long.name]  # it was run
