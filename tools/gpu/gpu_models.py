"""What `gpu_check` runs: one-op models, their sessions on any provider, inputs, eager PyTorch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.reference import rotate
from rotary_export.runtime.providers import CPU, CUDA

Tensors = dict[str, torch.Tensor]
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
}
OUTPUT_OF = {"X": "Y", "key": "key_out"}


@dataclass(frozen=True)
class CheckedDevice:
    """Where the checks run: CUDA, or the CPU to test the checks themselves."""

    provider: str

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cuda" if self.provider == CUDA else "cpu"

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch_size: int
    num_heads: int
    kv_num_heads: int
    seq_len: int
    head_dim: int


def make_inputs(
    checked: CheckedDevice,
    shape: Shape,
    types: tuple[str, str] = ("float32", "float32"),
    *,
    form: str = "prompt",
    rotary_dim: int = 0,
    scaled: bool = False,
    seed: int = 0,
) -> Tensors:
    """Draw the op's inputs: on the device, ids on the CPU.

    `form`: "prompt" (consecutive ids of each batch entry), "scattered" (no two consecutive),
    "offset" (one id) or "tables" (no ids).
    """
    generator = torch.Generator().manual_seed(seed)
    x_type, table_type = (getattr(torch, name) for name in types)
    batch, seq_len, half = shape.batch_size, shape.seq_len, (rotary_dim or shape.head_dim) // 2
    rows = 2 * seq_len + 7

    def draw(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator, dtype=torch.float64)

    x = draw(batch, shape.num_heads, seq_len, shape.head_dim)
    x[..., ::5] *= 1e-38  # Subnormal products.
    table_dims = (batch, seq_len, half) if form == "tables" else (rows, half)
    angles = draw(*table_dims) * 10
    inputs = {
        "X": x.to(x_type),
        "cos_cache": angles.cos().to(table_type),
        "sin_cache": angles.sin().to(table_type),
        "key": draw(batch, shape.kv_num_heads, seq_len, shape.head_dim).to(x_type),
    }
    if scaled:
        inputs["scale_cache"] = draw(*table_dims).exp().to(table_type)
    inputs = {name: value.to(checked.device) for name, value in inputs.items()}
    starts = torch.randint(0, 7, (batch, 1), generator=generator)
    if form == "prompt":
        inputs["position_ids"] = starts + torch.arange(seq_len)
    elif form == "scattered":
        inputs["position_ids"] = starts + 2 * torch.arange(seq_len).flip(0)
    elif form == "offset":
        inputs["position_ids"] = starts[0]
    return inputs


def rotate_eagerly(inputs: Tensors, interleaved: bool) -> list[torch.Tensor]:
    """Return Y and key_out as eager PyTorch computes them on the inputs' device."""
    ids = inputs.get("position_ids")
    tables = [inputs.get(name) for name in ("cos_cache", "sin_cache", "scale_cache")]
    if ids is not None:
        positions = ids if ids.dim() == 2 else ids + torch.arange(inputs["X"].shape[2])[None]
        positions = positions.to(inputs["X"].device)
        tables = [None if table is None else table[positions] for table in tables]
    cos, sin, scale = (None if table is None else table[:, None] for table in tables)
    assert cos is not None
    assert sin is not None
    inverse = None
    if scale is not None:
        inverse = scale.to(torch.promote_types(inputs["X"].dtype, torch.float32)) ** -1
    return [
        rotate(inputs["X"], cos, sin, scale, interleaved=interleaved),
        rotate(inputs["key"], cos, sin, inverse, interleaved=interleaved),
    ]


