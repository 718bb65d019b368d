"""What stands in the way of a trace, replaced for so long; the lengths that a config names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rotary_export.models.find.calls import is_rotary_name
from rotary_export.rope.stateless import replace_stateful

_EXPERTS = "_experts_implementation_internal"  # of a config, as set_experts_implementation sets it


@contextmanager
def patch_for_tracing(model: nn.Module) -> Iterator[None]:
    """Replace, while a model is traced, what an exporter takes for constant or does not know.

    1. Rotary modules of transformers that remember lengths (dynamic, longrope): stateless ones.
    2. Caches of rotary-embedding-torch, which compare lengths: off.
    3. `len(tensor)` in the modules of rotary classes, which must be a number: the tensor's size.
    4. transformers' grouped matrix product of experts, an operator of its own: batched products.

    Args:
        model: It is as it was when the context ends.
    """
    with ExitStack() as stack:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                stateless = replace_stateful(child)
                if stateless is not None:
                    stack.callback(setattr, parent, name, child)
                    setattr(parent, name, stateless.eval())
        rotary = [m for m in model.modules() if is_rotary_name(type(m).__name__)]
        for module in rotary:
            if getattr(module, "cache_if_possible", False):
                stack.callback(setattr, module, "cache_if_possible", True)
                setattr(module, "cache_if_possible", False)  # noqa: B010 (no attribute to mypy)
        for home in {type(module).__module__ for module in rotary} & sys.modules.keys():
            names = vars(sys.modules[home])
            if "len" not in names:
                stack.callback(names.pop, "len", None)
                names["len"] = _measure
        for config in _list_configs(model):
            if isinstance(found := _get(config, _EXPERTS), str) and found == "grouped_mm":
                stack.callback(setattr, config, _EXPERTS, "grouped_mm")
                setattr(config, _EXPERTS, "batched_mm")
        yield


def _measure(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else len(value)


def find_thresholds(model: nn.Module) -> list[int]:
    """Return the lengths at which a model's angles change, from its transformers configs."""
    found: list[Any] = []
    for config in _list_configs(model):
        longest = _get(config, "max_position_embeddings")
        for rope in _list_ropes(config):
            kind = rope.get("rope_type", rope.get("type"))
            if kind == "longrope":
                found.append(rope.get("original_max_position_embeddings") or longest)
            elif kind == "dynamic":
                found.append(longest)
    return sorted({size for size in found if type(size) is int})


def find_longest(model: nn.Module, thresholds: list[int]) -> int | None:
    """Return how many positions a model takes; None: any, or it is not known."""
    sizes = [
        _get(config, name)
        for config in _list_configs(model)
        for name in ("max_position_embeddings", "n_positions")
    ]
    known = [size for size in sizes if type(size) is int and size > 0]
    return None if thresholds or not known else min(known)


def _list_configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model's modules, and those in them, each once."""
    configs = [_get(model, "config"), *(vars(module).get("config") for module in model.modules())]
    nested = [value for config in configs for value in (_get(config, "__dict__") or {}).values()]
    configs += [value for value in nested if _get(value, "max_position_embeddings") is not None]
    return list({id(config): config for config in configs if config is not None}.values())


def _get(config: Any, name: str) -> Any:
    """Return a field of what may be a config of transformers, or anything else of that name."""
    try:
        return getattr(config, name, None)
    except Exception:  # whatever its __getattr__ raises
        return None


def _list_ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the rope parameters, one per layer type where they differ."""
    given = [_get(config, name) for name in ("rope_parameters", "rope_scaling")]
    ropes: Any = next((rope for rope in given if isinstance(rope, Mapping) and rope), None)
    if ropes is None:
        return []
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    return nested or [ropes]
