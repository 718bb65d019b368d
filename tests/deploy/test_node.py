"""The kit for Node.js: run as its page says, on the oldest and the newest onnxruntime-node."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import edit_manifest, make_arrays
from helpers.fuse_graphs import make_feeds
from helpers.javascript_kits import (
    BUNDLES,
    MODEL_SHAPES,
    NEWEST,
    OLDEST,
    SHAPES,
    check_pins,
    find_allowed,
    make_case,
    make_kit,
    name_shapes,
    run_node,
    save_case,
)
from helpers.target_runs import TargetRun, compare, get_fused_bundle, record, require

from rotary_export import load
from rotary_export.deploy.deploy import deploy

NAME = "node"


def run_kit(kit: Path, *words):
    return run_node(NAME, kit, "run.mjs", *words)


def run_case(kit: Path, inputs, expected, folder: Path, *flags: str):
    """Return the kit's outputs; its own comparison has passed."""
    save_case(folder, inputs, expected)
    out = folder / "out"
    words = ("--check", "--inputs", folder, "--out", out)
    done = run_node(NAME, kit, *flags, "run.mjs", *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count(": pass") == len(expected)
    return {file.stem: np.load(file) for file in out.iterdir()}


def run_cases(name, shapes, tolerance, dtype, folder: Path) -> tuple[float, bool]:
    """Compare with eager, in both versions; return the largest error and if all were exact."""
    (folder / NEWEST).mkdir(parents=True)
    (folder / OLDEST).mkdir()
    kit = make_kit(NAME, name, folder / NEWEST)
    runs = [(kit, shape) for shape in shapes]
    runs.append((make_kit(NAME, name, folder / OLDEST, "oldest"), shapes[1]))
    errors = []
    for number, (kit, shape) in enumerate(runs):
        inputs, expected = make_case(name, shape)
        got = run_case(kit, inputs, expected, folder / str(number))
        errors.append(compare(got, expected, find_allowed(tolerance, dtype)))
    return max(error for error, _ in errors), all(exact for _, exact in errors)


@pytest.mark.parametrize("dtype", BUNDLES)
def test_rotate_is_eager(dtype, tmp_path):
    results = [
        run_cases(name, SHAPES, tolerance, dtype, tmp_path / name)
        for name, tolerance in BUNDLES[dtype].items()
    ]
    record(
        TargetRun(
            "Node.js",
            f"onnxruntime-node {OLDEST}, {NEWEST}",
            "rotate",
            "ran",
            "portable",
            [dtype],
            name_shapes(SHAPES),
            max(error for error, _ in results),
            all(exact for _, exact in results),
            "registers no op library",
        )
    )


def test_float16_where_javascript_has_no_float16array(tmp_path):
    """As in Node.js 20 and 22."""
    inputs, expected = make_case("float16", (2, 5))
    kit = make_kit(NAME, "float16", tmp_path)
    got = run_case(kit, inputs, expected, tmp_path / "case", "--no-js-float16array")
    compare(got, expected, find_allowed("native-half", "float16"))


def test_model_is_eager(tmp_path):
    error, exact = run_cases("model", MODEL_SHAPES, "model", "float32", tmp_path / "model")
    record(
        TargetRun(
            "Node.js",
            f"onnxruntime-node {OLDEST}, {NEWEST}",
            "model",
            "ran",
            "portable",
            ["float32"],
            name_shapes(MODEL_SHAPES),
            error,
            exact,
            "llama, two layers",
        )
    )


def test_a_fused_bundle(tmp_path):
    kit = deploy(NAME, get_fused_bundle(), tmp_path / "kit")
    (kit / "node_modules").symlink_to(require(NAME) / "node_modules")
    inputs = make_feeds(3, 5)
    expected = load(get_fused_bundle())(**inputs)
    compare(
        run_case(kit, inputs, expected, tmp_path / "case"),
        expected,
        find_allowed("fused", "float32"),
    )


# ---- the page, and the module


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_kit(NAME, "plain", tmp_path_factory.mktemp("node"))


def test_page(plain):
    """Its commands, but for the installation, and its program."""
    page = (plain / "README.md").read_text(encoding="utf-8")
    install, *commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert install == "npm ci --ignore-scripts"
    for command in commands:
        done = run_node(NAME, plain, *command.removeprefix("node ").split())
        assert (done.returncode, done.stderr) == (0, "")
    shapes = run_kit(plain).stdout.splitlines()[1:]
    assert shapes == ["query_out float32 (2, 8, 7, 24)", "key_out float32 (2, 8, 7, 24)"]
    program = re.search(r"```js\n(.*?)```", page, re.DOTALL)[1]
    (plain / "program.mjs").write_text(program)
    done = run_node(NAME, plain, "program.mjs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[ 1, 8, 3, 24 ]\n"


def test_pins_are_what_is_installed(plain):
    check_pins(plain, "onnxruntime-node")


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
def test_npy_files_of_every_type(shape, plain, tmp_path):
    """Read and written again, they are numpy's own, byte by byte."""
    types = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "V2"]
    for code in types:
        items = np.random.default_rng(0).bytes(np.dtype(code).itemsize * int(np.prod(shape)))
        items = bytes(byte & 1 for byte in items) if code == "?" else items
        np.save(tmp_path / code, np.frombuffer(items, code).reshape(shape))
    program = f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        import {{ formatNpy, parseNpy }} from "./npy.mjs";
        for (const code of {types}) {{
          const file = "{tmp_path}/" + code;
          writeFileSync(file + ".js", formatNpy(parseNpy(readFileSync(file + ".npy"), code)));
        }}"""
    done = run_node(NAME, plain, "--input-type=module", "-e", program)
    assert done.returncode == 0, done.stderr
    for code in types:
        assert (tmp_path / f"{code}.js").read_bytes() == (tmp_path / f"{code}.npy").read_bytes()


# ---- what goes wrong


def check_refused(message: str, done, code: int = 1) -> None:
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 or code == 2
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("position_ids", np.array([[31, 32]]), "position_ids must be in [0, 32), got 32 at"),
        ("position_ids", np.array([[31, -1]]), "got -1 at batch 0, row 1"),
        ("position_ids", np.array([[1, 2]], np.int32), "position_ids must be int64, got int32"),
        ("position_ids", np.array([1, 2]), "must have shape (batch_size, seq_len), batch_size=1"),
        (
            "key",
            np.zeros((1, 2, 3, 24), np.float32),
            "seq_len=2, num_kv_heads=2, got (1, 2, 3, 24)",
        ),
        ("query", np.zeros((1, 2, 24), np.float32), "seq_len, 24), got (1, 2, 24)"),
        ("query", np.zeros((1, 4, 2, 24), np.float16), "query must be float32, got float16"),
        ("query", np.zeros((1, 4, 2, 24), np.complex64), "must contain numbers, little-endian"),
        ("query", np.zeros((1, 4, 2, 24), ">f4"), "must contain numbers, little-endian"),
        ("query", np.zeros((24, 2, 4, 1), np.float32).T, "must be in C order"),
    ],
)
def test_bad_arrays(name, array, message, plain, tmp_path):
    inputs = {**make_arrays("plain", batch=1, seq_len=2), name: array}
    save_case(tmp_path / "inputs", inputs, {})
    out = tmp_path / "out"
    check_refused(message, run_kit(plain, "--inputs", tmp_path / "inputs", "--out", out))
    assert not out.exists()


@pytest.mark.parametrize("size", [0, 9, 50, 200])
def test_cut_files(size, plain, tmp_path):
    inputs = Path(shutil.copytree(plain / "example", tmp_path / "inputs"))
    (inputs / "query.npy").write_bytes((inputs / "query.npy").read_bytes()[:size])
    check_refused(f"{inputs / 'query.npy'} ", run_kit(plain, "--inputs", inputs))


@pytest.mark.parametrize("worth", [1e-3, np.nan, np.inf])
def test_other_values_fail_the_check(worth, plain, tmp_path):
    inputs = Path(shutil.copytree(plain / "example", tmp_path / "inputs"))
    expected = np.load(inputs / "expected" / "key_out.npy")
    expected[1, 1, 5, 23] += worth
    np.save(inputs / "expected" / "key_out.npy", expected)
    done = run_kit(plain, "--check", "--inputs", inputs)
    assert done.returncode == 1
    _, query, key = done.stdout.splitlines()
    assert query.endswith(": pass")
    assert key.endswith(": FAIL")
    assert worth != 1e-3 or "max error 1.0e-3" in key
    np.save(inputs / "expected" / "key_out.npy", expected[:1])
    done = run_kit(plain, "--check", "--inputs", inputs)
    check_refused("key_out must be float32 (1, 8, 7, 24) as expected, got", done)


@pytest.fixture
def broken(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "kit", symlinks=True))


def test_missing_files(broken):
    (broken / "example" / "key.npy").unlink()
    check_refused("key.npy can't be read: ENOENT: no such file", run_kit(broken))
    (broken / "node_modules").unlink()
    check_refused("onnxruntime-node is not installed: npm ci", run_kit(broken))
    (broken / "node_modules").symlink_to("nowhere")
    shutil.rmtree(broken / "bundle")
    (broken / "kit.json").unlink()
    check_refused("onnxruntime-node is not installed: npm ci", run_kit(broken))


def test_damaged_bundles(broken):
    bundle = broken / "bundle"
    manifest = (bundle / "manifest.json").read_text()
    edit_manifest(bundle, minimum_onnxruntime={"fused": "1.23", "portable": "99.0"})
    check_refused(f"the bundle needs ONNX Runtime >= 99.0, got {NEWEST}", run_kit(broken))
    edit_manifest(bundle, format_version=2)
    check_refused("manifest.json must be of a rotary_export.bundle, version 1", run_kit(broken))
    (bundle / "manifest.json").write_text(manifest[:-20])
    check_refused("manifest.json is not valid JSON", run_kit(broken))
    (bundle / "manifest.json").write_text(manifest)
    edit_manifest(bundle, files=json.loads(manifest)["files"] | {"rotate.onnx_data": ""})
    check_refused("rotate.onnx_data can't be read: ENOENT", run_kit(broken))
    (bundle / "manifest.json").write_text(manifest)
    with (bundle / "rotate.onnx").open("ab") as file:
        file.write(b"\0")
    check_refused("rotate.onnx is not the file that was exported", run_kit(broken))
    (bundle / "rotate.onnx").unlink()
    check_refused("rotate.onnx can't be read: ENOENT", run_kit(broken))
    (bundle / "manifest.json").unlink()
    check_refused("manifest.json can't be read: ENOENT", run_kit(broken))


def test_bfloat16_has_no_tensors(tmp_path):
    check_refused("query is bfloat16, of which", run_kit(make_kit(NAME, "bfloat16", tmp_path)))


def test_wrong_usage(plain):
    check_refused("Unknown option '--chekc'", run_kit(plain, "--chekc"), 2)
    assert "usage: node run.mjs" in run_kit(plain, "--chekc").stderr
