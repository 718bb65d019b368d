"""The model repository for Triton Inference Server, with one model for each of three backends.

Source: Triton's model configuration, `model_config.proto`. Its dimensions omit the batch unless
`max_batch_size` is 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rotary_export.bundle.copy_files import copy_file, copy_tree
from rotary_export.bundle.manifest import DATA_SUFFIX, GraphInfo, Manifest, TensorInfo
from rotary_export.deploy.package_copy import copy_package
from rotary_export.op import library as op_library
from rotary_export.serving.core import MAX_BATCH_SIZE, find_batch_axes
from rotary_export.serving.interface import DATATYPES

REPOSITORY = "model_repository"
MOUNT = "/models"  # the path of the repository in the container
QUEUE_MICROSECONDS = 500
TYPES = {dtype: f"TYPE_{datatype}" for dtype, datatype in DATATYPES.items()} | {
    "bfloat16": "TYPE_BF16"
}


def write_repository(staging: Path, manifest: Manifest, graph: str) -> None:
    """Write the model repository: GRAPH_onnxruntime, GRAPH_pytorch (TorchScript), GRAPH_python.

    Triton has no scalars. For a graph with a scalar input only GRAPH_python is written, which
    accepts a tensor of shape (1,) instead.

    Args:
        staging: The folder that deploy writes; it contains `bundle/` and the kit.
        manifest: Of the bundle.
        graph: Its main graph.
    """
    info = manifest.graphs[graph]
    axes = find_batch_axes(manifest, info)
    batched = axes is not None and set(axes.values()) == {0}
    repository = staging / REPOSITORY
    bundle = staging / "bundle"

    if all(tensor.shape for tensor in info.inputs):
        _write_onnxruntime(bundle, repository / f"{graph}_onnxruntime", manifest, info, batched)
        if "torchscript" in info.files:
            _write_pytorch(bundle, repository / f"{graph}_pytorch", info, batched)

    folder = _make_version(repository / f"{graph}_python")
    (staging / "model.py").rename(folder / "model.py")
    copy_tree(bundle, folder / "bundle", copy=_link)
    copy_package(folder / "rotary_export")
    types = TYPES | {"bfloat16": "TYPE_FP32"}  # the backend's numpy has no bfloat16
    python = _describe(info, "python", "model.py", batched, types=types, ragged=True)
    _write_configs(folder.parent, python, gpu=False)
    _fit_page(staging / "README.md", [model.name for model in sorted(repository.iterdir())])


def _fit_page(page: Path, models: Sequence[str]) -> None:
    """Remove the rows and items of models that are not in the repository; name one that is."""
    lines, is_left_out = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        row = re.match(r"(?:\| |- )`(\w+_(?:onnxruntime|pytorch|python))`(?: \||:)", line)
        if not line.startswith("  "):  # else it goes on
            is_left_out = row is not None and row[1] not in models
        if not is_left_out:
            lines.append(line.replace("MODEL", models[0]))
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_onnxruntime(
    bundle: Path, model: Path, manifest: Manifest, info: GraphInfo, batched: bool
) -> None:
    folder, file = _make_version(model), info.files["onnx"]
    for name in (file, f"{file}{DATA_SUFFIX}"):
        if name in manifest.files:
            _link(bundle / name, folder / name)
    copy_file(op_library.op_library_path(), folder / op_library.LIBRARY_NAME)
    library = f"{MOUNT}/{model.name}/1/{op_library.LIBRARY_NAME}"
    operations = f'model_operations {{ op_library_filename: "{library}" }}\n'
    _write_configs(model, _describe(info, "onnxruntime", file, batched), operations)


def _write_pytorch(bundle: Path, model: Path, info: GraphInfo, batched: bool) -> None:
    folder, file = _make_version(model), info.files["torchscript"]
    _link(bundle / file, folder / file)
    names = {t.name: f"INPUT__{i}" for i, t in enumerate(info.inputs)}
    names |= {t.name: f"OUTPUT__{i}" for i, t in enumerate(info.outputs)}
    _write_configs(model, _describe(info, "pytorch", file, batched, names))


def _link(source: Path, target: Path) -> None:
    """Make a hard link, so that weights are on the disk once; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def _make_version(model: Path) -> Path:
    folder = model / "1"
    folder.mkdir(parents=True)
    return folder


def _write_configs(folder: Path, config: str, operations: str = "", *, gpu: bool = True) -> None:
    """Write config.pbtxt for the CPU and, for `--model-config-name=gpu`, that for a GPU.

    Only the CPU's registers the op library: in a session on a GPU it would pull nodes off it.
    """
    (folder / "config.pbtxt").write_text(config + operations + _describe_instances("KIND_CPU"))
    if gpu:
        (folder / "configs").mkdir()
        text = config + _describe_instances("KIND_GPU")
        (folder / "configs" / "gpu.pbtxt").write_text(text)


def _describe_instances(kind: str) -> str:
    return f"instance_group [ {{ count: 1 kind: {kind} }} ]\n"


def _describe(
    info: GraphInfo,
    backend: str,
    file: str,
    batched: bool,
    names: Mapping[str, str] | None = None,
    types: Mapping[str, str] = TYPES,
    *,
    ragged: bool = False,
) -> str:
    """Return a model's configuration, without its instances.

    Args:
        info: The graph.
        backend: Of Triton.
        file: In the version's folder.
        batched: Whether the first axis is the batch, and requests may run together.
        names: Of the tensors, where the backend has its own.
        types: Triton's of our dtypes.
        ragged: Whether the backend accepts requests of several lengths together.
    """

    def describe(kind: str, tensors: Iterable[TensorInfo]) -> str:
        parts = []
        for tensor in tensors:
            shape = [str(d) if isinstance(d, int) else "-1" for d in tensor.shape][batched:]
            dims = f"dims: [ {', '.join(shape or ['1'])} ]"
            if ragged and batched and kind == "input":
                dims += " allow_ragged_batch: true"
            name = (names or {}).get(tensor.name, tensor.name)
            parts.append(f'  {{ name: "{name}" data_type: {types[tensor.dtype]} {dims} }}')
        return f"{kind} [\n" + ",\n".join(parts) + "\n]\n"

    size = min(MAX_BATCH_SIZE, info.max_size.get("batch_size", MAX_BATCH_SIZE)) if batched else 0
    lines = f'backend: "{backend}"\ndefault_model_filename: "{file}"\nmax_batch_size: {size}\n'
    lines += describe("input", info.inputs) + describe("output", info.outputs)
    if batched:
        lines += f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}\n"
    return lines
