"""`load`: from a bundle's folder to a session."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rotary_export.bundle.manifest import (
    CODE_FORMATS,
    DATA_SUFFIX,
    SUFFIXES,
    Manifest,
    check_files,
    check_passed,
    find_main_graph,
    read_manifest,
)
from rotary_export.bundle.paths import identify
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.session import Session

RUNTIMES = {
    "onnxruntime": "onnx",
    "torchscript": "torchscript",
    "program": "program",
    "aoti": "aoti",
}


def load(
    bundle_dir: str | os.PathLike[str],
    graph: str | None = None,
    runtime: str = "onnxruntime",
    providers: str | Sequence[str] = "auto",
    use_op_library: bool | str = "auto",
    require_fused: bool = False,
    allow_failed: bool = False,
    allow_code: bool = False,
) -> Session:
    """Load one graph of a bundle; its files are checked against their hashes first.

    Args:
        bundle_dir: The bundle's folder.
        graph: One of the bundle's, such as "tables" and "rotate", or "encoder" and "decoder";
            None: "rotate" or "model", or the only one.
        runtime: "onnxruntime", "torchscript", "program" or "aoti". Only the one file of that
            format is opened.
        providers: ONNX Runtime's execution providers by name, in order of preference; "auto":
            CUDA where it works, else the CPU.
        use_op_library: Register our op library. "auto": where it is installed and has a kernel
            for the first provider (our CPU kernel would pull nodes off a GPU), which is not CUDA:
            the CUDA kernel is opt-in until it has been run on a GPU; True: or an error, CUDA
            included; False: never.
        require_fused: Raise where our kernel would not run.
        allow_failed: Open a bundle that was kept although its proof failed.
        allow_code: Open a file whose code may run here, as every one but an ONNX file.

    Returns:
        The session; `session.providers` and `session.kernel_path` name what runs.

    Raises:
        RotaryExportError: The bundle is damaged, is replaced meanwhile, lacks the graph or the
            format, or what was asked for by name can't run here; the message names what is missing.
    """
    path = Path(bundle_dir)
    folder = identify(path)
    manifest = read_manifest(path)
    if not allow_failed:
        check_passed(path, manifest)
    if runtime not in [*RUNTIMES]:  # a list has no hash
        raise RotaryExportError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if graph is None:
        graph = find_main_graph(path, manifest)
    if graph not in [*manifest.graphs]:
        raise RotaryExportError(
            f"the bundle {path} has no graph {graph!r}; it has {', '.join(manifest.graphs)}"
        )
    files = manifest.graphs[graph].files
    if RUNTIMES[runtime] not in files:
        raise RotaryExportError(
            f"runtime {runtime!r} needs {graph}{SUFFIXES[RUNTIMES[runtime]]}, "
            f"but the bundle was exported with formats {', '.join(files)}"
        )
    file = files[RUNTIMES[runtime]]
    if RUNTIMES[runtime] in CODE_FORMATS and not allow_code:
        raise RotaryExportError(
            f"the runtime {runtime!r} opens {file}, whose code may run here: allow_code=True "
            "(--allow-code) opens it if you trust its author"
        )
    check_files(path, manifest, [n for n in manifest.files if n in (file, f"{file}{DATA_SUFFIX}")])
    session = open_session(path, manifest, graph, runtime, providers, use_op_library, require_fused)
    if identify(path) != folder:
        raise RotaryExportError(f"{path} was replaced while it was being loaded: load it again")
    return session


def open_session(
    path: Path,
    manifest: Manifest,
    graph: str,
    runtime: str,
    providers: str | Sequence[str] = "auto",
    use_op_library: bool | str = "auto",
    require_fused: bool = False,
) -> Session:
    """Open one graph of a checked bundle; arguments as `load`."""
    info = manifest.graphs[graph]
    file = path / info.files[RUNTIMES[runtime]]
    if require_fused and not info.rotary_nodes:
        raise RotaryExportError(f"require_fused: the graph {graph!r} has no rotary node")
    if runtime == "onnxruntime":
        from rotary_export.runtime.ort import OrtSession

        return OrtSession(
            file,
            graph,
            info,
            providers,
            use_op_library,
            require_fused,
            manifest.minimum_onnxruntime,
        )
    if require_fused:
        raise RotaryExportError(f"require_fused: the runtime {runtime!r} has no fused kernel")
    if providers != "auto":
        raise RotaryExportError(f"providers are ONNX Runtime's; {runtime!r} has none")
    if use_op_library not in ("auto", False):
        raise RotaryExportError(
            f"use_op_library={use_op_library}: the op library is for ONNX Runtime, not {runtime!r}"
        )
    from rotary_export.runtime.torch_runtime import TorchSession

    if runtime == "aoti":
        from rotary_export.runtime.compiled import find_refusal

        refusal = find_refusal(manifest.compiled_for)
        if refusal:
            raise RotaryExportError(f"{file.name} can't run here: {refusal}")
    return TorchSession(file, graph, info, runtime)
