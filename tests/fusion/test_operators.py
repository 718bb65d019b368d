"""Attention and norms in ONNX's own operators: what is rewritten, and what only looks like it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.decoders import export_decoder, get_decoder
from helpers.tiny_models import make_model
from onnxscript import ir

from rotary_export.fusion.operators.apply import write_operators
from rotary_export.fusion.operators.separate import separate_heads

# As torch.onnx writes a decoder's attention: 4 query heads, 2 of key and value.
DECODER = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (
    float[B,4,S,8] query, float[B,2,S,8] key, float[B,2,S,8] value, float[B,1,S,T] mask,
    float[B,2,P,8] past_key, float[B,2,P,8] past_value
) => (float[B,4,S,8] y, float[B,2,T,8] present_key, float[B,2,T,8] present_value)
<
    float[B,2,1,T,8] one_key, float[B,2,1,T,8] one_value,
    float[B,2,2,T,8] wide_key, float[B,2,2,T,8] wide_value,
    float[B,4,T,8] many_keys, float[B,4,T,8] many_values, float[B,4,S,8] result,
    int64[1] axis = {2}, int64[5] members = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 8}
>
{
    present_key = Concat<axis = -2>(past_key, key)
    present_value = Concat<axis = -2>(past_value, value)
    one_key = Unsqueeze(present_key, axis)
    wide_key = Expand(one_key, members)
    many_keys = Reshape(wide_key, heads)
    one_value = Unsqueeze(present_value, axis)
    wide_value = Expand(one_value, members)
    many_values = Reshape(wide_value, heads)
    result = Attention<is_causal = 0, scale = 0.5>(query, many_keys, many_values, mask)
    shape = Shape(result)
    y = Reshape(result, shape)
}
"""
# The members of a group in front of the heads: query head 1 then reads head 1, not head 0.
TILED = {
    "int64[1] axis = {2}": "int64[1] axis = {1}",
    "members = {1, 1, 2, 1, 1}": "members = {1, 2, 1, 1, 1}",
    "float[B,2,1,T,8] one_key, float[B,2,1,T,8] one_value": (
        "float[B,1,2,T,8] one_key, float[B,1,2,T,8] one_value"
    ),
}
UNNAMED = {"float[B,4,T,8] many_keys, float[B,4,T,8] many_values,": ""}
OF_ALL_POSITIONS = (
    "float[B,2,1,T,8] one_key, float[B,2,1,T,8] one_value",
    "float[B,2,2,T,8] wide_key, float[B,2,2,T,8] wide_value",
    "float[B,4,T,8] many_keys, float[B,4,T,8] many_values",
)
NOT_GROUPED = {"tiled": TILED, "of unknown heads": UNNAMED}
SIZES = ((2, 3, 5), (3, 1, 7), (1, 4, 0))  # batch_size, seq_len, past


def make(changes=()):
    text = DECODER
    for old, new in dict(changes).items():
        assert old in text
        text = text.replace(old, new)
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def count(model):
    return Counter(node.op_type for node in model.graph)


def run(model):
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    results = []
    for batch_size, seq_len, past in SIZES:
        sizes = {"B": batch_size, "S": seq_len, "P": past, "T": past + seq_len}
        generator = np.random.default_rng(past)
        feeds = {
            info.name: generator.standard_normal(
                [sizes.get(dim, dim) for dim in info.shape], np.float32
            )
            for info in session.get_inputs()
        }
        results += session.run(None, feeds)
    return results


def assert_same(model, before):
    for left, right in zip(run(model), before, strict=True):
        assert left.tobytes() == right.tobytes()


def test_attention_reads_the_cache_as_it_is():
    model = make()
    before = run(model)
    write_operators(model)
    assert [node.op_type for node in model.graph] == ["Attention"]
    (node,) = model.graph
    assert [value.name for value in node.outputs] == ["y", "present_key", "present_value"]
    assert node.attributes["scale"].as_float() == 0.5
    assert_same(model, before)

    separate_heads(model)
    model.graph.sort()
    assert count(model) == make_counts(Constant=6)
    assert_same(model, before)


def make_counts(**others):
    """Of the model before, without its last reshape."""
    return Counter(Concat=2, Unsqueeze=2, Expand=2, Reshape=2, Attention=1, **others)


