"""What the manifest says of a decoder: its cache, its logits, its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rotary_export.bundle.dims import is_past, read_bounded
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.models.configs import find_last_position, find_length_thresholds
from rotary_export.models.decoder.cache import is_of_transformers, make_cache_of_length
from rotary_export.models.decoder.options import FULL, STATIC, WINDOW, DecoderOptions


def describe_decoder(model: nn.Module, graph: GraphInfo, options: DecoderOptions) -> dict[str, Any]:
    """Return the entries of a manifest's config that a loop over the graph must know.

    Args:
        model: What the graph was traced from.
        graph: The graph.
        options: What was asked for.

    Returns:
        `last_logits`, and `decoder`, if the graph has a key/value cache:

        - `cache`: the kind of the cache.
        - `num_layers`: how many layers it has.
        - `logits`: of "all" positions, or of the "last" one.
        - `max_cache_len`: of a static cache; None: it grows.
        - `length_thresholds`: lengths past which transformers computes its cache anew.
        - `max_positions`: how many positions the config names, where a model can't go past them.
    """
    keys = [info for info in graph.inputs if is_past(info.name) and info.name.endswith("key")]
    found: dict[str, Any] = {"last_logits": options.last_logits}
    if keys:
        is_open = bool(find_length_thresholds(model, ["dynamic"]))
        found["decoder"] = {
            "cache": _find_kind(keys),
            "num_layers": len(keys),
            "logits": "last" if options.last_logits else "all",
            "max_cache_len": options.max_cache_len,
            "length_thresholds": find_cache_resets(model),
            "max_positions": None if is_open else find_last_position(model),
        }
    return found


def _find_kind(keys: Sequence[TensorInfo]) -> str:
    """Return the kind of a cache."""
    dims = [info.shape[2] for info in keys]
    if all(isinstance(dim, int) for dim in dims):
        return STATIC
    return WINDOW if any(read_bounded(str(dim)) for dim in dims) else FULL


def find_cache_resets(model: nn.Module) -> list[int]:
    """Return the lengths past which `generate` throws its cache away and starts anew.

    Past such a length longrope changes the angles of all positions; keys in a cache keep theirs.
    Some models of transformers drop the cache there, others do not: they are asked.
    """
    return [
        length
        for length in find_length_thresholds(model, ["longrope"])
        if is_of_transformers(model) and _drops_cache(model, length)
    ]


def _drops_cache(model: Any, length: int) -> bool:
    """Return whether a model drops a cache of such a length when the next token comes."""
    ids = torch.zeros(1, length + 1, dtype=torch.int64)
    cache = make_cache_of_length(length)
    try:
        prepared = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), use_cache=True
        )
    except Exception:  # its own needs: a cache that is computed anew is right in any case
        return True
    return not any(value is cache for value in prepared.values())
