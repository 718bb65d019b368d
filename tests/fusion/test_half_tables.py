"""Tables that are computed in a half type: found, refused, and put back to float32 on request."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    find_rotary,
    rotate_half,
    run,
)
from onnx import TensorProto, numpy_helper
from onnxscript import ir

import rotary_export
from rotary_export.cli.main import cli
from rotary_export.errors import CheckFailedError
from rotary_export.fusion import fuse as fuse_module
from rotary_export.fusion.half_frequencies import restore_inv_freq

F16, F32, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
HALF = H // 2
INV_FREQ = 10000.0 ** -(np.arange(HALF) / HALF)
POSITIONS = np.array([[0, 1, 300, 2049, 3001, 20001]])


def make_ids(g: Graph) -> str:
    return g.unsqueeze(g.input("position_ids", ["batch", "seq"], TensorProto.INT64), -1)


def make_half(g: Graph) -> str:
    """All in float16."""
    wide = g.op("Cast", make_ids(g), to=F16)
    return g.op("Mul", wide, g.const(INV_FREQ.astype(np.float16)))


def make_cast_before_turn(g: Graph) -> str:
    """Computed in float16, widened for the cosine."""
    return g.op("Cast", make_half(g), to=F32)


def make_half_positions(g: Graph) -> str:
    """Positions rounded, all else in float32."""
    narrow = g.op("Cast", make_ids(g), to=F16)
    wide = g.op("Cast", narrow, to=F32)
    return g.op("Mul", wide, g.const(INV_FREQ.astype(np.float32)))


def make_rounded_angles(g: Graph) -> str:
    """Angles of float32, rounded before the cosine."""
    wide = g.op("Cast", make_ids(g), to=F32)
    return g.op("Cast", g.op("Mul", wide, g.const(INV_FREQ.astype(np.float32))), to=F16)


def make_frequencies(g: Graph) -> str:
    """Frequencies computed in the graph, too."""
    steps = g.op("Range", *(g.const(np.array(i, np.int64)) for i in (0, HALF, 1)))
    exponents = g.op("Div", g.op("Cast", steps, to=F16), g.const(np.float16(HALF)))
    powers = g.op("Pow", g.const(np.float16(10000)), exponents)
    inv_freq = g.op("Reciprocal", powers)
    return g.op("Mul", g.op("Cast", make_ids(g), to=F16), inv_freq)


ANGLES = {
    "half": make_half,
    "widened": make_cast_before_turn,
    "positions": make_half_positions,
    "rounded": make_rounded_angles,
    "frequencies": make_frequencies,
}


def rotate(g: Graph, angles: str, factor: float = 1.0) -> None:
    """Query and key in float16, by tables of angles that may be float32."""
    angles = g.join(angles, angles)
    tables = []
    for function in ("Cos", "Sin"):
        table = g.op("Cast", g.op(function, angles), to=F16)
        if factor != 1.0:
            table = g.op("Mul", table, g.const(np.float16(factor)))
        tables.append(g.unsqueeze(table, 1))
    for x in add_query_key(g):
        g.output(add_products(g, x, tables[0], rotate_half(g, x), tables[1]), f"{x}_out")


def make_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length = POSITIONS.shape[1]
    draw = {name: rng.normal(size=(1, n, length, H)) for name, n in (("query", 4), ("key", 2))}
    return {name: x.astype(np.float16) for name, x in draw.items()} | {"position_ids": POSITIONS}


def compute_truth(factor: float = 1.0) -> list[np.ndarray]:
    feeds = make_feeds()
    angles = POSITIONS[0][:, None] * np.concatenate((INV_FREQ, INV_FREQ))
    found = []
    for name in ("query", "key"):
        x = feeds[name].astype(np.float64)
        turned = np.concatenate((-x[..., HALF:], x[..., :HALF]), -1)
        found.append(factor * (x * np.cos(angles) + turned * np.sin(angles)))
    return found


def check_truth(model: onnx.ModelProto, factor: float = 1.0) -> None:
    for got, want in zip(run(model, make_feeds()), compute_truth(factor), strict=False):
        np.testing.assert_allclose(got, want, rtol=0, atol=6e-3 * factor)


@pytest.mark.parametrize("make", ANGLES.values(), ids=ANGLES)
def test_tables_in_half_are_refused_and_put_back_on_request(make):
    g = Graph(element=F16)
    rotate(g, make(g))
    message = (
        r"^tables computed in float16 in 2 of 2 rotary calls, the first of which is \S+: that is "
        "wrong from a few hundred positions on, and runtimes do not agree on it; pass "
        r"float32_tables=True \(--float32-tables\) to compute them in float32$"
    )
    with pytest.raises(CheckFailedError, match=message):
        rotary_export.fuse(g.model())
    result = rotary_export.fuse(g.model(), float32_tables=True)
    assert len(result.half_tables) == len(result.fused) == 2
    assert set(result.half_tables.values()) == {"float16"}
    assert "computed in float32 (float32_tables)" in result.check.notes[0]
    check_truth(result.model)


def test_the_tables_of_the_node_are_float32_and_the_factor_is_not_rounded_twice():
    g = Graph(element=F16)
    rotate(g, make_half(g), factor=1.2)
    result = rotary_export.fuse(g.model(), float32_tables=True)
    (node,) = find_rotary(result.model)
    model = onnx.shape_inference.infer_shapes(result.model)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert [types[name] for name in node.input[1:3]] == [F32, F32]
    check_truth(result.model, factor=float(np.float16(1.2)))


def test_the_model_before_is_the_same_with_that_part_in_float32(monkeypatch):
    """Not the file as it was read, which is equal to itself and wrong."""
    seen = []

    def look(before, *more):
        seen.append(ir.serde.serialize_model(before))
        return compared(before, *more)

    compared = fuse_module.compare_models
    monkeypatch.setattr(fuse_module, "compare_models", look)
    g = Graph(element=F16)
    rotate(g, make_half(g))
    source = g.model()
    given = source.SerializeToString()
    rotary_export.fuse(source, float32_tables=True)
    assert source.SerializeToString() == given
    assert not find_rotary(seen[0])
    check_truth(seen[0])
    with pytest.raises(AssertionError):
        check_truth(source)


def test_float32_tables_change_nothing_where_tables_are_float32():
    g = Graph(element=F16)
    wide = g.op("Cast", make_ids(g), to=F32)
    rotate(g, g.op("Mul", wide, g.const(INV_FREQ.astype(np.float32))))
    results = [rotary_export.fuse(g.model(), float32_tables=flag) for flag in (False, True)]
    assert results[0].model == results[1].model
    assert (results[1].half_tables, results[1].check.notes) == ({}, [])


def test_frequencies_that_are_stored_in_half_and_widened_are_the_model_s_own():
    """Rounded once, where the model was converted; every runtime computes the same of them."""
    g = Graph(element=F16)
    inv_freq = g.op("Cast", g.const(INV_FREQ.astype(np.float16)), to=F32)
    rotate(g, g.op("Mul", g.op("Cast", make_ids(g), to=F32), inv_freq))
    assert rotary_export.fuse(g.model()).half_tables == {}


def write_other_turn(g: Graph) -> str:
    """The embedding of a time step in half: its sines are no tables, and part of what is turned."""
    step = g.input("timestep", ["batch"], TensorProto.INT64)
    angles = g.op("Mul", g.op("Cast", g.unsqueeze(step, -1), to=F16), g.const(np.float16(0.01)))
    return g.op("Sin", angles, out="time")


def test_other_cosines_in_half_are_neither_refused_nor_changed():
    g = Graph(element=F16)
    wide = g.op("Cast", make_ids(g), to=F32)
    angles = g.op("Mul", wide, g.const(INV_FREQ.astype(np.float32)))
    angles = g.join(angles, angles)
    cos, sin = (g.unsqueeze(g.op("Cast", g.op(f, angles), to=F16), 1) for f in ("Cos", "Sin"))
    time = g.op("Unsqueeze", write_other_turn(g), g.ints(1, 2))
    for x in add_query_key(g):
        x = g.op("Add", x, time)
        g.output(add_products(g, x, cos, rotate_half(g, x), sin), f"{x}_out")
    assert rotary_export.fuse(g.model()).half_tables == {}


def test_only_the_tables_are_put_to_float32():
    g = Graph(element=F16)
    rotate(g, make_half(g))
    g.output(write_other_turn(g), "time_out")
    result = rotary_export.fuse(g.model(), float32_tables=True)
    (turn,) = (node for node in result.model.graph.node if "time_out" in node.output)
    (scaled,) = (node for node in result.model.graph.node if turn.input[0] in node.output)
    (cast,) = (node for node in result.model.graph.node if scaled.input[0] in node.output)
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", F16)


def test_turns_that_each_call_computes_anew_are_all_put_back():
    """As torch writes `ai.onnx::RotaryEmbedding`: normalisation makes one of them, by its name."""
    g = Graph(23, F16)
    angles = make_half(g)
    for x in add_query_key(g):
        y = g.op("RotaryEmbedding", x, g.op("Cos", angles), g.op("Sin", angles))
        g.output(y, f"{x}_out")
    model = g.model()
    with pytest.raises(CheckFailedError, match="tables computed in float16 in 2 of 2 rotary call"):
        rotary_export.fuse(model)
    result = rotary_export.fuse(model, float32_tables=True)
    assert (result.nodes, len(result.fused)) == (1, 2)
    check_truth(result.model)


def test_a_table_that_is_an_output_keeps_its_name_and_type():
    g = Graph(element=F16)
    rotate(g, make_half(g))
    cosine = next(node for node in g.nodes if node.op_type == "Cos")
    cosine.output[0] = "cosine"
    for node in g.nodes:
        node.input[:] = ["cosine" if name == "v4_0" else name for name in node.input]
    model = g.model()
    assert not any("v4_0" in node.output for node in model.graph.node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("cosine", F16, None))
    result = rotary_export.fuse(model, float32_tables=True)
    assert result.model.graph.output[-1].name == "cosine"
    cos = run(result.model, make_feeds())[-1]
    want = np.cos(POSITIONS[0][:, None] * np.concatenate((INV_FREQ, INV_FREQ)))
    assert cos.dtype == np.float16
    np.testing.assert_allclose(cos[0], want, rtol=0, atol=1e-3)


def test_bfloat16_is_named():
    g = Graph(element=BF16)
    ids = g.op("Cast", make_ids(g), to=BF16)
    inv_freq = g.op("Cast", g.const(INV_FREQ.astype(np.float32)), to=BF16)
    angles = g.op("Mul", ids, inv_freq)
    angles = g.join(angles, angles)
    cos, sin = (g.unsqueeze(g.op(f, angles), 1) for f in ("Cos", "Sin"))
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, rotate_half(g, x), sin), f"{x}_out")
    with pytest.raises(CheckFailedError, match="tables computed in bfloat16 in 2 of 2"):
        rotary_export.fuse(g.model())
    result = rotary_export.fuse(g.model(), float32_tables=True)
    assert set(result.half_tables.values()) == {"bfloat16"}


def test_what_can_t_be_put_back_is_refused():
    """Angles that a branch computes: it is not known to be arithmetic alone."""
    g = Graph(element=F16)
    wide = g.op("Cast", make_ids(g), to=F16)
    node = onnx.helper.make_node("Mul", [wide, "frequencies"], ["inside"])
    value = onnx.helper.make_tensor_value_info("inside", F16, None)
    branch = onnx.helper.make_graph([node], "branch", [], [value])
    g.stored.append(numpy_helper.from_array(INV_FREQ.astype(np.float16), "frequencies"))
    flag = g.op("Equal", g.op("Size", "position_ids"), g.const(np.int64(3)))
    rotate(g, g.op("If", flag, then_branch=branch, else_branch=branch))
    with pytest.raises(CheckFailedError, match=r"float16 in 2 of 2 .*; they can't be put back to"):
        rotary_export.fuse(g.model(), float32_tables=True)


# ---- frequencies


@pytest.mark.parametrize("base", [10000, 500000, 1e6, 150000, 5e6, 100, 10500])
@pytest.mark.parametrize("n", [4, 16, 32, 64, 128])
def test_frequencies_of_a_round_base_are_restored(base, n):
    exact = float(base) ** -(np.arange(n) / n)
    stored = exact.astype(np.float16)[None, :, None]
    restored, found = restore_inv_freq(stored)
    assert found == pytest.approx(base, rel=1e-12)
    assert restored.dtype == np.float32
    assert restored.shape == stored.shape
    np.testing.assert_array_equal(restored.reshape(-1), exact.astype(np.float32))


def make_llama3(n: int) -> np.ndarray:
    inv_freq = 500000.0 ** -(np.arange(n) / n)
    return np.where(np.arange(n) < n // 2, inv_freq, inv_freq / 8)


OTHERS = {
    "scaled": make_llama3(32),
    "odd-base": 12345.678 ** -(np.arange(64) / 64),
    "few": np.array([1, 0.1, 0.01]),
    "rising": np.linspace(1, 2, 16),
    "matrix": np.ones((4, 4)),
    "not-one": 0.5 * 10000.0 ** -(np.arange(32) / 32),
    "learned": np.exp(-(np.linspace(0, 9, 32) ** 1.01)),
}


@pytest.mark.parametrize("inv_freq", OTHERS.values(), ids=OTHERS)
def test_other_frequencies_are_not_restored(inv_freq):
    assert restore_inv_freq(inv_freq.astype(np.float16)) is None


def test_what_was_done_about_the_frequencies_is_said():
    g = Graph(element=F16)
    rotate(g, make_half(g))
    result = rotary_export.fuse(g.model(), float32_tables=True)
    assert result.check.notes[1:] == [
        "c1 is stored in float16; it is restored to float32 as the frequencies of base 10000, "
        "which round to what is stored"
    ]
    g = Graph(element=F16)
    own = np.array([1, 0.7, 0.3, 0.1], np.float16)
    rotate(g, g.op("Mul", g.op("Cast", make_ids(g), to=F16), g.const(own)))
    result = rotary_export.fuse(g.model(), float32_tables=True)
    assert result.check.notes[1:] == [
        "c1 is stored in float16, and has no closed form that restores it: what was rounded when "
        "the file was converted stays rounded"
    ]


# ---- the command


def test_the_command_says_it_and_puts_it_back(tmp_path):
    g = Graph(element=F16)
    rotate(g, make_half(g))
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(g.model(), source)
    result = CliRunner().invoke(cli, ["fuse", str(source), str(out)])
    assert (result.exit_code, out.exists()) == (1, False)
    assert "tables computed in float16 in 2 of 2 rotary calls" in result.stderr
    dry = CliRunner().invoke(cli, ["fuse", str(source), "--dry-run"])
    assert dry.exit_code == 0
    assert "tables computed in float16 in 2 of 2 rotary calls; --float32-tables" in dry.stdout
    options = ["fuse", str(source), str(out), "--float32-tables"]
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    assert "note: compared with the model whose positions, angles" in result.stdout
    assert "frequencies of base 10000" in " ".join(result.stdout.split())
    check_truth(onnx.load(out))
    report = json.loads(CliRunner().invoke(cli, [*options, "--force", "--json"]).stdout)
    assert set(report["half_tables"].values()) == {"float16"}
    assert len(report["notes"]) == 2
