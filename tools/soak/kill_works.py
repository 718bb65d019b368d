"""What `kills.py` kills: each writes version 0 or 1 of an output, and tells which one is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rotary_export.bundle import atomic
from rotary_export.bundle.manifest import check_files, read_manifest
from rotary_export.cli.arrays import write_outputs
from rotary_export.deploy.deploy import deploy
from rotary_export.embedding import RotaryEmbedding
from rotary_export.exporters.export import export
from rotary_export.fusion.fuse import fuse
from rotary_export.models.fused.bundle import write_fused_bundle

HEADS, CHANNELS, ROWS = 2, 16, 32
WIDTH = HEADS * CHANNELS
FORMATS = ("onnx", "torchscript")


@dataclass(frozen=True)
class Work:
    """One way to write an output.

    Attributes:
        name: In the results.
        write: Writes a version into a folder, over the other one.
        read: Returns the version that is there, and the names beside which nothing may be.

    `read` raises MixedError for an output that is of neither version, or of both.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], tuple[int, set[str]]]


class MixedError(Exception):
    """An output is of neither version, or of both."""


def expect(condition: bool, what: str) -> None:
    """Raise MixedError unless a condition holds."""
    if not condition:
        raise MixedError(what)


# ---- sources, made once


def make_sources(folder: Path) -> None:
    """Write two bundles, and two models with external data, which the works read."""
    for version in (0, 1):
        _export(folder / f"bundle{version}", version)
        onnx.save(
            _make_model(version), folder / f"in{version}.onnx", save_as_external_data=True,
            location=f"in{version}.data", size_threshold=1024,
        )  # fmt: skip


def _export(out: Path, version: int) -> None:
    rope = RotaryEmbedding(CHANNELS)
    export(rope, out, max_seq_len=ROWS * (version + 1), formats=FORMATS, force=True)


def _make_model(version: int) -> onnx.ModelProto:
    """Return a model of version + 1 products; its weights contain the version."""
    angles = np.outer(np.arange(ROWS), 10000.0 ** (-np.arange(0, CHANNELS, 2) / CHANNELS))
    arrays = {
        "cos": np.cos(angles).astype("f"),
        "sin": np.sin(angles).astype("f"),
        "sizes": np.array([0, 0, HEADS, CHANNELS]),
    }
    nodes, last = [], "x"
    for index in range(version + 1):
        arrays[f"w{index}"] = np.full((WIDTH, WIDTH), (version + 1) / WIDTH, "f")
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"p{index}"]))
        last = f"p{index}"
    nodes += [
        helper.make_node("Reshape", [last, "sizes"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["q"], perm=[0, 2, 1, 3]),
        helper.make_node("RotaryEmbedding", ["q", "cos", "sin", "position_ids"], ["y"]),
    ]
    floats, sizes = TensorProto.FLOAT, ["batch_size", HEADS, "seq_len", CHANNELS]
    ids = helper.make_tensor_value_info("position_ids", TensorProto.INT64, sizes[::2])
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", floats, ["batch_size", "seq_len", WIDTH]), ids],
        [helper.make_tensor_value_info("y", floats, sizes)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


# ---- the works


def _read_model(file: Path) -> tuple[int, set[str]]:
    """Return the version of a graph, which must be that of its data, and the names of both."""
    names = {
        entry.value
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    model = onnx.load(file)
    version = sum(node.op_type == "MatMul" for node in model.graph.node) - 1
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name[0] == "w"]
    expect(len(weights) == version + 1, "weights are missing")
    same = all((each == np.float32((version + 1) / WIDTH)).all() for each in weights)
    expect(same, "the data is of another version than the graph")
    return version, {file.name, *names}


def _read_bundle(folder: Path) -> int:
    """Return the version of a bundle that has exactly the files that its manifest names."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    names = {file.name for file in folder.iterdir()}
    expect(names == {"manifest.json", *manifest.files}, f"it contains {sorted(names)}")
    if "model" in manifest.graphs:
        return _read_model(folder / "model.onnx")[0]
    return int(manifest.config["max_seq_len"]) // ROWS - 1


def _read_kit(folder: Path) -> int:
    version = _read_bundle(folder / "bundle")
    kit = json.loads((folder / "kit.json").read_text())
    expected = {f"{name}.npy" for name in kit["outputs"]}
    found = {file.name for file in (folder / "example" / "expected").iterdir()}
    expect(found == expected, f"its example contains {sorted(found)}")
    return version


def _fuse(folder: Path, version: int) -> None:
    fuse(folder.parent / f"in{version}.onnx").save(folder / "out.onnx", force=True)


def _fuse_bundle(folder: Path, version: int) -> None:
    result = fuse(folder.parent / f"in{version}.onnx")
    write_fused_bundle(result, folder / "out", force=True)


def _deploy(folder: Path, version: int) -> None:
    deploy("node", folder.parent / f"bundle{version}", folder / "out", force=True)


def _write_arrays(folder: Path, version: int) -> None:
    write_outputs(folder / "out.npz", {"y": np.full(2**18, version)})


def _read_arrays(folder: Path) -> tuple[int, set[str]]:
    values = np.load(folder / "out.npz")["y"]
    expect(values.size == 2**18 and values.min() == values.max(), "it contains both versions")
    return int(values[0]), {"out.npz"}


def _export_without_exchange(folder: Path, version: int) -> None:
    exchange = atomic.exchange
    atomic.exchange = lambda first, second: False
    try:
        _export(folder / "out", version)
    finally:
        atomic.exchange = exchange


WORKS = (
    Work(
        "`export --force`",
        lambda folder, version: _export(folder / "out", version),
        lambda folder: (_read_bundle(folder / "out"), {"out"}),
    ),
    Work(
        "`export --force`, no exchange",
        _export_without_exchange,
        lambda folder: (_read_bundle(folder / "out"), {"out"}),
    ),
    Work("`fuse --force`", _fuse, lambda folder: _read_model(folder / "out.onnx")),
    Work(
        "`fuse --bundle --force`",
        _fuse_bundle,
        lambda folder: (_read_bundle(folder / "out"), {"out"}),
    ),
    Work("`deploy --force`", _deploy, lambda folder: (_read_kit(folder / "out"), {"out"})),
    Work("`run --out`", _write_arrays, _read_arrays),
)
