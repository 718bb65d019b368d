"""A snapshot restores what a run may change in a model."""

import pytest
import torch
from helpers.stateful_modules import STATEFUL, describe_state
from helpers.tiny_modules import X
from torch import nn

from rotary_export.models.trace.snapshot import take_snapshot


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", STATEFUL)
def test_a_model_is_restored(make, training):
    model = nn.Sequential(make()).train(training)
    model.add_module("frozen", nn.Identity().eval())
    before = describe_state(model)

    def run_and_fail():
        with take_snapshot(model):
            assert not any(module.training for module in model.modules())
            model(X)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_and_fail()
    assert describe_state(model) == before


@pytest.mark.parametrize("make", [m for m in STATEFUL if m.__name__ != "Submodules"])
def test_each_run_starts_from_the_same_state(make):
    model = make()
    with take_snapshot(model) as snapshot, torch.no_grad():
        before = describe_state(model)
        model(X)
        snapshot.restore_state()
        assert describe_state(model) == before
        model(X)
        snapshot.restore_state()
        assert describe_state(model) == before
