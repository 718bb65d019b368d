"""The models that faults are planted in: tiny ones, and a trained one in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotary_export.models.decoder.inputs import make_example
from rotary_export.models.source import load_source

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# By name: transformers' model_type, and what its config needs besides _SIZES.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a cache": ("llama", {}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "hidden_act": "gelu"}),
}
SUBJECTS = (*_FAMILIES, "xPos")
TRAINED = ("llama", "llama with a cache")  # those that a trained Llama can replace
_SHARP = 5.0


def make_subject(name: str, weights: str, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """Make a model and its example inputs.

    Args:
        name: One of SUBJECTS.
        weights: "default": of its initialisation. "sharp": those, with linear layers and
            embeddings x 5, so that attention is far from uniform. "trained": from a folder.
        folder: Of the trained model, a Llama.
    """
    if weights == "trained":
        model = load_source(str(folder)).model.float()
    else:
        torch.manual_seed(0)
        model = _make_tiny(name)
        if weights == "sharp":
            _multiply(model, _SHARP)
    model.eval()
    if name == "xPos":
        return model, {"x": torch.arange(14).reshape(2, 7) % 96}
    inputs = make_example(model)
    if name == "llama with a cache":
        inputs = _add_cache(model, inputs)
    return model, inputs


def _make_tiny(name: str) -> nn.Module:
    if name == "xPos":
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(dim=64, depth=2, heads=4, rotary_xpos=True)
        return TransformerWrapper(
            num_tokens=96, max_seq_len=256, use_abs_pos_emb=False, attn_layers=layers
        )
    import transformers

    family, settings = _FAMILIES[name]
    config = transformers.AutoConfig.for_model(family, **_SIZES | settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def _multiply(model: nn.Module, factor: float) -> None:
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    parameters = {id(p): p for layer in layers for p in layer.parameters()}  # tied ones once
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(factor)


def _add_cache(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Let the first tokens of an example be cached ones."""
    past = 3
    ids, mask, positions = (inputs[n] for n in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        output = model(input_ids=ids[:, :past], attention_mask=mask[:, :past], use_cache=True)
    return {
        "input_ids": ids[:, past:],
        "attention_mask": mask,
        "position_ids": positions[:, past:],
        "past_key_values": output.past_key_values,
    }
