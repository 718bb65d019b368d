"""Tiny decoders with a key/value cache, exported once per process, and what eager generates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.bundles import make_folder
from helpers.tiny_models import make_model
from torch import nn

from rotary_export import export_model

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
    """Export a model of transformers with its cache."""
    export_model(model, None, out, formats=["onnx"], quick=True, **options)
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


def step_through(decoder: Any, ids: Any, mask: Any, tokens: Any, chunk: int) -> Any:
    """Feed rows their tokens, in other places from the middle on; return the best ones, (B, T)."""
    order = np.roll(np.arange(len(ids)), 1)
    back, middle = np.argsort(order), tokens.shape[1] // 2
    chosen = [decoder.prefill(ids, mask, chunk=chunk).argmax(-1)]
    for index, column in enumerate(tokens.T[:-1]):
        if index == middle:
            decoder.reorder(order)
        is_moved = index >= middle
        best = decoder.step(column[order] if is_moved else column).argmax(-1)
        chosen.append(best[back] if is_moved else best)
    return np.stack(chosen, axis=1)


def make_prompts(lengths: list[int], seed: int = 0, low: int = 3, high: int = 96):
    """Draw prompts of these lengths, padded at the left with 0."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    ids = torch.randint(low, high, (len(lengths), size), generator=generator)
    mask = (torch.arange(size) >= size - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
