"""The noise of a model: what rounding alone moves, in the type that it computes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import CheckFailedError
from rotary_export.proof.comparison import to_comparable
from rotary_export.proof.models import noise as noise_module
from rotary_export.proof.models.cases import Case
from rotary_export.proof.models.compare import compare_results
from rotary_export.proof.models.noise import NoiseMeter
from rotary_export.proof.models.reference import Measured

EPSILON = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


class Scale(nn.Module):
    """Multiplies, in another type than its input's if one is given."""

    def __init__(self, factor=1.0, inside=None):
        super().__init__()
        self.factor, self.inside = factor, inside

    def forward(self, x):
        return x.to(self.inside or x.dtype).mul(self.factor).to(x.dtype)


def measure(model, x, keep=None, **options):
    def run(tensors):
        return {"y": model(*tensors)}

    case = Case("case", (x,), keep)
    eager = {name: to_comparable(value) for name, value in run(case.tensors).items()}
    return NoiseMeter(model, run).measure(case, eager, **options)["y"]


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_is_half_an_ulp_of_the_type(dtype):
    noise = measure(Scale(), torch.full((2, 300), 1.5, dtype=dtype))
    assert 0.5 * EPSILON[dtype] <= noise <= EPSILON[dtype]


@pytest.mark.parametrize("at", [0, 299, 300])
def test_every_slice_of_a_large_output_is_perturbed(monkeypatch, at):
    monkeypatch.setattr(noise_module, "_SLICE", 100)
    x = torch.zeros(7, 43)  # three slices and a remainder
    x.view(-1)[at] = 1.5
    assert 0 < measure(Scale(), x, runs=20) <= EPSILON[torch.float32]
    assert 0 < measure(Scale(), x.T, runs=20) <= EPSILON[torch.float32]  # not contiguous


def test_is_that_of_the_narrowest_type_inside():
    noise = measure(Scale(inside=torch.float32), torch.full((300,), 1.5, dtype=torch.float64))
    assert 0.5 * 2.0**-23 < noise <= 2.0**-23
    noise = measure(Scale(inside=torch.float16), torch.full((300,), 1.5))
    assert 0.5 * 2.0**-10 < noise <= 2.0**-10


def test_a_cast_alone_is_not_narrow():
    class Wide(nn.Module):
        def forward(self, x):
            return x.half().float() * 1.0

    noise = measure(Wide(), torch.full((300,), 1.5))
    assert 0.5 * 2.0**-23 < noise <= 2.0**-23


def test_later_modules_amplify_it():
    x = torch.full((300,), 1.5)
    assert measure(nn.Sequential(Scale(), Scale(1000.0)), x) > 500 * measure(Scale(), x)


def test_padding_is_left_out():
    x = torch.ones(1, 4, 3)
    x[:, :2] = 1e6
    assert measure(Scale(), x) > 1e-3
    assert measure(Scale(), x, torch.tensor([[False, False, True, True]])) < 1e-6


def test_integers_have_none_and_a_nan_is_no_noise():
    class Both(nn.Module):
        def forward(self, x):
            return x.long(), torch.stack([x, x * float("nan")])

    model, x = Both(), torch.ones(3)

    def run(tensors):
        return dict(zip(("ids", "y"), model(*tensors), strict=True))

    eager = {name: value.numpy() for name, value in run([x]).items()}
    noise = NoiseMeter(model, run).measure(Case("case", (x,)), eager)
    assert noise.keys() == {"y"}
    assert 0 < noise["y"] < 1e-6


def test_the_model_is_as_before():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).requires_grad_(False)
    x = torch.randn(2, 3)
    want = model(x)
    measure(model, x)
    assert torch.equal(model(x), want)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_infinities_have_no_noise():
    assert measure(Scale(), torch.tensor([1.5, float("inf")])) < 1e-6


# ---- errors are judged by it


def compare_two(errors, noises):
    """Compare cases whose output is 1, and whose error and noise are given in ulp of 1."""
    graph = GraphInfo((), (TensorInfo("y", "float32", (3,)),), {}, 1)
    measured = [
        Measured(Case(str(index), ()), {"y": np.ones(3, np.float32)}, {"y": moved * 2.0**-23})
        for index, moved in enumerate(noises)
    ]
    got = [{"y": np.float32([1, 1 + error * 2.0**-23, 1])} for error in errors]
    (row,) = compare_results(graph, "r", "k", measured, got)
    return row


@pytest.mark.parametrize(
    ("error", "moved", "allowed"), [(16, 0, 16), (17, 0, 16), (600, 100, 600), (601, 100, 600)]
)
def test_the_limit_is_the_floor_or_six_times_the_noise(error, moved, allowed):
    row = compare_two([error], [moved])
    assert (row.eager.max_ulp, row.noise, row.eager_allowed) == (error, moved, allowed)
    assert row.passed == (error <= allowed)


def test_each_case_is_judged_by_its_own_noise():
    row = compare_two([300, 100, 2], [100, 1, 0])
    assert (row.case, row.eager.max_ulp, row.passed) == ("1", 100, False)


def test_a_case_in_which_rounding_hides_an_error_is_left_out():
    hidden = 0.06 * 2.0**23
    row = compare_two([2.0**22, 3], [hidden, 0])
    assert (row.case, row.eager.max_ulp, row.passed) == ("1", 3, True)
    with pytest.raises(CheckFailedError, match=r"model\.y can't be compared: rounding alone moves"):
        compare_two([0], [hidden])


class Angles(nn.Module):
    """Sines of large angles: what a rounding inside moves is not seen from outside."""

    def forward(self, x):
        return (x * 1000.0).sin()


class Masked(nn.Module):
    """Changes a tensor in place, and has the smallest number of its type."""

    def forward(self, x):
        scores = x.clone()
        scores[0] = torch.finfo(x.dtype).min
        return scores.add_(0.0).softmax(0) + torch.stack((x, -x)).sum()


def test_operators_round_inside_of_modules():
    x = torch.full((300,), 1.5)
    outside = measure(Angles(), x)
    inside = measure(Angles(), x, every_operator=True)
    assert outside <= 2.0**-23
    assert 50 * 2.0**-23 < inside < 1500 * 2.0**-23


def test_operators_that_move_numbers_do_not_round():
    class Moves(nn.Module):
        def forward(self, x):
            return torch.cat((-x[2:], x.flip(0)[None].repeat(1, 1)[0])).float()

    assert measure(Moves(), torch.randn(300), every_operator=True) == 0.0


def test_the_smallest_number_stays():
    noise = measure(Masked(), torch.randn(300), every_operator=True)
    assert 0.0 < noise < 1e-3
