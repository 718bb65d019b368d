"""ONNX graphs and sessions for bench.py: our node, ORT's own two, primitives; in a chain."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.op.onnx_function import add_functions

OURS, MICROSOFT, STANDARD, PRIMITIVES = "rotary_export", "com.microsoft", "ai.onnx", "primitives"
PEERS = (MICROSOFT, STANDARD)
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}


@dataclass(frozen=True)
class BenchCase:
    """What is rotated; names as in the glossary."""

    batch_size: int = 1
    num_heads: int = 32
    kv_num_heads: int = 8
    seq_len: int = 2048
    head_dim: int = 128
    dtype: torch.dtype = torch.float32
    interleaved: bool = False
    rotary_dim: int = 0
    use_xpos: bool = False

    def shape(self, name: str) -> tuple[int, int, int, int]:
        """Return the shape of "query" or "key"."""
        heads = self.num_heads if name == "query" else self.kv_num_heads
        return self.batch_size, heads, self.seq_len, self.head_dim

    @property
    def elements(self) -> int:
        """Of query and key."""
        heads = self.num_heads + self.kv_num_heads
        return self.batch_size * heads * self.seq_len * self.head_dim

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return query, key and position_ids; the same tensors to all runners of this case."""
        return _make_inputs(self)

    @property
    def tables(self) -> dict[str, Tensor]:
        """Return cos, sin and scale, of x's type: what both ops accept."""
        half = (self.rotary_dim or self.head_dim) // 2
        inv_freq = 10000.0 ** (-torch.arange(half) / half)
        positions = torch.arange(self.seq_len)
        angles = positions[:, None] * inv_freq
        zeta = (torch.arange(half) / half + 0.4) / 1.4
        scale = zeta ** ((positions - self.seq_len // 2) / 512)[:, None]
        tables = {"cos": angles.cos(), "sin": angles.sin(), "scale": scale}
        return {name: table.to(self.dtype) for name, table in tables.items()}


@functools.lru_cache(maxsize=1)  # large: gone when the next case is measured
def _make_inputs(case: BenchCase) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(case.seq_len).repeat(case.batch_size, 1)
    drawn = {
        name: torch.randn(case.shape(name), generator=generator).to(case.dtype)
        for name in ("query", "key")
    }
    return drawn | {"position_ids": ids}


def make_constant(name: str, value: Tensor) -> TensorProto:
    """Return an initializer."""
    if value.dtype == torch.bfloat16:
        raw = value.view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, raw, raw=True)
    return numpy_helper.from_array(value.numpy(), name)


def _make_rotary_nodes(case: BenchCase, op: str, inputs: Sequence[str], step: int) -> Any:
    """Return the nodes that rotate query and key once, and the tables that they read."""
    outputs = [f"query_{step}", f"key_{step}"]
    tables = case.tables
    layout = {"interleaved": int(case.interleaved)}
    if op in (OURS, PRIMITIVES):
        names = [inputs[0], "cos", "sin", "position_ids", inputs[1]]
        names += ["scale"] if case.use_xpos else []
        node = helper.make_node(
            spec.OP_TYPE,
            names,
            outputs,
            domain=spec.DOMAIN,
            rotary_embedding_dim=case.rotary_dim,
            **layout,
        )
        read = {name: table for name, table in tables.items() if name in names}
        return [node], read
    nodes, read = [], {}
    for x, y, heads in zip(inputs, outputs, (case.num_heads, case.kv_num_heads), strict=True):
        of = y[: y.index("_")] if case.use_xpos else "both"
        factor = {"both": 1, "query": tables["scale"], "key": 1 / tables["scale"]}[of]
        cos, sin = f"cos_{of}", f"sin_{of}"
        read |= {cos: tables["cos"] * factor, sin: tables["sin"] * factor}
        standard = op == STANDARD
        names = [x, cos, sin, "position_ids"] if standard else [x, "position_ids", cos, sin]
        partial = {"rotary_embedding_dim": case.rotary_dim} if case.rotary_dim else {}
        partial |= {"num_heads": heads} if partial and not standard else {}
        domain = "" if standard else op
        nodes.append(helper.make_node(spec.OP_TYPE, names, [y], domain=domain, **layout, **partial))
    return nodes, read


def make_model(
    case: BenchCase,
    op: str,
    *,
    chain: int = 1,
    negate: bool = False,
    sum_outputs: bool = False,
    tapped: bool = False,
) -> ModelProto:
    """Write a graph that rotates query and key `chain` times.

    Args:
        case: Sizes and types.
        op: OURS, MICROSOFT, STANDARD or PRIMITIVES.
        chain: Nodes (or pairs of nodes) in a row.
        negate: A Neg stands before the first, so that its inputs are intermediate results too.
        sum_outputs: A ReduceSum reads each result.
        tapped: One element of every input of a node that is an intermediate result is an output of
            the graph too, so that nothing may be written in place.
    """
    nodes: list[NodeProto] = []
    constants: dict[str, Tensor] = {}
    outputs: dict[str, list[int]] = {}
    values = ["query", "key"]
    if negate:
        nodes += [helper.make_node("Neg", [x], [f"{x}_negated"]) for x in values]
        values = [f"{x}_negated" for x in values]
    for step in range(chain):
        if tapped and (step or negate):
            for value in values:
                ends = ["tap_start", "tap_end", "tap_axes"]
                nodes.append(helper.make_node("Slice", [value, *ends], [f"{value}_tap"]))
                outputs[f"{value}_tap"] = [1, 1, 1, 1]
            constants |= {"tap_start": torch.zeros(4, dtype=torch.int64)}
            constants |= {"tap_end": torch.ones(4, dtype=torch.int64)}
            constants |= {"tap_axes": torch.arange(4)}
        made, read = _make_rotary_nodes(case, op, values, step)
        nodes += made
        constants |= read
        values = [f"query_{step}", f"key_{step}"]
    for name, value in zip(("query", "key"), values, strict=True):
        if sum_outputs:
            nodes.append(helper.make_node("ReduceSum", [value], [f"{name}_sum"], keepdims=0))
            outputs[f"{name}_sum"] = []
        else:
            outputs[value] = list(case.shape(name))
    return finish_model(nodes, case.inputs, constants, outputs, case.dtype, op)


def finish_model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Tensor],
    constants: dict[str, Tensor],
    outputs: dict[str, list[int]],
    dtype: torch.dtype,
    op: str,
) -> ModelProto:
    """Wrap nodes as a model; for PRIMITIVES, our nodes get the body of opset 18."""
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info(n, ONNX_TYPES[t.dtype], t.shape) for n, t in inputs.items()],
        [helper.make_tensor_value_info(n, ONNX_TYPES[dtype], s) for n, s in outputs.items()],
        [make_constant(name, value) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18 if op == PRIMITIVES else 23)]
    opsets += [helper.make_opsetid(d, 1) for d in (spec.DOMAIN, MICROSOFT)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if op == PRIMITIVES:
        for node in nodes:
            for y, name in zip(node.output, ("query", "key"), strict=True):
                dims = inputs[name].shape
                graph.value_info.append(helper.make_tensor_value_info(y, ONNX_TYPES[dtype], dims))
        model.graph.CopyFrom(graph)
        add_functions(model)
    return model


class Runner:
    """A session whose inputs and outputs are bound to memory once; call it to run it.

    Args:
        model: Of static shapes.
        inputs: Its inputs.
        threads: Of ORT's pool.
        library: Op library to register; "": none.
    """

    def __init__(
        self, model: ModelProto, inputs: dict[str, Tensor], threads: int, library: str = ""
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Else the pool of the session before spins on, on a core that the next one needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if library:
            options.register_custom_ops_library(library)
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._inputs = inputs
        for name, tensor in inputs.items():
            self._binding.bind_input(name, *_describe(tensor))
        types = {code: dtype for dtype, code in ONNX_TYPES.items()}
        self.outputs: dict[str, Tensor] = {}
        for value in model.graph.output:
            tensor_type = value.type.tensor_type
            dims = [d.dim_value for d in tensor_type.shape.dim]
            self.outputs[value.name] = torch.zeros(dims, dtype=types[tensor_type.elem_type])
            self._binding.bind_output(value.name, *_describe(self.outputs[value.name]))

    def __call__(self) -> None:
        """Run."""
        self._session.run_with_iobinding(self._binding)


def _describe(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    return "cpu", 0, ONNX_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def make_runner(
    case: BenchCase, op: str, threads: int = 1, *, library: str | None = None, **graph: Any
) -> Runner:
    """Return a session that rotates; keyword arguments as `make_model`'s."""
    if library is None:
        library = str(op_library.op_library_path())
    library = library if op == OURS else ""
    return Runner(make_model(case, op, **graph), case.inputs, threads, library)


@contextmanager
def library_with(variable: str, value: str) -> Iterator[str]:
    """Yield the path of a copy of the op library that sees an environment variable.

    The library reads its variables when it is loaded, and a copy of another path is loaded anew.
    """
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = value
        try:
            yield shutil.copy(op_library.op_library_path(), Path(folder))
        finally:
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before
