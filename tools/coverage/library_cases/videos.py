"""Diffusers: transformers that denoise videos and music."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library_cases.case import Case, make_features

# Height and width stay fixed: they are multiples of a patch.
VIDEO = {
    "hidden_states": {0: "batch", 2: "frames"},
    "encoder_hidden_states": {0: "batch", 1: "text"},
    "timestep": {0: "batch"},
}
MASKED = {**VIDEO, "encoder_attention_mask": {0: "batch", 1: "text"}}
SIZES = ((2, 3, 5), (3, 5, 4), (1, 7, 9))
CHANNELS = {"in_channels": 4, "out_channels": 4, "num_layers": 1}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def make_video(batch: int, frames: int, text: int) -> dict[str, Any]:
    """Return a video (batch, 4, frames, 4, 6), a text and a step."""
    return {
        "hidden_states": make_features(batch, 4, frames, 4, 6),
        "encoder_hidden_states": make_features(batch, text, 24),
        "timestep": torch.randint(0, 1000, (batch,)),
    }


def make_masked_video(batch: int, frames: int, text: int) -> dict[str, Any]:
    """Return a video, and the mask of its text; the last text has a padded token."""
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[-1, -1] = False
    return {**make_video(batch, frames, text), "encoder_attention_mask": mask}


class Wan(Case):
    """Buffers of three axes, split, cut and expanded; pairs written by strided assignment."""

    name = "Wan"
    library = "diffusers"
    sizes = SIZES
    dims = VIDEO

    def build(self) -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            text_dim=24, freq_dim=16, ffn_dim=32, rope_max_seq_len=32, **CHANNELS, **HEADS
        )

    def inputs(self, batch: int, frames: int, text: int) -> dict[str, Any]:
        return make_video(batch, frames, text)


class SkyReels(Wan):
    """Complex tables of three axes; otherwise as Wan."""

    name = "SkyReels V2"

    def build(self) -> nn.Module:
        from diffusers import SkyReelsV2Transformer3DModel

        return SkyReelsV2Transformer3DModel(
            text_dim=24, freq_dim=16, ffn_dim=32, rope_max_seq_len=32, **CHANNELS, **HEADS
        )


class Ltx(Case):
    """Rotates before the heads are split, by coordinates that are an input."""

    name = "LTX"
    library = "diffusers"
    sizes = ((2, 6, 5), (3, 12, 4), (1, 20, 9))
    dims = {
        "hidden_states": {0: "batch", 1: "tokens"},
        "encoder_hidden_states": {0: "batch", 1: "text"},
        "timestep": {0: "batch"},
        "encoder_attention_mask": {0: "batch", 1: "text"},
        "video_coords": {0: "batch", 2: "tokens"},
    }

    def build(self) -> nn.Module:
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel(
            cross_attention_dim=32, caption_channels=24, **CHANNELS, **HEADS
        )

    def inputs(self, batch: int, tokens: int, text: int) -> dict[str, Any]:
        index = torch.arange(tokens)
        coordinates = torch.stack((index // 4, index // 2 % 2, index % 2)) * 8.0
        mask = torch.ones(batch, text, dtype=torch.int64)
        mask[-1, -1] = 0
        return {
            "hidden_states": make_features(batch, tokens, 4),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.randint(0, 1000, (batch,)),
            "encoder_attention_mask": mask,
            "video_coords": coordinates[None].repeat(batch, 1, 1),
        }


class CogVideoX(Case):
    """Cosines and sines are inputs; only the video's part of the sequence rotates."""

    name = "CogVideoX"
    library = "diffusers"
    sizes = ((2, 5), (3, 4), (1, 9))
    dims = {
        "hidden_states": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "text"},
        "timestep": {0: "batch"},
    }

    def build(self) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel(
            text_embed_dim=24, time_embed_dim=8, sample_width=6, sample_height=4, sample_frames=9,
            max_text_seq_length=16, use_rotary_positional_embeddings=True, **CHANNELS, **HEADS,
        )  # fmt: skip

    def inputs(self, batch: int, text: int) -> dict[str, Any]:
        angles = torch.arange(18)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
        angles = angles.repeat_interleave(2, dim=1)
        return {
            "hidden_states": make_features(batch, 3, 4, 4, 6),
            "encoder_hidden_states": make_features(batch, text, 24),
            "timestep": torch.randint(0, 1000, (batch,)),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }


