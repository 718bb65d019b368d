"""Encoder-decoders as two graphs: an encoder, which runs once, and a decoder, which runs each step.

A decoder attends to keys and values that depend on the encoder's output alone. The encoder graph
returns them: no step computes them again, or copies them. Imports transformers late.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import DECODER, ENCODER
from rotary_export.compat.transformers import list_cross_attentions
from rotary_export.errors import RotaryExportError
from rotary_export.models.configs import get_field
from rotary_export.models.decoder.cache import is_of_transformers
from rotary_export.models.error_text import describe_error
from rotary_export.models.trace.snapshot import take_snapshot

MASK = "encoder_attention_mask"
_BATCH, _TOKENS, _TEXT, _SAMPLES = 2, 3, 9, 4000


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder of transformers, which generates."""
    config = get_field(model, "config")
    return (
        is_of_transformers(model)
        and bool(get_field(config, "is_encoder_decoder"))
        and hasattr(model, "prepare_inputs_for_generation")
    )


def make_encoder_example(model: Any) -> dict[str, Tensor]:
    """Make example inputs for the encoder of a model that reads token ids or samples of audio.

    Raises:
        RotaryExportError: It reads something else.
    """
    name = model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        made = torch.arange(_BATCH * _TEXT).reshape(_BATCH, _TEXT) % 7 + 1
    elif name == "input_values":
        made = 0.1 * torch.randn(_BATCH, _SAMPLES, generator=generator)
    else:
        raise RotaryExportError(
            f"{type(model).__name__} reads {name}; a factory, package.module:factory, can return "
            "example inputs of its encoder with the model"
        )
    inputs = {name: made}
    if "attention_mask" in inspect.signature(model.get_encoder().forward).parameters:
        inputs["attention_mask"] = torch.ones(made.shape, dtype=torch.int64)
    return inputs


def make_first_tokens(model: Any, batch_size: int, count: int = 1) -> Tensor:
    """Return (B, count) tokens, of which the first is the one that a decoder starts with.

    Raises:
        RotaryExportError: The model's configs name none.
    """
    generation = get_field(model, "generation_config")
    for config in (generation, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            start = get_field(config, name)
            if type(start) is int:
                rest = torch.arange(count - 1).repeat(batch_size, 1) + 1
                return torch.cat((torch.full((batch_size, 1), start), rest), dim=1)
    raise RotaryExportError(
        f"the configs of {type(model).__name__} must have decoder_start_token_id, got none"
    )


def split_encoder_decoder(
    model: Any, inputs: Mapping[str, Any]
) -> tuple[tuple[str, nn.Module, dict[str, Any]], ...]:
    """Return the graphs of an encoder-decoder: name, model and example inputs of each.

    Args:
        model: As `is_encoder_decoder` accepts it.
        inputs: Of its encoder.

    Raises:
        RotaryExportError: It fails on them, or its decoder attends to something else than keys and
            values that one linear layer each makes of the encoder's output.
    """
    name = type(model).__name__
    attentions = list_cross_attentions(model.get_decoder())
    if not attentions:
        raise RotaryExportError(
            f"the layers of {name}'s decoder must have a cross_attn or encoder_attn with k_proj "
            "and v_proj, as those of T5Gemma and Moonshine: pass cache='none' (--cache none)"
        )
    batch_size = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))
    ids = make_first_tokens(model, batch_size, _TOKENS)
    try:
        with take_snapshot(model), torch.no_grad():
            outputs = model.get_encoder()(**inputs)
            cache = model(**inputs, decoder_input_ids=ids, use_cache=True).past_key_values
            encoder = Encoder(model, attentions, cache.cross_attention_cache)
            encoded = encoder(**inputs)
    except Exception as error:  # whatever the model raises
        raise RotaryExportError(
            f"{name} fails on its example inputs: {describe_error(error)}"
        ) from error
    kept = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
    made = [value for key, value in encoded.items() if key.startswith("present.")]
    if len(kept) != len(made) or not all(map(torch.equal, kept, made)):
        raise RotaryExportError(
            f"the decoder of {name} makes its keys of the encoder's output in another way than by "
            "one linear layer: pass cache='none' (--cache none)"
        )
    step: dict[str, Any] = {"input_ids": ids, "past_key_values": _make_first_cache(cache)}
    if MASK in encoded:
        step[MASK] = encoded[MASK]
    decoder = DecoderStep(model, outputs)
    return (DECODER, decoder.eval(), step), (ENCODER, encoder.eval(), dict(inputs))


