"""Imports go one way: no file imports one that stands after it in the README's architecture."""

import ast
from pathlib import Path

import pytest

import rotary_export

PACKAGE = Path(rotary_export.__file__).parent
ORDER = [
    "errors", "staging", "op.spec", "runtime.native", "reference", "op", "embedding", "scaling",
    "manifest", "runtime.machine", "runtime.providers", "runtime.session", "runtime.ort",
    "runtime.torch_runtime", "runtime", "serving", "exporters.rotate_static",
    "exporters.scaled_graphs", "exporters.graphs", "exporters.program", "exporters.aoti",
    "exporters.torchscript", "exporters.onnx", "oracle", "scaled_oracle", "runners", "parity_cases",
    "parity", "exporters.bundle", "models.calls", "models.rotation", "models.probe",
    "models.replace", "models.preserve", "models.inputs", "models.cases", "models.stateless",
    "models.guards", "models.paths", "models.trace", "models.write", "models.prepare",
    "models.prove", "models.export_model", "models.source", "fusion.sums", "fusion.operators",
    "fusion.channels", "fusion.rotation", "fusion.build", "fusion.rules", "fusion.shapes",
    "fusion.prepare", "fusion.join", "fusion.read", "fusion.feeds", "fusion.check", "fusion.fuse",
    "timing", "machine", "benchmark", "deploy.example", "deploy.inline", "deploy.cpp_onnxruntime",
    "deploy.signature", "deploy.triton", "deploy.mlserver", "deploy.targets", "deploy.deploy",
    "terminal", "arrays", "inspection", "cli_export", "cli", "__main__",
]  # fmt: skip


def find_rank(module):
    """Return the place of the longest name in ORDER that `module` is or is inside of."""
    names = [n for n in ORDER if module == n or module.startswith(f"{n}.")]
    return ORDER.index(max(names, key=len))


KITS = PACKAGE / "deploy" / "consumers"  # of an installed package; each stands by itself
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if KITS not in path.parents]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module in ("__init__", "deploy", "exporters", "fusion"):  # hand names on lazily; a docstring
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rotary_export."):
            name = node.module.removeprefix("rotary_export.")
            imported = [f"{name}.{a.name}" for a in node.names] if name in ORDER else [name]
            for other in imported:
                assert find_rank(other) <= find_rank(module), f"{module} imports {other}"
