"""The targets that `deploy` knows: what each runs, and what it needs besides its kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rotary_export.deploy.cpp_onnxruntime import copy_op_library
from rotary_export.deploy.inline import prepare_openvino, prepare_tract
from rotary_export.deploy.mlserver import prepare_mlserver
from rotary_export.deploy.signature import write_signature
from rotary_export.deploy.triton import write_repository
from rotary_export.manifest import Manifest

Prepare = Callable[[Path, Manifest, str], None]  # staging folder, manifest, graph


@dataclass(frozen=True)
class Target:
    """Somewhere a bundle runs.

    Attributes:
        what: In a few words.
        format: Of the bundle's files, the one that it opens: "onnx", "torchscript", "program",
            "aoti".
        prepare: Writes what depends on the bundle into the folder, if anything does.
    """

    what: str
    format: str
    prepare: Prepare | None = None


TARGETS: dict[str, Target] = {
    "cpp-onnxruntime": Target("a C++ program, ONNX Runtime", "onnx", copy_op_library),
    "cpp-libtorch": Target("a C++ program, libtorch: TorchScript", "torchscript", write_signature),
    "cpp-aoti": Target("a C++ program, libtorch: compiled by AOTInductor", "aoti", write_signature),
    "node": Target("a program for Node.js, onnxruntime-node", "onnx"),
    "browser": Target("a page, onnxruntime-web", "onnx"),
    "openvino": Target("OpenVINO, from Python", "onnx", prepare_openvino),
    "tract": Target("tract, from Python", "onnx", prepare_tract),
    "triton": Target("a model repository for Triton Inference Server", "onnx", write_repository),
    "mlserver": Target("the settings of an MLServer, and a client", "onnx", prepare_mlserver),
    "ray": Target("an application and a config file of Ray Serve, and a client", "onnx"),
}
