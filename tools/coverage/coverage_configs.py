"""Tiny configurations of any family of transformers, made by shrinking its defaults."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

# By name, wherever a family has it; sizes that must divide each other do.
_SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size",
         "shared_expert_intermediate_size"), 64
    ),
    **dict.fromkeys(
        ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim",
         "attention_head_dim", "kv_channels"), 16
    ),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    "rotary_dim": 8,
    "sliding_window": 16,
    "qk_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 64,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "first_k_dense_replace": 1,
    "lru_width": 64,
    "chunk_size": 16,
    "num_kv_shared_layers": 0,
}  # fmt: skip
_MAY_BE_NONE = ("num_experts_per_tok", "vocab_size", "n_routed_experts", "n_shared_experts")
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

_BLT = {
    "vocab_size": 260,
    "hidden_size": 64,
    "hidden_size_global": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
# What makes a family rotate at all, where its default does not.
_OWN: dict[str, dict[str, Any]] = {
    "esm": {"position_embedding_type": "rotary"},
    "bamba": {"attn_layer_indices": [1]},
    # torch.onnx has no attention with one key for all heads
    "falcon": {"multi_query": False, "num_kv_heads": 4},
    # four models of bytes and patches, each with a configuration of its own
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 99,
        "patcher_config": _BLT,
        "encoder_config": _BLT,
        "decoder_config": _BLT,
        "global_config": _BLT,
    },
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama+linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama+llama3": _LLAMA3,
    "llama+yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "llama+dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "phi3+longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i / 2 for i in range(8)],
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
}


def make_tiny_config(family: str) -> Any:
    """Make a configuration of two layers.

    Args:
        family: A model type, or one of VARIANTS.

    Returns:
        The configuration.
    """
    model_type, _, variant = family.partition("+")
    config_class = transformers.CONFIG_MAPPING[model_type]
    default = config_class()
    accepted = inspect.signature(config_class.__init__).parameters
    names = set(accepted) | set(vars(default))
    values: dict[str, Any] = {}
    for name, size in _SIZES.items():
        wanted = (int, type(None)) if name in _MAY_BE_NONE else int
        if name in names and isinstance(_read(default, name), wanted):
            values[name] = size
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        values |= dict.fromkeys(
            ("num_key_value_heads",) if "num_key_value_heads" in values else (), 4
        )
    layers = values.get("num_hidden_layers", 2)
    for name, value in vars(default).items():
        if isinstance(value, list) and name.startswith(("layer", "layers", "mlp")):
            values[name] = _pick_layers(value, layers)
    for name in _IDS:
        if isinstance(_read(default, name), int | list | None) and name in names:
            values[name] = 0 if name == "pad_token_id" else 1
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and all(not isinstance(value, dict) for value in rope.values()):
        # Three axes of positions share the pairs of a head; families without them don't read it.
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        values["rope_parameters"] = rope | {"mrope_section": [half // 2, half // 4, half // 4]}
    values |= _OWN.get(family, {})
    if variant:
        values["rope_parameters"] = VARIANTS[family]
    try:
        return config_class(**values)
    except Exception:  # a value that this family derives, or checks against another
        for name, value in values.items():
            try:
                setattr(default, name, value)
            except (AttributeError, NotImplementedError):
                continue
        return default


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, 0.0)
    except Exception:  # it varies between layers: here it does not
        return 0


def _pick_layers(value: list[Any], layers: int) -> list[Any]:
    """Keep one layer of each kind, as far as there is room."""
    try:
        kinds = list(dict.fromkeys(value))
    except TypeError:
        return value[:layers]
    return (kinds + value)[:layers]
