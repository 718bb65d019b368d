"""A tiny decoder with a tokenizer, for the kits: its bundles, and what eager generates."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.bundles import make_folder
from helpers.decoders import export_decoder, generate_eager
from helpers.tiny_models import make_model
from onnxscript import ir

from rotary_export.bundle.manifest import DATA_SUFFIX, hash_file, read_manifest

NUM_TOKENS = 32  # that are generated
END = 2
SPECIALS = ["<pad>", "<bos>", "<eos>"]
PROMPTS = ((5, 6, 7), (9, 10, 11, 12, 13))  # of two lengths
TEXT = "once in a hall"


@functools.cache
def get_text_decoder(kind: str) -> tuple[Any, Path]:
    """Return the model and its bundle, of kind "full", "static" or "data"; nobody writes into it.

    "data" has its weights beside the graph.
    """
    if kind == "data":
        model, bundle = get_text_decoder("full")
        return model, _copy_with_data(bundle, make_folder() / "text-data")
    model = make_model("llama", vocab_size=len(SPECIALS) + 93)
    folder = make_folder() / f"text-{kind}-model"
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    options = {"cache": "static", "max_cache_len": 48} if kind == "static" else {}
    out = make_folder() / f"text-{kind}"
    return model, export_decoder(model, out, model_folder=folder, **options)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:92], "Ġ"]
    vocab = {token: index for index, token in enumerate(SPECIALS + letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, begin, end = SPECIALS
    config = {"pad_token": pad, "bos_token": begin, "eos_token": end, "padding_side": "left"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _copy_with_data(bundle: Path, out: Path) -> Path:
    """Copy a bundle; its weights move to `model.onnx_data`, as those of a large model are."""
    out.mkdir()
    manifest = read_manifest(bundle)
    for name in manifest.files:
        (out / name).write_bytes((bundle / name).read_bytes())
    data = f"model.onnx{DATA_SUFFIX}"
    ir.save(ir.load(out / "model.onnx"), out / "model.onnx", external_data=data)
    assert (out / data).stat().st_size > 10_000
    moved = {name: hash_file(out / name) for name in ("model.onnx", data)}
    changed = replace(manifest, files={**manifest.files, **moved})
    (out / "manifest.json").write_text(changed.to_json())
    return out


def get_tokenizer(bundle: Path) -> Any:
    """Return the tokenizer of a bundle."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(bundle / "tokenizer.json"))


def generate_rows(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return what eager generates for a padded batch: each row up to its end, without padding."""
    size = max(map(len, prompts))
    padded = torch.tensor([[0] * (size - len(row)) + [*row] for row in prompts])
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in prompts])
    rows = []
    for prompt, made in zip(prompts, generate_eager(model, padded, mask, count), strict=True):
        new = made[size:].tolist()
        new = new[: new.index(END) + 1] if END in new else new
        rows.append([*prompt, *new])
    return rows
