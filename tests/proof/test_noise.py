"""The noise of a model: what rounding alone moves, in the type that it computes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_model
from torch import nn

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import CheckFailedError
from rotary_export.proof.comparison import to_comparable
from rotary_export.proof.models.cases import Case, InputValues, choose_values, make_case
from rotary_export.proof.models.compare import compare_results
from rotary_export.proof.models.noise import measure_noise

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


def measure(model, x, keep=None):
    def run(tensors):
        return {"y": model(*tensors)}

    case = Case("case", (x,), keep)
    eager = [{name: to_comparable(value) for name, value in run(case.tensors).items()}]
    (noise,) = measure_noise(model, run, [case], eager, lambda: None)
    return noise["y"]


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_is_half_an_ulp_of_the_type(dtype):
    noise = measure(Scale(), torch.full((2, 300), 1.5, dtype=dtype))
    assert 0.5 * EPSILON[dtype] <= noise <= EPSILON[dtype]


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

    eager = [{name: value.numpy() for name, value in run([x]).items()}]
    (noise,) = measure_noise(model, run, [Case("case", (x,))], eager, lambda: None)
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


INFOS = [
    TensorInfo("input_ids", "int64", ("batch_size", "seq_len")),
    TensorInfo("past_key_values.0.key", "float32", ("batch_size", 2, "past_seq_len", 16)),
    TensorInfo("past_key_values.0.value", "float32", ("batch_size", 2, "past_seq_len", 16)),
]
SOURCES = {
    "input_ids": InputValues("ids", (0, 95)),
    "past_key_values.0.key": InputValues("past", spread=(3.0, 0.1)),
    "past_key_values.0.value": InputValues("past"),
}
SIZES = {"batch_size": 2, "seq_len": 3, "past_seq_len": 5}


def test_a_past_is_what_the_model_keeps():
    from transformers import DynamicCache

    model = make_model("llama", num_hidden_layers=1)
    prompts = []

    def run(tensors):
        ids, *past = tensors
        assert [tensor.shape for tensor in past] == [(2, 2, 0, 16)] * 2
        prompts.append(ids)
        with torch.no_grad():
            (layer,) = model(ids, past_key_values=DynamicCache()).past_key_values.layers
        return {"present.0.key": layer.keys, "present.0.value": layer.values}

    case = make_case(INFOS, SOURCES, SIZES, run=run)
    (prompt,) = prompts
    assert prompt.shape == (2, 5)
    assert not torch.equal(prompt[:, :3], case.tensors[0])
    kept = run([prompt, *torch.zeros(2, 2, 2, 0, 16)]).values()
    assert all(torch.equal(*pair) for pair in zip(case.tensors[1:], kept, strict=True))


def test_values_have_the_spread_of_the_example():
    case = make_case(INFOS, SOURCES, SIZES)
    keys = case.tensors[1].numpy()
    assert abs(keys.mean() - 3.0) < 0.1
    assert 0.05 < np.std(keys) < 0.2


def test_the_infinity_of_a_mask_is_no_spread():
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -3.4e38)
    assert choose_values("bias", mask, None).spread == (0.0, 1.0)


def test_infinities_have_no_noise():
    assert measure(Scale(), torch.tensor([1.5, float("inf")])) < 1e-6


# ---- errors are judged by it


def compare_two(errors, noises):
    """Compare cases whose output is 1, and whose error and noise are given in ulp of 1."""
    graph = GraphInfo((), (TensorInfo("y", "float32", (3,)),), {}, 1)
    cases = [Case(str(index), ()) for index in range(len(errors))]
    want = [{"y": np.ones(3, np.float32)} for _ in errors]
    got = [{"y": np.float32([1, 1 + error * 2.0**-23, 1])} for error in errors]
    noise = [{"y": moved * 2.0**-23} for moved in noises]
    (row,) = compare_results(graph, "r", "k", cases, got, want, noise)
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
