"""Tiny models with random weights, of the families and libraries that are tested."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MULTI_HEAD = {"num_key_value_heads": 4}

# Family (transformers' model_type): what its config needs besides SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "gptj": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 8,
    },
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "cohere": {},
    "glm": {"head_dim": 16},
    "olmo2": {},
    "stablelm": {},
    "granite": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": None},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 3},
    "roformer": {"embedding_size": 64, "is_decoder": False},
    "codegen": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_ctx": 64,
        "rotary_dim": 8,
    },
}
ENCODERS = ("modernbert", "esm", "roformer")


def make_config(family: str, **changed: Any) -> Any:
    import transformers

    settings = SIZES | FAMILIES.get(family, {}) | changed
    if "n_layer" in settings:  # GPT-J and CodeGen
        settings["n_layer"] = settings["num_hidden_layers"]
    return transformers.AutoConfig.for_model(family, **settings)


def make_model(family: str, scale: float = 5.0, **changed: Any) -> nn.Module:
    """Make a model whose attention is far from uniform, so that a wrong angle shows."""
    import transformers

    config = make_config(family, **changed)
    auto = transformers.AutoModelForCausalLM
    if family in ENCODERS:
        auto = transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def make_inputs(model: nn.Module, batch: int = 2, seq: int = 6) -> dict[str, Any]:
    from rotary_export.models.decoder.inputs import make_example

    inputs = make_example(model)
    return {name: value[:batch, :seq] for name, value in inputs.items()}


def make_cache(tensors: Sequence[torch.Tensor], config: Any = None) -> Any:
    """Fill a key/value cache with (key, value, key, value, ...), two for each layer."""
    from transformers import DynamicCache

    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)), config=config)
