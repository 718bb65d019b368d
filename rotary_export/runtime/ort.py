"""Sessions that ONNX Runtime runs, with our op library or without it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import RotaryExportError, explain_damage, first_line
from rotary_export.op import library as op_library
from rotary_export.runtime.providers import (
    CUDA,
    check_version,
    choose_providers,
    import_onnxruntime,
    library_refusal,
)
from rotary_export.runtime.session import Session, Tensors, resolve_shape
from rotary_export.runtime.tensors import ELEMENT_TYPES, is_torch, make_dtype
from rotary_export.types import name_dtype

_NO_ELEMENTS = np.zeros(1)


class OrtSession(Session):
    """An `.onnx` file, run by ONNX Runtime.

    Attributes:
        ort_session: The `onnxruntime.InferenceSession`.
    """

    ort_session: Any

    def __init__(
        self,
        file: Path,
        graph_name: str,
        graph: GraphInfo,
        providers: str | Sequence[str],
        use_op_library: bool | str,
        require_fused: bool,
        minimum_onnxruntime: Mapping[str, str],
    ) -> None:
        ort = import_onnxruntime()
        chosen = choose_providers(providers)
        refusal = library_refusal(chosen, use_op_library)
        if refusal and (require_fused or use_op_library is True):
            asked = "require_fused" if require_fused else "use_op_library=True"
            raise RotaryExportError(f"{asked}: {refusal}")
        fused = not refusal
        check_version(ort.__version__, minimum_onnxruntime["fused" if fused else "portable"])

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; logged, they would have raw names
        try:
            if fused:
                options.register_custom_ops_library(str(op_library.op_library_path()))
            self.ort_session = ort.InferenceSession(str(file), options, providers=chosen)
        except Exception as error:  # ORT's own exceptions share no base class
            raise RotaryExportError(f"ONNX Runtime can't load {file.name}: {error}") from None
        got = tuple(self.ort_session.get_providers())
        if missing := [name for name in chosen if name not in got]:
            raise RotaryExportError(
                f"ONNX Runtime could not start {', '.join(missing)} and would run on "
                f"{', '.join(got)}"
            )
        with explain_damage(f"{file.name} can't be compared"):  # names may be no UTF-8
            for kind, values, infos in (
                ("inputs", self.ort_session.get_inputs(), graph.inputs),
                ("outputs", self.ort_session.get_outputs(), graph.outputs),
            ):
                _compare_tensors(f"{file.name} has the {kind}", values, infos, graph_name)
        if not graph.rotary_nodes:
            kernel_path = "primitive"
        else:
            kernel_path = f"fused ({_name_kernel(chosen[0])})" if fused else graph.function_body
        super().__init__(graph_name, graph, got, kernel_path)

    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        binding = self.ort_session.io_binding()
        held = []  # contiguous copies must outlive the run
        for name, value in inputs.items():
            buffer = value.contiguous() if is_torch(value) else np.ascontiguousarray(value)
            buffer = buffer.reshape(value.shape)  # numpy makes a scalar 1-D
            held.append(buffer)
            binding.bind_input(name, *_describe(buffer))
        device = next((v.device for v in inputs.values() if is_torch(v)), None)
        outputs = {}
        unsized = []
        for info in self.graph.outputs:
            try:
                shape = resolve_shape(info, sizes)
            except KeyError:  # ONNX Runtime finds it out
                unsized.append(info)
                binding.bind_output(info.name, "cpu")
                continue
            try:
                outputs[info.name] = _allocate(info, shape, device if wants_torch else None)
            except (MemoryError, ValueError, RuntimeError) as error:
                raise RotaryExportError(
                    f"{info.name} of shape {shape} can't be allocated: {first_line(error)}"
                ) from None
            binding.bind_output(info.name, *_describe(outputs[info.name]))
        if device is not None and device.type == "cuda":
            sys.modules["torch"].cuda.current_stream(device).synchronize()
        self.run_bound(binding)
        names = [info.name for info in self.graph.outputs]
        for info in unsized:
            value = binding.get_outputs()[names.index(info.name)].numpy()
            outputs[info.name] = sys.modules["torch"].from_numpy(value) if wants_torch else value
        return {name: outputs[name] for name in names}

    def run_bound(self, binding: Any) -> None:
        """Run on an IO binding of `ort_session`; nothing of it is checked.

        Raises:
            RotaryExportError: ONNX Runtime fails.
        """
        try:
            self.ort_session.run_with_iobinding(binding)
        except Exception as error:  # ORT's own exceptions share no base class
            raise RotaryExportError(f"ONNX Runtime, {self.graph_name}: {error}") from None


_ELEMENTS = {"float": "float32", "double": "float64"}  # ONNX Runtime's names, where others


def _compare_tensors(
    what: str, values: Sequence[Any], infos: Sequence[TensorInfo], graph_name: str
) -> None:
    """Compare the inputs or outputs of a file with those of a manifest.

    Raises:
        RotaryExportError: There are others, or of other types or sizes.
    """
    names = [value.name for value in values]
    if names != [info.name for info in infos]:
        raise RotaryExportError(
            f"{what} {', '.join(names)}, the manifest has others for {graph_name}"
        )
    for value, info in zip(values, infos, strict=True):
        element = value.type.removeprefix("tensor(").removesuffix(")")
        element = _ELEMENTS.get(element, element)
        # ONNX Runtime gives () for an unknown rank as well, or infers what a file does not declare.
        is_unknown = not value.shape or info.has_unknown_rank
        dims = info.shape if is_unknown else value.shape
        sizes = zip(dims, info.shape, strict=False)
        unequal = any(a != b for a, b in sizes if isinstance(a, int) and isinstance(b, int))
        if element != info.dtype or len(dims) != len(info.shape) or unequal:
            dims = ", ".join(map(str, value.shape))
            raise RotaryExportError(
                f"{what} {value.name}: {element}({dims}), the manifest has "
                f"{info.dtype}({', '.join(map(str, info.shape))}) for {graph_name}"
            )


def _name_kernel(provider: str) -> str:
    return "cuda" if provider == CUDA else op_library.instruction_set()


def _describe(buffer: Any) -> tuple[str, int, int, tuple[int, ...], int]:
    """Return device, device id, element type, shape and address, as an IO binding requires them."""
    element = ELEMENT_TYPES[name_dtype(buffer.dtype)]
    if is_torch(buffer):
        device = buffer.device
        # A tensor without elements has a null address, which ORT refuses.
        address = buffer.data_ptr() or _NO_ELEMENTS.ctypes.data
        return device.type, device.index or 0, element, tuple(buffer.shape), address
    return "cpu", 0, element, buffer.shape, buffer.ctypes.data


def _allocate(info: TensorInfo, shape: tuple[int, ...], torch_device: Any) -> Any:
    if torch_device is not None:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, info.dtype), device=torch_device)
    return np.empty(shape, dtype=make_dtype(info.dtype))
