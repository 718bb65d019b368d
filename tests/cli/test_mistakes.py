"""Mistakes: one line each, exit code 2, before anything is loaded or written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import EXPORT, call

MISTAKES = {
    "no-command": (["nope"], "No such command 'nope'"),
    "no-dim": (["export", "--max-seq-len", "4", "--out", "x"], "--dim"),
    "odd-dim": (["export", "--dim", "7", "--max-seq-len", "4", "--out", "x"], "got 7"),
    "bad-dtype": ([*EXPORT, "--dtype", "int8", "--out", "x"], "int8"),
    "bad-opset": ([*EXPORT, "--opset", "12", "--out", "x"], "opset must be in [18, 25], got 12"),
    "not-a-bundle": (["verify", "."], "it has no manifest.json"),
    "file-verify": (["verify", "text.onnx"], "text.onnx is an ONNX file, not a bundle"),
    "file-deploy": (
        ["deploy", "node", "text.onnx", "--out", "x"],
        "`rotary-export fuse IN.onnx --bundle DIR` writes a bundle",
    ),
    "no-file": (["inspect", "nope.onnx"], "nope.onnx does not exist"),
    "not-onnx": (["inspect", "text.onnx"], "text.onnx is not an ONNX file"),
    "no-input-file": (["run", "B", "--input", "query=no.npy", "--out", "o.npz"], "no.npy"),
    "not-npy": (["run", "B", "--input", "query=text.onnx", "--out", "o.npz"], "text.onnx"),
    "no-name": (["run", "B", "--input", "q.npy", "--out", "o.npz"], "--input NAME=q.npy"),
    "not-npz": (["run", "B", "--input", "zip.npz", "--out", "o.npz"], "zip.npz is not a plain"),
    "objects": (["run", "B", "--input", "objects.npz", "--out", "o.npz"], "objects.npz is not a"),
    "not-an-integer": (
        ["run", "B", "--input", "seq_len=--5", "--out", "o.npz"],
        "--5 does not",
    ),
    "twice": (
        ["run", "B", "--input", "query=q.npy", "--input", "query=q.npy", "--out", "o.npz"],
        "'query' is given twice",
    ),
    "missing-input": (["run", "B", "--input", "query=q.npy", "--out", "o.npz"], "'key'"),
    "no-folder": (
        ["run", "B", "--graph", "tables", "--input", "seq_len=3", "--out", "no/o.npz"],
        "no/o.npz can't be written",
    ),
    "no-graph": (["run", "B", "--graph", "x", "--input", "a=1", "--out", "o.npz"], "'x'"),
    "no-cuda": (
        ["run", "B", "--provider", "CUDAExecutionProvider", "--input", "a=1", "--out", "o.npz"],
        "CUDAExecutionProvider can't run here",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_line_and_exit_code_2(name, bundle, tmp_path, monkeypatch):
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("text.onnx").write_text("this is text")
    np.save("q.npy", np.zeros((1, 2, 1, 8), np.float32))
    np.savez("objects.npz", a=np.array([{}], dtype=object))
    Path("zip.npz").write_bytes(b"PK\x03\x04 and no more")
    before = sorted(os.listdir())
    result = call(*[bundle if a == "B" else a for a in arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(os.listdir()) == before


MODEL = ["export-model", "slow:make", "--quick"]  # the factory must not be called


TOO_LATE = {
    "export-opset": ([*EXPORT, "--opset", "26", "--out", "new"], "opset must be in [18, 25]"),
    "export-out": ([*EXPORT, "--out", "mine"], "mine exists and is not a bundle"),
    "export-bundle": ([*EXPORT, "--out", "B"], "B exists; force=True (--force) replaces it"),
    "export-folder": ([*EXPORT, "--out", "file/new"], "file/new can't be written: Not a directory"),
    "model-opset": ([*MODEL, "--opset", "17", "--out", "new"], "opset must be in [18, 25]"),
    "model-opset-dry": ([*MODEL, "--opset", "17", "--dry-run"], "opset must be in [18, 25]"),
    "model-out": ([*MODEL, "--out", "mine", "--force"], "mine exists and is not a bundle"),
    "model-bundle": ([*MODEL, "--out", "B"], "B exists; force=True"),
    "model-folder": ([*MODEL, "--out", "file/new"], "file/new can't be written"),
    "model-kept": ([*MODEL, "--out", "new", "--keep-failed", "mine"], "mine exists and is not"),
    "deploy-out": (["deploy", "node", "B", "--out", "mine"], "deploy did not write it"),
    "deploy-folder": (["deploy", "node", "B", "--out", "file/kit"], "file/kit can't be written"),
    "run-out": (["run", "B", "--input", "a=1", "--out", "file"], "file exists; force=True"),
    "run-folder": (["run", "B", "--input", "a=1", "--out", "no/o.npz"], "no/o.npz can't be"),
    "fuse-folder": (["fuse", "in.onnx", "no/o.onnx"], "no/o.onnx can't be written: No such file"),
    "fuse-out": (["fuse", "in.onnx", "file"], "file exists; force=True"),
}


@pytest.mark.parametrize("name", TOO_LATE)
def test_what_is_written_is_checked_before_anything_is_loaded(name, bundle, tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("loaded")

    arguments, message = TOO_LATE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("slow.py").write_text("raise SystemError('imported')\n")
    Path("file").touch()
    Path("mine").mkdir()
    Path("mine", "notes.txt").touch()
    shutil.copytree(bundle, "B")
    for module, attribute in (
        ("rotary_export.models.source", "load_source"),
        ("rotary_export.exporters.export", "check_config"),
        ("rotary_export.deploy.deploy", "check_files"),
        ("rotary_export.cli.arrays", "read_inputs"),
    ):
        monkeypatch.setattr(f"{module}.{attribute}", refuse)
    monkeypatch.setattr("rotary_export.cli.export._make_rope", refuse)
    before = sorted(tmp_path.rglob("*"))
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1  # no progress before it
    assert sorted(tmp_path.rglob("*")) == before


def test_mistake_in_json(tmp_path):
    result = call("verify", tmp_path, "--json")
    assert result.exit_code == 2
    assert "it has no manifest.json" in json.loads(result.stdout)["error"]


def test_missing_click_is_reported(tmp_path):
    blocker = "import sys; sys.modules['click'] = None\n"
    code = f"{blocker}from rotary_export.__main__ import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr == (
        "the command line needs click: pip install '.[cli]' in the checkout of rotary_export, "
        "or 'FILE.whl[cli]' with its wheel\n"
    )


@pytest.mark.parametrize("name", ["export", "RotaryEmbedding", "fuse"])
def test_missing_torch_is_reported(name):
    missing = "onnx" if name == "fuse" else "torch"
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom rotary_export import {name}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: rotary_export.{name} needs {missing}: pip install '.[export]' in "
        "the checkout of rotary_export, or 'FILE.whl[export]' with its wheel"
    )
