"""What sees every operator that torch runs."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "is_in_place"]


def is_in_place(function: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    return bool(function._schema.is_mutable)
