"""Rebuild the reference bundles in exported/, or check that they are what the code exports.

Beside them stands `example/`, inputs and outputs of the bundle `plain`, as `deploy` writes them.

Drift is a difference in graph structure, in inputs, outputs or configuration, or in a stored table
by more than an ulp (another machine's torch may compute a cosine an ulp differently). Reports,
producer versions and byte order are not compared.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import rotary_export
from rotary_export.bundle.manifest import Manifest, check_files, read_manifest
from rotary_export.compat.quiet import quiet_torch
from rotary_export.deploy.deploy import deploy
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.stored import read_constants
from rotary_export.proof.tolerances import Tolerance

STORED = Tolerance(1, "another machine's torch may round a cosine or a power the other way")
EXPORTED = Path(__file__).parents[2] / "exported"
EXAMPLE = EXPORTED / "example"
BUNDLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"dim": 64}, {"num_heads": 8, "num_kv_heads": 2}),
    "xpos": ({"dim": 64, "use_xpos": True}, {"num_heads": 8, "num_kv_heads": 2}),
    "interleaved-partial": ({"dim": 32}, {"num_heads": 4, "head_dim": 64, "interleaved": True}),
}


def build(name: str, folder: Path, *, force: bool) -> None:
    """Export one of the bundles to folder."""
    module, options = BUNDLES[name]
    rope = rotary_export.RotaryEmbedding(**module, max_seq_len=128)
    rotary_export.export(rope, folder, force=force, **options)


def make_example(folder: Path) -> Path:
    """Run the committed bundle `plain` on the example that `deploy` makes of it."""
    return deploy("cpp-onnxruntime", EXPORTED / "plain", folder / "kit") / "example"


def find_example_drift(new: Path) -> Iterator[str]:
    """Yield the files of the committed example that differ from a new one."""
    for file in sorted(new.rglob("*.npy")):
        name = file.relative_to(new)
        if (EXAMPLE / name).read_bytes() != file.read_bytes():
            yield f"example/{name} differs"


def find_drift(old: Path, new: Path) -> Iterator[str]:
    """Yield what differs between two bundles."""
    before, after = read_manifest(old), read_manifest(new)
    check_files(old, before)
    if _comparable(before) != _comparable(after):
        yield "manifest.json: graphs, configuration or opset differ"
        return
    for graph, info in after.graphs.items():
        for kind, file in info.files.items():
            if _read_structure(kind, old / file) != _read_structure(kind, new / file):
                yield f"{file}: the graph differs"
        old_tables, new_tables = (
            read_constants(folder, info, allow_code=True) for folder in (old, new)
        )
        for kind, name in ((k, n) for k in new_tables for n in {**new_tables[k], **old_tables[k]}):
            stored, table = old_tables[kind].get(name), new_tables[kind].get(name)
            if stored is None or table is None or stored.shape != table.shape:
                yield f"{graph} ({kind}): {name} is missing or of another shape"
            elif (np.abs(stored - table) > STORED.max_ulp * compute_ulp(table, "float32")).any():
                yield f"{graph} ({kind}): {name} differs by more than {STORED.max_ulp:g} ulp"


def _comparable(manifest: Manifest) -> Manifest:
    """Leave out what may differ from machine to machine."""
    return replace(manifest, producers={}, files=dict.fromkeys(manifest.files, ""), parity={})


def _read_structure(kind: str, file: Path) -> str:
    """Return a graph without the values of its tables."""
    if kind == "onnx":
        model = onnx.load(file)
        for tensor in model.graph.initializer:
            if len(tensor.dims):
                tensor.ClearField("raw_data")
                tensor.ClearField("float_data")
        model.producer_version = ""
        return str(model)
    with quiet_torch():
        if kind == "torchscript":
            # Classes are numbered within a process, and lines end with a source position.
            text = str(torch.jit.load(file).inlined_graph)
            return re.sub(r"___torch_mangle_\d+\.| #.*", "", text)
        return str(torch.export.load(file).graph)


def main() -> None:
    """Rebuild, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 on drift")
    if not parser.parse_args().check:
        for name in BUNDLES:
            print(f"export exported/{name}")
            build(name, EXPORTED / name, force=True)
        with tempfile.TemporaryDirectory() as folder:
            shutil.rmtree(EXAMPLE, ignore_errors=True)
            shutil.copytree(make_example(Path(folder)), EXAMPLE)
        return
    drift = []
    with tempfile.TemporaryDirectory() as folder:
        for name in BUNDLES:
            build(name, Path(folder) / name, force=False)
            drift += [f"{name}/{what}" for what in find_drift(EXPORTED / name, Path(folder) / name)]
        drift += find_example_drift(make_example(Path(folder)))
    for what in drift:
        print(f"drift: exported/{what}")
    if drift:
        sys.exit(1)
    print(f"exported/ is what the code exports: {', '.join(BUNDLES)}")


if __name__ == "__main__":
    main()
