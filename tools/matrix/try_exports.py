"""Export a module, a llama and a llama with a cache; print the versions and outcomes as JSON."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript
import torch
import transformers
from matrix_bundles import make_llama, make_llama_inputs
from transformers import DynamicCache

import rotary_export
from rotary_export.errors import RotaryExportError


def export_module(path: Path) -> None:
    """Export the embedding in every format."""
    rope = rotary_export.RotaryEmbedding(16, use_xpos=True, max_seq_len=32)
    rotary_export.export(rope, path, head_dim=24)


def export_llama(path: Path) -> None:
    """Export a model in every format."""
    rotary_export.export_model(make_llama(), make_llama_inputs(2, 7), path)


def export_cache(path: Path) -> None:
    """Export a model with a key/value cache, as the release names that argument."""
    model, inputs = make_llama(), make_llama_inputs(2, 7)
    cache = DynamicCache(config=model.config)
    names = inspect.signature(model.forward).parameters
    name = "past_key_values" if "past_key_values" in names else "cache"
    model(**{name: cache}, **make_llama_inputs(2, 5), use_cache=True)
    given: dict[str, Any] = {
        **inputs,
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "position_ids": inputs["position_ids"] + 5,
        name: cache,
        "use_cache": True,
    }
    bundle = rotary_export.export_model(model, given, path, formats=["onnx"])
    outputs = [info.name for info in bundle.manifest.graphs["model"].outputs]
    if not any(name.startswith("present") for name in outputs):
        raise RotaryExportError(f"the graph returns no cache: {outputs}")


def attempt(function: Any, path: Path) -> str:
    """Return "proven", or the first line of the error."""
    try:
        function(path)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "proven"


folder = Path(sys.argv[1])
folder.mkdir()
tried = {"module": export_module, "llama": export_llama, "llama with cache": export_cache}
packages = (torch, transformers, onnx, onnxscript, onnxruntime)
found = {
    "versions": {package.__name__: package.__version__ for package in packages},
    "exports": {name: attempt(each, folder / name) for name, each in tried.items()},
}
print(json.dumps(found))
