"""OpenVINO and tract: kits, inlined graphs and every form of node, against eager PyTorch."""

import functools

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers.bundles import get_bundle, make_arrays, make_folder, run_eager, to_numpy
from helpers.fuse_graphs import make_feeds
from helpers.inline_runs import (
    OPENVINO,
    TRACT,
    check_bad_input,
    run_cases,
    run_forms,
    run_python,
)
from helpers.target_runs import (
    compare,
    get_fused_bundle,
    get_model,
    get_model_bundle,
    make_model_arrays,
    run_model_eager,
)
from helpers.tiny_models import make_inputs

import rotary_export
from rotary_export.bundle.manifest import check_files, read_manifest
from rotary_export.deploy.deploy import deploy
from rotary_export.op.spec import OP_TYPE
from rotary_export.proof.tolerances import TOLERANCES

MODEL_SHAPES = ((3, 7), (2, 1), (1, 33))
ROTATE = [(runtime, dtype) for runtime in (OPENVINO, TRACT) for dtype in runtime.rotate]


@pytest.fixture(params=[OPENVINO, TRACT], ids=lambda runtime: runtime.name)
def runtime(request):
    return request.param


@functools.cache
def get_old_model():
    """Return the model's bundle at opset 18, its weights in a file of their own."""
    model = get_model()
    return rotary_export.export_model(
        model,
        make_inputs(model),
        make_folder() / "llama18",
        opset=18,
        formats=("onnx", "torchscript"),
        max_inline_bytes=0,
    )


def find_allowed(tolerance, dtype):
    """Return a tolerance relative to the largest magnitude of an output."""
    return TOLERANCES[tolerance].max_ulp * float(ml_dtypes.finfo(dtype).eps)


def compare_cases(outputs, wants, allowed):
    """Assert shapes, and values within `allowed` of eager; return the largest difference."""
    worst = 0.0
    for got, want in zip(outputs, wants, strict=True):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        if all(value.size for value in want.values()):
            worst = max(worst, compare(got, want, allowed)[0])
    return worst


@pytest.mark.parametrize(("runtime", "dtype"), ROTATE, ids=[f"{r.name}-{d}" for r, d in ROTATE])
def test_rotate(runtime, dtype, tmp_path):
    worst, counts = 0.0, {}
    for name, (ropes, tolerance) in runtime.rotate[dtype].items():
        kit = deploy(runtime.name, get_bundle(name), tmp_path / name)
        cases = [make_arrays(name, batch=b, seq_len=length) for b, length in runtime.shapes]
        saved = [
            {k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in case.items()}
            for case in cases
        ]
        outputs, counts[name] = run_cases(runtime.environment, kit, saved)
        assert counts[name] == ropes
        if dtype == "bfloat16":
            outputs = [{k: v.view(ml_dtypes.bfloat16) for k, v in o.items()} for o in outputs]
        wants = [{k: to_numpy(v) for k, v in run_eager(name, case).items()} for case in cases]
        worst = max(worst, compare_cases(outputs, wants, find_allowed(tolerance, dtype)))
    if runtime is TRACT:
        runtime.record("rotate", dtype, cases, worst, exact=True, note="primitives of opset 18")
        return
    # No row is exact: OpenVINO may use FMA, so what is equal here need not be elsewhere.
    found = [f"{n} ({name})" if len(counts) > 1 else str(n) for name, n in counts.items()]
    note = f"RoPE ops in the compiled model: {', '.join(found)}"
    runtime.record("rotate", dtype, cases, worst, exact=False, note=note)


@pytest.mark.parametrize(
    ("runtime", "make_bundle", "ropes", "note"),
    [
        # Query and key of two layers, and the row that computes the tables.
        (
            OPENVINO,
            get_model_bundle,
            5,
            "RoPE ops in the compiled model: 4, and 1 that computes the tables",
        ),
        (TRACT, get_old_model, 0, "primitives of opset 18; one plan per shape"),
    ],
    ids=["openvino", "tract"],
)
def test_model(runtime, make_bundle, ropes, note, tmp_path):
    kit = deploy(runtime.name, make_bundle(), tmp_path / "kit")
    cases = [make_model_arrays(batch, length) for batch, length in MODEL_SHAPES]
    outputs, count = run_cases(runtime.environment, kit, cases)
    assert count == ropes
    wants = [run_model_eager(case) for case in cases]
    worst = compare_cases(outputs, wants, find_allowed("model", "float32"))
    runtime.record("model", "float32", cases, worst, exact=False, note=note)


