"""ONNX Runtime's IO binding, called hundreds of times for each token of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Binder:
    """Binds memory of the CPU to the inputs and outputs of a session.

    A call is `bind_input(name, *device, element, shape, address)`, and likewise `bind_output`.

    Attributes:
        binding: What `run_with_iobinding` accepts.
        device: The arguments that name the CPU.
        bind_input: Binds an input.
        bind_output: Binds an output.
    """

    binding: Any
    device: tuple[Any, ...]
    bind_input: Callable[..., None]
    bind_output: Callable[..., None]


def make_binder(session: Any) -> Binder:
    """Make a binder for an `onnxruntime.InferenceSession`.

    The methods of an IOBinding make a device for each call, which takes longer than the call. The
    binding that it wraps accepts one that was made before.
    """
    binding = session.io_binding()
    try:
        from onnxruntime.capi.onnxruntime_inference_collection import OrtDevice

        device = OrtDevice.make("cpu", 0)._get_c_device()
        inner = binding._iobinding
        return Binder(binding, (device,), inner.bind_input, inner.bind_output)
    except (ImportError, AttributeError):  # another ONNX Runtime: slower, not broken
        return Binder(binding, ("cpu", 0), binding.bind_input, binding.bind_output)
