"""The op in the place of a model's functions, for as long as a context lasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.compat import pytree
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.find.calls import RecordedCall, flatten_arguments
from rotary_export.models.find.candidates import Candidate
from rotary_export.models.find.lowering import (
    CallTables,
    Lowering,
    Tables,
    compute_tables,
    rotate_call,
    rotate_slots,
)
from rotary_export.models.find.probe import is_close
from rotary_export.models.find.redirect import OwnFunction, Wrapper, redirect_calls
from rotary_export.models.find.replacement import Replacement


@dataclass(frozen=True)
class CheckedCall:
    """A call of one of the model's functions, as `replace_calls` with `check` sees it.

    Attributes:
        name: The function's.
        lowering: How it maps onto the op.
        xs: What it rotates.
        ys: What it returns for these.
        tables: Its own cos and sin, for each of them.
    """

    name: str
    lowering: Lowering
    xs: list[Tensor]
    ys: list[Tensor]
    tables: list[Tables]


Record = Callable[[CheckedCall], None]


@contextmanager
def replace_calls(
    found: Replacement, *, check: bool = False, record: Record | None = None
) -> Iterator[Counter[str]]:
    """Replace what was found by the op; the model's own functions come back at the end.

    Args:
        found: As `find_replacement` found it.
        check: Compare the op with the functions, and return what the functions return.
        record: With `check`: called with each call.

    Yields:
        Counts replaced calls by function.

    Raises:
        CheckFailedError: With `check`: the op differs from the function for a call.
    """
    counts: Counter[str] = Counter()
    memo: dict[Any, tuple[list[Any], CallTables]] = {}
    is_off = False

    def run_as_is(function: Callable[[], Any]) -> Any:
        """Run the model's own function, or the op, with the functions that it calls."""
        nonlocal is_off
        is_off = True
        try:
            return function()
        finally:
            is_off = False

    def make_wrapper(candidate: Candidate) -> Wrapper:
        def wrapper(own: OwnFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves, tree = flatten_arguments(own, args, kwargs)
            key = None if is_off else found.find(candidate, leaves)
            if key is None:
                return own.run(*args, **kwargs)
            lowering = found.lowerings[key]
            sources = [slot.source for slot in lowering.slots]
            memo_key = (candidate, own.identify(), *_identify_tables(leaves, sources, lowering))
            if memo_key not in memo:
                tables = run_as_is(lambda: compute_tables(own, leaves, tree, lowering))
                # Held, so that no other object gets their ids.
                held = [leaf for index, leaf in enumerate(leaves) if index not in sources]
                memo[memo_key] = [held, own], tables
            tables = memo[memo_key][1]
            try:
                rotated = run_as_is(
                    lambda: rotate_call(
                        [leaves[s] for s in sources], tables, lowering, rotate_slots
                    )
                )
            except RotaryExportError:
                if check:  # where the model itself fails, its own error is raised
                    run_as_is(lambda: own.run(*args, **kwargs))
                raise
            counts[candidate.name] += 1
            if check:
                output = run_as_is(lambda: own.run(*args, **kwargs))
                results = pytree.list_leaves(output)
                _check_rotated(candidate, lowering, results, rotated)
                if record is not None:
                    xs = [leaves[source] for source in sources]
                    ys = [results[slot.result] for slot in lowering.slots]
                    record(CheckedCall(candidate.name, lowering, xs, ys, tables.tables))
                return output
            return _rebuild(found.recorded_calls[key], leaves, lowering, rotated)

        return wrapper

    with ExitStack() as stack:
        for module in [] if check else found.table_modules:
            handle = module.register_forward_pre_hook(_widen, with_kwargs=True)
            stack.callback(handle.remove)
        wrappers = [(each.place, make_wrapper(each)) for each in found.candidates]
        stack.enter_context(redirect_calls(wrappers))
        yield counts


def _check_rotated(
    candidate: Candidate, lowering: Lowering, output: list[Any], rotated: list[Tensor]
) -> None:
    for slot, ours in zip(lowering.slots, rotated, strict=True):
        if not is_close(*map(lowering.split_heads, (ours, output[slot.result]))):
            difference = (ours - output[slot.result]).abs().max()
            raise CheckFailedError(
                f"the op differs from {candidate.name} by {float(difference):.3g} for a tensor of "
                f"shape {tuple(ours.shape)}, though not where it was traced"
            )


def _widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Cast half types to float32: a rotary module's input decides the type of its tables."""

    def widen(leaf: Any) -> Any:
        half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if half else leaf

    return pytree.map_leaves(widen, (args, kwargs))


def _identify_tables(leaves: list[Any], sources: list[int], lowering: Lowering) -> Iterator[Any]:
    """Yield what identifies a call's tables: layers of the same angles share one computation."""
    for index, leaf in enumerate(leaves):
        if index not in sources:
            if isinstance(leaf, torch.SymInt):
                yield str(leaf)
            else:
                yield leaf if isinstance(leaf, (int, float, str)) else id(leaf)
            continue
        for name, size in lowering.list_sizes(leaf):
            if name in "SH" or (name == "B" and lowering.whole_batch):
                yield str(size) if isinstance(size, torch.SymInt) else int(size)
        yield leaf.dtype


def _rebuild(
    recorded: RecordedCall, leaves: list[Any], lowering: Lowering, rotated: list[Tensor]
) -> Any:
    """Nest the results as the function does."""
    output = list(recorded.output)
    for index, value in enumerate(output):
        if isinstance(value, Tensor):  # an argument that is returned unchanged
            indices = [i for i, leaf in enumerate(recorded.leaves) if leaf is value]
            output[index] = leaves[indices[0]] if indices else None
    for slot, value in zip(lowering.slots, rotated, strict=True):
        output[slot.result] = value
    return pytree.unflatten(output, recorded.output_tree)
