"""A bundle whose graph counts: after token 7 comes token 8. It is written in milliseconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from rotary_export.bundle.manifest import hash_file
from rotary_export.runtime.onnx_file import read_onnx_file

NUM_TOKENS = 20
DECODER = {
    "cache": "full",
    "num_layers": 1,
    "logits": "all",
    "max_cache_len": None,
    "length_thresholds": [],
    "max_positions": 64,
}


def make_counting_graph(has_mask: bool = True) -> onnx.ModelProto:
    """Make a graph whose best token is the last one plus 1, modulo NUM_TOKENS."""
    mask = make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total"])
    int64, float32 = TensorProto.INT64, TensorProto.FLOAT
    cache = ["batch_size", 1, "past_seq_len", 1]
    grown = ["batch_size", 1, "past_seq_len + seq_len", 1]
    kinds = ("key", "value")
    constants = {"one": 1, "count": NUM_TOKENS, "axes": [1, 3], "values": np.float32([0, 1])}
    return make_model(
        make_graph(
            [
                make_node("Add", ["input_ids", "one"], ["sum"]),
                make_node("Mod", ["sum", "count"], ["next"]),
                make_node("OneHot", ["next", "count", "values"], ["logits"]),
                make_node("Cast", ["input_ids"], ["float"], to=float32),
                make_node("Unsqueeze", ["float", "axes"], ["new"]),
                *(
                    make_node(
                        "Concat", [f"past_key_values.0.{k}", "new"], [f"present.0.{k}"], axis=2
                    )
                    for k in kinds
                ),
            ],
            "counting",
            [
                make_tensor_value_info("input_ids", int64, ["batch_size", "seq_len"]),
                *([mask] if has_mask else []),
                *(make_tensor_value_info(f"past_key_values.0.{k}", float32, cache) for k in kinds),
            ],
            [
                make_tensor_value_info("logits", float32, ["batch_size", "seq_len", NUM_TOKENS]),
                *(make_tensor_value_info(f"present.0.{k}", float32, grown) for k in kinds),
            ],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
        ),
        opset_imports=[make_opsetid("", 20)],
        ir_version=10,
    )


def write_counting_decoder(folder: Path, has_mask: bool = True, **files: Any) -> Path:
    """Write the bundle.

    Args:
        folder: The folder, which is made.
        has_mask: Whether the graph has an attention mask.
        files: Contents of other files by name without their ending, which is `.json`.
    """
    folder.mkdir()
    onnx.save(make_counting_graph(has_mask), folder / "model.onnx")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    manifest = replace(
        read_onnx_file(folder / "model.onnx"),
        name=folder.name,
        config={"decoder": DECODER},
        files={file.name: hash_file(file) for file in folder.iterdir()},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def make_tokenizer(words: list[str]) -> dict[str, Any]:
    """Return the content of a tokenizer.json: each word is a token, joined by spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return json.loads(tokenizer.to_str())
