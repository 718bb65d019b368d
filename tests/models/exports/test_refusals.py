"""export_model: what it refuses, in one clear error each, and what may be anything."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_modules import Baked, Plain, X, rope_of
from torch import nn

from rotary_export import RotaryExportError, export_model


class Counted(nn.Module):
    """Makes its length a number."""

    def forward(self, x):
        return rope_of(x).reshape(x.shape[0], int(x.shape[1]), 16)


class Hidden(nn.Module):
    def forward(self, x, flags):
        y = rope_of(x)
        return y if flags.sum() > 1 else y + 1


class Leaves(nn.Module):
    def forward(self, x):
        raise SystemExit(3)


class Divides(nn.Module):
    """Has a condition that Python can't compute for every length."""

    def forward(self, x):
        return rope_of(x) * (2 if 100 % (x.shape[1] - 5) == 3 else 1)


REFUSED = {
    "no module": (3, {"x": X}, "model must be a torch.nn.Module, got int"),
    "no dict": (Plain(), [X], "example_inputs must be a dict by argument name, got list"),
    "unknown argument": (Plain(), {"y": X}, "Plain.forward accepts x, example_inputs has 'y'"),
    "no tensor": (Plain(), {"x": 3}, "example_inputs must hold at least one tensor, got x"),
    "no rotary": (Plain(), {"x": X}, "Plain applies no rotary embedding"),
    "baked": (
        Baked(),
        {"x": X},
        r"the traced branch only where seq_len is not a multiple of 7, at .*: limit that size",
    ),
    "specialised": (
        Counted(),
        {"x": X},
        r"tracing specialises seq_len to the constant 6 \(dimension 1 of x\).*refusals\.py, line",
    ),
    "leaves": (Leaves(), {"x": X}, "Leaves fails on its example inputs: SystemExit: 3"),
    "divides by zero": (Divides(), {"x": X}, "the model fails at .*: ZeroDivisionError"),
    "depends on values": (
        Hidden(),
        {"x": X, "flags": torch.ones(3)},
        r"torch.export can't trace the model: the model decides, or chooses a size, by the values "
        r"of its tensors \(at \S+test_refusals\.py:\d+, forward\); choose .* torch.where there",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(tmp_path, capfd, case):
    model, inputs, message = case
    with pytest.raises(RotaryExportError, match=message):
        export_model(model, inputs, tmp_path / "b", formats=["onnx"])
    assert not any(capfd.readouterr())
    assert not list(tmp_path.iterdir())


DYNAMIC = {
    "a word": ("all", "dynamic_shapes must be 'auto', None or a dict"),
    "unknown input": ({"y": {0: "b"}}, "dynamic_shapes names 'y', which is not one of"),
    "unknown axis": ({"x": {3: "b"}}, r"dynamic_shapes\['x'\] must have axes in \[0, 3\), got 3"),
    "a text": ({"x": "b"}, r"dynamic_shapes\['x'\] must be a dict of axis to name, got"),
    "no name": ({"x": {0: 3}}, r"dynamic_shapes\['x'\]\[0\] must be a name, a sum .* got 3"),
    "a lonely sum": ({"x": {0: "a + b"}}, "has a sum with 'a', which no dimension is alone"),
    "two sizes": ({"x": {0: "b", 1: "b"}}, "x must have b=2, as the tensors before it"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_module_is_refused(tmp_path):
    model = torch.jit.trace(Plain(), (X,))
    with pytest.raises(RotaryExportError, match=r"a ScriptModule \(Plain\), which torch.export"):
        export_model(model, {"x": X}, tmp_path / "b")


class Parts(nn.Module):
    """Has a part that was compiled, or traced."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return rope_of(self.part(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_compiled_part_is_named(tmp_path):
    model = Parts(torch.jit.script(nn.LayerNorm(16)))
    with pytest.raises(RotaryExportError, match="; part is a ScriptModule: use the module that"):
        export_model(model, {"x": X}, tmp_path / "b")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_part_may_be_exported(tmp_path):
    model = Parts(torch.jit.trace(nn.LayerNorm(16), (X,)))
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].rotary_nodes == 1


@pytest.mark.parametrize("case", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_refuses_dynamic_shapes(tmp_path, case):
    shapes, message = case
    with pytest.raises(RotaryExportError, match=message):
        export_model(Baked(), {"x": X}, tmp_path / "b", dynamic_shapes=shapes)


def test_fixed_shapes(tmp_path):
    bundle = export_model(
        Baked(), {"x": X}, tmp_path / "b", dynamic_shapes={"x": {0: "rows"}}, formats=["onnx"]
    )
    assert bundle.manifest.graphs["model"].inputs[0].shape == ("rows", 6, 16)
    assert bundle.report.passed


class Echo(nn.Module):
    def forward(self, x):
        return {"x": rope_of(x)}


def test_an_output_may_have_an_inputs_name(tmp_path):
    bundle = export_model(Echo(), {"x": X}, tmp_path / "b")
    assert [output.name for output in bundle.manifest.graphs["model"].outputs] == ["output.x"]


class Config:
    """Something that is not a config of transformers."""

    def __getattr__(self, name):
        raise KeyError(name)


@pytest.mark.parametrize(
    "kind", [Config, lambda: torch.ones(3), lambda: 3], ids=["any", "tensor", "int"]
)
def test_an_attribute_config_may_be_anything(tmp_path, kind):
    model = Echo()
    model.config = kind()
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.config["max_positions"] is None


class Offset(nn.Module):
    """Has an integer argument, whose meaning is not known."""

    def forward(self, x, start):
        return rope_of(x) + start


def test_values_that_were_not_tried_are_said(tmp_path):
    inputs = {"x": X, "start": torch.tensor(3)}
    bundle = export_model(Offset(), inputs, tmp_path / "b", formats=["onnx"])
    assert bundle.report.unverified == {"other values of start": "its meaning is not known"}
