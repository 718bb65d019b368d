"""Tiny decoders with a key/value cache, exported once per process, and what eager generates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from helpers.bundles import edit_manifest, make_folder
from helpers.tiny_models import make_model
from torch import nn
from transformers import DynamicCache

from rotary_export import export_model
from rotary_export.bundle.manifest import hash_file

PHI3 = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [float(4 + each) for each in range(8)],
        "original_max_position_embeddings": 24,
    },
}


def export_decoder(model: nn.Module, out: Path, **options: Any) -> Path:
    """Export a model of transformers with a cache of every position."""
    ids = torch.arange(16).reshape(2, 8) % 90 + 3
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
    example = {
        "input_ids": ids[:, 5:],
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(5, 8).repeat(2, 1),
        "past_key_values": cache,
    }
    bundle = export_model(model, example, out, formats=["onnx"], quick=True, **options)
    config = dict(bundle.manifest.config)
    config["decoder"] = {
        "cache": "full",
        "num_layers": len(cache.layers),
        "logits": "all",
        "max_cache_len": None,
        "length_thresholds": config["length_thresholds"],
        "max_positions": config["max_positions"],
    }
    (out / "generation_config.json").write_text(model.generation_config.to_json_string())
    files = {f.name: hash_file(f) for f in out.iterdir() if f.name != "manifest.json"}
    edit_manifest(out, config=config, files=files)
    return out


@functools.cache
def get_decoder(family: str) -> tuple[Any, Path]:
    """Return a tiny model and its bundle; nobody writes into it."""
    model = make_model(family, **(PHI3 if family == "phi3" else {}))
    return model, export_decoder(model, make_folder() / f"decoder-{family}")


def generate_eager(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int, **options: Any):
    """Return the tokens of transformers' own loop, prompts included, as numpy."""
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            **{"do_sample": False} | options,
        )
    return made.numpy()


def make_prompts(lengths: list[int], seed: int = 0, low: int = 3, high: int = 96):
    """Draw prompts of these lengths, padded at the left with 0."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    ids = torch.randint(low, high, (len(lengths), size), generator=generator)
    mask = (torch.arange(size) >= size - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
