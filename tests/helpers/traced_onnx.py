"""Functions of tensors as ONNX files, run by ONNX Runtime at sizes that were not traced."""

from __future__ import annotations

import onnxruntime
import torch
from torch import nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.onnx_export import skip_needless_work
from rotary_export.models.trace.program import trace_program


class Function(nn.Module):
    """A function as a module; its constants are buffers and attributes."""

    def __init__(self, function, **constants):
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, *tensors):
        return self.function(*tensors, *self.buffers())


def trace(module, tensors, dims):
    """Trace a module; `dims` are a name or number per axis of each tensor."""
    infos = [TensorInfo(f"x{n}", "float32", tuple(each)) for n, each in enumerate(dims)]
    return trace_program(module, list(tensors), infos)


def write(program, opset=23):
    """Return the ONNX model of a program."""
    with skip_needless_work():
        return torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, optimize=True, verbose=False
        ).model_proto


def run(model, tensors):
    """Return the outputs of an ONNX model in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.as_tensor(value) for value in session.run(None, feeds)]


def count(model, operator):
    """Return the number of nodes of an operator."""
    return sum(node.op_type == operator for node in model.graph.node)