def _make_first_cache(cache: Any) -> Any:
    """Return the cache of a first step: no tokens, and what the encoder made."""
    from rotary_export.models.decoder.cross import CrossCache

    layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return CrossCache(
        [
            tensor
            for own, cross in layers
            for tensor in (own.keys[:, :, :0], own.values[:, :, :0], cross.keys, cross.values)
        ]
    )


class Encoder(nn.Module):
    """The encoder, and the keys and values that each layer of the decoder makes of its output.

    Args:
        model: The encoder-decoder.
        attentions: Of the decoder's layers, those that attend to the encoder.
        cache: The keys and values that they kept of an example.
    """

    def __init__(self, model: Any, attentions: Sequence[nn.Module], cache: Any) -> None:
        super().__init__()
        self.source_name = f"the encoder of {type(model).__name__}"
        self.config = model.config
        self.encoder = model.get_encoder()
        self.attentions = nn.ModuleList(attentions)
        self.head_dims = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Encode.

        Returns:
            - `last_hidden_state`: (B, E, hidden_size).
            - `encoder_attention_mask`: (B, E), if there is an `attention_mask`.
            - `present.N.encoder.key`, `present.N.encoder.value`: (B, heads, E, head_dim).
        """
        outputs = self.encoder(**inputs)
        states = outputs.last_hidden_state
        found = {"last_hidden_state": states}
        if inputs.get("attention_mask") is not None:
            # Some encoders shorten their input, and the mask with it.
            own = getattr(outputs, "attention_mask", None)
            found[MASK] = (inputs["attention_mask"] if own is None else own).long()
        for index, attention in enumerate(self.attentions):
            both: Any = (attention.k_proj, attention.v_proj)
            for kind, project, head_dim in zip(
                ("key", "value"), both, self.head_dims[index], strict=True
            ):
                heads = project(states).unflatten(-1, (-1, head_dim)).transpose(1, 2)
                found[f"present.{index}.encoder.{kind}"] = heads
        return found


class DecoderStep(nn.Module):
    """One step of the decoder, on keys and values that its encoder made.

    Args:
        model: The encoder-decoder.
        outputs: What its encoder returns.
    """

    def __init__(self, model: Any, outputs: Any) -> None:
        super().__init__()
        self.source_name = f"the decoder of {type(model).__name__}"
        self.config = model.config
        self.model = model
        self.hidden_size = outputs.last_hidden_state.shape[-1]
        fields = {field.name for field in dataclasses.fields(outputs)}
        self.wrap: Callable[..., Any] = type(outputs)
        self.has_own_mask = "attention_mask" in fields

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that limits the ids."""
        embedding: nn.Module = self.model.get_decoder().embed_tokens
        return embedding

    def forward(
        self, input_ids: Tensor, past_key_values: Any, encoder_attention_mask: Any = None
    ) -> dict[str, Any]:
        """Run the decoder on (B, S) new tokens."""
        keys = past_key_values.cross_attention_cache.layers[0].keys  # (B, N, E, H)
        # Only its shape is read: its keys and values exist.
        states = keys.new_zeros(keys.shape[0], keys.shape[2], self.hidden_size)
        mask = {"attention_mask": encoder_attention_mask}
        outputs = self.model(
            encoder_outputs=self.wrap(
                last_hidden_state=states, **(mask if self.has_own_mask else {})
            ),
            decoder_input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=True,
            **mask,
        )
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}
