"""Rope types in whole models, on both sides of the lengths at which their angles change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_cache, make_inputs, make_model
from torch import nn

from rotary_export import export_model, load
from rotary_export.errors import UsageWarning

SHORT, LONG = [1.0 + i / 8 for i in range(8)], [3.0 + i for i in range(8)]
TYPES = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": SHORT,
                "long_factor": LONG,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("case", TYPES.values(), ids=TYPES.keys())
def test_both_sides_of_the_switch(tmp_path, case):
    family, changed = case
    model = make_model(family, **changed)
    formats = ["onnx", "torchscript"]
    bundle = export_model(model, make_inputs(model), tmp_path / "bundle", formats=formats)
    assert bundle.manifest.config["length_thresholds"] == [16]
    tried = bundle.report.shapes["model"]
    assert {"batch_size 2, seq_len 16", "batch_size 2, seq_len 17"} <= set(tried)

    def run_fresh(length):
        fresh = make_model(family, **changed)
        with torch.no_grad():
            return fresh(input_ids=ids[:, :length], use_cache=False).logits.numpy()

    # The first rows of a longer input differ: all angles changed. No call remembers another.
    ids = torch.arange(3 * 24).reshape(3, 24) % 96
    assert abs(run_fresh(24)[:, :9] - run_fresh(9)).max() > 1e-3
    for options in ({}, {"use_op_library": False}, {"runtime": "torchscript", "allow_code": True}):
        session = load(bundle, "model", **options)
        for length in (24, 9, 17, 16):
            got = session(
                input_ids=ids[:, :length].contiguous(),
                attention_mask=torch.ones(3, length, dtype=torch.int64),
                position_ids=torch.arange(length).repeat(3, 1),
            )["logits"].numpy()
            want = run_fresh(length)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * abs(want).max())


def test_a_cache_past_the_switch_is_warned_of(tmp_path):
    family, changed = TYPES["longrope"]
    model = make_model(family, num_hidden_layers=1, **changed)
    inputs = make_inputs(model) | {"past_key_values": make_cache([])}
    with pytest.warns(UsageWarning, match="longrope changes .* past 16 tokens, but keys"):
        bundle = export_model(model, inputs, tmp_path / "b", formats=["onnx"], quick=True)
    assert "past 16 tokens" in bundle.manifest.parity["notes"][-1]


class Wrapped(nn.Module):
    """A model inside another, which has no config of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("threshold", [16, 2048, 8192])
def test_the_switch_of_a_model_inside_another(tmp_path, threshold):
    family, changed = TYPES["dynamic"]
    model = Wrapped(make_model(family, **changed | {"max_position_embeddings": threshold}))
    inputs = {"input_ids": torch.arange(14).reshape(2, 7)}
    bundle = export_model(model, inputs, tmp_path / "bundle", formats=["onnx"])
    assert bundle.manifest.config["length_thresholds"] == [threshold]
    batch = 2 if threshold == 16 else 1
    is_tried = f"batch_size {batch}, seq_len {threshold + 1}" in bundle.report.shapes["model"]
    skipped = bundle.report.unverified.get("lengths > 8192, where its angles change", "")
    assert is_tried == (threshold < 8192)
    assert ("more than 4096" in skipped) == (threshold == 8192)
