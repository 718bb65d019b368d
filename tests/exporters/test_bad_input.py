"""Every mistake gives one clear error that names it, and nothing is written, changed or lost.

Here: arguments of the modules, of `export` and of `load`, and bundles; test_bad_session.py has what
sessions are called with.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.bundles import (
    check_refused,
    copy_bundle,
    edit_manifest,
    get_bundle,
    update_hash,
)

from rotary_export import RotaryEmbedding, RotaryQueryKey, apply_rotary_emb, export, load
from rotary_export.op import library as op_library

NAN, INF = float("nan"), float("inf")
ROPE = RotaryEmbedding(8, max_seq_len=16)
XPOS = RotaryEmbedding(8, use_xpos=True)


# ---- modules

MODULES = {
    "dim odd": (lambda: RotaryEmbedding(7), "dim must be an even int >= 4, got 7"),
    "dim 2": (lambda: RotaryEmbedding(2), "dim must be an even int >= 4, got 2"),
    "dim 0": (lambda: RotaryEmbedding(0), "dim must be an even int >= 4, got 0"),
    "dim float": (lambda: RotaryEmbedding(8.0), "dim must be an even int >= 4, got 8.0"),
    "dim str": (lambda: RotaryEmbedding("8"), "dim must be an even int >= 4, got '8'"),
    "dim bool": (lambda: RotaryEmbedding(True), "dim must be an even int >= 4, got True"),
    "factor": (
        lambda: RotaryEmbedding(8, interpolation_factor=0.5),
        "interpolation_factor must be >= 1 and finite, got 0.5",
    ),
    "factor nan": (
        lambda: RotaryEmbedding(8, interpolation_factor=NAN),
        "interpolation_factor must be >= 1 and finite, got nan",
    ),
    "scale_base": (
        lambda: RotaryEmbedding(8, scale_base=0),
        "scale_base must be > 0 and finite, got 0",
    ),
    "max_seq_len": (
        lambda: RotaryEmbedding(8, max_seq_len=0),
        "max_seq_len must be an int >= 1, got 0",
    ),
    "max_seq_len bool": (
        lambda: RotaryEmbedding(8, max_seq_len=True),
        "max_seq_len must be an int >= 1, got True",
    ),
    "max_seq_len huge": (
        lambda: RotaryEmbedding(8, max_seq_len=10**20),
        "max_seq_len must be <= 16777216, past which float32 positions are not exact, got 1000",
    ),
    "use_xpos": (lambda: RotaryEmbedding(8, "no"), "use_xpos must be True or False, got 'no'"),
    "base str": (lambda: RotaryEmbedding(8, base="x"), "base must be > 0 and finite, got 'x'"),
    "base rescaled": (
        lambda: RotaryEmbedding(4, base_rescale_factor=1e200),
        "base * base_rescale_factor ** (dim / (dim - 2)) must be finite, got base=10000, base_res",
    ),
    "rope": (lambda: RotaryQueryKey("x"), "rope must be a rotary_export.RotaryEmbedding, got str"),
    "x 1-D": (
        lambda: apply_rotary_emb(torch.zeros(8), torch.zeros(1, 8)),
        "x must be floating and have 2 dimensions or more, as must freqs, got x float32 of shape",
    ),
    "x int": (
        lambda: apply_rotary_emb(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8)),
        "x must be floating and have 2 dimensions or more, as must freqs, got x int64 of shape",
    ),
    "seq_len negative": (lambda: ROPE(-1), "seq_len must be >= 0 and <= max_seq_len = 16, got -1"),
    "seq_len long": (lambda: ROPE(17), "seq_len must be >= 0 and <= max_seq_len = 16, got 17"),
    "seq_len float": (lambda: ROPE(3.0), "seq_len must be an int or an int64 tensor, got 3.0"),
    "seq_len bool": (lambda: ROPE(True), "seq_len must be an int or an int64 tensor, got True"),
    "seq_len float tensor": (
        lambda: ROPE(torch.tensor(3.0)),
        "seq_len must be an int or an int64 tensor of shape (), got float32 of shape ()",
    ),
}


@pytest.mark.parametrize("mistake", MODULES)
def test_modules(mistake, tmp_path):
    act, message = MODULES[mistake]
    check_refused(message, act, tmp_path)


# ---- export

FORMATS = "onnx, torchscript, program, aoti"
DTYPES = "float32, float16, bfloat16, float64"
# module, arguments, message
EXPORTS = {
    "class": (torch.nn.Linear(2, 2), {}, "module must be a rotary_export.RotaryEmbedding or"),
    "no max_seq_len": (RotaryEmbedding(8), {}, "max_seq_len must be given to export or to the"),
    "max_seq_len 0": (ROPE, {"max_seq_len": 0}, "max_seq_len must be an int >= 1, got 0"),
    "max_seq_len float": (ROPE, {"max_seq_len": 2.5}, "max_seq_len must be an int >= 1, got 2.5"),
    "max_seq_len bool": (ROPE, {"max_seq_len": True}, "max_seq_len must be an int >= 1, got True"),
    "head_dim": (
        ROPE,
        {"head_dim": 6},
        "rotary_dim must be even and <= head_dim, got rotary_dim=8, head_dim=6",
    ),
    "head_dim float": (ROPE, {"head_dim": 9.5}, "head_dim must be an int, got 9.5"),
    "num_heads": (ROPE, {"num_heads": -1}, "num_heads must be >= 1, got -1"),
    "num_heads str": (ROPE, {"num_heads": "4"}, "num_heads must be an int, got '4'"),
    "num_kv_heads": (ROPE, {"num_kv_heads": 0}, "num_kv_heads must be >= 1, got 0"),
    "head counts": (
        ROPE,
        {"num_heads": 4, "num_kv_heads": 3},
        "num_heads must be a multiple of num_kv_heads, got num_heads=4, num_kv_heads=3",
    ),
    "static": (
        ROPE,
        {"static": True, "num_heads": 2},
        "a static export needs batch_size and num_heads, got batch_size=None, num_heads=2",
    ),
    "batch_size": (ROPE, {"batch_size": 2}, "batch_size is for static=True"),
    "interleaved": (ROPE, {"interleaved": "no"}, "interleaved must be True or False, got 'no'"),
    "formats": (ROPE, {"formats": ("onnx", "tf")}, f"formats must be of {FORMATS}, got 'tf'"),
    "formats str": (ROPE, {"formats": "onnx"}, f"formats must be a list, of {FORMATS}, got 'onnx'"),
    "formats None": (ROPE, {"formats": None}, f"formats must be a list, of {FORMATS}, got None"),
    "no formats": (ROPE, {"formats": ()}, "formats must name at least one format, got none"),
    "opset 17": (ROPE, {"opset": 17}, "opset must be in [18, 25], got 17"),
    "opset 26": (ROPE, {"opset": 26}, "opset must be in [18, 25], got 26"),
    "opset str": (ROPE, {"opset": "23"}, "opset must be in [18, 25], got '23'"),
    "dtype int": (ROPE, {"dtype": torch.int64}, f"dtype must be one of {DTYPES}, got torch.int64"),
    "dtype str": (ROPE, {"dtype": "float32"}, f"dtype must be one of {DTYPES}, got float32"),
    "a subclass": (
        type("Mine", (RotaryEmbedding,), {"__module__": "theirs"})(8, max_seq_len=16),
        {},
        "or the RotaryEmbedding of zeta or x-transformers, got theirs.Mine",
    ),
    "float64": (
        RotaryEmbedding(8, max_seq_len=16).double(),
        {},
        "module must be float32, got tor",
    ),
    "xPos range": (
        XPOS,
        {"max_seq_len": 80000},
        "range of float32 at max_seq_len=80000; the longest that fits is 72521",
    ),
    "xPos range, half": (
        XPOS,
        {"max_seq_len": 20000, "dtype": torch.float16},
        "range of float16 at max_seq_len=20000; the longest that fits is 9065",
    ),
}


@pytest.mark.parametrize("mistake", EXPORTS)
def test_export(mistake, tmp_path):
    module, arguments, message = EXPORTS[mistake]
    check_refused(message, lambda: export(module, tmp_path / "new" / "b", **arguments), tmp_path)


@pytest.mark.parametrize("out", [None, 3, ["demo"]])
def test_out_is_no_path(out, tmp_path):
    check_refused(f"out must be a path, got {out!r}", lambda: export(ROPE, out), tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_export_leaves_what_is_in_the_way(tmp_path, force):
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("theirs")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    bundle = copy_bundle("plain", tmp_path)
    (bundle / "notes.txt").write_text("theirs")
    wanted = {
        "file": "file exists and is not a bundle; it is left as it is",
        "folder": "folder exists and is not a bundle; it is left as it is",
        "extension": "extension exists and is not a bundle; it is left as it is",
        "plain": "contains 'notes.txt', which is not of the bundle and would be lost"
        if force
        else "plain exists; force=True (--force) replaces it",
        "file/under": "file/under can't be written: Not a directory",
        "x" * 300: "can't be written: File name too long",
    }
    for name, message in wanted.items():
        check_refused(message, lambda n=name: export(ROPE, tmp_path / n, force=force), tmp_path)


# ---- load


def edit_graph(bundle, graph="rotate", **changes):
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs[graph] |= changes
    edit_manifest(bundle, graphs=graphs)


def name_file(bundle, name):
    edit_graph(bundle, files={"onnx": name})
    edit_manifest(bundle, files={name: "0" * 64})


def write(bundle, file, data, *, hashed=False):
    (bundle / file).write_bytes(data)
    if hashed:
        update_hash(bundle, file)


def swap_files(bundle):
    (bundle / "rotate.onnx").rename(bundle / "x")
    (bundle / "tables.onnx").rename(bundle / "rotate.onnx")
    (bundle / "x").rename(bundle / "tables.onnx")


def truncate(bundle):
    write(bundle, "rotate.onnx", (bundle / "rotate.onnx").read_bytes()[:-1])


NEW_OP = {"domain": "rotary_export", "name": "RotaryEmbedding", "version": 2}
OUTSIDE = "manifest.json names a file outside the bundle: "
NOT_OURS = "is not the file that was exported: its sha256 differs"
# what is done to a bundle, arguments of load, message
BUNDLES = {
    "no folder": (shutil.rmtree, {}, "is not a bundle: it has no manifest.json"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), {}, "it has no manifest.json"),
    "not JSON": (lambda b: write(b, "manifest.json", b"{"), {}, "manifest.json is not valid JSON"),
    "not UTF-8": (lambda b: write(b, "manifest.json", b"\xff"), {}, "is not valid JSON"),
    "a list": (
        lambda b: write(b, "manifest.json", b"[]"),
        {},
        "is not a rotary_export.bundle manifest",
    ),
    "other format": (
        lambda b: edit_manifest(b, format="x"),
        {},
        "is not a rotary_export.bundle manifest",
    ),
    "newer format": (
        lambda b: edit_manifest(b, format_version=2),
        {},
        "has format_version 2; this rotary_export reads up to 1",
    ),
    "newer op": (lambda b: edit_manifest(b, op=NEW_OP), {}, "has op version 2; this rotary_export"),
    "no op": (lambda b: edit_manifest(b, op=None), {}, "is damaged: it has no 'op'"),
    "no files": (lambda b: edit_manifest(b, files=None), {}, "is damaged: it has no 'files'"),
    "graphs list": (
        lambda b: edit_manifest(b, graphs=[1]),
        {},
        "is damaged: graphs must be an object, got [1]",
    ),
    "no limits": (
        lambda b: edit_graph(b, inputs=[{"name": "x", "dtype": "int8", "shape": [], "limits": []}]),
        {},
        "is damaged: the limits of x must be two, got []",
    ),
    "other graph's file": (
        lambda b: edit_graph(b, files={"onnx": "tables.onnx"}),
        {},
        "tables.onnx has the inputs seq_len, the manifest has others for rotate",
    ),
    "no minimum": (
        lambda b: edit_manifest(b, minimum_onnxruntime={"fused": "1.23"}),
        {},
        "is damaged: minimum_onnxruntime has no 'portable'",
    ),
    "unknown format": (
        lambda b: edit_graph(b, files={"tf": "x"}),
        {},
        f"is damaged: files must be by format, of {FORMATS}, got",
    ),
    "parent": (lambda b: name_file(b, "../x"), {}, f"{OUTSIDE}'../x'"),
    "absolute": (lambda b: name_file(b, "/etc/passwd"), {}, f"{OUTSIDE}'/etc/passwd'"),
    "below": (lambda b: name_file(b, "a/rotate.onnx"), {}, f"{OUTSIDE}'a/rotate.onnx'"),
    "dots": (lambda b: name_file(b, ".."), {}, f"{OUTSIDE}'..'"),
    "no hash": (lambda b: edit_manifest(b, files={}), {}, "manifest.json has no sha256 of "),
    "missing": (lambda b: (b / "rotate.onnx").unlink(), {}, "rotate.onnx is missing from the"),
    "truncated": (truncate, {}, NOT_OURS),
    "swapped": (swap_files, {}, NOT_OURS),
    "emptied": (lambda b: write(b, "rotate.onnx", b""), {}, NOT_OURS),
    "missing pt": (
        lambda b: (b / "rotate.pt").unlink(),
        {"runtime": "torchscript", "allow_code": True},
        "rotate.pt is missing from the bundle",
    ),
    "changed pt2": (
        lambda b: write(b, "rotate.pt2", b"PK"),
        {"runtime": "program", "allow_code": True},
        f"rotate.pt2 in {{bundle}} {NOT_OURS}",
    ),
    "not ONNX": (
        lambda b: write(b, "rotate.onnx", b"garbage", hashed=True),
        {},
        "ONNX Runtime can't load rotate.onnx: ",
    ),
    "not TorchScript": (
        lambda b: write(b, "rotate.pt", b"garbage", hashed=True),
        {"runtime": "torchscript", "allow_code": True},
        "can't load rotate.pt: ",
    ),
    "not a program": (
        lambda b: write(b, "rotate.pt2", b"garbage", hashed=True),
        {"runtime": "program", "allow_code": True},
        "can't load rotate.pt2: ",
    ),
    "graph": (None, {"graph": "model"}, "has no graph 'model'; it has tables, rotate"),
    "graphs": (None, {"graph": ["rotate"]}, "has no graph ['rotate']; it has tables, rotate"),
    "runtime": (
        None,
        {"runtime": "tf"},
        "runtime must be one of onnxruntime, torchscript, program, aoti",
    ),
    "format": (
        lambda b: edit_graph(b, files={"onnx": "rotate.onnx"}),
        {"runtime": "program", "allow_code": True},
        "runtime 'program' needs rotate.pt2, but the bundle was exported with formats onnx",
    ),
    "provider": (None, {"providers": ["X"]}, "X is not in this ONNX Runtime; it has "),
    "providers": (
        None,
        {"runtime": "program", "allow_code": True, "providers": ["CPUExecutionProvider"]},
        "providers are ONNX Runtime's; 'program' has none",
    ),
    "use_op_library": (None, {"use_op_library": "x"}, "use_op_library must be 'auto', True or"),
    "library for torch": (
        None,
        {"runtime": "torchscript", "allow_code": True, "use_op_library": True},
        "use_op_library=True: the op library is for ONNX Runtime, not 'torchscript'",
    ),
}


@pytest.mark.parametrize("mistake", BUNDLES)
def test_load(mistake, tmp_path):
    change, arguments, message = BUNDLES[mistake]
    bundle = copy_bundle("plain", tmp_path)
    if change is not None:
        change(bundle)
    message = message.replace("{bundle}", str(bundle))
    check_refused(message, lambda: load(bundle, **arguments), tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"use_op_library": True}, {"require_fused": True}])
def test_an_op_library_that_does_not_load(monkeypatch, tmp_path, arguments):
    path = tmp_path / op_library.LIBRARY_NAME
    path.write_bytes(b"\x7fELF garbage")
    monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
    message = f"{path} must be a loadable op library, got: "
    check_refused(message, lambda: load(get_bundle("plain"), **arguments), tmp_path)