@pytest.mark.parametrize("changes", NOT_GROUPED.values(), ids=NOT_GROUPED)
def test_heads_that_are_not_repeated_in_groups_stay(changes):
    model = make(changes)
    before = run(model)
    write_operators(model)
    assert count(model)["Expand"] == 2
    assert len(next(n for n in model.graph if n.op_type == "Attention").inputs) == 4
    assert_same(model, before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("is_causal = 0", "is_causal = 1"),  # with a cache, it counts from the end of the past
        ("Concat<axis = -2>(past_value, value)", "Concat<axis = -2>(value, past_value)"),
    ],
    ids=["causal", "new values first"],
)
def test_what_is_no_cache_of_attention_stays_joined(old, new):
    model = make({old: new})
    before = run(model)
    write_operators(model)
    assert (count(model)["Expand"], count(model)["Concat"]) == (0, 2)
    assert_same(model, before)


def test_heads_that_are_joined_are_no_cache():
    text = {
        "float[B,2,P,8] past_key, float[B,2,P,8] past_value": (
            "float[B,1,S,8] past_key, float[B,1,S,8] past_value"
        ),
        "float[B,2,S,8] key, float[B,2,S,8] value": "float[B,1,S,8] key, float[B,1,S,8] value",
        "Concat<axis = -2>(past_key, key)": "Concat<axis = 1>(past_key, key)",
        "Concat<axis = -2>(past_value, value)": "Concat<axis = 1>(past_value, value)",
    }
    model = make(text)
    write_operators(model)
    assert count(model)["Concat"] == 2


def test_a_mask_that_is_made_of_the_values_keeps_them_joined():
    """As in Doge: with present_value as an output of attention, the graph would be a cycle."""
    model = make(
        {
            "past_value, value)\n": (
                "past_value, value)\n"
                "    sums = ReduceSum<keepdims = 0>(present_value, ends)\n"
                "    rows = Unsqueeze(sums, middle)\n"
                "    own_mask = Add(mask, rows)\n"
            ),
            "many_values, mask)": "many_values, own_mask)",
            "int64[1] axis = {2}": "int64[2] ends = {1, 3}, int64[2] middle = {1, 2}, "
            "int64[1] axis = {2}",
        }
    )
    before = run(model)
    write_operators(model)
    assert (count(model)["Expand"], count(model)["Concat"]) == (0, 2)
    assert_same(model, before)


def test_heads_stay_repeated_where_a_cache_holds_them_so():
    model = make(
        {
            "float[B,2,P,8] past_key, float[B,2,P,8] past_value": (
                "float[B,4,P,8] past_key, float[B,4,P,8] past_value"
            ),
            "float[B,2,T,8] present_key, float[B,2,T,8] present_value": (
                "float[B,4,T,8] present_key, float[B,4,T,8] present_value"
            ),
            "    result = Attention": "    result, present_key, present_value = Attention",
            "    present_key = Concat<axis = -2>(past_key, key)\n": "",
            "    present_value = Concat<axis = -2>(past_value, value)\n": "",
            "Unsqueeze(present_key, axis)": "Unsqueeze(key, axis)",
            "Unsqueeze(present_value, axis)": "Unsqueeze(value, axis)",
            "many_values, mask)": "many_values, mask, past_key, past_value)",
        }
        | {old: old.replace("T", "S") for old in OF_ALL_POSITIONS}
    )
    before = run(model)
    write_operators(model)
    assert count(model)["Expand"] == 2
    assert_same(model, before)


# ---- of exported models


def read_counts(bundle):
    return count(ir.load(bundle / "model.onnx"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_decoder_has_one_node_for_each_attention_and_norm(family):
    model, bundle = get_decoder(family)
    layers = model.config.num_hidden_layers
    norms = 2 * layers + 1 if family == "llama" else 6 * layers + 1
    found = read_counts(bundle)
    assert found["Attention"] == found["RotaryEmbedding"] == layers
    assert found["RMSNormalization"] == norms
    assert found["Pow"] == found["Reciprocal"] == 0
    graph = ir.load(bundle / "model.onnx").graph
    for node in graph:
        if node.op_type == "Attention":
            assert [value.name for value in node.inputs[4:]] == [
                name.replace("present", "past_key_values")
                for name in (value.name for value in node.outputs[1:])
            ]


def test_opset_22_has_none_of_these_operators(tmp_path):
    model = make_model("llama", num_hidden_layers=1)
    found = read_counts(export_decoder(model, tmp_path / "b", opset=22))
    assert found["Attention"] == found["RMSNormalization"] == 0
