"""Between torch tensors and numpy arrays, bfloat16 included; torch is imported where it is used."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rotary_export.errors import RotaryExportError
from rotary_export.types import Array, name_dtype

# ONNX's numbers of the types that numpy and torch share.
ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
    "bfloat16": 16,
}


def is_torch(value: object) -> bool:
    """Whether value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def make_bfloat16() -> np.dtype[Any]:
    """Return numpy's bfloat16 dtype.

    Raises:
        RotaryExportError: ml_dtypes is not installed.
    """
    try:
        import ml_dtypes
    except ImportError:
        raise RotaryExportError(
            "bfloat16 numpy arrays need the package ml_dtypes: pip install ml_dtypes"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def make_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a name that a manifest contains."""
    return make_bfloat16() if name == "bfloat16" else np.dtype(name)


def to_numpy(value: Any) -> Array:
    """Return an array, or a tensor in CPU memory as one of the same dtype."""
    if not is_torch(value):
        return np.asarray(value)
    if name_dtype(value.dtype) == "bfloat16":
        torch = sys.modules["torch"]
        return np.asarray(value.contiguous().view(torch.int16).numpy()).view(make_bfloat16())
    return np.asarray(value.numpy())


def to_torch(value: Any) -> Any:
    """Return a contiguous tensor, or an array as one of the same dtype."""
    import torch

    if is_torch(value):
        return value.contiguous()  # a program may see it as flat
    # Contiguous, since torch has no negative strides; writeable, since torch warns otherwise.
    value = np.require(value, requirements=("C", "W"))
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)
