"""What an exporter can't trace in a model, replaced while the model is traced."""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.compat.einx import broadcast_with_symbols
from rotary_export.compat.transformers import (
    BATCHED,
    COUNT_FRAMES,
    EXPERTS,
    GROUPED,
    count_frames,
    list_frame_counters,
)
from rotary_export.models.configs import get_field, list_configs
from rotary_export.models.find.names import is_rotary_name
from rotary_export.rope.stateless_replacement import replace_stateful

_CACHES = "cache_if_possible"


@contextmanager
def patch_for_tracing(model: nn.Module) -> Iterator[None]:
    """Replace, while a model is traced, what an exporter would make constant or can't export.

    1. Rotary modules of transformers that remember lengths (dynamic, longrope): stateless ones.
    2. Caches of rotary-embedding-torch, which compare lengths: off.
    3. `len(tensor)` in the modules of rotary classes, which must be a number: the tensor's size.
    4. Elementwise functions of einx, which turn sizes into numbers: broadcasting.
    5. transformers' grouped matrix product of experts, an operator of its own: batched products.
    6. `max` and `min` of numbers that are computed from sizes, which would take one of them.
    7. `torch.linspace` of as many steps as a size, which would be constant.
    8. Moonshine's `int(samples / 64 + 1)`, the length of its mask: division of whole numbers.

    Args:
        model: It is restored when the context ends.
    """
    with ExitStack() as stack:
        _replace_stateful_modules(model, stack)
        stack.enter_context(disable_caches(model))
        _replace_len(_list_rotary(model), stack)
        stack.enter_context(broadcast_with_symbols())
        _use_batched_experts(model, stack)
        _keep_maxima(stack)
        for module in list_frame_counters(model):
            stack.callback(delattr, module, COUNT_FRAMES)
            setattr(module, COUNT_FRAMES, count_frames)
        stack.callback(setattr, torch, "linspace", torch.linspace)
        torch.linspace = functools.partial(_space, torch.linspace)
        yield


@contextmanager
def disable_caches(model: nn.Module) -> Iterator[None]:
    """Turn off caches of rotary-embedding-torch: each call computes what a first one does.

    Scales of xPos depend on the length. A cached one is that of a longer, earlier call.

    Args:
        model: It is restored when the context ends.
    """
    caching = [m for m in _list_rotary(model) if getattr(m, _CACHES, False)]
    try:
        for module in caching:
            setattr(module, _CACHES, False)
        yield
    finally:
        for module in caching:
            setattr(module, _CACHES, True)


def _list_rotary(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if is_rotary_name(type(m).__name__)]


def _replace_stateful_modules(model: nn.Module, stack: ExitStack) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            stateless = replace_stateful(child)
            if stateless is not None:
                stack.callback(setattr, parent, name, child)
                setattr(parent, name, stateless.eval())


def _replace_len(rotary: list[nn.Module], stack: ExitStack) -> None:
    for module in {type(each).__module__ for each in rotary} & sys.modules.keys():
        names = vars(sys.modules[module])
        if "len" not in names:
            stack.callback(names.pop, "len", None)
            names["len"] = _measure


def _measure(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else len(value)


def _keep_maxima(stack: ExitStack) -> None:
    """Let `max(1.0, seq_len / 8)` be a maximum in the graph; torch does so for whole numbers."""
    for name, symbolic in (("max", torch.sym_max), ("min", torch.sym_min)):
        real = getattr(builtins, name)
        stack.callback(setattr, builtins, name, real)
        setattr(builtins, name, functools.partial(_choose, real, symbolic))


def _choose(real: Any, symbolic: Any, *values: Any, **options: Any) -> Any:
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    if len(values) > 1 and not options and all(isinstance(value, numbers) for value in values):
        if any(isinstance(value, numbers[2:]) for value in values):
            return functools.reduce(symbolic, values)
    return real(*values, **options)


def _space(real: Any, start: Any, end: Any, steps: Any, **options: Any) -> Tensor:
    """Return what `torch.linspace` returns, also for a symbolic number of steps.

    As there, each half is counted from its own end.
    """
    if not isinstance(steps, torch.SymInt):
        found: Tensor = real(start, end, steps, **options)
        return found
    size: Any = steps
    at = torch.arange(size, device=options.get("device"))
    step = (end - start) / torch.sym_max(size - 1, 1)
    made: Tensor = torch.where(
        at < torch.sym_max(size // 2, 1), start + step * at, end - step * (size - 1 - at)
    )
    return made.to(options.get("dtype") or torch.get_default_dtype())


def _use_batched_experts(model: nn.Module, stack: ExitStack) -> None:
    for config in list_configs(model):
        found = get_field(config, EXPERTS)
        if isinstance(found, str) and found == GROUPED:
            stack.callback(setattr, config, EXPERTS, GROUPED)
            setattr(config, EXPERTS, BATCHED)
