"""`manifest.json`: the contents of a bundle, written by the exporters, read by the runtime.

Standard library only. The hashes are for integrity (a truncated or swapped file), not for
authenticity: whoever can change a file can change the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rotary_export.bundle.json_file import read_json
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.op import spec

FILE_NAME = "manifest.json"
FORMAT = "rotary_export.bundle"
FORMAT_VERSION = 1
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "program": ".pt2", "aoti": ".aoti.pt2"}
DEFAULT_FORMATS = ("onnx", "torchscript", "program")
MAIN_GRAPHS = ("rotate", "model")  # a bundle has one of them
DATA_SUFFIX = ".data"  # of the file beside GRAPH.onnx that contains a large model's weights


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph.

    Attributes:
        name: The same in every format.
        dtype: numpy's name of it, or "bfloat16".
        shape: Sizes; a string is a dynamic axis, the same size wherever it stands, a sum or a
            multiple of them: "past_seq_len + seq_len", "8 * height".
        limits: Smallest and largest legal value; None: any.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    limits: tuple[int, int] | None = None


@dataclass(frozen=True)
class GraphInfo:
    """One graph of a bundle.

    Attributes:
        inputs: In order.
        outputs: In order.
        files: File name by format, a key of SUFFIXES.
        rotary_nodes: Number of `rotary_export::RotaryEmbedding` nodes in the ONNX file.
        function_body: What ONNX Runtime runs without our op library: "native" or "primitive".
        max_size: By name of a dynamic size, the largest that is legal, where there is one.
        min_size: The smallest, where it is more than 1.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    files: Mapping[str, str]
    rotary_nodes: int = 0
    function_body: str = "primitive"
    max_size: Mapping[str, int] = field(default_factory=dict)
    min_size: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest.

    Attributes:
        name: Of the bundle: its folder's name when it was made.
        config: The arguments it was exported with.
        dtype: Of query and key.
        opset: Of ai.onnx, in the ONNX files.
        graphs: By name.
        minimum_onnxruntime: Oldest version that runs it "fused" and "portable".
        producers: Versions of what made it.
        files: sha256 by file name.
        parity: The report of `verify`, as made by the export.
        compiled_for: "system", "machine" and "instruction_set" that "aoti" files need; empty
            where there are none.
    """

    name: str
    config: Mapping[str, Any]
    dtype: str
    opset: int
    graphs: Mapping[str, GraphInfo]
    minimum_onnxruntime: Mapping[str, str]
    producers: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    compiled_for: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "op": {"domain": spec.DOMAIN, "name": spec.OP_TYPE, "version": spec.OP_VERSION},
        }
        return json.dumps(head | asdict(self), indent=1, allow_nan=False) + "\n"


def hash_file(path: Path) -> str:
    """Return a file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(bundle_dir: Path) -> Manifest:
    """Read and check `manifest.json`; the other files are not opened.

    Args:
        bundle_dir: The bundle's folder.

    Returns:
        The manifest.

    Raises:
        RotaryExportError: It is missing, not JSON, not a manifest, of a newer version than this
            package reads, or names a file outside the bundle.
    """
    path = bundle_dir / FILE_NAME
    if bundle_dir.suffix == ".onnx" and bundle_dir.is_file():
        raise RotaryExportError(
            f"{bundle_dir} is an ONNX file, not a bundle; `rotary-export fuse IN.onnx --bundle "
            "DIR` writes a bundle of the file before fuse"
        )
    if not path.is_file():
        raise RotaryExportError(f"{bundle_dir} is not a bundle: it has no {FILE_NAME}")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RotaryExportError(f"{path} is not a {FORMAT} manifest")
    _check_version(path, "format_version", data.get("format_version"), FORMAT_VERSION)
    try:
        _check_version(path, "op version", data["op"]["version"], spec.OP_VERSION)
        manifest = Manifest(
            name=str(data["name"]),
            config=dict(data["config"]),
            dtype=str(data["dtype"]),
            opset=int(data["opset"]),
            graphs={name: _read_graph(graph) for name, graph in data["graphs"].items()},
            minimum_onnxruntime={
                how: str(data["minimum_onnxruntime"][how]) for how in ("fused", "portable")
            },
            producers=dict(data["producers"]),
            files=dict(data["files"]),
            parity=dict(data["parity"]),
            compiled_for={str(k): str(v) for k, v in data.get("compiled_for", {}).items()},
        )
    except RotaryExportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RotaryExportError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    compiled = any("aoti" in graph.files for graph in manifest.graphs.values())
    if compiled and manifest.compiled_for.keys() != {"system", "machine", "instruction_set"}:
        raise RotaryExportError(f"{path} does not name the machine that its compiled graphs need")
    for name in (*manifest.files, *(f for g in manifest.graphs.values() for f in g.files.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise RotaryExportError(f"{path} names a file outside the bundle: {name!r}")
        if name not in manifest.files:
            raise RotaryExportError(f"{path} has no sha256 of {name!r}")
    return manifest


def _check_version(path: Path, what: str, got: object, known: int) -> None:
    if not isinstance(got, int) or not 1 <= got <= known:
        raise RotaryExportError(
            f"{path} has {what} {got!r}; this rotary_export reads up to {known}"
        )


def _read_graph(data: Mapping[str, Any]) -> GraphInfo:
    def tensors(key: str) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(
                str(t["name"]),
                str(t["dtype"]),
                tuple(t["shape"]),
                None if t["limits"] is None else (int(t["limits"][0]), int(t["limits"][1])),
            )
            for t in data[key]
        )

    files = {str(kind): str(file) for kind, file in data["files"].items()}
    if not files or not files.keys() <= SUFFIXES.keys():
        raise ValueError(f"files must be by format, of {', '.join(SUFFIXES)}, got {files}")
    return GraphInfo(
        tensors("inputs"),
        tensors("outputs"),
        files,
        int(data["rotary_nodes"]),
        str(data["function_body"]),
        *(
            {str(name): int(size) for name, size in data.get(key, {}).items()}
            for key in ("max_size", "min_size")
        ),
    )


def find_main_graph(bundle_dir: Path, manifest: Manifest) -> str:
    """Return "rotate" or "model", whichever the bundle has, or its only graph."""
    for name in MAIN_GRAPHS:
        if name in manifest.graphs:
            return name
    if len(manifest.graphs) == 1:
        return next(iter(manifest.graphs))
    raise RotaryExportError(
        f"the bundle {bundle_dir} has no graph {' or '.join(map(repr, MAIN_GRAPHS))}; it has "
        f"{', '.join(manifest.graphs)}"
    )


def check_passed(path: Path, manifest: Manifest) -> None:
    """Refuse a bundle that was kept although its proof failed.

    Raises:
        CheckFailedError: It is one; the message contains why it failed.
    """
    if manifest.parity.get("passed") is False:
        raise CheckFailedError(
            f"{path} failed its proof: {manifest.parity.get('error', 'see its manifest')}; "
            "load(..., allow_failed=True) opens it nevertheless"
        )


def check_files(bundle_dir: Path, manifest: Manifest, names: list[str] | None = None) -> None:
    """Compare files with the hashes in the manifest.

    Args:
        bundle_dir: The bundle's folder.
        manifest: Its manifest.
        names: Which files; default: all.

    Raises:
        CheckFailedError: A file is missing or not the one that was written.
    """
    for name in manifest.files if names is None else names:
        path = bundle_dir / name
        if not path.is_file():
            raise CheckFailedError(f"{name} is missing from the bundle {bundle_dir}")
        if hash_file(path) != manifest.files[name]:
            raise CheckFailedError(
                f"{name} in {bundle_dir} is not the file that was exported: its sha256 differs "
                f"from the one in {FILE_NAME}"
            )
