"""Nested arguments and results as flat lists, as torch.export flattens them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree

TreeSpec = _pytree.TreeSpec  # the structure of a nested value


def flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a nested value, and its structure."""
    return _pytree.tree_flatten(value)


def flatten_with_path(value: Any) -> tuple[list[tuple[Any, Any]], TreeSpec]:
    """Return (path, leaf) pairs of a nested value, and its structure."""
    return _pytree.tree_flatten_with_path(value)


def unflatten(leaves: list[Any], structure: TreeSpec) -> Any:
    """Return the nested value of that structure."""
    return _pytree.tree_unflatten(leaves, structure)


def list_leaves(value: Any) -> list[Any]:
    """Return the leaves of a nested value."""
    return _pytree.tree_leaves(value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a nested value with a function applied to each leaf."""
    return _pytree.tree_map(function, value)
