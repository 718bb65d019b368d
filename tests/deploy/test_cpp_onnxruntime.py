"""The kit for C++ with ONNX Runtime: built as its page says, run on old and new runtimes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.bundles import edit_manifest, get_bundle, make_arrays, run_eager, to_numpy
from helpers.paths import KITS, ROOT
from helpers.target_runs import (
    TargetRun,
    compare,
    get_fused_bundle,
    get_model_allowed,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)

from rotary_export.deploy.deploy import deploy
from rotary_export.proof.tolerances import TOLERANCES

NAME = "cpp-onnxruntime"
NEWEST = "1.31.1"
OLDEST = {"fused": "1.23.2", "portable": "1.25.1"}  # of opset 23, of what setup_targets installs
OLDEST_18 = {"fused": "1.20.1", "portable": "1.23.2"}  # of opset 18
SHAPES = ((1, 1), (3, 7), (2, 32))  # batch_size, seq_len; none was traced
EPSILON = {name: float(ml_dtypes.finfo(name).eps) for name in ("float32", "float16", "bfloat16")}
# Bundle: type, tolerance without the op library, oldest runtimes. With the library all are exact.
BUNDLES = {
    "plain": ("float32", "native", OLDEST),
    "xpos": ("float32", "native-xpos", OLDEST),
    "opset18": ("float32", "exact", OLDEST_18),
    "float16": ("float16", "native-half", OLDEST),
    "bfloat16": ("bfloat16", "native-half", OLDEST),
}


def get_runtime(version: str) -> str:
    folder = require(NAME) / version / "onnxruntime" / "capi"
    return str(folder / f"libonnxruntime.so.{version}")


def follow_page(folder: Path) -> None:
    """Run the commands that the kit's page has for a kit; warnings are errors."""
    page = (folder / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```bash\n(.*?)```$", page, re.DOTALL | re.MULTILINE)
    fetch, *commands = commands.splitlines()
    (compare,) = re.findall(r"`(diff .*?)` finds no difference", page)
    # What the first one fetches from the network, fetched before.
    script, _, install = fetch.partition(" headers && ")
    assert (folder / script.removeprefix("bash ")).is_file()
    assert install.endswith(f" --target ort onnxruntime=={NEWEST}")
    (folder / "headers").symlink_to(ROOT / "build" / "ort_headers")
    (folder / "ort").symlink_to(require(NAME) / NEWEST)
    done = subprocess.run(
        ["bash", "-ec", "\n".join([*commands, compare])],
        cwd=folder,
        env=os.environ | {"CXXFLAGS": "-Werror", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """A kit of the plain bundle, built, and its example reproduced byte by byte, as on its page."""
    require(NAME)
    folder = deploy(NAME, get_bundle("plain").path, tmp_path_factory.mktemp("cpp") / "kit")
    follow_page(folder)
    return folder


def call(
    kit: Path,
    mode: str,
    inputs: Path,
    out: Path,
    *,
    path: str = "fused",
    version: str = NEWEST,
    graph: Path | None = None,
    **changed: Path,
) -> subprocess.CompletedProcess[str]:
    """Run the program; `changed` replaces its runtime or library."""
    graph = graph or kit / "bundle" / "rotate.onnx"
    words = [changed.get("runtime", get_runtime(version)), graph, inputs, out]
    if path == "fused":
        words.append(changed.get("library", kit / "build" / "librotary_export.so"))
    command = list(map(str, (kit / "build" / "rotary_run", mode, *words)))
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def load(folder: Path) -> dict[str, np.ndarray]:
    arrays = {file.stem: np.load(file) for file in folder.iterdir()}
    return {k: v.view(ml_dtypes.bfloat16) if v.dtype.kind == "V" else v for k, v in arrays.items()}


def run(kit: Path, mode: str, folder: Path, arrays: dict[str, np.ndarray], **options):
    """Return the program's outputs."""
    folder.mkdir()
    inputs, out = save(folder / "inputs", arrays), folder / "outputs"
    done = call(kit, mode, inputs, out, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return load(out)


@pytest.mark.parametrize("path", ["fused", "portable"])
def test_a_fused_bundle(path, kit, tmp_path):
    other = deploy(NAME, get_fused_bundle(), tmp_path / "kit")
    graph, out = other / "bundle" / "model.onnx", tmp_path / "out"
    done = call(kit, "run", other / "example", out, path=path, graph=graph)
    assert (done.returncode, done.stderr) == (0, "")
    allowed = 0 if path == "fused" else TOLERANCES["fused"].max_ulp * EPSILON["float32"]
    compare(load(out), load(other / "example" / "expected"), allowed)


# ---- rotate


@pytest.mark.parametrize("path", ["fused", "portable"])
@pytest.mark.parametrize("name", BUNDLES)
def test_rotate_is_eager(name, path, kit, tmp_path):
    """At shapes not traced. The rows of a decode loop are those of one run, to the bit."""
    bundle = get_bundle(name).path
    dtype, tolerance, oldest = BUNDLES[name]
    allowed = 0.0
    if path == "portable":
        allowed = TOLERANCES[tolerance].max_ulp * EPSILON[dtype]
    errors, exact = [], True
    for version, shape in [*((NEWEST, shape) for shape in SHAPES), (oldest[path], SHAPES[1])]:
        arrays = make_arrays(name, batch=shape[0], seq_len=shape[1])
        wanted = {k: to_numpy(v) for k, v in run_eager(name, arrays).items()}
        folder = tmp_path / f"{len(errors)}"
        folder.mkdir()
        options = {"path": path, "version": version, "graph": bundle / "rotate.onnx"}
        got = run(kit, "run", folder / "run", arrays, **options)
        compare(run(kit, "decode", folder / "decode", arrays, **options), got, 0)
        error, same = compare(got, wanted, allowed)
        errors.append(error)
        exact &= same
    if name in ("plain", "float16", "bfloat16"):  # a row for each type
        record(
            TargetRun(
                "C++, ONNX Runtime",
                f"{oldest[path]}, {NEWEST}",
                "rotate",
                "ran",
                path,
                [dtype],
                [f"{b}x{s}" for b, s in SHAPES],
                max(errors),
                exact,
                "a decode loop returns the same bits",
            )
        )


# ---- a whole model


@pytest.mark.parametrize("path", ["fused", "portable"])
def test_model_is_eager(path, kit, tmp_path):
    bundle = get_model_bundle().path
    allowed = get_model_allowed()
    worst = 0.0
    shapes = [(1, 1), (3, 9)]
    for batch_size, seq_len in shapes:
        arrays = make_model_arrays(batch_size, seq_len)
        wanted = run_model_eager(arrays)
        for version in (NEWEST, OLDEST[path]):
            folder = tmp_path / f"{batch_size}x{seq_len}-{version}"
            options = {"path": path, "version": version, "graph": bundle / "model.onnx"}
            error, _ = compare(run(kit, "run", folder, arrays, **options), wanted, allowed)
            worst = max(worst, error)
    record(
        TargetRun(
            "C++, ONNX Runtime",
            f"{OLDEST[path]}, {NEWEST}",
            "model",
            "ran",
            path,
            ["float32"],
            [f"{b}x{s}" for b, s in shapes],
            worst,
            note="llama, two layers",
        )
    )


def test_model_kit(kit, tmp_path):
    """What deploy writes for a model runs with what was built for another bundle."""
    folder = deploy(NAME, get_model_bundle().path, tmp_path / "kit")
    out = tmp_path / "out"
    done = call(kit, "run", folder / "example", out, graph=folder / "bundle" / "model.onnx")
    assert done.returncode == 0, done.stderr
    allowed = get_model_allowed()
    compare(load(out), load(folder / "example" / "expected"), allowed)


# ---- what goes wrong


def check_refused(message: str, done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "array", "mode", "message"),
    [
        ("position_ids", np.array([[31, 32]]), "run", "[0, 32), got 32 at batch 0, row 1"),
        ("position_ids", np.array([[31, -1]]), "decode", "[0, 32), got -1 at batch 0, row 1"),
        ("position_ids", np.array([[31.0, 0.0]]), "run", "position_ids must be int64"),
        ("position_ids", np.array([[1]]), "run", "position_ids must have shape"),
        ("position_ids", np.array([[1]]), "decode", "must have tokens, as many as query"),
        ("key", np.zeros((1, 2, 2, 20), np.float32), "run", "key for the following indices"),
        ("key", np.zeros((1, 2, 0, 24), np.float32), "decode", "must have tokens, as many as"),
        ("query", np.zeros((1, 2, 24), np.float32), "run", "Invalid rank for input: query"),
        ("query", np.zeros((1, 2, 24), np.float32), "decode", "query must have tokens"),
        ("query", np.zeros((1, 4, 2, 24), np.float16), "run", "expected: (tensor(float))"),
        ("query", np.zeros((1, 4, 2, 24), np.int32), "run", "must hold float16, bfloat16"),
        ("query", np.zeros((4, 2, 24, 1), np.float32).T, "run", "must be in C order"),
    ],
)
def test_bad_arrays(name, array, mode, message, kit, tmp_path):
    arrays = make_arrays("plain", batch=1, seq_len=2) | {name: array}
    out = tmp_path / "out"
    done = call(kit, mode, save(tmp_path / "inputs", arrays), out)
    check_refused(message, done, out)
    assert len(done.stderr.splitlines()) <= 3  # as many as ONNX Runtime's own messages have


@pytest.mark.parametrize("bad", [-1, 32, 10**6, 2**40, -(2**63)])
@pytest.mark.parametrize("mode", ["run", "decode"])
def test_bad_ids_without_the_library(bad, mode, kit, tmp_path):
    """In the words of the other kits; the second of two batch entries, the last of three rows."""
    ids = np.array([[0, 1, 31], [2, 0, bad]])
    arrays = make_arrays("plain", batch=2, seq_len=3) | {"position_ids": ids}
    out = tmp_path / "out"
    done = call(kit, mode, save(tmp_path / "inputs", arrays), out, path="portable")
    check_refused(f"position_ids must be in [0, 32), got {bad} at batch 1, row 2", done, out)


@pytest.mark.parametrize("limits", [{"max_size": {"seq_len": 2}}, {"min_size": {"seq_len": 4}}])
def test_sizes_that_the_manifest_limits(limits, kit, tmp_path):
    bundle, out = Path(shutil.copytree(kit / "bundle", tmp_path / "bundle")), tmp_path / "out"
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["rotate"] |= limits
    edit_manifest(bundle, graphs=graphs)
    inputs = save(tmp_path / "inputs", make_arrays("plain", batch=1, seq_len=3))
    sign = {"max_size": "<= 2", "min_size": ">= 4"}[next(iter(limits))]
    done = call(kit, "run", inputs, out, graph=bundle / "rotate.onnx")
    check_refused(f"seq_len must be {sign}, got 3", done, out)


def test_damaged_manifests(kit, tmp_path):
    bundle, out = Path(shutil.copytree(kit / "bundle", tmp_path / "bundle")), tmp_path / "out"
    text = (bundle / "manifest.json").read_text()
    for message, damaged in {
        "manifest.json must be JSON, got ": text[:-20],
        "manifest.json must be JSON, got [[": "[" * 100_000,
        "manifest.json must have graphs": "{}",
        "must describe rotate.onnx": text.replace("rotate.onnx", "other.onnx"),
        "must describe the input query": text.replace('"query"', '"other"'),
        "manifest.json must have minimum_onnxruntime": text.replace('"minimum_', '"other_'),
        "needs ONNX Runtime >= new, got": text.replace('"fused": "1.23"', '"fused": "new"'),
    }.items():
        (bundle / "manifest.json").write_text(damaged)
        done = call(kit, "run", kit / "example", out, graph=bundle / "rotate.onnx")
        check_refused(message, done, out)


def test_names_in_a_manifest_are_text_of_any_alphabet(kit, tmp_path):
    bundle, out = Path(shutil.copytree(kit / "bundle", tmp_path / "bundle")), tmp_path / "out"
    (bundle / "rotate.onnx").rename(bundle / "dreh\u00fcng \u56de.onnx")
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace("rotate.onnx", "dreh\\u00fcng \\u56de.onnx"))
    done = call(kit, "run", kit / "example", out, graph=bundle / "dreh\u00fcng \u56de.onnx")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [0, 9, 50, 200])
def test_cut_files(size, kit, tmp_path):
    inputs, out = Path(shutil.copytree(kit / "example", tmp_path / "inputs")), tmp_path / "out"
    (inputs / "query.npy").write_bytes((inputs / "query.npy").read_bytes()[:size])
    check_refused(f"{inputs / 'query.npy'} ", call(kit, "run", inputs, out), out)


def test_missing_files(kit, tmp_path):
    example, out, none = kit / "example", tmp_path / "out", tmp_path / "none"
    library = kit / "build" / "librotary_export.so"
    for message, changed in {
        "RUNTIME: ": {"runtime": none},
        "is not ONNX Runtime": {"runtime": library},
        "Failed to load library": {"library": none},
        f"{tmp_path}/manifest.json can't be opened": {"graph": none},
    }.items():
        check_refused(message, call(kit, "run", example, out, **changed), out)
    check_refused("query.npy can't be opened", call(kit, "run", none, out), out)
    check_refused("usage: rotary_run", call(kit, "walk", example, out), out)


def test_a_model_without_a_cache_is_not_decoded(kit, tmp_path):
    inputs, out = save(tmp_path / "inputs", make_model_arrays(1, 2)), tmp_path / "out"
    graph = get_model_bundle().path / "model.onnx"
    check_refused(
        "decode accepts rotate, not a graph of input_ids",
        call(kit, "decode", inputs, out, graph=graph),
        out,
    )


@pytest.mark.parametrize(
    ("path", "version", "minimum"),
    [("portable", "1.24.4", "1.25"), ("portable", "1.23.2", "1.25"), ("fused", "1.20.1", "1.23")],
)
def test_a_runtime_older_than_the_bundle_needs(path, version, minimum, kit, tmp_path):
    """1.24 has the function body's op, but reads outside the tables at a bad position."""
    out = tmp_path / "out"
    done = call(kit, "run", kit / "example", out, path=path, version=version)
    check_refused(f"the bundle needs ONNX Runtime >= {minimum}, got {version}", done, out)


def test_the_page_for_a_clone_names_what_is_there():
    """Its three commands need the network; what they run is in the repository."""
    page = (KITS / NAME / "README.md").read_text(encoding="utf-8")
    commands = page.split("```bash\n")[1].split("```")[0]
    for word in re.findall(r"\b(?:tools|exported)/[\w./-]+", commands):
        assert (ROOT / word).exists(), word


def test_the_program_is_small():
    assert len((KITS / NAME / "main.cc").read_text().splitlines()) <= 120
