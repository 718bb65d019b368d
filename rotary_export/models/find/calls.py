"""The calls that a model makes of candidates: recorded, or redirected to wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rotary_export.compat import pytree
from rotary_export.models.find.candidates import Candidate, Function


@dataclass(eq=False)
class RecordedCall:
    """One call of a candidate, as the model made it.

    Attributes:
        candidate: What was called.
        leaves: The arguments, flattened: tensors, modules, numbers, None.
        tree: How they were nested.
        output: The results, flattened.
        output_tree: How they were nested.
        children: Calls of other candidates that this call made.
    """

    candidate: Candidate
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
    """Describe flattened arguments, without the sizes that may vary."""

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            ids = not (leaf.is_floating_point() or leaf.is_complex())  # their last size may vary
            width = leaf.shape[-1] if leaf.dim() and not ids else 0
            if isinstance(width, torch.Tensor):  # as sizes are while torch.jit traces
                width = int(width)
            return "tensor", leaf.dim(), width if type(width) is int else None
        if leaf is None or isinstance(leaf, (bool, str)):
            return leaf
        if isinstance(leaf, torch.SymInt):  # as a size is while torch.export traces
            return "int"
        return type(leaf).__name__

    return tuple(describe(leaf) for leaf in leaves)


@contextmanager
def patch_candidates(
    candidates: Sequence[Candidate], make_wrapper: Callable[[Candidate], Function]
) -> Iterator[None]:
    """Bind wrappers in the place of candidates; the originals come back, after an error too."""
    originals: list[tuple[Any, str, Any]] = []
    try:
        for candidate in candidates:
            wrapper = make_wrapper(candidate)
            for owner, name in candidate.bindings:
                original = vars(owner)[name]
                originals.append((owner, name, original))
                static = isinstance(original, staticmethod)
                setattr(owner, name, staticmethod(wrapper) if static else wrapper)
        yield
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


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

    def make_wrapper(candidate: Candidate) -> Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = pytree.flatten((args, kwargs))
            call = RecordedCall(candidate, leaves, tree)
            (running[-1].children if running else outermost).append(call)
            running.append(call)
            try:
                output = candidate.function(*args, **kwargs)
            finally:
                running.pop()
            call.output, call.output_tree = pytree.flatten(output)
            return output

        return wrapper

    with patch_candidates(candidates, make_wrapper), torch.no_grad():
        run()
    return outermost
