"""What configs leave to the family (`model_type`): layouts, defaults and the names of keys.

Checked against the installed transformers by `tests/rope/test_families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names of one thing, in the order of preference.
BASE_KEYS = ("rope_theta", "rotary_emb_base")
HIDDEN_KEYS = ("embed_dim", "hidden_size", "n_embd", "d_model")
HEADS_KEYS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_num_attention_heads",
)  # fmt: skip
KV_HEADS_KEYS = ("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads")
HEAD_DIM_KEYS = ("head_dim", "attention_head_dim", "kv_channels", "qk_rope_head_dim")
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
# A config that contains one of these has a rotary embedding.
ROPE_KEYS = (*BASE_KEYS, "rotary_dim", "rotary_pct", "rotary_emb_fraction", "qk_rope_head_dim")

# Channel pairs (2i, 2i + 1).
INTERLEAVED = frozenset(
    "codegen cohere cohere2 cohere2_moe deepseek_v2 ernie4_5 ernie4_5_moe glm glm4 gptj helium "
    "llama4_text moonshine roformer".split()
)
# Channel pairs (i, i + rotary_dim / 2).
HALF = frozenset(
    "afmoe apertus arcee aria_text bamba bitnet chameleon cwm dbrx diffllama doge dots1 "
    "emu3_text_model esm eurobert exaone4 falcon falcon_h1 flex_olmo gemma gemma2 gemma3_text "
    "gemma3n_text gemma4_text glm4_moe gpt_neox gpt_neox_japanese gpt_oss granite granitemoe "
    "granitemoehybrid granitemoeshared hunyuan_v1_dense hunyuan_v1_moe jais2 jetmoe laguna "
    "lfm2 lfm2_moe llama mellum mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral "
    "mixtral mllama_text_model modernbert modernbert-decoder nemotron nomic_bert olmo olmo2 "
    "olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text "
    "qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl_moe_text qwen3_vl_text "
    "recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 t5_gemma_module "
    "vaultgemma zamba2".split()
)

# What a config.json may leave out, where it is not 10000 and the whole head.
DEFAULTS: dict[str, dict[str, float]] = {
    "bamba": {"partial_rotary_factor": 0.5},
    "bitnet": {"rope_theta": 500000.0},
    "codegen": {"rotary_dim": 64},
    "cohere": {"rope_theta": 500000.0},
    "emu3_text_model": {"rope_theta": 1000000.0},
    "ernie4_5": {"rope_theta": 500000.0},
    "ernie4_5_moe": {"rope_theta": 500000.0},
    "flex_olmo": {"rope_theta": 500000.0},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "glm4v_moe_text": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"partial_rotary_factor": 0.25},
    "gptj": {"rotary_dim": 64},
    "helium": {"rope_theta": 100000.0},
    "lfm2": {"rope_theta": 1000000.0},
    "lfm2_moe": {"rope_theta": 1000000.0},
    "llama4_text": {"rope_theta": 500000.0},
    "minimax": {"rope_theta": 1000000.0},
    "minimax_m2": {"rope_theta": 5000000.0},
    "mixtral": {"rope_theta": 1000000.0},
    "mllama_text_model": {"rope_theta": 500000.0},
    "moonshine": {"partial_rotary_factor": 0.9},
    "nemotron": {"partial_rotary_factor": 0.5},
    "nomic_bert": {"rope_theta": 1000.0},
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"rope_theta": 1000000.0},
    "qwen2_5_vl_text": {"rope_theta": 1000000.0},
    "qwen2_vl_text": {"rope_theta": 1000000.0},
    "qwen3_5_moe_text": {"partial_rotary_factor": 0.25},
    "qwen3_5_text": {"partial_rotary_factor": 0.25},
    "qwen3_next": {"partial_rotary_factor": 0.25},
    "qwen3_vl_moe_text": {"rope_theta": 500000.0},
    "qwen3_vl_text": {"rope_theta": 500000.0},
    "recurrent_gemma": {"partial_rotary_factor": 0.5},
    "smollm3": {"rope_theta": 2000000.0},
    "solar_open": {"rope_theta": 1000000.0},
    "stablelm": {"partial_rotary_factor": 0.25},
}

# Families whose configs, where they leave the rope parameters out, mean scaled ones.
OWN_ROPES = frozenset({"apertus", "cwm", "gpt_oss", "ministral3"})

# Old configs of families with two bases: layer type, its key, its default, whether it is scaled.
_GEMMA3 = (
    ("full_attention", "rope_theta", 1000000.0, True),
    ("sliding_attention", "rope_local_base_freq", 10000.0, False),
)
_MODERNBERT = (
    ("full_attention", "global_rope_theta", 160000.0, True),
    ("sliding_attention", "local_rope_theta", 10000.0, True),
)
TWO_BASES: dict[str, tuple[tuple[str, str, float, bool], ...]] = {
    "gemma3_text": _GEMMA3,
    "gemma3n_text": _GEMMA3,
    "deepseek_v4": (
        ("main", "rope_theta", 10000.0, False),
        ("compress", "compress_rope_theta", 160000.0, True),
    ),
    "modernbert": _MODERNBERT,
    "modernbert-decoder": _MODERNBERT,
    "olmo3": (
        ("full_attention", "rope_theta", 500000.0, True),
        ("sliding_attention", "rope_theta", 500000.0, False),
    ),
}

# Multimodal positions: layout (`axes.assign_axes`) and the sections that configs leave out.
MROPE: dict[str, tuple[str, tuple[int, ...]]] = {
    "cohere_compass_text": ("interleaved", (24, 20, 20)),
    "ernie4_5_vl_moe_text": ("pairs-first", (22, 22, 20)),
    "glm4v_moe_text": ("chunked", (8, 12, 12)),
    "glm4v_text": ("chunked", (8, 12, 12)),
    "hunyuan_vl_text": ("doubled", ()),
    "paddleocr_vl_text": ("chunked", (16, 24, 24)),
    "qwen2_5_omni_text": ("chunked", (16, 24, 24)),
    "qwen2_5_vl_text": ("chunked", (16, 24, 24)),
    "qwen2_vl_text": ("chunked", (16, 24, 24)),
    "qwen3_5_moe_text": ("interleaved", (11, 11, 10)),
    "qwen3_5_text": ("interleaved", (11, 11, 10)),
    "qwen3_omni_moe_text": ("interleaved", (24, 20, 20)),
    "qwen3_vl_moe_text": ("interleaved", (24, 20, 20)),
    "qwen3_vl_text": ("interleaved", (24, 20, 20)),
}
# 2-D vision: which columns of a table have the rows (axis 0) and the columns (axis 1) of an image
# (`axes.assign_axes`). Llama 4's positions count from 1; 0 and 0 is its class token.
AXIAL: dict[str, str] = {
    **dict.fromkeys(
        "cohere_compass_vision dinov3_vit dots3_note_vision_encoder edgetam_video eomt_dinov3 "
        "ernie4_5_vl_moe_vision exaone4_5_vision gemma4_vision glm4v_moe_vision glm4v_vision "
        "glm5_next_vision glm_ocr_vision lfm3_vl_vision mlcd mlcd_vision_model "
        "muse_glimmer_vision muse_spark_vision paddleocr_vl_vision qwen2_5_omni_vision_encoder "
        "qwen2_5_vl_vision qwen2_vl_vision qwen3_5_moe_vision qwen3_5_vision "
        "qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision "
        "sam2_video sam3_tracker_video sam3_vit_model video_llama_3_vision".split(),
        "rows-first",
    ),
    "inkling2_vision": "columns-first",
    "kimi_k25_vision": "alternating",
    "llama4_vision_model": "columns-first",
    "minimax_m3_vl_vision": "three-axes",
    "pixtral": "even-odd",
    "step3p5_vision": "columns-first",
}
# Of these, those whose positions are coordinates in [-1, 1].
COORDINATES = frozenset({"dinov3_vit", "eomt_dinov3"})
# Those that rotate each half of a head by itself, halves of it against each other.
TWO_BLOCKS = frozenset({"gemma4_vision"})
# Families whose angles do not follow from their rope parameters, and what they are.
OTHERS = {
    "efficientloftr": "of 2-D positions, one axis for each pair in turn",
    "musicflamingo": "of times",
    "vjepa2": "different for the two channels of a pair, which is not a rotation",
}
# Families whose "yarn" is longrope.
LONGROPE_ONLY = frozenset({"phi3", "phi4_multimodal"})


def is_known(model_type: str) -> bool:
    """Return whether a family is known to have a rotary embedding, whatever its config contains."""
    return model_type in INTERLEAVED | HALF or model_type in AXIAL or model_type in DEFAULTS


def find_layout(model_type: str) -> bool | None:
    """Return a family's layout: True for interleaved, None if it is not known."""
    if model_type in INTERLEAVED:
        return True
    return False if model_type in HALF else None


def find_layer_config(config: Any, layer_type: str | None) -> Any:
    """Return the config of one type of layer, where sizes differ (Gemma 4).

    Args:
        config: A dict or an object.
        layer_type: None: of all layers.
    """
    if layer_type is None:
        return config
    if not isinstance(config, Mapping):
        try:
            return config.per_layer_config[layer_type]
        except (AttributeError, LookupError, TypeError, ValueError):
            return config
    overrides: dict[str, Any] = {}
    if layer_type == "full_attention" and config.get("global_head_dim"):
        overrides["head_dim"] = config["global_head_dim"]
        if config.get("num_global_key_value_heads") and config.get("attention_k_eq_v", True):
            overrides["num_key_value_heads"] = config["num_global_key_value_heads"]
    by_layer = config.get("per_layer_config") or {}
    for index, name in enumerate(config.get("layer_types") or ()):
        if name == layer_type:
            overrides |= by_layer.get(str(index), by_layer.get(index)) or {}
    return {**config, **overrides}
