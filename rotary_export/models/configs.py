"""The lengths that a model's transformers configs contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def find_length_thresholds(
    model: nn.Module, kinds: Sequence[str] = ("longrope", "dynamic")
) -> list[int]:
    """Return the lengths at which a model's angles change, of these rope types."""
    found: list[Any] = []
    for config in list_configs(model):
        longest = get_field(config, "max_position_embeddings")
        for rope in _list_ropes(config):
            kind = rope.get("rope_type", rope.get("type"))
            if kind not in kinds:
                continue
            if kind == "longrope":
                found.append(rope.get("original_max_position_embeddings") or longest)
            else:
                found.append(longest)
    return sorted({size for size in found if type(size) is int})


def find_last_position(model: nn.Module) -> int | None:
    """Return how many positions a model's configs name; None: they name none."""
    sizes = [
        get_field(config, name)
        for config in list_configs(model)
        for name in ("max_position_embeddings", "n_positions")
    ]
    known = [size for size in sizes if type(size) is int and size > 0]
    return min(known, default=None)


def list_configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model's modules, and those in them, each once."""
    configs = [
        get_field(model, "config"),
        *(vars(module).get("config") for module in model.modules()),
    ]
    nested = [
        value for config in configs for value in (get_field(config, "__dict__") or {}).values()
    ]
    configs += [
        value for value in nested if get_field(value, "max_position_embeddings") is not None
    ]
    return list({id(config): config for config in configs if config is not None}.values())


def get_field(config: Any, name: str) -> Any:
    """Return a field of a transformers config, or of any other object of that name."""
    try:
        return getattr(config, name, None)
    except Exception:  # whatever its __getattr__ raises
        return None


def has_axes(model: nn.Module) -> bool:
    """Return whether a model's positions have several axes: time, height, width."""
    ropes = (rope for config in list_configs(model) for rope in _list_ropes(config))
    return any(rope.get("mrope_section") for rope in ropes)


def _list_ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the rope parameters, one per layer type where they differ."""
    given = [get_field(config, name) for name in ("rope_parameters", "rope_scaling")]
    ropes: Any = next((rope for rope in given if isinstance(rope, Mapping) and rope), None)
    if ropes is None:
        return []
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    return nested or [ropes]
