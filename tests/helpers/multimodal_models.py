"""Tiny encoder-decoders and multimodal models with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from helpers.tiny_models import SIZES
from torch import nn

IMAGE_TOKEN = 90


def make_moonshine(**changed: Any) -> Any:
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "tie_word_embeddings": False,  # tied ones repeat a token
        "initializer_range": 0.1,
    }
    config = transformers.MoonshineConfig(**settings | changed)
    return _make(transformers.MoonshineForConditionalGeneration, config)


def make_qwen2_vl(sections: tuple[int, int, int] = (2, 3, 3)) -> Any:
    """Make a model whose positions have three axes, of so many frequencies each."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    config = transformers.Qwen2VLConfig(
        text_config=SIZES | {"num_hidden_layers": 1, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return _make(transformers.Qwen2VLForConditionalGeneration, config)


def make_gemma3() -> Any:
    text = {"num_hidden_layers": 1, "head_dim": 16, "sliding_window": 8}
    layers = {"layer_types": ["sliding_attention"]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=SIZES | text | layers,
        tie_word_embeddings=False,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return _make(transformers.Gemma3ForConditionalGeneration, config)


def _make(cls: Any, config: Any) -> nn.Module:
    """Make a model whose attention is far from uniform, so that a wrong angle shows."""
    torch.manual_seed(0)
    model: nn.Module = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model
