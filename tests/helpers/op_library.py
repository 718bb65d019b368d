"""Run the op library's op in ONNX Runtime and compare its bits with eager PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
import torch
from helpers.cases import ID_FORMS, make_inputs
from helpers.function_bodies import ONNX_TYPES, run_bound
from helpers.oracles import Tensors, assert_same_bits, compute_eager
from onnx import GraphProto, ModelProto, helper

from rotary_export.op import library as op_library
from rotary_export.op import spec


def random_float32_cases(count: int, seed: int) -> Iterator[tuple[Tensors, int, int]]:
    """Yield inputs, `interleaved` and `rotary_embedding_dim`; lengths 1 to 4096, mostly short."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seq_len = round(4096 ** rng.random())
        head_dim = 2 * int(rng.integers(1, 97 if seq_len < 512 else 33))
        rotary_dim = int(rng.choice([0, 2 * rng.integers(1, head_dim // 2 + 1)]))
        batch, heads, kv_heads = (int(n) for n in rng.integers((1, 1, 0), (4, 4, 3)))
        inputs = make_inputs(
            rng,
            form=rng.choice(ID_FORMS),
            sizes=(1 if seq_len > 512 else batch, heads, seq_len, head_dim),
            kv_heads=kv_heads,
            rotary_dim=rotary_dim,
            scaled=bool(rng.integers(2)),
        )
        for name in ("X", "key"):  # subnormal to large, so that an FMA would show
            if name in inputs:
                inputs[name] *= 10.0 ** float(rng.integers(-38, 20))
        yield inputs, int(rng.integers(2)), rotary_dim


# ---- ONNX Runtime


@functools.cache
def make_session(
    types: tuple[tuple[str, torch.dtype, int], ...],
    attributes: tuple[tuple[str, int], ...] = (),
    library: str | None = None,
    threads: int = 1,
) -> ort.InferenceSession:
    """Return a session of one node with inputs of these names, types and ranks, all dynamic."""
    given = [name for name, _, _ in types]
    last = max(spec.INPUTS.index(name) for name in given)
    outputs = spec.OUTPUTS[: 2 if "key" in given else 1]
    node = helper.make_node(
        spec.OP_TYPE,
        [name if name in given else "" for name in spec.INPUTS[: last + 1]],
        outputs,
        domain=spec.DOMAIN,
        **dict(attributes),
    )
    graph = helper.make_graph(
        [node],
        "test",
        [
            helper.make_tensor_value_info(name, ONNX_TYPES[t], [None] * rank)
            for name, t, rank in types
        ],
        [helper.make_tensor_value_info(name, ONNX_TYPES[types[0][1]], None) for name in outputs],
    )
    return load_model(make_graph_model(graph), library=library, threads=threads)


def make_graph_model(graph: GraphProto) -> ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, spec.OP_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def load_model(
    model: ModelProto, *, library: str | None = None, threads: int = 1
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library or str(op_library.op_library_path()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # expected errors are raised; no need to log them
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_session(
    inputs: Tensors, *, library: str | None = None, threads: int = 1, **attributes: int
) -> list[torch.Tensor]:
    """Run the op in ORT, with outputs bound to memory that is filled with a sentinel."""
    types = tuple((name, x.dtype, x.dim()) for name, x in inputs.items())
    session = make_session(types, tuple(sorted(attributes.items())), library, threads)
    return run_bound(session, inputs)


def check_against_eager(inputs: Tensors, what: object = "", **options: int) -> None:
    got = run_session(inputs, **options)
    want = compute_eager(inputs, bool(options.get("interleaved", 0)))
    for name, y, y_want in zip(spec.OUTPUTS, got, want, strict=False):
        assert_same_bits(y, y_want, f"{name} {what}")
