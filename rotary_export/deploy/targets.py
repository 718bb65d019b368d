"""The targets of `deploy`: one entry each.

To add a target, add an entry here and a folder in `kits/` of the same name: a `README.md` and
whatever program it describes. `rotary_export/deploy/README.md` has the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rotary_export.bundle.manifest import Manifest

# Of a target: a folder (of the bundle, or the one that is being written), manifest, graph.
Step = Callable[[Path, Manifest, str], None]


@dataclass(frozen=True)
class Target:
    """Somewhere a bundle runs.

    Attributes:
        what: What deploy writes, in a few words.
        runs: What computes the rotary embedding there.
        format: The format of the bundle that it opens: "onnx", "torchscript", "program", "aoti".
        also: A format that it opens, too, where the bundle has it.
        has_windows: Whether it runs a cache whose layers have different lengths: such sizes are
            checked by this package's own session.
        check: Refuses a bundle that the target can't run, before anything is written.
        prepare: Writes the files that depend on the bundle into the folder, if there are any.
        shared: Folders of `kits/shared/`, whose files are copied too.
    """

    what: str
    runs: str
    format: str
    prepare: Step | None = None
    shared: tuple[str, ...] = ()
    also: str | None = None
    has_windows: bool = False
    check: Step | None = None


def _find(module: str, name: str) -> Step:
    """Return a function of this package that is imported when it is called: some need torch."""

    def step(folder: Path, manifest: Manifest, graph: str) -> None:
        function: Step = getattr(import_module(f"rotary_export.deploy.{module}"), name)
        function(folder, manifest, graph)

    return step


TARGETS: dict[str, Target] = {
    "cpp-onnxruntime": Target(
        "a C++ program, ONNX Runtime",
        "our kernel, or the function body",
        "onnx",
        _find("cpp_onnxruntime", "prepare_cpp_onnxruntime"),
        shared=("cpp",),
    ),
    "cpp-libtorch": Target(
        "a C++ program, libtorch",
        "TorchScript",
        "torchscript",
        _find("signature", "write_signature"),
        shared=("cpp", "libtorch"),
    ),
    "cpp-aoti": Target(
        "a C++ program, libtorch",
        "code compiled by AOTInductor",
        "aoti",
        _find("signature", "write_signature"),
        shared=("cpp", "libtorch"),
    ),
    "node": Target(
        "a program for Node.js, onnxruntime-node",
        "the function body",
        "onnx",
        _find("transformers_js", "arrange_for_transformers_js"),
        shared=("javascript",),
    ),
    "browser": Target(
        "a page, onnxruntime-web",
        "the function body",
        "onnx",
        _find("transformers_js", "arrange_for_transformers_js"),
        shared=("javascript",),
    ),
    "openvino": Target(
        "a Python program, OpenVINO",
        "the function body, fused to OpenVINO's own RoPE",
        "onnx",
        _find("inline", "prepare_openvino"),
        shared=("python",),
    ),
    "tract": Target(
        "a Python program, tract",
        "primitives of opset 18",
        "onnx",
        _find("inline", "prepare_tract"),
        shared=("python",),
    ),
    "genai": Target(
        "a folder for onnxruntime-genai, and programs in Python and C++",
        "the function body, or our kernel",
        "onnx",
        _find("genai", "write_genai"),
        shared=("cpp",),
        check=_find("genai", "check_genai"),
    ),
    "triton": Target(
        "a model repository for Triton Inference Server",
        "our kernel, or TorchScript",
        "onnx",
        _find("triton", "write_repository"),
        also="torchscript",
    ),
    "mlserver": Target(
        "the settings of an MLServer, and a client",
        "our kernel",
        "onnx",
        _find("mlserver", "prepare_mlserver"),
        has_windows=True,
    ),
    "ray": Target(
        "an application and a config file of Ray Serve, and a client",
        "our kernel",
        "onnx",
        _find("package_copy", "prepare_ray"),
        has_windows=True,
    ),
}
