"""`genai_config.json` and the files beside it, by which onnxruntime-genai opens a folder.

Source: onnxruntime-genai's `src/config.h`. The names of inputs, outputs and sizes are those of the
manifest; special tokens and the settings of a search those of the model's own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rotary_export.bundle.copy_files import copy_file
from rotary_export.bundle.json_file import read_json_object
from rotary_export.bundle.manifest import FILE_NAME, GraphInfo, Manifest, TensorInfo
from rotary_export.deploy.signature import write_decoder
from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library

CONFIG = "genai_config.json"
# Of the bundle: without the first two, genai can't be told of the model, or reads no text.
NEEDED = ("config.json", "tokenizer.json")
GENERATION = "generation_config.json"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
# Both genai and transformers call them so, and apply them to greedy search, too.
SEARCH = (
    "min_length",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
OPEN_LENGTH = 2**20  # context_length of a model that names no length; genai allocates token ids


def check_genai(source: Path, manifest: Manifest, graph: str) -> None:
    """Refuse a bundle that genai can't run, or would run wrongly.

    Raises:
        RotaryExportError: It has no cache that grows, no logits of all positions, no tokenizer or
            no config, or inputs that genai does not have.
    """
    decoder = manifest.config.get("decoder")
    if not decoder:
        raise RotaryExportError(
            "genai needs a causal language model with a cache, got a graph without one: "
            "export the model with --cache full"
        )
    if decoder["cache"] != "full":
        raise RotaryExportError(
            f"genai needs cache 'full', got {decoder['cache']!r}: export the model with "
            "--cache full"
        )
    if decoder["logits"] != "all":
        raise RotaryExportError(
            "genai needs the logits of all positions (it pads on the right, and reads each row at "
            "its own length), got those of the last: export the model without --last-logits"
        )
    for name in NEEDED:
        if name not in manifest.files:
            raise RotaryExportError(
                f"genai needs {name} in the bundle, got none: export the model from its folder, or "
                "name that with --model-folder or model_folder="
            )
    _check_inputs(manifest.graphs[graph])
    _find_special_tokens(source)


def write_genai(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write genai_config.json, and copy the tokenizer's files and the op library beside it."""
    bundle = staging / "bundle"
    info = manifest.graphs[graph]
    for name in manifest.files:
        if name not in (*info.files.values(), FILE_NAME) and not name.startswith(f"{graph}."):
            copy_file(bundle / name, staging / name)
    copy_file(op_library.op_library_path(), staging / op_library.LIBRARY_NAME)
    content = _describe(bundle, manifest, info)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (staging / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    write_decoder(staging, manifest, graph)


def _describe(bundle: Path, manifest: Manifest, info: GraphInfo) -> dict[str, Any]:
    """Return the content of genai_config.json."""
    config, generation = _read_configs(bundle)
    names = [each.name for each in info.inputs if each.name in TOKEN_INPUTS]
    logits = next(each for each in info.outputs if each.name == "logits")
    layers = [each for each in info.inputs if PAST.fullmatch(each.name)]
    sizes = {key: config[key] for key in ("hidden_size", "num_attention_heads") if key in config}
    length = _find_length(manifest, config)
    return {
        "model": {
            "type": "decoder",  # any decoder; the names of families only choose workarounds
            "vocab_size": logits.shape[-1],
            "context_length": length,
            **_find_special_tokens(bundle),
            "decoder": {
                "filename": f"bundle/{info.files['onnx']}",
                "session_options": {"provider_options": []},
                "num_hidden_layers": len(layers) // 2,
                "num_key_value_heads": layers[0].shape[1],
                "head_size": layers[0].shape[3],
                **sizes,
                "inputs": {
                    **{name: name for name in names},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": length,
            "past_present_share_buffer": False,
            **{key: generation[key] for key in SEARCH if generation.get(key) is not None},
        },
    }


def _find_length(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """Return the most positions that genai may fill.

    Past a threshold, transformers computes its cache anew, which genai does not.
    """
    decoder = manifest.config["decoder"]
    named = decoder["max_positions"] or config.get("max_position_embeddings") or OPEN_LENGTH
    return min(int(each) for each in (named, *decoder["length_thresholds"]))


def _read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of config.json and of generation_config.json, {} without the latter."""
    config = read_json_object(folder / NEEDED[0])
    has_generation = (folder / GENERATION).is_file()
    return config, read_json_object(folder / GENERATION) if has_generation else {}


def _find_special_tokens(folder: Path) -> dict[str, Any]:
    """Return bos, eos and pad token ids; transformers pads with eos where there is no pad.

    Raises:
        RotaryExportError: No end is named: genai would take token 0 for it.
    """
    config, generation = _read_configs(folder)
    both = {
        key: generation[key] if generation.get(key) is not None else config.get(key)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ends = both["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not ends:
        raise RotaryExportError(
            f"genai needs eos_token_id in {GENERATION} or {NEEDED[0]} of the bundle, got none"
        )
    pad = both["pad_token_id"]
    found = {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
    return (
        found if both["bos_token_id"] is None else {"bos_token_id": both["bos_token_id"], **found}
    )


def _check_inputs(info: GraphInfo) -> None:
    """Refuse inputs that genai does not fill, and layers whose caches differ."""
    for tensor in info.inputs:
        if tensor.name not in TOKEN_INPUTS and not PAST.fullmatch(tensor.name):
            raise RotaryExportError(
                f"genai has the inputs {', '.join(TOKEN_INPUTS)} and past_key_values.N.key and "
                f".value, but the graph also has {tensor.name}"
            )
        if tensor.name in TOKEN_INPUTS and len(tensor.shape) != 2:
            raise RotaryExportError(
                f"genai needs {tensor.name} of shape (batch_size, seq_len), got "
                f"({', '.join(map(str, tensor.shape))})"
            )
    _check_layers(info.inputs, PAST)
    _check_layers(info.outputs, PRESENT)


def _check_layers(tensors: Sequence[TensorInfo], pattern: re.Pattern[str]) -> None:
    """Refuse layers that are not numbered 0, 1, ..., or have caches of different sizes."""
    found = [(tensor, match) for tensor in tensors if (match := pattern.fullmatch(tensor.name))]
    numbers = sorted({int(match[1]) for _, match in found})
    if numbers != list(range(len(numbers))) or len(found) != 2 * len(numbers):
        raise RotaryExportError(
            f"genai needs a key and a value of layers 0, 1, ..., got layers {numbers}"
        )
    sizes = {(tensor.shape[1], tensor.shape[3]) for tensor, _ in found}
    if len(sizes) != 1:
        listed = ", ".join(f"{heads} x {size}" for heads, size in sorted(sizes, key=str))
        raise RotaryExportError(
            "genai needs keys and values of one size in all layers, got kv_num_heads x head_dim "
            f"of {listed}"
        )
