"""The files beside a graph by which other runtimes open it: config, tokenizer, chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from rotary_export.bundle.copy_files import copy_file
from rotary_export.bundle.json_file import read_json_object
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.models.configs import get_field
from rotary_export.models.decoder.cache import is_of_transformers

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = "tokenizer_config.json"
# Of a model's folder; never code, never weights.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Paths of the machine that saved a file, and code that the bundle does not contain.
_REMOVED = ("_name_or_path", "name_or_path", "auto_map", "tokenizer_file", "vocab_file")
_DTYPES = ("dtype", "torch_dtype")  # today's key of a config, and the one before


def find_model_folder(given: str | os.PathLike[str]) -> Path:
    """Return the folder of a model, or refuse what is not one."""
    if not isinstance(given, (str, os.PathLike)) or not Path(given).is_dir():
        raise RotaryExportError(f"model_folder must be a folder, got {str(given)!r}")
    return Path(given)


def write_model_files(model: nn.Module, folder: Path | None, out: Path, dtype: str) -> list[str]:
    """Write the files that describe a model of transformers beside its graph.

    Args:
        model: The model. Its configs are written, unless its folder contains them.
        folder: Of the model; None: there is none, and so no tokenizer.
        out: The bundle that is being made.
        dtype: Of the graph's activations, for the config.

    Returns:
        What was left out, in words.

    Raises:
        RotaryExportError: A file of the folder can't be read.
    """
    notes = []
    for name, attribute in ((CONFIG, "config"), (GENERATION, "generation_config")):
        if folder is not None and (folder / name).is_file():
            _write(out / name, read_json_object(folder / name), dtype)
        elif is_of_transformers(model) and get_field(model, attribute) is not None:
            try:
                content = json.loads(getattr(model, attribute).to_json_string())
            except Exception as error:  # whatever a config of the user's own raises
                notes.append(f"without {name}: it can't be written: {first_line(error)}")
                continue
            if name == CONFIG:
                content = {"architectures": [type(model).__name__], "dtype": dtype} | content
            _write(out / name, content, dtype)
    if folder is None:
        return notes
    if (folder / TOKENIZER).is_file():
        _write(out / TOKENIZER, read_json_object(folder / TOKENIZER), dtype)
    for name in COPIED:
        if (folder / name).is_file():
            copy_file(folder / name, out / name)
    return notes


def _write(path: Path, content: dict[str, Any], dtype: str) -> None:
    """Write a JSON file without what does not hold on another machine."""
    cleaned = _clean(content)
    if path.name == CONFIG:
        cleaned |= {key: dtype for key in _DTYPES if key in cleaned}
    text = json.dumps(cleaned, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if key not in _REMOVED}
    return value
