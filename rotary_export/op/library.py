"""Find and load the op library, `librotary_export.so`: the fused kernel for ONNX Runtime and torch.

Standard library only: a deployment calls these functions before it chooses a runtime.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from rotary_export.errors import RotaryExportError
from rotary_export.package import package_folders

LIBRARY_NAME = "librotary_export.so"


def op_library_path() -> Path:
    """Return the path of the op library, for `SessionOptions.register_custom_ops_library`.

    Returns:
        The absolute path.

    Raises:
        RotaryExportError: No library is installed: the package was not built.
    """
    folders = package_folders()
    for folder in folders:
        path = folder / LIBRARY_NAME
        if path.is_file():
            return path
    looked_in = ", ".join(str(folder) for folder in folders)
    raise RotaryExportError(
        f"{LIBRARY_NAME} must be beside the package's files, found none in {looked_in}; "
        "`pip install .` in the source folder builds it (it needs a C++17 compiler)"
    )


def instruction_set() -> str:
    """Return the instruction set that the kernels use here.

    One of baseline, avx2, avx512, avx512bf16 and neon.

    Raises:
        RotaryExportError: No usable library is installed, or the environment variable
            ROTARY_EXPORT_ISA names an instruction set that this machine does not have.
    """
    library = load_library()
    name: bytes | None = library.RotaryExportInstructionSet()
    if name is None:
        message = ctypes.create_string_buffer(1024)
        library.RotaryExportRotate(None, message, len(message))  # A null call returns the reason.
        raise RotaryExportError(message.value.decode())
    return name.decode()


def library_providers() -> tuple[str, ...]:
    """Return the ONNX Runtime execution providers that the library has kernels for.

    Raises:
        RotaryExportError: No usable library is installed.
    """
    providers: bytes = load_library().RotaryExportProviders()
    return tuple(providers.decode().split(","))


def load_library() -> ctypes.CDLL:
    """Return the op library with the types of its C interface (`csrc/rotary_export.h`) declared.

    Raises:
        RotaryExportError: No library is installed, or it can't be loaded.
    """
    return _load_library(op_library_path())


@functools.cache
def _load_library(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.RotaryExportInstructionSet.restype = ctypes.c_char_p
        library.RotaryExportProviders.restype = ctypes.c_char_p
        library.RotaryExportRotate.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        library.RotaryExportRotateTeam.argtypes = (ctypes.c_void_p,)
        library.RotaryExportRotateTeam.restype = None
    except (OSError, AttributeError) as error:  # not loadable; loadable but not ours
        raise RotaryExportError(f"{path} must be a loadable op library, got: {error}") from error
    return library