def test_every_form_of_node(runtime, tmp_path):
    for case, got, want, count in run_forms(runtime, tmp_path):
        if runtime is TRACT:
            compare(got, want, 0)
            continue
        compare(got, want, find_allowed("native-xpos" if case.scaled else "native", "float32"))
        is_fused = case.interleaved or not case.rotary_dim
        assert count == (len(want) if is_fused else 0), case.id


ROTARY_NODES = {OPENVINO.name: 2, TRACT.name: 0}  # of ai.onnx, in the inlined graph
FIRST_LINE = {OPENVINO.name: "0 operations are its own RoPE\n", TRACT.name: "tract 0."}


def test_the_page(runtime, tmp_path):
    kit = deploy(runtime.name, get_bundle("plain"), tmp_path / "kit")
    model = onnx.load(kit / "rotate.inlined.onnx")
    assert not model.functions
    assert [o.version for o in model.opset_import if not o.domain] == [runtime.opset]
    assert {node.domain for node in model.graph.node} == {""}
    operations = [node.op_type for node in model.graph.node]
    assert operations.count(OP_TYPE) == ROTARY_NODES[runtime.name]
    assert runtime is not OPENVINO or len(operations) == 2
    done = run_python(runtime.environment, kit, "run.py")
    assert done.returncode == 0, done.stderr
    assert FIRST_LINE[runtime.name] in done.stdout
    assert "query_out (2, 8, 7, 24): largest difference from ONNX Runtime " in done.stdout
    assert runtime is not TRACT or "from ONNX Runtime 0\n" in done.stdout
    wrong = np.load(kit / "example" / "expected" / "key_out.npy")
    wrong[1, 2, 3, 4] += 1
    np.save(kit / "example" / "expected" / "key_out.npy", wrong)
    done = run_python(runtime.environment, kit, "run.py")
    assert (done.returncode, done.stderr) == (
        1,
        "key_out differs from what ONNX Runtime computed\n",
    )


def test_a_fused_bundle(runtime, tmp_path):
    kit = deploy(runtime.name, get_fused_bundle(), tmp_path / "kit")
    done = run_python(runtime.environment, kit, "run.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": largest difference from ONNX Runtime ") == 2
    case = make_feeds(3, 5)
    (got,), _ = run_cases(runtime.environment, kit, [case])
    compare(got, rotary_export.load(get_fused_bundle())(**case), find_allowed("fused", "float32"))


def test_bad_input(runtime, tmp_path):
    kit = deploy(runtime.name, get_bundle("plain"), tmp_path / "kit")
    check_bad_input(runtime.environment, kit, make_arrays("plain"))


def test_external_weights_are_not_copied(tmp_path):
    kit = deploy("tract", get_old_model(), tmp_path / "kit")
    assert (kit / "bundle" / "model.onnx_data").is_file()
    assert (kit / "model.inlined.onnx").stat().st_size < 100_000


def test_weights_are_in_the_kit_once(runtime, tmp_path, monkeypatch):
    """Those of a bundle's own file are moved to one that both graphs share."""
    monkeypatch.setattr("rotary_export.deploy.inline.MAX_INLINE_BYTES", 2**10)
    model = get_model()
    bundle = rotary_export.export_model(
        model, make_inputs(model), tmp_path / "llama18", opset=18, formats=["onnx"], quick=True
    )
    before = (bundle.path / "model.onnx").read_bytes()
    kit = deploy(runtime.name, bundle, tmp_path / "kit")
    sizes = {f.relative_to(kit).as_posix(): f.stat().st_size for f in kit.rglob("*.onnx*")}
    data = sizes.pop("bundle/model.onnx_data")
    assert sizes.keys() == {"bundle/model.onnx", "model.inlined.onnx"}
    assert max(sizes.values()) < 100_000 < data < len(before)
    check_files(kit / "bundle", read_manifest(kit / "bundle"))
    assert (bundle.path / "model.onnx").read_bytes() == before
    case = make_model_arrays(*MODEL_SHAPES[0])
    (output,), _ = run_cases(runtime.environment, kit, [case])
    compare(output, run_model_eager(case), find_allowed("model", "float32"))
    again = rotary_export.load(kit / "bundle")(**case)
    compare(again, run_model_eager(case), find_allowed("model", "float32"))
