"""Sam2, transformers: objects and points followed from image to image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library_cases.case import Case, make_features


class Sam2Memory(Case):
    """Memory attention of SAM 2: complex tables as an attribute, repeated for older frames."""

    name = "SAM 2, memory attention"
    library = "sam2"
    sizes = ((2,), (3,), (1,))
    dims = {name: {1: "batch"} for name in ("curr", "memory", "curr_pos", "memory_pos")}

    def build(self) -> nn.Module:
        from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
        from sam2.modeling.sam.transformer import RoPEAttention

        rope = {"embedding_dim": 32, "num_heads": 1, "downsample_rate": 1, "feat_sizes": (4, 4)}
        layer = MemoryAttentionLayer(
            activation="relu", d_model=32, dim_feedforward=48, dropout=0.0, pos_enc_at_attn=False,
            pos_enc_at_cross_attn_keys=True, pos_enc_at_cross_attn_queries=False,
            self_attention=RoPEAttention(**rope),
            cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=8, **rope),
        )  # fmt: skip
        return MemoryAttention(d_model=32, pos_enc_at_input=True, layer=layer, num_layers=1)

    def inputs(self, batch: int) -> dict[str, Any]:
        return {
            "curr": make_features(16, batch, 32),
            "memory": make_features(36, batch, 8),
            "curr_pos": make_features(16, batch, 32),
            "memory_pos": make_features(36, batch, 8),
            "num_obj_ptr_tokens": 4,
        }


class Sam2MemoryTransformers(Case):
    """The same in transformers: cosines and sines, five axes."""

    name = "SAM 2 video, memory attention"
    library = "transformers"
    sizes = ((2,), (3,), (1,))
    dims = {
        name: {1: "batch"}
        for name in (
            "current_vision_features", "memory", "current_vision_position_embeddings",
            "memory_posision_embeddings",
        )
    }  # fmt: skip

    def build(self) -> nn.Module:
        from transformers import Sam2VideoConfig
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention

        return Sam2VideoMemoryAttention(
            Sam2VideoConfig(
                memory_attention_hidden_size=32, memory_attention_num_layers=1,
                memory_attention_feed_forward_hidden_size=48,
                memory_attention_rope_feat_sizes=[4, 4],
            )
        )  # fmt: skip

    def inputs(self, batch: int) -> dict[str, Any]:
        return {
            "current_vision_features": make_features(16, batch, 32),
            "memory": make_features(36, batch, 64),
            "current_vision_position_embeddings": make_features(16, batch, 32),
            "memory_posision_embeddings": make_features(36, batch, 64),
            "num_object_pointer_tokens": 4,
        }


class LightGlueLayers(nn.Module):
    """LightGlue's positional encoder and a layer, behind the detector of keypoints."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LightGlueConfig
        from transformers.models.lightglue.modeling_lightglue import (
            LightGluePositionalEncoder,
            LightGlueTransformerLayer,
        )

        config = LightGlueConfig(descriptor_dim=32, num_attention_heads=2, num_hidden_layers=1)
        config._attn_implementation = "sdpa"
        self.encoder = LightGluePositionalEncoder(config)
        self.layer = LightGlueTransformerLayer(config, 0)

    def forward(self, descriptors: Tensor, keypoints: Tensor) -> Tensor:
        """(2 pairs, points, 32) and (2 pairs, points, 2) -> (2 pairs, points, 32)."""
        return self.layer(descriptors, self.encoder(keypoints)[0], attention_mask=None)[0]


class LightGlue(Case):
    """Angles are a learned projection of the coordinates of keypoints."""

    name = "LightGlue, layer"
    library = "transformers"
    sizes = ((6,), (11,), (40,))
    dims = {"descriptors": {1: "points"}, "keypoints": {1: "points"}}

    def build(self) -> nn.Module:
        return LightGlueLayers()

    def inputs(self, points: int) -> dict[str, Any]:
        return {
            "descriptors": make_features(2, points, 32),
            "keypoints": torch.rand(2, points, 2) * 2 - 1,
        }


CASES = (Sam2Memory, Sam2MemoryTransformers, LightGlue)
