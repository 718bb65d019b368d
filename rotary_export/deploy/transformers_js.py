"""The bundle of a decoder as transformers.js looks for its files: the graph in `onnx/`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rotary_export.bundle.manifest import DATA_SUFFIX, EMBED, FILE_NAME, Manifest, hash_file

_CONFIG = "config.json"
_FOLDER = "onnx"


def arrange_for_transformers_js(staging: Path, manifest: Manifest, graph: str) -> None:
    """Move a decoder's graph to `bundle/onnx/`, and name it in `config.json` and the manifest.

    Bundles without a cache that grows, without a `config.json`, or of a model that reads
    embeddings, are left as they are: transformers.js does not open them.

    Args:
        staging: The kit's folder.
        manifest: Of its bundle.
        graph: Which graph.
    """
    if manifest.config.get("decoder", {}).get("cache") != "full" or _CONFIG not in manifest.files:
        return
    if EMBED in manifest.graphs:
        return
    bundle = staging / "bundle"
    file = manifest.graphs[graph].files["onnx"]
    moved = [name for name in (file, f"{file}{DATA_SUFFIX}") if name in manifest.files]
    (bundle / _FOLDER).mkdir()
    for name in moved:
        (bundle / name).rename(bundle / _FOLDER / name)
    _configure(bundle / _CONFIG, file, len(moved) > 1)
    files = {f"{_FOLDER}/{k}" if k in moved else k: v for k, v in manifest.files.items()}
    files[_CONFIG] = hash_file(bundle / _CONFIG)
    info = replace(manifest.graphs[graph], files={"onnx": f"{_FOLDER}/{file}"})
    arranged = replace(manifest, graphs={**manifest.graphs, graph: info}, files=files)
    (bundle / FILE_NAME).write_text(arranged.to_json(), encoding="utf-8")


def _configure(path: Path, file: str, has_data: bool) -> None:
    """Add what transformers.js must know to a model's config."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # "fp32" is its name of a file without a suffix, whatever the types inside.
    settings = {"dtype": "fp32"} | ({"use_external_data_format": {file: 1}} if has_data else {})
    config["transformers.js_config"] = config.get("transformers.js_config", {}) | settings
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
