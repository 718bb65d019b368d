"""A model is restored after an export, and after one that fails."""

import pytest
from helpers.stateful_modules import STATEFUL, Submodules, describe_state
from helpers.tiny_modules import Baked, Plain, X
from torch import nn

from rotary_export import export_model
from rotary_export.errors import RotaryExportError


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_restored(tmp_path, training):
    model = nn.Sequential(*(make() for make in STATEFUL if make is not Submodules)).train(training)
    model.add_module("frozen", Plain().eval())
    before = describe_state(model)
    export_model(model, {"input": X}, tmp_path / "b", formats=["onnx", "torchscript"])
    assert describe_state(model) == before
    for make in (Baked, Submodules):
        model.append(make()).train(training)
        before = describe_state(model)
        with pytest.raises(
            RotaryExportError, match="the traced branch only where"
        ):  # that of Baked
            export_model(model, {"input": X}, tmp_path / "c", formats=["onnx"])
        assert describe_state(model) == before
