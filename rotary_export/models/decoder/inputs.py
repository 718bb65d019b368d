"""Example inputs of a decoder: made from the model, or completed by a key/value cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rotary_export.errors import RotaryExportError
from rotary_export.models.arguments import CACHES as NAMES
from rotary_export.models.arguments import check_arguments, find_extra_arguments
from rotary_export.models.configs import get_field
from rotary_export.models.decoder.cache import (
    arrange,
    choose_rebuild,
    find_stateful_layer,
    is_cache,
    is_empty,
    is_of_transformers,
    is_pairs,
    make_empty_cache,
    read_cache,
    rebuild_cache,
)
from rotary_export.models.decoder.encoder import (
    is_encoder_decoder,
    make_encoder_example,
    make_first_tokens,
)
from rotary_export.models.decoder.options import FULL, NONE, STATIC, DecoderOptions
from rotary_export.models.error_text import describe_error
from rotary_export.models.trace.snapshot import take_snapshot

LOGITS = "logits_to_keep"  # transformers' argument: how many positions at the end have logits
_SHAPE = (2, 7)


def prepare_inputs(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, options: DecoderOptions
) -> dict[str, Any]:
    """Return the example inputs that a graph is made from.

    - None: they are made, for a model of transformers that accepts token ids. A causal language
      model gets a cache, unless `options.cache` is "none".
    - Given ones decide whether there is a cache, unless `options.cache` does: one is added where
      there is none, with the attention mask and the position ids that it needs.
    - `use_cache=True` adds one, too.
    - An empty cache gets keys and values of no position; the model is run once to learn their
      shapes. A tuple of (key, value) becomes a cache, if the model is one of transformers.
    - `options.last_logits` adds `logits_to_keep=1`.
    - An encoder-decoder with a cache gets the inputs of its encoder alone: `split_model` makes
      those of its decoder.

    Args:
        model: As `export_model`.
        example_inputs: As `export_model`.
        options: The cache and the logits.

    Raises:
        RotaryExportError: They do not fit the model or the options, the model has no such cache,
            or fails on its example inputs.
    """
    if is_encoder_decoder(model):
        return _prepare_encoder_decoder(model, example_inputs, options)
    if example_inputs is None:
        check_arguments(model, {})
        inputs = make_example(model)
        kind = options.cache or (FULL if is_decoder(model) else NONE)
    else:
        renamed = rename_cache(model, example_inputs)
        check_arguments(model, renamed)
        inputs = dict(renamed)
        kind = _choose_cache(model, inputs, options)
    inputs = {name: _convert_pairs(model, name, value) for name, value in inputs.items()}
    if kind != NONE and not has_cache(inputs):
        inputs = _add_cache(model, inputs, options, kind)
    for name, value in inputs.items():
        if is_cache(value) and is_empty(value):
            inputs[name] = _make_empty(model, inputs, name)
    if options.last_logits:
        _check_accepts(model, LOGITS, "last_logits")
        inputs[LOGITS] = 1
    return inputs


def _prepare_encoder_decoder(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, options: DecoderOptions
) -> dict[str, Any]:
    """Return the inputs of an encoder, or, without a cache, of the whole model."""
    name = type(model).__name__
    if options.last_logits or options.inputs_embeds:
        option = "last_logits" if options.last_logits else "inputs_embeds"
        raise RotaryExportError(f"{option} is for a decoder alone, {name} has an encoder")
    if example_inputs is None:
        inputs: dict[str, Any] = make_encoder_example(model)
        batch_size = next(iter(inputs.values())).shape[0]
        inputs["decoder_input_ids"] = make_first_tokens(model, batch_size, _SHAPE[1])
        kind = options.cache or FULL
    else:
        check_arguments(model, example_inputs)
        inputs = dict(example_inputs)
        kind = _choose_cache(model, inputs, options)
    if kind == NONE:
        return inputs
    if kind != FULL:
        raise RotaryExportError(
            f"cache {kind!r} is for a decoder alone, {name} has an encoder: use 'full' or 'none'"
        )
    if has_cache(inputs):
        raise RotaryExportError(
            f"example inputs of an encoder-decoder must have no cache, {name} makes its own: pass "
            "cache='full' (--cache full) instead"
        )
    others = ("use_cache", "return_dict")
    return {n: v for n, v in inputs.items() if not n.startswith("decoder_") and n not in others}


def is_decoder(model: nn.Module) -> bool:
    """Return whether a model is a causal language model of transformers, which generates."""
    config = get_field(model, "config")
    return (
        is_of_transformers(model)
        and hasattr(model, "prepare_inputs_for_generation")
        and not get_field(config, "is_encoder_decoder")
        and get_field(config, "is_decoder") is not False
        and _find_argument(model) is not None
    )


def has_cache(inputs: Mapping[str, Any]) -> bool:
    """Return whether example inputs contain a key/value cache, in whatever form."""
    return any(
        value is not None and (name in NAMES or is_cache(value)) for name, value in inputs.items()
    )


def make_example(model: nn.Module) -> dict[str, Any]:
    """Make example inputs for a model of transformers that accepts token ids; without a cache.

    Raises:
        RotaryExportError: It does not accept input_ids.
    """
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise RotaryExportError(
            f"{type(model).__name__} does not accept input_ids; a factory, package.module:factory, "
            "can return example inputs with the model"
        )
    batch, seq = _SHAPE
    ids = torch.arange(batch * seq).reshape(batch, seq) % 7 + 1
    return _add_positions(model, {"input_ids": ids})


def rename_cache(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name a cache as the model's forward does: `past_key_values`, or `cache`.

    Where forward accepts any keyword, the other name would be lost in silence.
    """
    argument = _find_argument(model) if is_of_transformers(model) else None
    if argument is None or argument in inputs or not isinstance(inputs, Mapping):
        return inputs
    return {argument if name in NAMES else name: value for name, value in inputs.items()}


