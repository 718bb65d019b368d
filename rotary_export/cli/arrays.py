"""Arrays in and out of `.npy` and `.npz` files, bfloat16 included."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.atomic import write_files
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.tensors import make_bfloat16
from rotary_export.types import Array, Arrays


def read_inputs(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the inputs of `run --input`.

    Args:
        arguments: NAME=FILE.npy, NAME=INTEGER, or FILE.npz with any number of arrays.

    Returns:
        Arrays or ints by name.

    Raises:
        RotaryExportError: A file is missing or not a plain numpy file, or a name is given twice.
    """
    inputs: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            loaded = _load(argument)
            if isinstance(loaded, np.ndarray):
                raise RotaryExportError(f"an .npy needs a name: --input NAME={argument}")
            found: dict[str, Any] = loaded
        elif re.fullmatch("-?[0-9]+", value, re.ASCII):
            found = {name: int(value)}
        else:
            array = _load(value)
            if not isinstance(array, np.ndarray):
                raise RotaryExportError(f"{value} contains several arrays: --input {value}")
            found = {name: array}
        for key in found.keys() & inputs.keys():
            raise RotaryExportError(f"the input {key!r} is given twice")
        inputs |= found
    return inputs


def _load(file: str) -> Array | dict[str, Array]:
    """Read an .npy as an array, an .npz as a dict of them."""
    try:
        with open(file, "rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return _read_bfloat16(loaded)
            return {key: _read_bfloat16(loaded[key]) for key in loaded.files}
    except FileNotFoundError:
        raise RotaryExportError(f"the input file {file} does not exist") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise RotaryExportError(f"{file} is not a plain .npy or .npz file: {error}") from None


def _read_bfloat16(array: Array) -> Array:
    """Restore the type of bfloat16, which numpy writes as raw two-byte items."""
    return array.view(make_bfloat16()) if array.dtype == np.dtype("V2") else array


def write_outputs(file: Path, outputs: Arrays) -> None:
    """Write an `.npz`; it appears whole or not at all.

    Args:
        file: In a folder that exists.
        outputs: Arrays by name.

    Raises:
        RotaryExportError: The file can't be written.
    """
    with write_files(file) as staging, (staging / file.name).open("wb") as stream:
        np.savez(stream, **outputs)  # type: ignore[arg-type]