def build_model(
    inputs: Tensors, *, ours: bool = True, chain: int = 1, negate: bool = False, **attributes: int
) -> bytes:
    """Build a model of the op, `chain` times in a row.

    Args:
        inputs: Say which inputs there are, their types and shapes.
        ours: One node of ours; else two of ONNX Runtime's own, for query and for key.
        chain: Each rotates what the one before it returned.
        negate: Before and after, so that the op's inputs and outputs are intermediate results,
            which ONNX Runtime may keep in one place.
        **attributes: Of the op.
    """
    nodes = []
    names = {name: name for name in OUTPUT_OF}

    def apply(op_type: str, sources: Sequence[str], results: Sequence[str], **options: Any) -> None:
        nodes.append(helper.make_node(op_type, sources, results, **options))

    def negate_both(step: str) -> None:
        for name, value in names.items():
            names[name] = f"{name}_{step}"
            apply("Neg", [value], [names[name]])

    if negate:
        negate_both("before")
    for step in range(chain):
        results = {name: f"{name}_{step}" for name in names}
        tables = ["cos_cache", "sin_cache", "position_ids" if "position_ids" in inputs else ""]
        if ours:
            sources = [names["X"], *tables, names["key"]]
            sources += ["scale_cache"] if "scale_cache" in inputs else []
            apply(spec.OP_TYPE, sources, list(results.values()), domain=spec.DOMAIN, **attributes)
        else:
            for name, result in results.items():
                apply("RotaryEmbedding", [names[name], *tables], [result], **attributes)
        names = results
    if negate:
        negate_both("after")
    renamed = {value: OUTPUT_OF[name] for name, value in names.items()}
    for node in nodes:
        node.output[:] = [renamed.get(value, value) for value in node.output]

    def describe(name: str, like: torch.Tensor) -> Any:
        return helper.make_tensor_value_info(name, ONNX_TYPES[like.dtype], like.shape)

    graph = helper.make_graph(
        nodes,
        "gpu_check",
        [describe(name, value) for name, value in inputs.items()],
        [describe(output, inputs[name]) for name, output in OUTPUT_OF.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(spec.DOMAIN, spec.OP_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


class Runner:
    """A model in ONNX Runtime, run on tensors where they are."""

    def __init__(
        self,
        model: bytes | str,
        checked: CheckedDevice,
        *,
        library: bool = True,
        stream: int | None = None,
        profile: str | None = None,
    ) -> None:
        """Open a session; `stream`: a CUDA stream to run on; `profile`: a file's prefix."""
        options = ort.SessionOptions()
        options.log_severity_level = 4  # Expected errors are raised; they need not be logged, too.
        options.intra_op_num_threads = 1
        if library:
            options.register_custom_ops_library(str(op_library.op_library_path()))
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        provider_options = {} if stream is None else {"user_compute_stream": str(stream)}
        providers = [(checked.provider, provider_options)]
        providers += [(CPU, {})] if checked.provider != CPU else []
        self.session = ort.InferenceSession(model, options, providers=providers)
        self.checked = checked

    def bind(self, inputs: Tensors, outputs: Tensors) -> Any:
        """Bind tensors where they are; they must outlive the binding."""
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, x in tensors.items():
                element: Any = int(TensorProto.BFLOAT16)
                if x.dtype != torch.bfloat16:
                    element = np.dtype(str(x.dtype).removeprefix("torch.")).type
                index = x.device.index or 0
                bind(name, x.device.type, index, element, tuple(x.shape), x.data_ptr())
        return binding

    def __call__(self, inputs: Tensors, like: Sequence[str] = ("X", "key")) -> list[torch.Tensor]:
        """Run once; return the outputs, which have the shapes of the inputs `like`."""
        names = zip([o.name for o in self.session.get_outputs()], like, strict=True)
        outputs = {name: torch.full_like(inputs[like], -77.0) for name, like in names}
        binding = self.bind(inputs, outputs)
        self.checked.wait()
        self.session.run_with_iobinding(binding)
        self.checked.wait()
        return list(outputs.values())


def read_placement(
    model: bytes | str,
    checked: CheckedDevice,
    inputs: Tensors,
    *,
    library: bool,
    like: Sequence[str] = ("X", "key"),
) -> list[tuple[str, str]]:
    """Return (operator, provider) of each node that ran, from ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        runner = Runner(model, checked, library=library, profile=prefix)
        runner(inputs, like)
        events = json.loads(Path(runner.session.end_profiling()).read_text())
    nodes = [event for event in events if event["name"].endswith("_kernel_time")]
    return [(node["args"]["op_name"], node["args"]["provider"]) for node in nodes]
