"""Decoders that read text, and what transformers generates."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.bundles import make_folder
from helpers.decoders import export_decoder, generate_eager
from helpers.tiny_models import make_model

TOKENS = 32
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("e", "r")]
SPACE = "\u0120"  # as byte-level tokenizers write it
TEXTS = ("the rain in Spain, ran.", "a man", "there: the end")


@dataclass(frozen=True)
class TextDecoder:
    """A model, its bundle, and prompts of different lengths.

    Attributes:
        title: For the table of targets.
        model: Of transformers.
        layers: Their number.
        bundle: With a growing cache and a tokenizer; nobody writes into it.
        texts: The prompts.
        prompts: Their token ids.
        expected: The ids that `generate` returns for each prompt alone, up to the end of the text.
    """

    title: str
    model: Any
    layers: int
    bundle: Path
    texts: tuple[str, ...]
    prompts: list[list[int]]
    expected: list[list[int]]


@functools.cache
def get_text_decoder() -> TextDecoder:
    """Return the tiny Llama with a tokenizer of its own."""
    folder, model = make_tokenizer(make_folder() / "tokenizer"), make_model("llama")
    bundle = export_decoder(model, make_folder() / "text", model_folder=folder)
    return make_text_decoder("llama, two layers", model, bundle, TEXTS)


def make_text_decoder(title: str, model: Any, bundle: Path, texts: Sequence[str]) -> TextDecoder:
    """Generate from texts by transformers; the bundle contains the tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in texts]
    expected = [generate_row(model, prompt) for prompt in prompts]
    layers = model.config.num_hidden_layers
    return TextDecoder(title, model, layers, bundle, tuple(texts), prompts, expected)


def generate_row(model: Any, prompt: list[int]) -> list[int]:
    """Return a prompt and the tokens that transformers generates for it alone."""
    ids = torch.tensor([prompt])
    row: list[int] = generate_eager(model, ids, torch.ones_like(ids), TOKENS)[0].tolist()
    return row


def make_tokenizer(folder: Path) -> Path:
    """Write the files of a small byte-level tokenizer: ids below 96, 0 pads, 2 is the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    letters = [chr(code) for code in (*range(97, 123), *range(65, 91), *range(48, 58))]
    words = [*special, *letters, SPACE, *".,!?'-:;()", *("".join(pair) for pair in MERGES)]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": 0, "pad_token": 0, "bos_token": 1, "eos_token": 2}
    config = {name: special[index] for name, index in names.items()}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def count_rotations(profile: Path) -> dict[str, int]:
    """Return how many rotary nodes ONNX Runtime's profile contains, and how many attentions.

    Our node rotates query and key; its function body calls ONNX's own operator for each.
    """
    events = json.loads(profile.read_text())
    ops = [event.get("args", {}).get("op_name") for event in events]
    return {op: ops.count(op) for op in ("RotaryEmbedding", "Attention")}
