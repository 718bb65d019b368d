"""The calls that a model makes of candidates, recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rotary_export.compat import pytree
from rotary_export.models.find.candidates import Candidate
from rotary_export.models.find.redirect import OwnFunction, Wrapper, redirect_calls


@dataclass(eq=False)
class RecordedCall:
    """One call of a candidate, as the model made it.

    Attributes:
        candidate: What was called.
        own: The function, as it was called.
        leaves: The arguments and the outer variables that contain tensors, flattened: tensors,
            modules, numbers, None.
        tree: How they were nested.
        output: The results, flattened.
        output_tree: How they were nested.
        children: Calls of other candidates that this call made.
    """

    candidate: Candidate
    own: OwnFunction
    leaves: list[Any]
    tree: pytree.TreeSpec
    output: list[Any] = field(default_factory=list)
    output_tree: Any = None
    children: list[RecordedCall] = field(default_factory=list)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What calls with the same lowering have in common."""
        return make_signature(self.leaves)


def make_signature(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Describe flattened arguments, without the sizes that may vary.

    An integer may be a size, or name a dimension; see `generalize`.
    """

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            ids = not (leaf.is_floating_point() or leaf.is_complex())  # their last size may vary
            width = leaf.shape[-1] if leaf.dim() and not ids else 0
            if isinstance(width, torch.Tensor):  # as sizes are while torch.jit traces
                width = int(width)
            return "tensor", leaf.dim(), width if type(width) is int else None
        if leaf is None or isinstance(leaf, (bool, str)):
            return leaf
        if isinstance(leaf, (int, torch.SymInt)):  # a symbol is a size
            return "int", leaf if type(leaf) is int else None
        return type(leaf).__name__

    return tuple(describe(leaf) for leaf in leaves)


def generalize(signature: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what signatures have in common that differ in integers alone."""
    return tuple(
        "int" if isinstance(part, tuple) and part[0] == "int" else part for part in signature
    )


def record_calls(run: Callable[[], Any], candidates: Sequence[Candidate]) -> list[RecordedCall]:
    """Run a model and record its calls of candidates.

    Args:
        run: Runs it once.
        candidates: What to record.

    Returns:
        The outermost calls; those that they made are their children.
    """
    outermost: list[RecordedCall] = []
    running: list[RecordedCall] = []

    def make_wrapper(candidate: Candidate) -> Wrapper:
        def wrapper(own: OwnFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves, tree = flatten_arguments(own, args, kwargs)
            call = RecordedCall(candidate, own, leaves, tree)
            (running[-1].children if running else outermost).append(call)
            running.append(call)
            try:
                output = own.run(*args, **kwargs)
            finally:
                running.pop()
            call.output, call.output_tree = pytree.flatten(output)
            return output

        return wrapper

    wrappers = [(candidate.place, make_wrapper(candidate)) for candidate in candidates]
    with redirect_calls(wrappers), torch.no_grad():
        run()
    return outermost


def flatten_arguments(
    own: OwnFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten what a function reads: its arguments, and outer variables that contain tensors."""
    return pytree.flatten((args, kwargs, own.read_captured()))


def call_with(own: OwnFunction, leaves: Sequence[Any], tree: pytree.TreeSpec) -> list[Any]:
    """Call a function with other leaves; return its results, flattened."""
    return pytree.list_leaves(own.call(*pytree.unflatten(list(leaves), tree)))
