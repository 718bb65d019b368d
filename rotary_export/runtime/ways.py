"""Every way to run a graph of a bundle, listed once: what it opens, and when it is available.

The proof, `bench` and `fuse` go through this list. torch and onnx are imported only where a way
needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import CODE_FORMATS, GraphInfo, Manifest
from rotary_export.errors import RotaryExportError
from rotary_export.package import hide_folders
from rotary_export.runtime.load import RUNTIMES, open_session
from rotary_export.runtime.providers import CPU, import_onnxruntime, library_refusal
from rotary_export.runtime.session import Session


@dataclass(frozen=True)
class Way:
    """One way to run a graph, on the CPU.

    Attributes:
        name: Human-readable; the key in reports.
        runtime: As `load` names it; "reference" is onnx.reference.
        use_op_library: Whether ONNX Runtime runs our kernel or the function body.
        options: Arguments of `open_session` that follow from the two.
    """

    name: str
    runtime: str
    use_op_library: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_format(self) -> str:
        """The format of the bundle's files that it opens: a key of SUFFIXES."""
        return RUNTIMES.get(self.runtime, "onnx")

    @property
    def computed_by_torch(self) -> bool:
        """Whether torch computes it, with the Cos, Sin and Pow of eager."""
        return self.runtime in ("torchscript", "program", "aoti")

    def find_refusal(self, compiled_for: Mapping[str, str] | None = None) -> str | None:
        """Find out why this way is not available on this machine.

        Args:
            compiled_for: As in the manifest; for "aoti".

        Returns:
            The reason, or None.
        """
        if self.computed_by_torch and find_spec("torch") is None:
            return "torch is not installed"
        if self.runtime == "aoti":
            from rotary_export.runtime.compiled import find_refusal

            return find_refusal(compiled_for or {})
        if self.runtime == "reference" and find_spec("onnx") is None:
            return "onnx is not installed"
        if self.runtime == "onnxruntime":
            try:
                import_onnxruntime()
            except RotaryExportError as error:
                return str(error)
            return library_refusal([CPU], "auto") if self.use_op_library else None
        return None

    def open(self, path: Path, manifest: Manifest, graph: str) -> Session:
        """Open one graph of a checked bundle.

        Args:
            path: The bundle's folder.
            manifest: Its manifest.
            graph: The name of the graph, which has a file of this way's format.

        Raises:
            RotaryExportError: The file can't be loaded.
        """
        if self.runtime == "reference":
            from rotary_export.runtime.reference_session import ReferenceSession

            info = manifest.graphs[graph]
            return ReferenceSession(path / info.files["onnx"], graph, info)
        return open_session(path, manifest, graph, self.runtime, **self.options)


PROGRAM = Way("torch.export", "program")
TORCHSCRIPT = Way("TorchScript", "torchscript")
AOTI = Way("AOTInductor", "aoti")
FUNCTION_BODY = Way(
    "ONNX Runtime, function body",
    "onnxruntime",
    options={"providers": [CPU], "use_op_library": False},
)
OP_LIBRARY = Way(
    "ONNX Runtime, op library",
    "onnxruntime",
    use_op_library=True,
    options={"providers": [CPU], "use_op_library": True},
)
REFERENCE = Way("onnx.reference", "reference")
WAYS = (PROGRAM, TORCHSCRIPT, AOTI, FUNCTION_BODY, OP_LIBRARY, REFERENCE)


NOT_OPENED = "not opened, it is code (--allow-code, allow_code=True)"


def list_ways(
    graph: GraphInfo,
    compiled_for: Mapping[str, str],
    skipped: dict[str, str],
    *,
    allow_code: bool,
) -> Iterator[Way]:
    """List the ways that can run a graph here.

    Args:
        graph: The graph; one without a rotary node is the same with the op library and without.
        compiled_for: As in the manifest.
        skipped: Receives the ways that are not available, and why.
        allow_code: Include the ways that may run code of the files that they open.

    Yields:
        Ways, in the order of WAYS.
    """
    for way in WAYS:
        if way.file_format not in graph.files or (way is OP_LIBRARY and not graph.rotary_nodes):
            continue
        if way.file_format in CODE_FORMATS and not allow_code:
            skipped[way.name] = NOT_OPENED
            continue
        refusal = way.find_refusal(compiled_for)
        if refusal:
            skipped[way.name] = hide_folders(refusal)  # a bundle contains it
        else:
            yield way
