"""A model is restored after an export, and after one that fails."""

from contextlib import nullcontext, suppress

import pytest
from helpers.stateful_modules import STATEFUL, Submodules, describe_state
from helpers.tiny_modules import Baked, Plain, X
from torch import nn

from rotary_export import export_model
from rotary_export.errors import RotaryExportError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", STATEFUL)
def test_a_model_is_restored(tmp_path, make, training):
    model = nn.Sequential(make()).train(training)
    model.add_module("frozen", Plain().eval())
    before = describe_state(model)
    # What makes submodules can't be traced.
    with suppress(RotaryExportError) if make is Submodules else nullcontext():
        export_model(model, {"input": X}, tmp_path / "b", formats=["onnx", "torchscript"])
    assert describe_state(model) == before
    model.append(Baked()).train(training)
    before = describe_state(model)
    with pytest.raises(RotaryExportError, match="another branch"):
        export_model(model, {"input": X}, tmp_path / "c", formats=["onnx"])
    assert describe_state(model) == before
