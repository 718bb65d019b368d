"""The op as ONNX Runtime runs it: shape inference, memory, attributes, other versions."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.cases import ID_FORMS, flatten_heads, make_inputs
from helpers.op_library import check_against_eager, load_model, make_graph_model
from helpers.oracles import Tensors, assert_same_bits, compute_eager
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rotary_export.op import library as op_library
from rotary_export.op import spec

LIBRARY = op_library.op_library_path()
Shape = list[int | str] | None
ORT_MINOR = int(ort.__version__.split(".")[1])
NEEDS_INFERENCE = pytest.mark.skipif(
    ORT_MINOR < 24, reason="the op has no shape inference before 1.24 (see ort/register_ops.cc)"
)


def make_node(inputs: list[str], outputs: list[str], **attributes: int) -> NodeProto:
    return helper.make_node(spec.OP_TYPE, inputs, outputs, domain=spec.DOMAIN, **attributes)


def load(
    nodes: list[NodeProto],
    inputs: dict[str, Shape],
    outputs: dict[str, Shape],
    *,
    library: str | None = None,
    initializers: Tensors | None = None,
    value_info: dict[str, Shape] | None = None,
) -> ort.InferenceSession:
    """Return a session; all values are float32 but position_ids."""

    def describe(shapes: dict[str, Shape]) -> list[object]:
        types = {name: TensorProto.FLOAT for name in shapes} | {"position_ids": TensorProto.INT64}
        return [helper.make_tensor_value_info(n, types[n], shape) for n, shape in shapes.items()]

    graph = helper.make_graph(
        nodes,
        "test",
        describe(inputs),
        describe(outputs),
        [numpy_helper.from_array(x.numpy(), name) for name, x in (initializers or {}).items()],
        value_info=describe(value_info or {}),
    )
    return load_model(make_graph_model(graph), library=library)


def run(session: ort.InferenceSession, inputs: Tensors) -> list[torch.Tensor]:
    names = [value.name for value in session.get_inputs()]
    got = session.run(None, {name: inputs[name].numpy() for name in names})
    return [torch.from_numpy(y) for y in got]


# ---- shape inference


@NEEDS_INFERENCE
def test_outputs_have_the_symbolic_shapes_of_their_inputs():
    shapes: dict[str, Shape] = {"X": ["b", 4, "s", 8], "key": ["b", 2, "s", 8], "c": None}
    session = load(
        [make_node(["X", "c", "c", "", "key"], ["Y", "K"])], shapes, {"Y": None, "K": None}
    )
    assert [y.shape for y in session.get_outputs()] == [shapes["X"], shapes["key"]]


def test_an_unknown_shape_is_not_a_scalar_s():
    """Before shapes are known, ORT reports rank 0: a consumer of Y must not see it."""
    nodes = [
        make_node(["X", "c", "c", "", "key"], ["Y", "K"]),
        helper.make_node("Transpose", ["Y"], ["Yt"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["K"], ["Kt"], perm=[0, 2, 1, 3]),
    ]
    session = load(nodes, {"X": None, "key": None, "c": None}, {"Yt": None, "Kt": None})
    inputs = make_inputs(np.random.default_rng(1), form="tables-shared", kv_heads=2)
    tensors = inputs | {"c": inputs["cos_cache"]}
    wants = compute_eager(tensors | {"sin_cache": inputs["cos_cache"]}, False)
    for got, want in zip(run(session, tensors), wants, strict=True):
        assert_same_bits(got, want.transpose(1, 2))


def test_a_declared_output_shape_survives_an_unknown_input_shape():
    declared: Shape = ["b", 3, "s", 8]
    session = load([make_node(["X", "c", "c"], ["Y"])], {"X": None, "c": None}, {"Y": declared})
    assert session.get_outputs()[0].shape == declared


def test_an_absent_key_gets_no_shape():
    shapes: dict[str, Shape] = {"X": ["b", 3, "s", 8], "c": None}
    session = load([make_node(["X", "c", "c", "", "", "c"], ["Y"])], shapes, {"Y": None})
    inputs = make_inputs(np.random.default_rng(2), form="tables-shared")
    tensors = inputs | {"c": inputs["cos_cache"]}
    tables = dict.fromkeys(("sin_cache", "scale_cache"), inputs["cos_cache"])
    (want,) = compute_eager(inputs | tables, False)
    (got,) = run(session, tensors)
    assert_same_bits(got, want)


# ---- memory


@pytest.mark.parametrize("kv_heads", [3, 2], ids=["key-like-x", "fewer-heads"])
def test_in_place_each_output_has_its_own_input_s_memory(kv_heads):
    inputs = make_inputs(np.random.default_rng(3), kv_heads=kv_heads, scaled=True)
    others = ["cos_cache", "sin_cache", "position_ids"]
    pairs = [("X", "key"), ("y1", "k1"), ("y2", "k2"), ("Y", "K")]
    nodes = [
        make_node([x, *others, key, "scale_cache"], list(outputs))
        for (x, key), outputs in itertools.pairwise(pairs)
    ]
    shapes = {name: list(x.shape) for name, x in inputs.items()}
    like = {name: shapes[("X", "key")[i]] for pair in pairs[1:] for i, name in enumerate(pair)}
    outputs = {name: like.pop(name) for name in pairs[-1]}
    got = run(load(nodes, shapes, outputs, value_info=like), inputs)
    for _ in range(3):
        inputs["X"], inputs["key"] = compute_eager(inputs, False)
    for name, y in zip(("X", "key"), got, strict=True):
        assert_same_bits(y, inputs[name])


def test_an_input_with_another_reader_is_not_overwritten():
    inputs = make_inputs(np.random.default_rng(4), form="tables-shared")
    nodes = [
        helper.make_node("Neg", ["X"], ["n"]),  # So that ORT owns the memory.
        make_node(["n", "cos_cache", "sin_cache"], ["Y"]),
        helper.make_node("Add", ["n", "Y"], ["sum"]),
    ]
    shapes = {name: list(x.shape) for name, x in inputs.items()}
    value_info = {name: shapes["X"] for name in ("n", "Y")}
    session = load(nodes, shapes, {"sum": shapes["X"]}, value_info=value_info)
    (got,) = run(session, inputs)
    (want,) = compute_eager(inputs | {"X": -inputs["X"]}, False)
    assert_same_bits(got, want - inputs["X"])


@pytest.mark.parametrize("form", ID_FORMS)
def test_inputs_that_are_initializers_are_read_once(form):
    inputs = make_inputs(np.random.default_rng(5), form=form, kv_heads=1, scaled=True)
    constants = {name: x for name, x in inputs.items() if name not in ("X", "key")}
    names = [name if name in inputs else "" for name in spec.INPUTS]
    session = load(
        [make_node(names, ["Y", "K"])],
        {name: list(inputs[name].shape) for name in ("X", "key")},
        {"Y": None, "K": None},
        initializers=constants,
    )
    for _ in range(2):
        inputs |= {name: torch.randn(inputs[name].shape) for name in ("X", "key")}
        for got, want in zip(run(session, inputs), compute_eager(inputs, False), strict=True):
            assert_same_bits(got, want)


# ---- attributes, threads, errors


@pytest.mark.parametrize("interleaved", [0, 1], ids=["half", "interleaved"])
def test_every_attribute_of_the_node_is_read(interleaved):
    inputs = make_inputs(np.random.default_rng(8), kv_heads=2, rotary_dim=4)
    wants = compute_eager(inputs, bool(interleaved))
    node = make_node(
        list(inputs),
        ["Y", "K"],
        interleaved=interleaved,
        rotary_embedding_dim=4,
        num_heads=3,
        kv_num_heads=2,
    )
    session = load([node], dict.fromkeys(inputs, None), {"Y": None, "K": None})
    flat = inputs | {name: flatten_heads(inputs[name]) for name in ("X", "key")}
    for got, want in zip(run(session, flat), wants, strict=True):
        assert_same_bits(got, flatten_heads(want))


@pytest.mark.parametrize("sizes", [(1, 8, 1021, 64), (3, 64, 1, 2048), (1, 512, 2, 1024)], ids=str)
def test_rows_are_split_over_threads(sizes):
    inputs = make_inputs(np.random.default_rng(9), sizes=sizes, kv_heads=1)
    check_against_eager(inputs, threads=3)


def test_bad_inputs_are_invalid_arguments():
    inputs = make_inputs(np.random.default_rng(7))
    inputs["position_ids"][0, 1] = 8
    session = load([make_node(list(inputs), ["Y"])], dict.fromkeys(inputs, None), {"Y": None})
    message = r"INVALID_ARGUMENT .* position_ids must be in \[0, 8\), got 8 at batch 0, row 1"
    with pytest.raises(Exception, match=message):
        run(session, inputs)


# ---- runtimes of other versions

# Passes the op library an OrtApiBase with another version string, which has no newer API version.
OTHER_RUNTIME = r"""
#include <dlfcn.h>
struct Base { const void* (*GetApi)(unsigned); const char* (*GetVersionString)(); };
static const Base* real;
static Base other = {
    [](unsigned version) -> const void* { return version > NEWEST ? 0 : real->GetApi(version); },
    [] { return VERSION; }};
