"""Timm, transformers, vit-pytorch: encoders of images and of videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library_cases.case import Case, make_features


class Image(Case):
    """Images of a fixed size, in batches of any size; no case itself."""

    sizes = ((2,), (3,), (1,))
    dims = {"x": {0: "batch"}}
    side = 32

    def inputs(self, batch: int) -> dict[str, Any]:
        return {"x": make_features(batch, 3, self.side, self.side)}


def make_timm(architecture: str, **settings: Any) -> nn.Module:
    """Make a small model of a registered architecture of timm."""
    import timm

    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model(architecture, **sizes | settings)


class Eva02(Image):
    """Sines and cosines in one tensor; interleaved pairs; class token without rotation."""

    name = "EVA02"
    library = "timm"

    def build(self) -> nn.Module:
        return make_timm("eva02_tiny_patch14_224", patch_size=8, ref_feat_shape=(4, 4))


class DinoV3Timm(Image):
    """Halves; images of any size that is a multiple of the patch."""

    name = "DINOv3, timm"
    library = "timm"

    def build(self) -> nn.Module:
        return make_timm("vit_small_patch16_dinov3", patch_size=8)


class RopeVit(Image):
    """Angles per head, learned ("RoPE-Mixed"): tables (heads, tokens, channels)."""

    name = "RoPE-ViT, mixed"
    library = "timm"

    def build(self) -> nn.Module:
        return make_timm("vit_small_patch16_rope_mixed_224", patch_size=8)


class RopeVitAxial(Image):
    """Angles of two axes, a class token, a learned position embedding beside them."""

    name = "RoPE-ViT, axial"
    library = "timm"

    def build(self) -> nn.Module:
        return make_timm("vit_small_patch16_rope_ape_224", patch_size=8)


class DinoV3(Image):
    """The angles of patches, in front of them a class token and registers."""

    name = "DINOv3, transformers"
    library = "transformers"
    dims = {"pixel_values": {0: "batch"}}

    def build(self) -> nn.Module:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        return DINOv3ViTModel(
            DINOv3ViTConfig(
                patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, image_size=32, num_register_tokens=2,
            )
        )  # fmt: skip

    def inputs(self, batch: int) -> dict[str, Any]:
        return {"pixel_values": make_features(batch, 3, 32, 32)}


class Pixtral(DinoV3):
    """All images of a batch in one sequence, with a mask of blocks."""

    name = "Pixtral, vision"
    sizes = ((1,), (1,))
    dims = {"pixel_values": {}}

    def build(self) -> nn.Module:
        from transformers import PixtralVisionConfig, PixtralVisionModel

        return PixtralVisionModel(
            PixtralVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=32, patch_size=8,
            )
        )  # fmt: skip


class Qwen2VlVision(Case):
    """Patches of several images in one sequence, their grid as an input."""

    name = "Qwen2-VL, vision"
    library = "transformers"
    sizes = ((1,), (1,))
    dims = {"hidden_states": {}, "grid_thw": {}}

    def build(self) -> nn.Module:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
        )

        return Qwen2VisionTransformerPretrainedModel(
            Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4)
        )

    def inputs(self, images: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(images * 16, 3 * 2 * 4 * 4),
            "grid_thw": torch.tensor([[1, 4, 4]]).repeat(images, 1),
        }


class Vjepa2(Case):
    """Video: a third of the channels for frames, rows and columns each."""

    name = "V-JEPA 2"
    library = "transformers"
    sizes = ((2,), (3,), (1,))
    dims = {"pixel_values_videos": {0: "batch"}}

    def build(self) -> nn.Module:
        from transformers import VJEPA2Config, VJEPA2Model

        return VJEPA2Model(
            VJEPA2Config(
                patch_size=8, crop_size=16, frames_per_clip=4, hidden_size=48, num_hidden_layers=2,
                num_attention_heads=2, pred_hidden_size=48, pred_num_attention_heads=2,
                pred_num_hidden_layers=1,
            )
        )  # fmt: skip

    def inputs(self, batch: int) -> dict[str, Any]:
        return {
            "pixel_values_videos": make_features(batch, 4, 3, 16, 16),
            "skip_predictor": True,
        }


class Sam3Vision(DinoV3):
    """Windows and whole images: two sets of tables."""

    name = "SAM 3, vision"

    def build(self) -> nn.Module:
        from transformers.models.sam3.configuration_sam3 import Sam3ViTConfig
        from transformers.models.sam3.modeling_sam3 import Sam3ViTModel

        return Sam3ViTModel(
            Sam3ViTConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=32, patch_size=8, window_size=2, global_attn_indexes=[1],
                pretrain_image_size=16,
            )
        )  # fmt: skip


class RvT(Image):
    """Applied inline, in no function of its own; a class token does not rotate."""

    name = "RvT"
    library = "vit-pytorch"
    dims = {"img": {0: "batch"}}

    def build(self) -> nn.Module:
        from vit_pytorch.rvt import RvT as Model

        return Model(
            image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=48,
            dim_head=16,
        )  # fmt: skip

    def inputs(self, batch: int) -> dict[str, Any]:
        return {"img": make_features(batch, 3, 32, 32)}


CASES = (
    Eva02, DinoV3Timm, RopeVit, RopeVitAxial, DinoV3, Pixtral, Qwen2VlVision, Vjepa2, Sam3Vision,
    RvT,
)  # fmt: skip
