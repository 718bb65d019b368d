"""The op library in ONNX Runtime: random inputs, extreme values and sizes, threads, errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.cases import ID_FORMS, TYPES, make_inputs
from helpers.function_bodies import ONNX_TYPES, collect_onnx_cases
from helpers.op_library import (
    check_against_eager,
    load_model,
    make_graph_model,
    random_float32_cases,
    run_session,
)
from helpers.oracles import assert_same_bits, compute_eager
from onnx import TensorProto, helper, numpy_helper

from rotary_export.errors import RotaryExportError
from rotary_export.op import spec

# ---- many inputs


def test_2000_random_float32_cases_have_the_bits_of_eager():
    for case, (inputs, interleaved, rotary_dim) in enumerate(random_float32_cases(2000, seed=2)):
        what = f"case {case}, {[tuple(x.shape) for x in inputs.values()]}"
        check_against_eager(inputs, what, interleaved=interleaved, rotary_embedding_dim=rotary_dim)


def test_onnx_s_own_cases_run_once_the_domain_is_changed():
    cases = collect_onnx_cases()
    assert len(cases) == 8
    for case in cases:
        model = case.model
        model.graph.node[0].domain = spec.DOMAIN
        model.opset_import.append(helper.make_opsetid(spec.DOMAIN, spec.OP_VERSION))
        session = load_model(model)
        for inputs, outputs in case.data_sets:
            names = [i.name for i in model.graph.input]
            arrays = [numpy_helper.to_array(x) if hasattr(x, "dims") else x for x in inputs]
            (y,) = session.run(None, dict(zip(names, arrays, strict=True)))
            np.testing.assert_allclose(
                y, outputs[0], rtol=case.rtol, atol=case.atol, err_msg=case.name
            )


# ---- values and sizes at the edges


@pytest.mark.parametrize("interleaved", [0, 1], ids=["half", "interleaved"])
@pytest.mark.parametrize("x_type", ["float16", "bfloat16"])
def test_every_half_value_is_loaded_exactly(x_type, interleaved):
    rng = np.random.default_rng(3)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(TYPES[x_type])
    inputs = make_inputs(rng, (x_type, "float32"), "tables-shared", sizes=(1, 1, 1024, 64))
    inputs["X"] = every.reshape(1, 1, 1024, 64)
    check_against_eager(inputs, interleaved=interleaved)
    # Every value as a table entry, too; the tables' own conversion is another loop.
    inputs = make_inputs(rng, (x_type, x_type), "tables-shared", sizes=(1, 1, 1024, 128))
    inputs["cos_cache"] = every.reshape(1, 1024, 64)
    check_against_eager(inputs, interleaved=interleaved)


@pytest.mark.parametrize("x_type", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even_for_every_kind_of_float32(x_type):
    # x = (1, 0), sin = 0: y is cos, rounded once. Bit patterns over all of float32, then values a
    # bit's breadth around every tie of the half type.
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    lower = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16)
    ties = (lower.view(TYPES[x_type]).double() + (lower + 1).view(TYPES[x_type]).double()) / 2
    tie_bits = ties.float().view(torch.int32).numpy().view(np.uint32)
    patterns = np.concatenate([bits, tie_bits - 1, tie_bits, tie_bits + 1])
    cos = torch.from_numpy(patterns[: len(patterns) // 64 * 64].view(np.float32)).reshape(1, -1, 64)
    x = torch.zeros(1, 1, cos.shape[1], 128, dtype=TYPES[x_type])
    x[..., :64] = 1
    check_against_eager({"X": x, "cos_cache": cos, "sin_cache": torch.zeros_like(cos)})


@pytest.mark.parametrize("types", spec.TYPE_PAIRS, ids="-".join)
def test_nan_and_infinity_pass(types):
    inputs = make_inputs(np.random.default_rng(5), types, kv_heads=1, rotary_dim=4, scaled=True)
    for name, x in inputs.items():
        if name != "position_ids":
            x.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=x.dtype)
    (y, _) = run_session(inputs, rotary_embedding_dim=4)
    assert y.isnan().any()
    check_against_eager(inputs, rotary_embedding_dim=4)


def test_tail_keeps_the_bits_of_a_signalling_nan():
    inputs = make_inputs(np.random.default_rng(6), rotary_dim=4)
    inputs["X"].view(torch.int32)[..., 4:] = 0x7F800001
    (y,) = run_session(inputs, rotary_embedding_dim=4)
    assert (y.view(torch.int32)[..., 4:] == 0x7F800001).all()


@pytest.mark.parametrize("sizes", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 0, 5, 8), (0, 3, 0, 8)], ids=str)
@pytest.mark.parametrize("form", ID_FORMS)
def test_empty_inputs_give_empty_outputs(sizes, form):
    inputs = make_inputs(np.random.default_rng(7), form=form, sizes=sizes, kv_heads=1)
    if form == "offset":
        # Without rows, no position is bad.
        inputs["position_ids"][0] = 0 if sizes[0] and sizes[2] else -1
    y, _ = run_session(inputs)
    assert y.shape == inputs["X"].shape


def test_more_positions_than_table_rows():
    inputs = make_inputs(np.random.default_rng(8), sizes=(2, 3, 40, 8), kv_heads=2)
    for table in ("cos_cache", "sin_cache"):
        inputs[table] = inputs[table][:4].clone()
    inputs["position_ids"] %= 4
    check_against_eager(inputs)


def test_rotary_dim_past_the_kernel_s_table_buffers():
    for types in (("float16", "float16"), ("float32", "float32")):
        inputs = make_inputs(
            np.random.default_rng(9), types, sizes=(1, 2, 3, 5000), kv_heads=1, scaled=True
        )
        check_against_eager(inputs)
        check_against_eager(inputs, interleaved=1)


# ---- how ORT runs it


def test_two_threads_give_the_bits_of_one():
    inputs = make_inputs(np.random.default_rng(10), sizes=(2, 8, 2048, 64), kv_heads=2)
    for one, two in zip(run_session(inputs), run_session(inputs, threads=2), strict=True):
        assert_same_bits(two, one)
    check_against_eager(inputs, threads=2)


def test_a_chain_of_ops_with_static_shapes_runs_in_place():
    inputs = make_inputs(np.random.default_rng(11), kv_heads=3, rotary_dim=4, scaled=True)
    extra = [name for name in spec.INPUTS[1:] if name != "key"]
    names = [("X", "key"), ("y1", "k1"), ("y2", "k2"), ("Y", "key_out")]
    nodes = [
        helper.make_node(
            spec.OP_TYPE,
            [x, *extra[:3], key, *extra[3:]],
            outputs,
            domain=spec.DOMAIN,
            rotary_embedding_dim=4,
        )
        for (x, key), outputs in itertools.pairwise(names)
    ]

    def info(name: str, like: str) -> object:
        return helper.make_tensor_value_info(
            name, ONNX_TYPES[inputs[like].dtype], list(inputs[like].shape)
        )

    graph = helper.make_graph(
        nodes,
        "chain",
        [info(name, name) for name in inputs],
        [info("Y", "X"), info("key_out", "key")],
        value_info=[
            info(n, like) for pair in names[1:3] for n, like in zip(pair, ("X", "key"), strict=True)
        ],
    )
    got = load_model(make_graph_model(graph)).run(None, {k: v.numpy() for k, v in inputs.items()})
    for _ in range(3):
        inputs["X"], inputs["key"] = compute_eager(inputs, False)
    assert_same_bits(torch.from_numpy(got[0]), inputs["X"])
    assert_same_bits(torch.from_numpy(got[1]), inputs["key"])


@pytest.mark.skipif(
    tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 24),
    reason="the op has no shape inference before 1.24 (see csrc/ort/register_ops.cc)",
)
def test_shapes_are_inferred_with_their_symbols():
    node = helper.make_node(
        spec.OP_TYPE, ["X", "c", "c", "", "key"], ["Y", "key_out"], domain=spec.DOMAIN
    )
    shapes = {"X": ["batch", 4, "seq", 8], "c": None, "key": ["batch", 2, "seq", 8]}
    graph = helper.make_graph(
        [node],
        "shapes",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in spec.OUTPUTS],
    )
    y, key_out = load_model(make_graph_model(graph)).get_outputs()
    assert y.shape == shapes["X"]
    assert key_out.shape == shapes["key"]


# ---- errors, with the messages of spec.py

X, COS = (2, 3, 5, 8), (9, 4)
IDS = {"position_ids": (2, 5)}
BAD_SHAPES: dict[str, dict[str, object]] = {
    "x-rank-2": {"X": (2, 8)},
    "x-rank-5": {"X": (1, 2, 3, 5, 8)},
    "x-3d-without-num-heads": {"X": (2, 5, 24)},
    "x-3d-negative-num-heads": {"X": (2, 5, 24), "num_heads": -3},
    "x-3d-num-heads-do-not-divide": {"X": (2, 5, 24), "num_heads": 5},
    "rotary-dim-odd": {"rotary_embedding_dim": 3},
    "rotary-dim-negative": {"rotary_embedding_dim": -2},
    "rotary-dim-too-large": {"rotary_embedding_dim": 10},
    "head-dim-odd": {"X": (2, 3, 5, 7)},
    "head-dim-0": {"X": (2, 3, 5, 0)},
    "cos-too-wide": {"cos_cache": (9, 8)},
    "cos-3d-with-ids": {"cos_cache": (2, 5, 4)},
    "cos-1d-with-ids": {"cos_cache": (4,)},
    "cos-2d-without-ids": {"position_ids": None},
    "cos-batch": {"position_ids": None, "cos_cache": (3, 5, 4)},
    "cos-length": {"position_ids": None, "cos_cache": (2, 6, 4)},
    "ids-1d": {"position_ids": (5,)},
    "ids-scalar": {"position_ids": ()},
    "ids-batch": {"position_ids": (3, 5)},
    "ids-length": {"position_ids": (2, 4)},
    "ids-3d": {"position_ids": (1, 2, 5)},
    "sin": {"sin_cache": (9, 3)},
    "scale": {"scale_cache": (8, 4)},
    "scale-rank": {"scale_cache": (4,)},
    "key-rank": {"key": (2, 5, 24), "kv_num_heads": 3},
    "key-batch": {"key": (1, 3, 5, 8)},
    "key-length": {"key": (2, 3, 4, 8)},
    "key-head-dim": {"key": (2, 3, 5, 6)},
    "key-3d-without-kv-num-heads": {"X": (2, 5, 24), "num_heads": 3, "key": (2, 5, 24)},
    "key-3d-head-dim": {"X": (2, 5, 24), "num_heads": 3, "key": (2, 5, 24), "kv_num_heads": 2},
    "two-errors-the-first-is-reported": {"cos_cache": (9, 8), "sin_cache": (9, 3), "key": (2, 8)},
}


@pytest.mark.parametrize("bad", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes_are_refused_with_spec_s_message(bad):
    call = {"X": X, "cos_cache": COS, "sin_cache": None, **IDS, **bad}
    call["sin_cache"] = call["sin_cache"] or call["cos_cache"]
    attributes = {k: v for k, v in call.items() if isinstance(v, int)}
    with pytest.raises(RotaryExportError) as stated:
        spec.check_inputs([call.get(name) for name in spec.INPUTS], **attributes)

    def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64 if name == "position_ids" else torch.float32)

    shapes = {k: v for k, v in call.items() if isinstance(v, tuple)}
    with pytest.raises(Exception, match="RotaryEmbedding node") as raised:
        run_session({k: fill(k, v) for k, v in shapes.items()}, **attributes)
    assert str(stated.value) in str(raised.value)


INT64 = torch.iinfo(torch.int64)
BAD_IDS = {
    "negative": ([[0, 1, 2], [3, -1, 99]], 4, (-1, 1, 1)),
    "too-large": ([[0, 4, 2], [3, 9, -1]], 4, (4, 0, 1)),
    "smallest": ([[0, 1, INT64.min], [0, 0, 0]], 4, (INT64.min, 0, 2)),
    "largest": ([[0, 1, 2], [0, 0, INT64.max]], 4, (INT64.max, 1, 2)),
    "shared": ([[0, 7, 8]], 4, (7, 0, 1)),
    "offset-negative": ([-1], 4, (-1, 0, 0)),
    "offset-runs-out": ([2], 4, (4, 0, 2)),
    "offset-at-the-end": ([4], 4, (4, 0, 0)),
    "offset-largest": ([INT64.max], 4, (INT64.max, 0, 0)),
    "offset-largest-less-1": ([INT64.max - 1], 4, (INT64.max - 1, 0, 0)),
    "offset-smallest": ([INT64.min], 4, (INT64.min, 0, 0)),
    "no-rows": ([[0, 0, 0]], 0, (0, 0, 0)),
}


@pytest.mark.parametrize(("ids", "rows", "first_bad"), BAD_IDS.values(), ids=BAD_IDS)
def test_an_id_outside_the_tables_is_refused_and_nothing_is_written(ids, rows, first_bad):
    table = torch.zeros(rows, 4)
    inputs = {
        "X": torch.zeros(2, 1, 3, 8),
        "cos_cache": table,
        "sin_cache": table,
        "position_ids": torch.tensor(ids),
    }
    bad_id, batch, row = first_bad
    with pytest.raises(Exception, match="RotaryEmbedding node") as raised:
        run_session(inputs)
    assert spec.bad_id_message(bad_id, batch, row, rows) in str(raised.value)


@pytest.mark.parametrize(("inputs", "outputs"), [("key", ["Y"]), ("", ["Y", "key_out"])])
def test_key_and_key_out_go_together(inputs, outputs):
    node = helper.make_node(spec.OP_TYPE, ["X", "c", "c", "", inputs], outputs, domain=spec.DOMAIN)
    names = ["X", "c", *([inputs] if inputs else [])]
    graph = helper.make_graph(
        [node],
        "key",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )
    feeds = {n: np.zeros((1, 1, 2) if n == "c" else (1, 1, 1, 4), np.float32) for n in names}
    with pytest.raises(Exception, match="key_out must be given if and only if key is, got key"):
        load_model(make_graph_model(graph)).run(None, feeds)


def test_types_without_a_kernel_are_refused_at_load():
    for types in (("float32", "float16"), ("float16", "float64"), ("bfloat16", "float16")):
        with pytest.raises(Exception, match="RotaryEmbedding"):
            run_session(make_inputs(np.random.default_rng(12), types))
