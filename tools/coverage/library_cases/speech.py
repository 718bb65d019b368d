"""Transformers, stable-audio-tools: speech and audio."""

from __future__ import annotations

from typing import Any

from torch import nn

from library_cases.case import Case, make_features

FEATURES = {"input_features": {0: "batch", 1: "frames"}}


class Wav2Vec2Conformer(Case):
    """Raw audio: each axis has a minimum, below which the convolutions fail."""

    name = "Wav2Vec2-Conformer"
    library = "transformers"
    sizes = ((2, 1600), (3, 2400), (1, 4001))
    dims = {"input_values": {0: "batch", 1: "samples"}}

    def build(self) -> nn.Module:
        from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

        return Wav2Vec2ConformerModel(
            Wav2Vec2ConformerConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8),
                num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
                position_embeddings_type="rotary", conv_depthwise_kernel_size=7,
            )
        )  # fmt: skip

    def inputs(self, batch: int, samples: int) -> dict[str, Any]:
        return {"input_values": make_features(batch, samples)}


class Wav2Vec2Bert(Case):
    """Features in, layers of a conformer; tables cached by length in an attribute."""

    name = "Wav2Vec2-BERT"
    library = "transformers"
    sizes = ((2, 12), (3, 20), (1, 40))
    dims = FEATURES

    def build(self) -> nn.Module:
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        return Wav2Vec2BertModel(
            Wav2Vec2BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                feature_projection_input_dim=20, position_embeddings_type="rotary",
                conv_depthwise_kernel_size=7,
            )
        )  # fmt: skip

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"input_features": make_features(batch, frames, 20)}


class Lasr(Case):
    """A conformer behind two strided convolutions."""

    name = "LASR, encoder"
    library = "transformers"
    sizes = ((2, 48), (3, 65), (1, 120))
    dims = FEATURES

    def build(self) -> nn.Module:
        from transformers import LasrEncoder, LasrEncoderConfig

        return LasrEncoder(
            LasrEncoderConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                conv_kernel_size=8, subsampling_conv_channels=16, num_mel_bins=20,
            )
        )  # fmt: skip

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"input_features": make_features(batch, frames, 20)}


class GlmAsr(Case):
    """Half of each head rotates; mel bins before frames."""

    name = "GLM-ASR, encoder"
    library = "transformers"
    sizes = ((2, 24), (3, 30), (1, 80))
    dims = {"input_features": {0: "batch", 2: "frames"}}

    def build(self) -> nn.Module:
        from transformers.models.glmasr.configuration_glmasr import GlmAsrEncoderConfig
        from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoder

        return GlmAsrEncoder(
            GlmAsrEncoderConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_mel_bins=20,
            )
        )  # fmt: skip

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"input_features": make_features(batch, 20, frames)}


class Moonshine(Case):
    """Encoder on raw audio, interleaved pairs, nine tenths of a head."""

    name = "Moonshine, encoder"
    library = "transformers"
    sizes = ((2, 3200), (3, 4000), (1, 9001))
    dims = {"input_values": {0: "batch", 1: "samples"}}

    def build(self) -> nn.Module:
        from transformers import MoonshineConfig
        from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder

        return MoonshineEncoder(
            MoonshineConfig(
                vocab_size=99, hidden_size=40, intermediate_size=48, encoder_num_hidden_layers=2,
                decoder_num_hidden_layers=1, encoder_num_attention_heads=2,
                decoder_num_attention_heads=2, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def inputs(self, batch: int, samples: int) -> dict[str, Any]:
        return {"input_values": make_features(batch, samples)}


class Mimi(Case):
    """The transformer of the codec of Moshi, with its sliding window."""

    name = "Mimi, transformer"
    library = "transformers"
    dims = {"hidden_states": {0: "batch", 1: "frames"}}

    def build(self) -> nn.Module:
        from transformers import MimiConfig
        from transformers.models.mimi.modeling_mimi import MimiTransformerModel

        return MimiTransformerModel(
            MimiConfig(
                hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16, attn_implementation="sdpa", sliding_window=16,
                layer_scale_initial_scale=1.0,
            )
        )  # fmt: skip

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"hidden_states": make_features(batch, frames, 32)}


class StableAudioTools(Case):
    """The original of Stable Audio: half of each head, tables from the length."""

    name = "Stable Audio, original"
    library = "stable-audio-tools"
    dims = {"x": {0: "batch", 1: "frames"}}

    def build(self) -> nn.Module:
        from stable_audio_tools.models.transformer import ContinuousTransformer

        return ContinuousTransformer(dim=64, depth=2, dim_heads=32, zero_init_branch_outputs=False)

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"x": make_features(batch, frames, 64), "use_checkpointing": False}


CASES = (
    Wav2Vec2Conformer, Wav2Vec2Bert, Lasr, GlmAsr, Moonshine, Mimi, StableAudioTools,
)  # fmt: skip
