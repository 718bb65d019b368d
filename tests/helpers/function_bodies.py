"""Models of rotary nodes with their function bodies, run in ONNX Runtime without the op library."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from helpers.cases import Case
from helpers.oracles import Tensors
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from rotary_export.op import spec
from rotary_export.op.onnx_function import add_functions

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
}
Dims = list[int | str | None]


def to_ort(x: Tensor) -> ort.OrtValue:
    if x.dtype == torch.bfloat16:
        array = x.view(torch.int16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(x.numpy())


def run_bound(session: ort.InferenceSession, inputs: Tensors) -> list[Tensor]:
    """Run with outputs bound to memory that is filled with a sentinel."""
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, to_ort(inputs[value.name]))
    outputs = []
    for value in session.get_outputs():
        like = inputs[value.name.replace("Y", "X").replace("key_out", "key")]
        outputs.append(torch.full_like(like, -77.0))
        binding.bind_ortvalue_output(value.name, to_ort(outputs[-1]))  # shares its memory
    session.run_with_iobinding(binding)
    return outputs


def make_dims(case: Case, name: str, shape: torch.Size, dynamic: bool) -> Dims:
    """Return a shape; if dynamic, with names for the dimensions that exported graphs leave open."""
    if not dynamic:
        return list(shape)
    if name in ("X", "key"):
        heads = [] if case.flat else [shape[1]]
        return ["batch_size", *heads, "seq_len", shape[-1]]
    rows: dict[str, Dims] = {
        "per-batch": ["batch_size", "seq_len"],
        "shared": [1, "seq_len"],
        "offset": [1],
        "tables-per-batch": ["batch_size", "seq_len", shape[-1]],
        "tables-shared": [1, "seq_len", shape[-1]],
    }
    return rows[case.ids] if name == "position_ids" or len(shape) == 3 else ["rows", shape[-1]]


def make_node(case: Case, prefix: str = "") -> NodeProto:
    given = case.make_inputs()
    last = max(spec.INPUTS.index(name) for name in given)
    return helper.make_node(
        spec.OP_TYPE,
        [prefix + name if name in given else "" for name in spec.INPUTS[: last + 1]],
        [prefix + name for name in spec.OUTPUTS[: 2 if case.kv_heads else 1]],
        name=f"{prefix}rotary",
        domain=spec.DOMAIN,
        **case.attributes,
    )


def make_model(
    *cases: Case, opset: int = 23, dynamic: bool = True, constants: tuple[str, ...] = ()
) -> ModelProto:
    """Make a model of one node per case; with several, names begin with `n0_`, `n1_`, ..."""
    nodes, inputs, outputs, stored = [], [], [], []
    for index, case in enumerate(cases):
        prefix = f"n{index}_" if len(cases) > 1 else ""
        nodes.append(make_node(case, prefix))
        values = {}
        for name, x in case.make_inputs().items():
            if name in constants:
                stored.append(numpy_helper.from_array(x.numpy(), prefix + name))
                continue
            dims = make_dims(case, name, x.shape, dynamic)
            values[name] = helper.make_tensor_value_info(prefix + name, ONNX_TYPES[x.dtype], dims)
        inputs += values.values()
        for name, like in zip(nodes[-1].output, ("X", "key"), strict=False):
            tensor = values[like].type.tensor_type
            outputs.append(helper.make_tensor_value_info(name, tensor.elem_type, None))
            outputs[-1].type.CopyFrom(values[like].type)
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializer=stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(spec.DOMAIN, spec.OP_VERSION)]
    return helper.make_model(graph, opset_imports=opsets)


def make_with_bodies(*cases: Case, **options: object) -> ModelProto:
    model = make_model(*cases, **options)
    add_functions(model)
    return model


def load_without_library(model: ModelProto, optimised: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # expected errors are raised; no need to log them
    if optimised:
        options.optimized_model_filepath = optimised
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def collect_onnx_cases() -> list[Any]:
    """Return ONNX's own test cases of ai.onnx::RotaryEmbedding."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():  # Other operators' cases warn while they are generated.
        warnings.simplefilter("ignore")
        cases = node.collect_testcases(spec.OP_TYPE)
    return [  # copies: the generated cases are the process's own
        copy.deepcopy(case)
        for case in cases
        if [n.op_type for n in case.model.graph.node] == [spec.OP_TYPE]
        and not case.model.graph.node[0].domain
    ]


def to_numpy(x: Tensor) -> np.ndarray:
    """Return x as numpy; bfloat16 in the type of ml_dtypes."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def from_numpy(x: np.ndarray) -> Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x))
