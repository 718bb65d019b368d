"""Which execution providers run, whether CUDA works, and when our op library is registered."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, any flavour.

    Raises:
        RotaryExportError: None is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RotaryExportError(
            "ONNX Runtime is not installed: pip install onnxruntime (CPU) or onnxruntime-gpu "
            f"(CUDA): {error}"
        ) from None
    return onnxruntime


def check_version(installed: str, minimum: str) -> None:
    """Refuse an ONNX Runtime older than the bundle needs.

    Raises:
        RotaryExportError: It is older.
    """

    def parse(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"[0-9]{1,9}", version)[:2]]

    if parse(installed) < parse(minimum):
        raise RotaryExportError(
            f"this bundle needs ONNX Runtime >= {minimum}, installed is {installed}"
        )


def find_cuda_problem() -> str | None:
    """Find out why CUDA can't run here.

    Returns:
        What is missing (the wheel's provider, the driver, a device, a library), or None.
    """
    ort = import_onnxruntime()
    if CUDA not in ort.get_available_providers():
        return f"this ONNX Runtime {ort.__version__} is built without it; install onnxruntime-gpu"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver is not installed (libcuda.so.1 is not found)"
    code = driver.cuInit(0)
    if code:
        return f"the NVIDIA driver does not start (cuInit returned {code})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no device"
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return f"a CUDA library that ONNX Runtime {ort.__version__} needs is missing: {error}"
    return None


def choose_providers(requested: str | Sequence[str]) -> list[str]:
    """Turn what the user asked for into a provider list.

    Args:
        requested: "auto", or names in order of preference.

    Returns:
        Names for ONNX Runtime; the CPU is always the last resort.

    Raises:
        RotaryExportError: A provider that was named can't run here.
    """
    if requested == "auto":
        return [CPU] if find_cuda_problem() else [CUDA, CPU]
    names = [requested] if isinstance(requested, str) else requested
    if not isinstance(names, Sequence) or not names:
        raise RotaryExportError(
            f"providers must be 'auto', a name or a list of names, got {requested!r}"
        )
    names = list(names)
    available = import_onnxruntime().get_available_providers()
    for name in names:
        problem = find_cuda_problem() if name == CUDA else None
        if problem:
            raise RotaryExportError(f"{CUDA} can't run here: {problem}")
        if name not in available:
            raise RotaryExportError(
                f"{name} is not in this ONNX Runtime; it has {', '.join(available)}"
            )
    return names if CPU in names else [*names, CPU]


def library_refusal(providers: Sequence[str], use_op_library: bool | str) -> str | None:
    """Return why our op library is not to be registered.

    A registered kernel wins over the function body, wherever it runs: a CPU kernel would pull
    nodes off the accelerator that would have run the body. So the library is registered only
    where it has a kernel for the first provider, which is the one that runs the node. Its CUDA
    kernel is opt-in until it has been run on a GPU: only True registers it.

    Args:
        providers: In order of preference.
        use_op_library: As in `load`.

    Returns:
        The reason, or None: register it.

    Raises:
        RotaryExportError: The library is broken, or the argument is not one of the three.
    """
    if not (isinstance(use_op_library, bool) or use_op_library == "auto"):
        raise RotaryExportError(
            f"use_op_library must be 'auto', True or False, got {use_op_library!r}"
        )
    if use_op_library is False:
        return "the op library is switched off (use_op_library=False)"
    try:
        op_library.op_library_path()
    except RotaryExportError as error:
        return str(error)
    kernels = op_library.library_providers()
    if providers[0] not in kernels:
        return (
            f"the op library has kernels for {', '.join(kernels)}, and the first provider is "
            f"{providers[0]}"
        )
    if providers[0] == CUDA and use_op_library is not True:
        return (
            "the op library's CUDA kernel has never been run on a GPU, so it is used only with "
            "use_op_library=True"
        )
    return None
