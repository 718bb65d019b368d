"""What must run where little is installed, does: each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bundles import get_bundle, make_arrays, make_tensors, run_eager
from helpers.oracles import assert_same_bits

import rotary_export
from rotary_export import RotaryExportError, load
from rotary_export.runtime.tensors import make_bfloat16

MAKE_BARE = (
    "python3 -m venv build/bare && build/bare/bin/pip install numpy onnxruntime && "
    "export ROTARY_EXPORT_BARE_PYTHON=$PWD/build/bare/bin/python"
)


def run_python(code: str, *arguments: object, options=("-I",), python=sys.executable, env=None):
    """Run code in a new interpreter; return what it prints."""
    run = subprocess.run(
        [python, *options, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ---- torch without rotary_export

RUN_TORCH = """
import sys, warnings

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rotary_export":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
try:
    import rotary_export
except ModuleNotFoundError:
    pass
else:
    sys.exit("rotary_export was imported")
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
inputs, outputs = torch.load(sys.argv[2]), {}
for graph, given in inputs.items():
    script = torch.jit.load(f"{sys.argv[1]}/{graph}.pt")
    program = torch.export.load(f"{sys.argv[1]}/{graph}.pt2").module()
    outputs[graph] = [script(*given), program(*given)]
torch.save(outputs, sys.argv[3])
"""


@pytest.mark.parametrize("name", ["xpos", "static"])
def test_torch_files_run_where_this_package_is_not(name, tmp_path):
    rotate = make_tensors(name, seq_len=13)
    inputs = {"rotate": list(rotate.values()), "tables": [torch.tensor(13)]}
    torch.save(inputs, tmp_path / "in")
    run_python(RUN_TORCH, get_bundle(name).path, tmp_path / "in", tmp_path / "out")
    outputs = torch.load(tmp_path / "out")
    wants = {"rotate": list(run_eager(name, rotate).values())}
    wants["tables"] = load(get_bundle(name), "tables", "program", allow_code=True)(
        seq_len=13
    ).values()
    for graph, want in wants.items():
        assert len(outputs[graph]) == 2
        for got in outputs[graph]:
            for value, expected in zip(got, want, strict=True):
                assert_same_bits(value, torch.as_tensor(expected), (name, graph))


# ---- a deployment


def test_the_runtime_imports_numpy_alone():
    run = subprocess.run(
        [sys.executable, "-I", "-X", "importtime", "-c", "import rotary_export.runtime"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert {"numpy", "rotary_export.runtime.session"} <= imported
    packages = {name.partition(".")[0] for name in imported}
    unwanted = {"torch", "onnx", "onnxscript", "onnxruntime", "transformers", "ml_dtypes"}
    assert packages & (unwanted | {"click", "rich"}) == set()


def test_nothing_is_imported_until_it_is_asked_for():
    code = "import sys, rotary_export; dir(rotary_export); print('numpy' in sys.modules)"
    assert run_python(code).strip() == "False"


RUN_BARE = """
import importlib.util, sys
import numpy as np
import rotary_export
from rotary_export.runtime import load

assert rotary_export.__file__.startswith(sys.argv[3]), rotary_export.__file__
assert not [n for n in ("torch", "onnx", "ml_dtypes") if importlib.util.find_spec(n)]
inputs, outputs = dict(np.load(sys.argv[1] + "/in.npz")), {}
paths = {"fused": {"require_fused": True}, "plain": {"use_op_library": False}}
for path, arguments in paths.items():
    session = load(sys.argv[2], **arguments)
    print(session.kernel_path)
    outputs |= {f"{path}.{name}": value for name, value in session(**inputs).items()}
np.savez(sys.argv[1] + "/out.npz", **outputs)
"""


def test_numpy_and_the_cpu_wheel_are_enough(tmp_path):
    python = os.environ.get("ROTARY_EXPORT_BARE_PYTHON")
    if not python and os.environ.get("CI"):
        pytest.fail(f"ROTARY_EXPORT_BARE_PYTHON is not set: {MAKE_BARE}")
    if not python:
        pytest.skip(f"needs an environment with numpy and onnxruntime alone: {MAKE_BARE}")
    # A copy, since the folder that it is installed in holds torch as well.
    package = tmp_path / "site" / "rotary_export"
    shutil.copytree(Path(rotary_export.__file__).parent, package)
    inputs = make_arrays("plain", seq_len=13)
    np.savez(tmp_path / "in.npz", **inputs)
    printed = run_python(
        RUN_BARE,
        tmp_path,
        get_bundle("plain").path,
        package.parent,
        options=("-P",),
        python=python,
        env={"PYTHONPATH": str(package.parent)},
    )
    assert re.fullmatch(r"fused \(\w+\)\nnative\n", printed)
    outputs = np.load(tmp_path / "out.npz")
    for name, want in run_eager("plain", inputs).items():
        assert_same_bits(torch.from_numpy(outputs[f"fused.{name}"]), want, name)
        np.testing.assert_allclose(outputs[f"plain.{name}"], want.numpy(), rtol=0, atol=2e-6)


# ---- what is missing is named

RUN_WITHOUT = """
import sys

for name in sys.argv[1].split(","):
    sys.modules[name] = None
from rotary_export.errors import RotaryExportError
from rotary_export.runtime import load

try:
    load(sys.argv[2], runtime=sys.argv[3], allow_code=True)
except RotaryExportError as error:
    print(error)
"""
MISSING = {
    "onnxruntime": ("onnxruntime", r"ONNX Runtime is not installed: pip install onnxruntime \(CPU"),
    "torch": ("program", "'torchscript', 'program' and 'aoti' need torch: pip install torch"),
    "torch,onnxruntime": (
        "torchscript",
        "'torchscript', 'program' and 'aoti' need torch: pip install",
    ),
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_package_is_named(missing):
    runtime, message = MISSING[missing]
    printed = run_python(RUN_WITHOUT, missing, get_bundle("plain").path, runtime)
    assert re.search(message, printed)
    assert printed.count("\n") == 1


def test_bfloat16_without_ml_dtypes(monkeypatch):
    bundle = get_bundle("bfloat16")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(RotaryExportError, match="bfloat16 numpy arrays need the package ml_dtypes"):
        make_bfloat16()
    tensors = make_tensors("bfloat16")  # torch has a bfloat16 of its own
    for arguments in ({}, {"runtime": "program", "allow_code": True}):
        outputs = load(bundle, **arguments)(**tensors)
        for key, want in run_eager("bfloat16", tensors).items():
            assert_same_bits(outputs[key], want, key)
