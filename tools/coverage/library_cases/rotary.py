"""Libraries of rope itself: rotary-embedding-torch, x-transformers, torchscale, local-attention.

An attention of rotary-embedding-torch is what its README shows: projections, the library's class,
and scaled dot products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library_cases.case import Case, make_features, make_tokens

HEADS, DIM = 2, 16
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """Projections around a rotation of query and key, (B, N, S, H) each."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from rotary_embedding_torch import RotaryEmbedding

        self.rotary_emb = RotaryEmbedding(**{"dim": DIM} | settings)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as the README shows first."""
        rotate = self.rotary_emb.rotate_queries_or_keys
        return rotate(query), rotate(key)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, ..., C)."""
        query, key, value = (
            t.unflatten(-1, (HEADS, DIM)).movedim(-2, 1) for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        query, key = (t.flatten(2, -2) for t in self.rotate(query, key))
        out = scaled_dot_product_attention(query, key, value.flatten(2, -2))
        return self.to_out(out.transpose(1, 2).flatten(-2)).reshape(x.shape)


class XPosAttention(Attention):
    """Query and key by one call, with xPos."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as the README shows for xPos."""
        return self.rotary_emb.rotate_queries_and_keys(query, key)


class AxialAttention(Attention):
    """Query and key are (B, N, frames, rows, columns, H)."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as the README shows for axes."""
        from rotary_embedding_torch import apply_rotary_emb

        freqs = self.rotary_emb.get_axial_freqs(*query.shape[2:-1])
        return apply_rotary_emb(freqs, query), apply_rotary_emb(freqs, key)


class Rotary(Case):
    """The README's first use."""

    name = "RotaryEmbedding"
    library = "rotary-embedding-torch"

    def build(self) -> nn.Module:
        return Attention()

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        return {"x": make_features(batch, length, WIDTH)}


class RotaryLearned(Rotary):
    """Learned frequencies."""

    name = "RotaryEmbedding, learned"

    def build(self) -> nn.Module:
        return Attention(learned_freq=True)


class RotaryPartial(Rotary):
    """Half of each head, positions interpolated."""

    name = "RotaryEmbedding, partial"

    def build(self) -> nn.Module:
        return Attention(dim=DIM // 2, interpolate_factor=2.0)


class RotaryXPos(Rotary):
    """Scales of query and key, cached by length: they depend on the lengths of earlier calls."""

    name = "RotaryEmbedding, xPos"

    def build(self) -> nn.Module:
        return XPosAttention(use_xpos=True)


class RotaryXPosStateless(Rotary):
    """Scales of query and key, computed at each call."""

    name = "RotaryEmbedding, xPos, no cache"

    def build(self) -> nn.Module:
        return XPosAttention(use_xpos=True, cache_if_possible=False)


class RotaryAxial(Rotary):
    """Axial, of pixels: coordinates from -1 to 1; tensors of six axes."""

    name = "RotaryEmbedding, axial, pixels"
    sizes = ((2, 3), (3, 3), (1, 3))
    dims = {"x": {0: "batch"}}

    def build(self) -> nn.Module:
        return AxialAttention(dim=4, freqs_for="pixel", max_freq=8)

    def inputs(self, batch: int, frames: int) -> dict[str, Any]:
        return {"x": make_features(batch, frames, 3, 4, WIDTH)}


class RotaryVideo(RotaryAxial):
    """Axial, of indices: any number of frames."""

    name = "RotaryEmbedding, axial, indices"
    sizes = ((2, 3), (3, 5), (1, 8))
    dims = {"x": {0: "batch", 1: "frames"}}

    def build(self) -> nn.Module:
        return AxialAttention(dim=4)


def make_transformer(kind: str, **settings: Any) -> nn.Module:
    """Make an encoder or a decoder of x-transformers on token ids."""
    import x_transformers

    layers = getattr(x_transformers, kind)(
        **{"dim": 64, "depth": 2, "heads": 2, "attn_dim_head": 32, "rotary_pos_emb": True}
        | settings
    )
    return x_transformers.TransformerWrapper(
        num_tokens=99, max_seq_len=0, use_abs_pos_emb=False, attn_layers=layers
    )


class XDecoder(Case):
    """A decoder on token ids."""

    name = "Decoder"
    library = "x-transformers"
    settings = {}
    kind = "Decoder"

    def build(self) -> nn.Module:
        return make_transformer(self.kind, **self.settings)

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        return {"x": make_tokens(batch, length)}


class XEncoder(XDecoder):
    """An encoder on token ids."""

    name = "Encoder"
    kind = "Encoder"


class XDecoderXPos(XDecoder):
    """xPos: the scale of the key is the reciprocal of the query's."""

    name = "Decoder, xPos"
    settings = {"rotary_xpos": True}


class XDecoderPartial(XDecoder):
    """Half of each head rotates, and keys have one head."""

    name = "Decoder, partial, one key head"
    settings = {"rotary_emb_dim": 16, "attn_one_kv_head": True}


class TorchScale(Case):
    """The authors' xPos: positions around the middle, (batch and heads, S, H)."""

    name = "LEX transformer"
    library = "torchscale"
    dims = {"prev_output_tokens": {0: "batch", 1: "length"}}

    def build(self) -> nn.Module:
        from torchscale.architecture.config import DecoderConfig
        from torchscale.architecture.decoder import Decoder

        config = DecoderConfig(
            vocab_size=99, decoder_embed_dim=32, decoder_attention_heads=2, decoder_layers=2,
            decoder_ffn_embed_dim=48, xpos_rel_pos=True,
        )  # fmt: skip
        return Decoder(config, embed_tokens=nn.Embedding(99, 32))

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        return {"prev_output_tokens": make_tokens(batch, length)}


class LocalTransformer(Case):
    """Attention in windows: five axes, positions start anew in each window."""

    name = "LocalTransformer"
    library = "local-attention"
    sizes = ((2, 16), (3, 24), (1, 48))

    def build(self) -> nn.Module:
        from local_attention import LocalTransformer as Model

        return Model(
            num_tokens=99, max_seq_len=64, dim=32, depth=2, local_attn_window_size=8, dim_head=16,
            heads=2, num_residual_streams=1,
        )  # fmt: skip

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        return {"x": make_tokens(batch, length)}


CASES = (
    Rotary, RotaryLearned, RotaryPartial, RotaryXPos, RotaryXPosStateless, RotaryAxial,
    RotaryVideo, XDecoder, XEncoder,
    XDecoderXPos, XDecoderPartial, TorchScale, LocalTransformer,
)  # fmt: skip
