"""The graphs that a model becomes: one, or a decoder with an embedding or an encoder beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import EMBED, MODEL
from rotary_export.errors import RotaryExportError
from rotary_export.models.configs import has_axes
from rotary_export.models.decoder.encoder import is_encoder_decoder, split_encoder_decoder
from rotary_export.models.decoder.options import NONE, STATIC, DecoderOptions

IDS, EMBEDS, POSITIONS = "input_ids", "inputs_embeds", "position_ids"
BLOCKS = "token_type_ids"  # which tokens are of an image, as Gemma 3 reads them
_AXES = 3  # of multimodal positions: time, height, width


@dataclass(frozen=True)
class Part:
    """One graph of a bundle, and what it is traced from.

    Attributes:
        name: Of the graph.
        model: What is traced.
        inputs: Its example inputs.
        is_rotary: Whether it must apply a rotary embedding.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    is_rotary: bool = True


class EmbedTokens(nn.Module):
    """The embedding of a model's tokens, (B, S) ids to (B, S, hidden_size)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.source_name = f"the embedding of {type(model).__name__}"
        self.embedding = model.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that limits the ids."""
        embedding: nn.Module = self.embedding
        return embedding

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Embed tokens."""
        return {EMBEDS: self.embedding(input_ids)}


def split_model(
    model: nn.Module, inputs: Mapping[str, Any], options: DecoderOptions
) -> tuple[Part, ...]:
    """Return the graphs that a model becomes; the main one is the first.

    - An encoder-decoder, unless it has no cache: `decoder` and `encoder`.
    - With `options.inputs_embeds`: `model`, which reads embeddings, and `embed_tokens`.
    - Any other: `model`.

    Args:
        model: As `export_model`.
        inputs: As `prepare_inputs` returned them.
        options: As of `prepare_inputs`.

    Raises:
        RotaryExportError: The model can't be split so.
    """
    is_whole = any(name.startswith("decoder_") for name in inputs)
    if is_encoder_decoder(model) and options.cache != NONE and not is_whole:
        return tuple(Part(*each) for each in split_encoder_decoder(model, inputs))
    if not options.inputs_embeds:
        return (Part(MODEL, model, inputs),)
    name = type(model).__name__
    if not isinstance(ids := inputs.get(IDS), Tensor):
        raise RotaryExportError(
            f"inputs_embeds is for a model of transformers and example inputs with {IDS}, which "
            f"are embedded; {name} has {', '.join(inputs)}"
        )
    if not isinstance(getattr(model, "get_input_embeddings", lambda: None)(), nn.Module):
        raise RotaryExportError(f"inputs_embeds is for a model of transformers, got {name}")
    embed = EmbedTokens(model).eval()
    with torch.no_grad():
        embeds = embed(ids)[EMBEDS]
    given = {EMBEDS if name == IDS else name: value for name, value in inputs.items()}
    given[EMBEDS] = embeds
    positions = given.get(POSITIONS)
    if has_axes(model) and isinstance(positions, Tensor) and positions.dim() == 2:
        if options.cache == STATIC:
            raise RotaryExportError(
                f"cache 'static' is for positions of one axis, {name} has {_AXES}: use 'full'"
            )
        given[POSITIONS] = positions.expand(_AXES, *positions.shape)
    return Part(MODEL, model, given), Part(EMBED, embed, {IDS: ids}, is_rotary=False)


def describe_blocks(model: nn.Module, options: DecoderOptions) -> list[str]:
    """Describe tokens that attend to later ones in the model, but not in its graph."""
    if not options.inputs_embeds or BLOCKS not in inspect.signature(model.forward).parameters:
        return []
    return [
        f"{type(model).__name__} lets the tokens of an image attend to each other, by {BLOCKS}: "
        "this graph lets each token attend to earlier ones alone, as in a text"
    ]
