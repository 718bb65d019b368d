"""Inputs with which `fuse` runs a model."""

from __future__ import annotations

import numpy as np
from helpers.fuse_graphs import (
    Graph,
    H,
    make_model,
)
from onnx import TensorProto

import rotary_export
from rotary_export.fusion import fuse as fuse_module
from rotary_export.fusion.check import feeds


def test_inputs_mean_something_to_a_decoder():
    g = Graph()
    ids = g.input("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    mask = g.input("attention_mask", ["batch_size", "past_sequence_length + sequence_length"], 7)
    position = g.input("position_ids", ["batch_size", "sequence_length"], TensorProto.INT64)
    past = g.input("past_key_values.0.key", ["batch_size", 2, "past_sequence_length", H])
    flag = g.input("use_cache", [1], TensorProto.BOOL)
    table = g.const(np.zeros((11, 4), "f"))
    g.output(g.op("Gather", table, ids), "out")
    for name in (mask, position, past, flag):
        g.output(name, f"{name}_out")
    model = fuse_module.read_model(g.model())
    made = feeds.make_feeds(model.graph, feeds.Shape(3, 4, 5))
    assert made["input_ids"].shape == (3, 4)
    assert made["input_ids"].max() < 11
    assert made["attention_mask"].shape == (3, 9)
    assert made["attention_mask"].all()
    np.testing.assert_array_equal(made["position_ids"][1], [5, 6, 7, 8])
    assert made["past_key_values.0.key"].shape == (3, 2, 5, H)
    assert made["use_cache"].all()


def test_given_inputs_are_used():
    case = {"position_ids": np.array([[0, 1, 2, 39]])}
    result = rotary_export.fuse(make_model(), shapes=[(1, 4, 0)], inputs=[case])
    assert {row.shape.length for row in result.check.comparisons} == {4}
