"""transformers: which class a config makes, and what its modules are called inside."""

from __future__ import annotations

from typing import Any

EXPERTS = "_experts_implementation_internal"  # of a config, as set_experts_implementation sets it
COUNT_FRAMES = "_get_feat_extract_output_lengths"  # of an encoder
_MOONSHINE = "transformers.models.moonshine.modeling_moonshine"
GROUPED, BATCHED = "grouped_mm", "batched_mm"  # an operator of its own; plain products


def list_frame_counters(model: Any) -> list[Any]:
    """Return the modules of Moonshine that count the frames of an input, by its samples."""
    return [m for m in model.modules() if type(m).__module__ == _MOONSHINE]


def count_frames(samples: Any) -> Any:
    """Return how many frames Moonshine's convolutions make: kernels 127, 7, 3, strides 64, 3, 2."""
    return (((samples - 127) // 64 + 1 - 7) // 3 + 1 - 3) // 2 + 1


def list_cross_attentions(decoder: Any) -> list[Any]:
    """Return the modules of a decoder's layers that attend to its encoder; []: not all have one.

    Their linear layers `k_proj` and `v_proj` make keys and values of the encoder's output.
    """
    found = [
        module
        for layer in getattr(decoder, "layers", ())
        for name in ("encoder_attn", "cross_attn")
        if hasattr(module := getattr(layer, name, None), "k_proj") and hasattr(module, "v_proj")
    ]
    return found if len(found) == len(getattr(decoder, "layers", ())) else []


def has_causal_lm(transformers: Any, config: Any) -> bool:
    """Whether `AutoModelForCausalLM` has a class for a config.

    Args:
        transformers: The package.
        config: A config object.
    """
    return type(config) in transformers.AutoModelForCausalLM._model_mapping
