"""What sees every operator that torch runs."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "is_in_place"]


def is_in_place(function: Any) -> bool:
    """Whether something is an operator that changes one of its arguments."""
    schema = getattr(function, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