class HunyuanVideo(Case):
    """Image and text in one sequence; a padding mask over both."""

    name = "HunyuanVideo"
    library = "diffusers"
    sizes = SIZES
    dims = {**MASKED, "pooled_projections": {0: "batch"}, "guidance": {0: "batch"}}

    def build(self) -> nn.Module:
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel(
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6), **CHANNELS, **HEADS,
        )  # fmt: skip

    def inputs(self, batch: int, frames: int, text: int) -> dict[str, Any]:
        return {
            **make_masked_video(batch, frames, text),
            "pooled_projections": make_features(batch, 12),
            "guidance": torch.full((batch,), 6000.0),
        }


class Mochi(Case):
    """Learned frequencies, which differ from head to head; a loop over the batch fixes it."""

    name = "Mochi"
    library = "diffusers"
    sizes = ((2, 3, 5), (2, 5, 4), (2, 7, 9))
    dims = {
        "hidden_states": {2: "frames"},
        "encoder_hidden_states": {1: "text"},
        "encoder_attention_mask": {1: "text"},
    }

    def build(self) -> nn.Module:
        from diffusers import MochiTransformer3DModel

        model = MochiTransformer3DModel(
            pooled_projection_dim=16, text_embed_dim=24, time_embed_dim=8, max_sequence_length=16,
            **CHANNELS, **HEADS,
        )  # fmt: skip
        nn.init.normal_(model.pos_frequencies)  # they are learned, from zero on
        return model

    def inputs(self, batch: int, frames: int, text: int) -> dict[str, Any]:
        return make_masked_video(batch, frames, text)


class Cosmos(Case):
    """Frequencies scaled per axis; halves."""

    name = "Cosmos"
    library = "diffusers"
    sizes = SIZES
    dims = VIDEO

    def build(self) -> nn.Module:
        from diffusers import CosmosTransformer3DModel

        return CosmosTransformer3DModel(
            text_embed_dim=24, adaln_lora_dim=8, max_size=(16, 16, 16), concat_padding_mask=False,
            extra_pos_embed_type=None, **CHANNELS, **HEADS,
        )  # fmt: skip

    def inputs(self, batch: int, frames: int, text: int) -> dict[str, Any]:
        return make_video(batch, frames, text)


class SanaVideo(Case):
    """Linear attention: query and key are rotated behind a ReLU, for the numerator only."""

    name = "Sana Video"
    library = "diffusers"
    sizes = SIZES
    dims = VIDEO

    def build(self) -> nn.Module:
        from diffusers import SanaVideoTransformer3DModel

        return SanaVideoTransformer3DModel(
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
            caption_channels=24, rope_max_seq_len=32, **CHANNELS, **HEADS,
        )  # fmt: skip

    def inputs(self, batch: int, frames: int, text: int) -> dict[str, Any]:
        return make_video(batch, frames, text)


class StableAudio(Case):
    """Half of each head rotates, by tables that are inputs; keys have fewer heads."""

    name = "Stable Audio"
    library = "diffusers"
    sizes = ((2, 6, 5, 2), (3, 12, 4, 1), (1, 20, 9, 3))
    dims = {
        "hidden_states": {0: "batch", 2: "tokens"},
        "encoder_hidden_states": {0: "batch", 1: "text"},
        "timestep": {0: "batch"},
        "global_hidden_states": {0: "batch", 1: "prepended"},
        "rotary_embedding.0": {0: "prepended + tokens"},
        "rotary_embedding.1": {0: "prepended + tokens"},
    }

    def build(self) -> nn.Module:
        from diffusers import StableAudioDiTModel

        return StableAudioDiTModel(
            in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16,
            time_proj_dim=16, global_states_input_dim=12, cross_attention_input_dim=24,
        )  # fmt: skip

    def inputs(self, batch: int, tokens: int, text: int, prepended: int) -> dict[str, Any]:
        angles = torch.arange(prepended + tokens)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        angles = angles.repeat(1, 2)
        return {
            "hidden_states": make_features(batch, 4, tokens),
            "timestep": torch.rand(batch),
            "encoder_hidden_states": make_features(batch, text, 24),
            "global_hidden_states": make_features(batch, prepended, 12),
            "rotary_embedding": (angles.cos(), angles.sin()),
        }


CASES = (
    Wan, SkyReels, Ltx, CogVideoX, HunyuanVideo, Mochi, Cosmos, SanaVideo, StableAudio,
)  # fmt: skip
