"""Small bundles, exported once per process, and what their graphs should give."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rotary_export
from rotary_export import RotaryEmbedding, RotaryExportError, RotaryQueryKey

ROWS = 32
XPOS = {"use_xpos": True, "interpolation_factor": 2.0}
HEADS = {"num_heads": 4, "num_kv_heads": 2}
# name: arguments of RotaryEmbedding(16, max_seq_len=ROWS), of export.
SPECS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"head_dim": 24}),
    "xpos": (XPOS, HEADS | {"head_dim": 24, "interleaved": True}),
    "static": (XPOS, HEADS | {"static": True, "batch_size": 2}),
    "float16": ({}, HEADS | {"dtype": torch.float16}),
    "bfloat16": (XPOS, HEADS | {"dtype": torch.bfloat16}),
    "float64": (XPOS, HEADS | {"dtype": torch.float64}),
    "opset18": (XPOS, HEADS | {"opset": 18, "formats": ("onnx",)}),
}
# How a graph runs: arguments of load. The last three are equal to eager in float32, to the bit.
PORTABLE = {"use_op_library": False}
PATHS: dict[str, dict[str, Any]] = {
    "portable": PORTABLE,
    "fused": {"require_fused": True},
    "torchscript": {"runtime": "torchscript", "allow_code": True},
    "program": {"runtime": "program", "allow_code": True},
}
EXACT_PATHS = [path for path in PATHS if path != "portable"]


@functools.cache
def make_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="rotary_export-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def make_rope(name: str) -> RotaryEmbedding:
    return RotaryEmbedding(16, max_seq_len=ROWS, **SPECS[name][0])


@functools.cache
def get_bundle(name: str) -> rotary_export.Bundle:
    """Return one of SPECS, exported; nobody writes into it."""
    return rotary_export.export(make_rope(name), make_folder() / name, **SPECS[name][1])


def copy_bundle(name: str, folder: Path) -> Path:
    """Copy one of SPECS, to be changed."""
    return Path(shutil.copytree(get_bundle(name), folder / name))


def edit_manifest(bundle: Path, **changes: Any) -> None:
    """Change entries of a manifest; what is None goes."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def update_hash(bundle: Path, file: str) -> None:
    """Make the manifest agree with a file that was changed."""
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    digest = hashlib.sha256((bundle / file).read_bytes()).hexdigest()
    edit_manifest(bundle, files=files | {file: digest})


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """Return every file below folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check_refused(message, act, folder):
    """Expect one RotaryExportError with that message, and the folder as it was."""
    before = read_tree(folder)
    with pytest.raises(RotaryExportError, match=re.escape(message)) as raised:
        act()
    assert "\n" not in str(raised.value).strip()
    assert read_tree(folder) == before


def make_tensors(
    name: str, batch: int = 3, seq_len: int = 7, heads: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Make inputs of `rotate`, or of the static one, for one of SPECS."""
    generator = torch.Generator().manual_seed(seed)
    arguments = SPECS[name][1]
    static = arguments.get("static", False)
    shape = (2, ROWS) if static else (batch, seq_len)

    def draw(heads: int) -> Tensor:
        sizes = (shape[0], heads, shape[1], arguments.get("head_dim", 16))
        return torch.randn(sizes, generator=generator).to(arguments.get("dtype", torch.float32))

    position = torch.tensor(seq_len)
    if not static:
        position = torch.randint(0, ROWS, shape, generator=generator)
    tensors = {"query": draw(heads), "key": draw(2)}
    return tensors | {"seq_len" if static else "position_ids": position}


def make_arrays(name: str, **sizes: int) -> dict[str, np.ndarray]:
    """As `make_tensors`, in numpy."""
    return {key: to_numpy(value) for key, value in make_tensors(name, **sizes).items()}


def to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def to_torch(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def run_eager(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return what `rotate` should give."""
    tensors = {key: to_torch(value) for key, value in inputs.items()}
    module = RotaryQueryKey(make_rope(name), interleaved=SPECS[name][1].get("interleaved", False))
    query, key = tensors["query"], tensors["key"]
    if "position_ids" in tensors:
        outputs = module(query, key, tensors["position_ids"])
    else:
        length = int(tensors["seq_len"])
        rotated = module(query[:, :, :length], key[:, :, :length], torch.tensor([0]))
        outputs = tuple(
            torch.cat((head, x[:, :, length:]), 2)
            for head, x in zip(rotated, (query, key), strict=True)
        )
    return dict(zip(("query_out", "key_out"), outputs, strict=True))
