"""Key/value caches as named tensors, and back; named as optimum names them.

Of transformers, and of x-transformers, whose cache contains keys that are not rotated yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rotary_export.compat.x_transformers import is_layer_cache, list_layers, make_layer_cache
from rotary_export.errors import RotaryExportError
from rotary_export.models.decoder.options import FULL, STATIC, DecoderOptions
from rotary_export.models.error_text import describe_error


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache of transformers or x-transformers; imports neither."""
    module = sys.modules.get("transformers.cache_utils")
    return is_layer_cache(value) or (module is not None and isinstance(value, module.Cache))


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of transformers, without importing transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_pairs(value: Any) -> bool:
    """Return whether a value is a cache as it was before transformers had a class for it.

    That is a tuple of (key, value), (B, N, S, H) each, one for each layer.
    """
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in value)
        and all(isinstance(part, Tensor) and part.dim() == 4 for pair in value for part in pair)
    )


def is_empty(cache: Any) -> bool:
    """Return whether a cache that grows holds no tensors yet, not even empty ones."""
    if is_layer_cache(cache):
        return False
    from transformers import DynamicCache

    grows = isinstance(cache, DynamicCache) or hasattr(cache, "arrange")
    return grows and not any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def make_empty_cache(model: Any, options: DecoderOptions, kind: str) -> Any:
    """Make an empty cache of transformers for a model.

    Args:
        model: A causal language model of transformers.
        options: Of which `max_cache_len` is read.
        kind: One of `CACHES`.

    Raises:
        RotaryExportError: No layer of the model has a sliding window, which "window" needs; or
            one attends to chunks, whose mask a static cache does not have.
    """
    from transformers import DynamicCache

    if kind == FULL:
        return DynamicCache()
    from rotary_export.models.decoder.static import StaticCache
    from rotary_export.models.decoder.window import WindowCache

    layers = DynamicCache(config=model.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    if kind == STATIC:
        assert options.max_cache_len is not None
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        if "chunked_attention" in (kinds or ()):
            raise RotaryExportError(
                f"cache 'static' is for full and sliding attention, {type(model).__name__} has "
                "chunked attention: use 'full'"
            )
        uses_scores = getattr(model.config, "_attn_implementation", "sdpa") == "eager"
        return StaticCache(windows, options.max_cache_len, model.dtype if uses_scores else None)
    if not any(windows):
        raise RotaryExportError(
            f"cache 'window' is for a model with sliding windows, {type(model).__name__} has none: "
            "use 'full'"
        )
    return WindowCache(windows)


def arrange(arguments: dict[str, Any]) -> None:
    """Let a cache among a model's arguments change the others as it needs."""
    for value in [*arguments.values()]:
        if is_cache(value) and hasattr(value, "arrange"):
            value.arrange(arguments)


def find_cache_dims(example_inputs: Mapping[str, Any]) -> dict[str, int | str]:
    """Return the size of the axis of positions of a cache, by name of a tensor; {}: it grows."""
    found: dict[str, int | str] = {}
    for value in example_inputs.values():
        if is_cache(value) and hasattr(value, "list_dims"):
            found |= value.list_dims()
    return found


def make_cache_of_length(length: int) -> Any:
    """Make a cache of one layer that holds so many positions, of zeros."""
    return rebuild_cache([torch.zeros(1, 1, length, 1)] * 2)


def find_stateful_layer(model: Any) -> str:
    """Return the kind of a layer that keeps more than keys and values, or other ones; "": none.

    transformers chooses the kind of each layer by the config: full, with a window, a recurrent
    state, none of its own.

    Raises:
        RotaryExportError: transformers can't read the layers from the config.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        cache = DynamicCache(config=model.config)
    except Exception as error:  # whatever transformers raises
        raise RotaryExportError(
            f"transformers has no cache for {type(model).__name__}: {describe_error(error)}; pass "
            "cache='none' (--cache none)"
        ) from error
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return type(layer).__name__
    return ""


def read_cache(name: str, cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of a cache that holds all positions.

    Layers with a sliding window are read as full ones, until they drop a position: the model masks
    positions outside the window.

    Args:
        name: The argument's name, for errors.
        cache: A filled DynamicCache, or what a decoder of x-transformers returned.

    Returns:
        (B, N, S, H) tensors by name: `past_key_values.N.key`, `past_key_values.N.value`.

    Raises:
        RotaryExportError: The cache has no layers, drops positions, or is of another kind.
    """
    if is_layer_cache(cache):
        return _name_layers("past_key_values", list_layers(cache))
    if hasattr(cache, "read_tensors"):  # of an encoder-decoder
        found: dict[str, Tensor] = cache.read_tensors()
        return found
    from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

    required = f"{name} must be a DynamicCache that holds every position, filled, got"
    if isinstance(cache, EncoderDecoderCache):
        raise RotaryExportError(f"{required} an EncoderDecoderCache")
    if hasattr(cache, "arrange"):  # one of this package
        return _name_layers("past_key_values", [(e.keys, e.values) for e in cache.layers])
    found = {}
    for index, layer in enumerate(getattr(cache, "layers", [])):
        whole = isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.dim() == 4
        if not whole:
            raise RotaryExportError(f"{required} layer {index} of {type(layer).__name__}")
        kept, length = layer.keys.shape[-2], layer.get_seq_length()
        if kept != length:
            raise RotaryExportError(
                f"{required} {kept} of {length} in layer {index} ({type(layer).__name__}); "
                "DynamicCache() without a config keeps them all"
            )
        found[f"past_key_values.{index}.key"] = layer.keys
        found[f"past_key_values.{index}.value"] = layer.values
    if not found:
        raise RotaryExportError(
            f"{name} must hold keys and values, got a {type(cache).__name__} without layers"
        )
    return found


def _name_layers(prefix: str, layers: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    kinds = ("key", "value")
    return {
        f"{prefix}.{index}.{kind}": tensor
        for index, layer in enumerate(layers)
        for kind, tensor in zip(kinds, layer, strict=True)
    }


def choose_rebuild(cache: Any) -> Callable[[Sequence[Tensor]], Any]:
    """Return what makes a cache of its kind of (key, value, key, value, ...)."""
    if is_layer_cache(cache):
        return _rebuild_layer_cache
    return getattr(cache, "rebuild", rebuild_cache)


def _rebuild_layer_cache(tensors: Sequence[Tensor]) -> Any:
    """Make a cache of x-transformers of (key, value, key, value, ...), two for each layer."""
    return make_layer_cache(list(zip(tensors[0::2], tensors[1::2], strict=True)))


def rebuild_cache(tensors: Sequence[Tensor]) -> Any:
    """Make a cache of transformers of (key, value, key, value, ...), two for each layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache, make_layer = DynamicCache(), cast(Any, DynamicLayer)
    for keys, values in zip(tensors[0::2], tensors[1::2], strict=True):
        layer = make_layer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def name_present(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the keys and values of a cache that a model returns, by name."""
    if is_layer_cache(cache):
        yield from _name_layers("present", list_layers(cache)).items()
        return
    if hasattr(cache, "name_present"):
        yield from cache.name_present()
        return
    for index, layer in enumerate(cache.layers):
        yield f"present.{index}.key", layer.keys
        yield f"present.{index}.value", layer.values
