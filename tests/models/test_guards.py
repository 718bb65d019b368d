"""Conditions on sizes: limits, sizes to be proven, refusals."""

import types

import pytest
import torch
from helpers.tiny_modules import X, rope_of
from torch import nn

from rotary_export import export_model, load, verify
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.trace.guards import Condition
from rotary_export.models.trace.size_limits import TOTAL, find_size_constraints


def find(*conditions, **longest):
    """Find the paths of functions of s (seq_len) and b (batch_size)."""
    names = {"s": "seq_len", "b": "batch_size", "p": "past_seq_len"}
    made = [
        Condition(tuple(names[v] for v in f.__code__.co_varnames), f, f"it, line {line}")
        for line, f in enumerate(conditions)
    ]
    paths = find_size_constraints(made, longest)
    return paths.max_size, paths.points


def at(*sizes):
    return [{"seq_len": size} for size in sizes]


PATHS = {
    "always": ([lambda s: s >= 2], {}, []),
    "up-to": ([lambda s: s <= 40], {"seq_len": 40}, []),
    "up-to-far": ([lambda s: s <= 50000], {"seq_len": 50000}, []),
    "the-smaller-limit": ([lambda s: s <= 40, lambda s: s < 30], {"seq_len": 29}, []),
    "but-at-one": ([lambda s: s != 37], {}, at(37)),
    "but-at-multiples": ([lambda s: s % 256 > 0], {}, at(256, 512)),
    "but-at-many": ([lambda s: s % 4 > 0], {}, at(4, 8, 128)),
    "multiples-in-limits": (
        [lambda s: s % 256 > 0, lambda s: s <= 300],
        {"seq_len": 300},
        at(256),
    ),
    "but-in-a-range": ([lambda s: s // 10 != 3], {}, at(30, 39)),
    "from-the-middle": ([lambda s: s >= 30], {}, at(2, 29)),
    "too-long-to-prove": ([lambda s: (s + 255) // 256 != 8], {"seq_len": 1792}, []),
    "no-power-of-two": ([lambda s: s % 3000 > 0], {"seq_len": 2999}, []),
    "two-sizes": ([lambda s: s != 37, lambda b: b != 2], {}, [*at(37), {"batch_size": 2}]),
    "of-both": (
        [lambda b, s: b * s <= 100],
        {},
        [{"batch_size": 2, "seq_len": 51}, {"batch_size": 8, "seq_len": 64}],
    ),
    "of-both-in-limits": ([lambda b, s: b * s < 100, lambda s: s <= 2, lambda b: b < 9],
                          {"seq_len": 2, "batch_size": 8}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS)
def test_paths(case):
    conditions, limits, points = case
    assert find(*conditions) == (limits, points)


def test_no_point_is_longer_than_the_model():
    assert find(lambda s: s != 37, seq_len=36) == ({"seq_len": 36}, [])
    _, points = find(lambda p, s: p + s < 30, **{TOTAL: 34})
    assert all(30 <= point["past_seq_len"] + point["seq_len"] <= 34 for point in points)
    assert points


def test_what_fails_only_where_it_is_too_large_is_said():
    condition = Condition(("batch_size", "seq_len"), lambda b, s: b * s < 10**6, "b * s < 10**6")
    paths = find_size_constraints([condition], {})
    assert (paths.points, paths.unverified) == ([], ["b * s < 10**6"])


RARE = {"one": lambda s: s == 7, "a-third": lambda s: s % 3 == 1, "none": lambda s: s < 2}


@pytest.mark.parametrize("condition", RARE.values(), ids=RARE)
def test_a_condition_that_rarely_holds_is_refused(condition):
    words = r"another path where not it, line 0; give seq_len a fixed size"
    with pytest.raises(RotaryExportError, match=words):
        find(condition)


# ---- models


class Model(nn.Module):
    """A rotation, and something that depends on sizes."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(rope_of(x), *x.shape[:2])


def pad_to(y, multiple, added):
    length = y.shape[1]
    if -length % multiple > 0:
        return nn.functional.pad(y, (0, 0, 0, -length % multiple))[:, :length]
    return y + added


def test_another_path_of_the_same_values_is_proven(tmp_path):
    model = Model(lambda y, b, n: pad_to(y, 4, 0.0))
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.config["points"] == at(4, 8, 128)
    shapes = {"batch_size 3, seq_len 4", "batch_size 3, seq_len 8", "batch_size 3, seq_len 128"}
    assert shapes <= set(bundle.report.shapes["model"])
    assert shapes <= set(verify(bundle.path).shapes["model"])
    x = torch.randn(1, 12, 16)
    torch.testing.assert_close(
        torch.as_tensor(load(bundle, "model")(x=x)["output"]), rope_of(x), rtol=0, atol=1e-5
    )


def bounded(y, b, n):
    return y * max(1, n - 30)


# Of other values at some sizes.
WRONG = {
    "at-multiples": lambda y, b, n: pad_to(y, 4, 1.0),
    "at-one": lambda y, b, n: y * 2 if n == 37 else y,
    "at-the-end-of-a-range": lambda y, b, n: y * (2 if n > 23 else 1) if n < 30 else y,
    "at-one-token": lambda y, b, n: y * 2 if b * n == 1 else y,
    "of-both": lambda y, b, n: y * 2 if b * n > 200 else y,
    "of-their-sum": lambda y, b, n: y * 2 if b + n > 90 else y,
}


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_another_path_of_other_values_is_refused(tmp_path, function):
    with pytest.raises(CheckFailedError, match="not equal to eager") as caught:
        export_model(
            Model(function), {"x": torch.randn(2, 41, 16)}, tmp_path / "b", formats=["onnx"]
        )
    is_assumed = function is WRONG["at-one-token"]  # torch.export says of no size that it is 1
    assert is_assumed or "test_models_guards.py, line" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_both_sides_of_a_maximum_are_tried(tmp_path):
    bundle = export_model(Model(bounded), {"x": X}, tmp_path / "b", formats=["onnx", "program"])
    assert bundle.manifest.graphs["model"].max_size == {}
    assert {f"batch_size 3, seq_len {size}" for size in (32, 128)} < set(
        bundle.report.shapes["model"]
    )
    # TorchScript keeps the side that was traced.
    bundle = export_model(Model(bounded), {"x": X}, tmp_path / "c", formats=["torchscript"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 31}
    (what,) = bundle.report.unverified
    assert what.startswith("sizes where not Eq(Max(")
    assert bundle.manifest.parity["unverified"] == {what: "not equal: a limit"}


def test_a_path_past_the_models_own_length_is_a_limit(tmp_path):
    config = types.SimpleNamespace(max_position_embeddings=32)
    model = Model(WRONG["at-one"], config=config)
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 36}


class Second(nn.Module):
    """Has a condition on the second input's size."""

    def forward(self, x, y):
        return rope_of(x) * (2 if y.shape[1] > 40 else 1) + y


def test_a_condition_on_another_input_is_a_limit(tmp_path):
    bundle = export_model(Second(), {"x": X, "y": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 40}


def test_the_limit_of_a_size_with_another_name(tmp_path):
    model = Model(lambda y, b, n: y * (2 if b > 7 else 1))
    shapes = {"x": {0: "rows", 1: "length"}}
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"], dynamic_shapes=shapes)
    assert bundle.manifest.graphs["model"].max_size == {"rows": 7}
    assert "rows 1, length 1" in bundle.report.shapes["model"]


class Growing(nn.Module):
    """Keeps tables, and makes them anew for longer inputs."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        length = x.shape[1]
        if self.kept.get("length", 0) < length:
            self.kept["length"], self.kept["x"] = length, torch.ones(length, 1)
        return rope_of(x) * self.kept["x"][:length]


def test_tables_that_a_model_keeps_are_no_limit(tmp_path):
    model = Growing({})
    bundle = export_model(model, {"x": X}, tmp_path / "b")
    assert model.kept == {}
    assert bundle.manifest.graphs["model"].max_size == {}
    assert "batch_size 1, seq_len 17" in bundle.report.shapes["model"]


def rotary_of(x, length):
    return rope_of(x) if length else x


class Given(nn.Module):
    """Gives its rotary function a size."""

    def forward(self, x):
        return rotary_of(x, x.shape[1])


def test_a_function_that_takes_a_size_is_fused(tmp_path):
    bundle = export_model(Given(), {"x": X}, tmp_path / "b")
    assert bundle.manifest.graphs["model"].rotary_nodes == 1
