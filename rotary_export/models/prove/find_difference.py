"""Where a traced model first differs from the model: its rotary calls, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotary_export.models.error_text import describe_error
from rotary_export.models.find.lowering import bring_to_op
from rotary_export.models.find.replace import CheckedCall, replace_calls
from rotary_export.models.find.replacement import Replacement
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.proof.models.cases import Case, Run

_MAX_ULP = 256  # of the largest magnitude of a tensor; less may be rounding


@dataclass(frozen=True)
class _Call:
    """A tensor that the model rotates.

    Attributes:
        place: Its layer, and the function.
        x: The tensor, in a shape of the op.
        y: The result, likewise; None: it is not what the op returns.
    """

    place: str
    x: Tensor
    y: Tensor | None


def find_difference(
    model: nn.Module,
    run: Run,
    found: Replacement,
    traced: TracedRotary,
    names: list[str],
    case: Case,
) -> str:
    """Return in words which rotary call of a traced model is the first that differs.

    Args:
        model: The model.
        run: Runs it on its tensors, in order.
        found: Its rotary calls.
        traced: The traced model.
        names: Of the inputs, in order.
        case: What to run both on.
    """
    if not traced.has_nodes:
        return "no function of the model applies the rotary embedding, so no call is compared"
    calls: list[_Call] = []
    running: list[str] = []

    def record(call: CheckedCall) -> None:
        layer = running[-1] if running else "the model"
        place = f"{layer}, {call.name.rpartition('.')[2]}"
        # The op's result has its channels in another order, or is multiplied by a factor.
        is_last = call.lowering.layout != "deinterleaved" and not call.lowering.has_factor
        for x, y in zip(call.xs, call.ys, strict=True):
            result = bring_to_op(y, call.lowering) if is_last else None
            calls.append(_Call(place, bring_to_op(x, call.lowering), result))

    with _track_modules(model, running), replace_calls(found, check=True, record=record):
        run(case.tensors)
    try:
        got = traced.compute_calls(dict(zip(names, case.tensors, strict=True)))
    except Exception as error:  # whatever torch raises at sizes that the trace can't have
        return f"the rotary calls of the trace can't be compared: {describe_error(error)}"
    pairs = [(x, y) for xs, ys in got for x, y in zip(xs, ys, strict=True)]
    if len(pairs) != len(calls):
        return f"the trace rotates {len(pairs)} tensors, the model {len(calls)}"
    for index, (call, (x, y)) in enumerate(zip(calls, pairs, strict=True)):
        for what, theirs, ours in (("input", call.x, x), ("result", call.y, y)):
            place = None if theirs is None else _find_place(ours, theirs)
            if place is not None:
                return (
                    f"the {what} of rotary call {index + 1} of {len(calls)} ({call.place}) is the "
                    f"first that differs, {place}"
                )
    return f"all {len(calls)} rotary calls of the trace agree, the difference is after them"


@contextmanager
def _track_modules(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are running, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name or "model"))
        )
        handles.append(module.register_forward_hook(lambda *_: _pop(running)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pop(running: list[str]) -> None:
    running.pop()


def _find_place(ours: Tensor, theirs: Tensor) -> str | None:
    """Name the batch row and position of the largest difference; None: there is none."""
    if ours.shape != theirs.shape:
        return f"of shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    difference = (ours.double() - theirs.double()).abs()
    largest = theirs.double().abs().max()
    if (
        not difference.numel()
        or difference.max() <= _MAX_ULP * torch.finfo(theirs.dtype).eps * largest
    ):
        return None
    index = torch.unravel_index(difference.argmax(), difference.shape)
    position = index[2] if theirs.dim() == 4 else index[1]
    return (
        f"at batch row {int(index[0])}, position {int(position)}, by {float(difference.max()):.3g} "
        f"of {float(largest):.3g}"
    )