extern "C" void* RegisterCustomOps(void* options, const Base* base) {
  real = base;
  void* library = dlopen(LIBRARY, RTLD_NOW);
  return reinterpret_cast<void* (*)(void*, Base*)>(dlsym(library, "RegisterCustomOps"))(
      options, &other);
}
"""


@pytest.fixture
def make_runtime(tmp_path):
    """Return a function that builds an op library which sees a runtime of another version."""

    def make(version: str) -> str:
        library = shutil.copy(LIBRARY, tmp_path)  # A copy, as a library registers its ops once.
        source = tmp_path / "other.cc"
        source.write_text(OTHER_RUNTIME)
        shim = tmp_path / "other.so"
        newest = version.split(".")[1]
        definitions = [f'-DLIBRARY="{library}"', f'-DVERSION="{version}"', f"-DNEWEST={newest}"]
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++17", "-shared", "-fPIC", *definitions, "-ldl"]
        subprocess.run([compiler, *flags, str(source), "-o", str(shim)], check=True)
        return str(shim)

    return make


@pytest.mark.parametrize("version", ["1.18.0", "1.23.2"])
def test_a_runtime_without_version_24_returns_the_same_bits(make_runtime, version):
    library = make_runtime(version)
    for form in ID_FORMS:
        inputs = make_inputs(np.random.default_rng(6), form=form, kv_heads=2)
        check_against_eager(inputs, form, library=library)


def test_a_runtime_that_is_too_old_is_named(make_runtime):
    shapes: dict[str, Shape] = {"X": None, "c": None}
    message = "rotary_export's op library needs ONNX Runtime 1.18 or newer, got 1.17.3"
    with pytest.raises(Exception, match=message):
        load(
            [make_node(["X", "c", "c"], ["Y"])], shapes, {"Y": None}, library=make_runtime("1.17.3")
        )
