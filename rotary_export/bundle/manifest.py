"""`manifest.json`: the contents of a bundle, written by the exporters, read by the runtime.

Standard library only. The hashes are for integrity (a truncated or swapped file), not for
authenticity: whoever can change a file can change the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rotary_export.bundle import schema
from rotary_export.bundle.json_file import read_json
from rotary_export.bundle.paths import check_path
from rotary_export.bundle.staging import describe_kept
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.op import spec

FILE_NAME = "manifest.json"
FORMAT = "rotary_export.bundle"
FORMAT_VERSION = 1
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "program": ".pt2", "aoti": ".aoti.pt2"}
CODE_FORMATS = ("torchscript", "program", "aoti")  # opening such a file can run code in it
DEFAULT_FORMATS = ("onnx", "torchscript", "program")
MODEL = "model"
MAIN_GRAPHS = ("rotate", MODEL)  # a bundle has one of them, unless it is an encoder-decoder's
ENCODER, DECODER = "encoder", "decoder"
EMBED = "embed_tokens"  # beside a model that reads embeddings, as transformers.js names it
DATA_SUFFIX = "_data"  # GRAPH.onnx_data contains a large model's weights, as optimum names it


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

    @property
    def has_unknown_rank(self) -> bool:
        """Whether it is an output of a fused file that does not declare its rank."""
        return self.shape == (f"{self.name}_shape",)


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
        length_thresholds: Of a decoder: lengths past which its cache must be computed anew, as
            the config's "decoder" has them.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    files: Mapping[str, str]
    rotary_nodes: int = 0
    function_body: str = "primitive"
    max_size: Mapping[str, int] = field(default_factory=dict)
    min_size: Mapping[str, int] = field(default_factory=dict)
    length_thresholds: tuple[int, ...] = ()


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

    @property
    def is_model(self) -> bool:
        """Whether it is the bundle of a model, not of a rotary embedding alone."""
        return MODEL in self.graphs or DECODER in self.graphs

    @property
    def only_graph(self) -> str:
        """The name of its graph, of what `select` returned."""
        (name,) = self.graphs
        return name

    def select(self, name: str) -> Manifest:
        """Return the manifest of one of its graphs.

        The config of a bundle of several graphs is that of the main one; `config["graphs"]`
        contains those of the others.
        """
        config = self.config.get("graphs", {}).get(name, self.config)
        return replace(self, config=config, graphs={name: self.graphs[name]})

    def join(self, other: Manifest) -> Manifest:
        """Return the manifest of a bundle that has the one graph of another, too."""
        graphs = {**self.config.get("graphs", {}), other.only_graph: other.config}
        return replace(
            self,
            config={**self.config, "graphs": graphs},
            graphs={**self.graphs, **other.graphs},
            files=other.files,
            compiled_for={**self.compiled_for, **other.compiled_for},
        )

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "op": {"domain": spec.DOMAIN, "name": spec.OP_TYPE, "version": spec.OP_VERSION},
        }
        content = asdict(self)
        for graph in content["graphs"].values():
            del graph["length_thresholds"]  # of the config
        return json.dumps(head | content, indent=1, allow_nan=False) + "\n"


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
            package reads, or names a file outside the bundle; or the folder contains a symlink.
    """
    check_path(bundle_dir)
    path = bundle_dir / FILE_NAME
    if bundle_dir.suffix == ".onnx" and bundle_dir.is_file():
        raise RotaryExportError(
            f"{bundle_dir} is an ONNX file, not a bundle; `rotary-export fuse IN.onnx --bundle "
            "DIR` writes a bundle of the file before fuse"
        )
    if not path.is_file():
        kept = describe_kept(bundle_dir)
        raise RotaryExportError(f"{bundle_dir} is not a bundle: it has no {FILE_NAME}{kept}")
    _check_links(bundle_dir)
    data = read_json(path, is_finite=True)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RotaryExportError(f"{path} is not a {FORMAT} manifest")
    _check_version(path, "format_version", data.get("format_version"), FORMAT_VERSION)
    op = data.get("op")
    if isinstance(op, dict):
        _check_version(path, "op version", op.get("version"), spec.OP_VERSION)
    try:
        schema.check(data, schema.MANIFEST)
        decoder = data["config"].get("decoder", {})
        lengths = tuple(decoder.get("length_thresholds", ()))
        graphs = {name: _read_graph(graph, lengths) for name, graph in data["graphs"].items()}
    except ValueError as error:
        raise RotaryExportError(f"{path} is damaged: {error}") from None
    manifest = Manifest(
        name=data["name"],
        config=data["config"],
        dtype=data["dtype"],
        opset=data["opset"],
        graphs=graphs,
        minimum_onnxruntime=data["minimum_onnxruntime"],
        producers=data["producers"],
        files=data["files"],
        parity=data["parity"],
        compiled_for=data.get("compiled_for", {}),
    )
    compiled = any("aoti" in graph.files for graph in manifest.graphs.values())
    if compiled and manifest.compiled_for.keys() != {"system", "machine", "instruction_set"}:
        raise RotaryExportError(f"{path} does not name the machine that its compiled graphs need")
    for name in (*manifest.files, *(f for g in manifest.graphs.values() for f in g.files.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise RotaryExportError(f"{path} names a file outside the bundle: {name!r}")
        if name not in manifest.files:
            raise RotaryExportError(f"{path} has no sha256 of {name!r}")
    return manifest


def _check_links(bundle_dir: Path) -> None:
    """Refuse a folder with symlinks, by which files outside would be read."""
    for entry in bundle_dir.rglob("*"):
        if entry.is_symlink():
            raise RotaryExportError(
                f"{bundle_dir} contains {str(entry.relative_to(bundle_dir))!r}, a symlink to "
                f"{str(entry.readlink())!r}: a bundle has files alone (cp -rL copies what links "
                "name)"
            )


def _check_version(path: Path, what: str, got: object, known: int) -> None:
    if not isinstance(got, int) or not 1 <= got <= known:
        raise RotaryExportError(
            f"{path} has {what} {got!r}; this rotary_export reads up to {known}"
        )


def _read_graph(data: Mapping[str, Any], lengths: tuple[int, ...]) -> GraphInfo:
    """Read a graph that fits the schema.

    Raises:
        ValueError: What the schema can't state.
    """

    def read_tensor(tensor: Mapping[str, Any]) -> TensorInfo:
        limits = tensor["limits"]
        if limits is not None and len(limits) != 2:
            raise ValueError(f"the limits of {tensor['name']} must be two, got {limits}")
        return TensorInfo(
            tensor["name"],
            tensor["dtype"],
            tuple(tensor["shape"]),
            None if limits is None else (limits[0], limits[1]),
        )

    files = data["files"]
    if not files or not files.keys() <= SUFFIXES.keys():
        raise ValueError(f"files must be by format, of {', '.join(SUFFIXES)}, got {files}")
    inputs, outputs = (tuple(map(read_tensor, data[key])) for key in ("inputs", "outputs"))
    for tensors in (inputs, outputs):
        names = [info.name for info in tensors]
        if not names or len({*names}) < len(names):
            raise ValueError(f"inputs and outputs must have different names, got {names}")
    return GraphInfo(
        inputs,
        outputs,
        files,
        data["rotary_nodes"],
        data["function_body"],
        data.get("max_size", {}),
        data.get("min_size", {}),
        lengths,
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


def check_openable(path: Path, manifest: Manifest, allow_code: bool) -> None:
    """Refuse a bundle with a graph of which no file may be opened.

    Raises:
        RotaryExportError: All its files are of formats whose code may run, which is not allowed.
    """
    for name, graph in manifest.graphs.items():
        if not allow_code and graph.files.keys() <= {*CODE_FORMATS}:
            raise RotaryExportError(
                f"{path} has {name} as {', '.join(graph.files)} alone, whose code may run here: "
                "allow_code=True (--allow-code) opens them if you trust their author"
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
