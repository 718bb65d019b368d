"""Diffusers: transformers that denoise images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library_cases.case import Case, make_features

AXES = {"axes_dims_rope": (4, 6, 6), "attention_head_dim": 16, "num_attention_heads": 2}
# Names of the axes of what most of these models accept.
TOKENS = {
    "hidden_states": {0: "batch", 1: "image"},
    "encoder_hidden_states": {0: "batch", 1: "text"},
    "timestep": {0: "batch"},
}
# Height and width stay fixed: they are multiples of a patch.
TEXT = {**TOKENS, "hidden_states": {0: "batch"}}
IDS = {"img_ids": {0: "image"}, "txt_ids": {0: "text"}}


def make_image_ids(image: int, width: int, axes: int = 3) -> Tensor:
    """Return (image, axes) ids: 0, then row and column."""
    index = torch.arange(image)
    ids = torch.zeros(image, axes)
    ids[:, 1], ids[:, 2] = index // width, index % width
    return ids


class Flux(Case):
    """Image and text in one sequence, interleaved pairs, ids of three axes."""

    name = "Flux"
    library = "diffusers"
    sizes = ((2, 6, 5), (3, 12, 4), (1, 20, 9))
    dims = {**TOKENS, **IDS, "pooled_projections": {0: "batch"}}

    def build(self) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=24,
            pooled_projection_dim=12, **AXES,
        )  # fmt: skip

    def inputs(self, batch: int, image: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, image, 8),
            "encoder_hidden_states": make_features(batch, text, 24),
            "pooled_projections": make_features(batch, 12),
            "timestep": torch.rand(batch),
            "img_ids": make_image_ids(image, 3),
            "txt_ids": torch.zeros(text, 3),
        }


class Flux2(Case):
    """As Flux, with ids of four axes and one modulation for all layers."""

    name = "Flux 2"
    library = "diffusers"
    sizes = Flux.sizes
    dims = {**TOKENS, **IDS, "guidance": {0: "batch"}}

    def build(self) -> nn.Module:
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=24,
            timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), attention_head_dim=16,
            num_attention_heads=2,
        )  # fmt: skip

    def inputs(self, batch: int, image: int, text: int) -> dict[str, Any]:
        text_ids = torch.zeros(text, 4)
        text_ids[:, 3] = torch.arange(text)
        return {
            "hidden_states": make_features(batch, image, 8),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.rand(batch),
            "img_ids": make_image_ids(image, 3, axes=4),
            "txt_ids": text_ids,
            "guidance": torch.rand(batch),
        }


class Chroma(Case):
    """As Flux; the modulation comes from a network of its own, which makes a list of the batch."""

    name = "Chroma"
    library = "diffusers"
    sizes = ((2, 6, 5), (2, 12, 4), (2, 20, 9))
    dims = {"hidden_states": {1: "image"}, "encoder_hidden_states": {1: "text"}, **IDS}

    def build(self) -> nn.Module:
        from diffusers import ChromaTransformer2DModel

        return ChromaTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=24,
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **AXES,
        )  # fmt: skip

    def inputs(self, batch: int, image: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, image, 8),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.rand(batch),
            "img_ids": make_image_ids(image, 3),
            "txt_ids": torch.zeros(text, 3),
        }


class QwenImage(Case):
    """Complex tables, held as attributes; the sizes of image and text become Python numbers."""

    name = "Qwen-Image"
    library = "diffusers"
    sizes = ((2, 5), (3, 5), (1, 5))
    dims = {name: {0: "batch"} for name in TOKENS}

    def build(self) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=24, **AXES
        )

    def inputs(self, batch: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, 6, 16),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.rand(batch),
            "img_shapes": [(1, 2, 3)],
        }


class Lumina2(Case):
    """Complex tables gathered by positions, which depend on the lengths of the captions."""

    name = "Lumina 2"
    library = "diffusers"
    sizes = ((2, 5), (3, 4), (1, 9))
    dims = {
        **TEXT,
        "encoder_attention_mask": {0: "batch", 1: "text"},
    }

    def build(self) -> nn.Module:
        from diffusers import Lumina2Transformer2DModel

        return Lumina2Transformer2DModel(
            in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 32, 32), cap_feat_dim=24,
        )  # fmt: skip

    def inputs(self, batch: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, 4, 4, 6),
            "timestep": torch.rand(batch),
            "encoder_hidden_states": make_features(batch, text, 24),
            "encoder_attention_mask": torch.ones(batch, text, dtype=torch.bool),
        }


class CogView4(Case):
    """Rotates the image's part of query and key in place; halves."""

    name = "CogView 4"
    library = "diffusers"
    sizes = ((2, 5), (3, 4), (1, 9))
    dims = {
        **TEXT,
        **{name: {0: "batch"} for name in ("original_size", "target_size", "crop_coords")},
    }

    def build(self) -> nn.Module:
        from diffusers import CogView4Transformer2DModel

        return CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, text_embed_dim=24, time_embed_dim=16, condition_dim=8,
            pos_embed_max_size=16, sample_size=16, rope_axes_dim=(16, 16),
        )  # fmt: skip

    def inputs(self, batch: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, 4, 4, 6),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.rand(batch),
            "original_size": torch.full((batch, 2), 32.0),
            "target_size": torch.full((batch, 2), 48.0),
            "crop_coords": torch.zeros(batch, 2),
        }


class Prx(Case):
    """Rotations as 2 x 2 matrices, multiplied with each pair."""

    name = "PRX"
    library = "diffusers"
    sizes = ((2, 5), (3, 4), (1, 9))
    dims = TEXT

    def build(self) -> nn.Module:
        from diffusers import PRXTransformer2DModel

        return PRXTransformer2DModel(
            in_channels=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8]
        )

    def inputs(self, batch: int, text: int) -> dict[str, Any]:
        return {
            "hidden_states": make_features(batch, 4, 4, 6),
            "timestep": torch.rand(batch),
            "encoder_hidden_states": make_features(batch, text, 24),
        }


CASES = (Flux, Flux2, Chroma, QwenImage, Lumina2, CogView4, Prx)