def _find_argument(model: nn.Module) -> str | None:
    """Return the argument of a model's forward that is its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def _choose_cache(model: nn.Module, inputs: Mapping[str, Any], options: DecoderOptions) -> str:
    """Return the kind of cache that given inputs and options ask for together."""
    asked = inputs.get("use_cache") is True and is_of_transformers(model)
    given = next((name for name in inputs if has_cache({name: inputs[name]})), "")
    wanted = given or ("use_cache=True" if asked else "")
    if options.cache == NONE and wanted:
        raise RotaryExportError(f"cache 'none' must go with no cache, example_inputs has {wanted}")
    if options.cache not in (None, NONE) and inputs.get("use_cache") is False:
        raise RotaryExportError(
            f"cache {options.cache!r} must go with use_cache=True, example_inputs has False"
        )
    return options.cache or (FULL if wanted else NONE)


def _convert_pairs(model: nn.Module, name: str, value: Any) -> Any:
    if name in NAMES and is_pairs(value) and is_of_transformers(model):
        return rebuild_cache([tensor for pair in value for tensor in pair])
    return value


def _add_cache(
    model: nn.Module, inputs: Mapping[str, Any], options: DecoderOptions, kind: str
) -> dict[str, Any]:
    """Return inputs with an empty cache, and with what a step needs beside it."""
    name, argument = type(model).__name__, _find_argument(model)
    if not is_of_transformers(model) or argument is None:
        raise RotaryExportError(
            f"a cache is for a causal language model of transformers, whose forward accepts "
            f"{' or '.join(NAMES)}; {name} does not: pass cache='none' (--cache none)"
        )
    if stateful := find_stateful_layer(model):
        raise RotaryExportError(
            f"{name} has layers that keep more than keys and values of each position "
            f"({stateful}), so it has no key/value cache alone: pass cache='none' (--cache none)"
        )
    inputs = _add_positions(model, inputs)
    cache = make_empty_cache(model, options, kind)
    if kind == STATIC:
        inputs = _lengthen_mask(inputs, cache.max_cache_len)
    return {n: v for n, v in inputs.items() if n != argument} | {argument: cache}


def _lengthen_mask(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return inputs with a mask of all positions of a static cache: those to come are 0."""
    if "position_ids" not in inputs or inputs["position_ids"].dim() != 2:
        raise RotaryExportError(
            "cache 'static' is for a model whose forward accepts position_ids (B, S): keys and "
            "values are written there"
        )
    mask = inputs["attention_mask"]
    if mask.shape[1] > length:
        raise RotaryExportError(
            f"max_cache_len must be >= {mask.shape[1]}, the length of the example, got {length}"
        )
    return {**inputs, "attention_mask": pad(mask, (0, length - mask.shape[1]))}


def _add_positions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with the attention mask and the position ids that a model accepts."""
    parameters = inspect.signature(model.forward).parameters
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    added: dict[str, Any] = {}
    if isinstance(ids, Tensor) and ids.dim() > 1:
        batch, seq = ids.shape[:2]
        added["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64)
        added["position_ids"] = torch.arange(seq).repeat(batch, 1)
    return {**inputs, **{n: v for n, v in added.items() if n in parameters and n not in inputs}}


def _make_empty(model: nn.Module, inputs: Mapping[str, Any], name: str) -> Any:
    """Return an empty cache that has the shapes of what the model keeps."""
    cache = deepcopy(inputs[name])
    arguments = {**inputs, **find_extra_arguments(model, inputs), name: cache}
    arrange(arguments)
    try:
        with take_snapshot(model), torch.no_grad():
            model(**arguments)
    except Exception as error:  # whatever the model raises
        raise RotaryExportError(
            f"{type(model).__name__} fails on its example inputs: {describe_error(error)}"
        ) from error
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if not tensors or not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
        read_cache(name, cache)  # raises
    empty = cache.empty(tensors) if hasattr(cache, "empty") else [t[:, :, :0] for t in tensors]
    return choose_rebuild(cache)(empty)


def _check_accepts(model: nn.Module, argument: str, option: str) -> None:
    if argument not in inspect.signature(model.forward).parameters:
        raise RotaryExportError(
            f"{option} is for a model whose forward accepts {argument}; that of "
            f"{type(model).__name__} does not"
        )
