"""What an export finds out of a model before it traces it."""

import types

import pytest
import torch
from helpers.tiny_modules import rope_of
from torch import nn

from rotary_export.errors import RotaryExportError
from rotary_export.models.analyze import analyze_model, find_rotary_calls
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import take_snapshot
from rotary_export.proof.models.plan import plan_cases


class Model(nn.Module):
    def __init__(self, function=rope_of, **config):
        super().__init__()
        self.function, self.config = function, types.SimpleNamespace(**config)
        self.runs = []

    def get_input_embeddings(self):
        return nn.Embedding(96, 4)

    def forward(self, x, input_ids=None):
        self.runs.append(tuple(x.shape))
        return self.function(x)


def analyze(model, dynamic_shapes="auto", **inputs):
    with take_snapshot(model) as snapshot:
        return analyze_model(model, inputs, dynamic_shapes, snapshot, lambda step: None)


def test_sizes_of_a_trace_are_different():
    shapes = {"x": {0: "a", 1: "b"}}
    analysis = analyze(Model(), shapes, x=torch.randn(4, 4, 16))
    assert analysis.traced_sizes == {"a": 4, "b": 5}
    assert [tuple(t.shape) for t in analysis.traced.tensors] == [(4, 5, 16)]
    assert [info.shape for info in analysis.inputs] == [("a", "b", 16)]


def test_an_example_of_one_row_is_traced_with_two():
    analysis = analyze(Model(), x=torch.randn(1, 1, 16))
    assert analysis.traced_sizes == {"batch_size": 2, "seq_len": 7}


def test_token_ids_have_limits():
    inputs = {"x": torch.randn(2, 6, 16), "input_ids": torch.ones(2, 6, dtype=torch.int64)}
    analysis = analyze(Model(), **inputs)
    assert [info.limits for info in analysis.inputs] == [None, (0, 95)]


def test_no_case_is_longer_than_the_model_accepts():
    analysis = analyze(Model(max_position_embeddings=12), x=torch.randn(2, 6, 16))
    assert analysis.max_positions == 12
    assert analysis.max_run_size["seq_len"] == 12
    specs = plan_cases(analysis.plan(SizeConstraints()))
    assert max(spec.length for spec in specs) == 12


def test_sizes_to_verify_become_cases():
    analysis = analyze(Model(), x=torch.randn(2, 6, 16))
    constraints = SizeConstraints(max_size={"batch_size": 9}, sizes_to_verify=[{"seq_len": 37}])
    specs = plan_cases(analysis.plan(constraints))
    assert specs[-1].sizes == {"batch_size": 3, "seq_len": 37}


def test_the_example_runs_unchanged():
    model = Model()
    shapes = []
    model.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(kwargs["x"].shape),
                                    with_kwargs=True)  # fmt: skip
    x = torch.randn(2, 3, 16)
    analysis = analyze(model, x=x)
    assert tuple(shapes[0]) == (2, 3, 16)
    assert tuple(shapes[-1]) == (2, *analysis.traced.tensors[0].shape[1:])
    assert model.runs == []
    assert analysis.example.tensors[0] is x


def fail(x):
    raise SystemExit(3)


def test_a_model_that_fails_is_an_error():
    with pytest.raises(RotaryExportError, match="Model fails on its example inputs: SystemExit: 3"):
        find_rotary_calls(Model(fail), {"x": torch.ones(2, 3, 16)})
