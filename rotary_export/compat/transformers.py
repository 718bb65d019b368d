"""transformers: which class a config makes, and which kernel its experts use."""

from __future__ import annotations

from typing import Any

EXPERTS = "_experts_implementation_internal"  # of a config, as set_experts_implementation sets it
GROUPED, BATCHED = "grouped_mm", "batched_mm"  # an operator of its own; plain products


def has_causal_lm(transformers: Any, config: Any) -> bool:
    """Whether `AutoModelForCausalLM` has a class for a config.

    Args:
        transformers: The package.
        config: A config object.
    """
    return type(config) in transformers.AutoModelForCausalLM._model_mapping
