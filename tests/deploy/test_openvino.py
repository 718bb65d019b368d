"""OpenVINO: the inlined graph of opset 23, whose rotary nodes it fuses to an op of its own."""

import functools
import shutil

import numpy as np
import onnx
import onnx.inliner
import pytest
from helpers.bundles import (
    check_refused,
    edit_manifest,
    get_bundle,
    make_arrays,
    make_folder,
    run_eager,
    to_numpy,
)
from helpers.inline_runs import check_bad_input, name_shapes, run_cases, run_forms, run_python
from helpers.target_runs import (
    Row,
    compare,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)
from helpers.tiny_models import make_inputs, make_model

from rotary_export import export_model
from rotary_export.deploy.deploy import deploy
from rotary_export.op.spec import OP_TYPE
from rotary_export.proof.tolerances import TOLERANCES

SHAPES = ((1, 1), (3, 7), (5, 1), (2, 32), (0, 3), (2, 0))
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Type: bundles, each with the operations that OpenVINO fuses and with its tolerance.
ROTATE = {
    # Of half the channels, in halves: OpenVINO runs plain operations.
    "float32": {"plain": (0, "native"), "xpos": (2, "native-xpos")},
    "float16": {"float16": (2, "native-half")},
    "bfloat16": {"bfloat16": (2, "bf16-truncated")},
}


@pytest.fixture(scope="module")
def environment():
    return require("openvino")


@functools.cache
def get_version(environment):
    program = "import openvino as ov; print(ov.__version__)"
    done = run_python(environment, make_folder(), "-c", program)
    return done.stdout.strip().partition("-")[0]


def compare_cases(outputs, wants, allowed):
    """Assert shapes, and values within `allowed` of eager; return the largest difference."""
    worst = 0.0
    for got, want in zip(outputs, wants, strict=True):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        if all(value.size for value in want.values()):
            worst = max(worst, compare(got, want, allowed)[0])
    return worst


@pytest.mark.parametrize("dtype", ROTATE)
def test_rotate(environment, tmp_path, dtype):
    import ml_dtypes

    worst, notes = 0.0, []
    for name, (ropes, tolerance) in ROTATE[dtype].items():
        kit = deploy("openvino", get_bundle(name), tmp_path / name)
        cases = [make_arrays(name, batch=batch, seq_len=length) for batch, length in SHAPES]
        saved = [
            {k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in case.items()}
            for case in cases
        ]
        outputs, count = run_cases(environment, kit, saved)
        assert count == ropes
        if dtype == "bfloat16":
            outputs = [{k: v.view(ml_dtypes.bfloat16) for k, v in o.items()} for o in outputs]
        wants = [{k: to_numpy(v) for k, v in run_eager(name, case).items()} for case in cases]
        allowed = TOLERANCES[tolerance].max_ulp * EPS[dtype]
        worst = max(worst, compare_cases(outputs, wants, allowed))
        notes.append(f"{count} ({name})" if len(ROTATE[dtype]) > 1 else str(count))
    note = f"RoPE ops in the compiled model: {', '.join(notes)}"
    # No row says exact: OpenVINO may use FMA, so what is equal here need not be elsewhere.
    record(
        Row(
            "OpenVINO", get_version(environment), "rotate", "ran", "portable", [dtype],
            name_shapes(cases), worst, note=note,
        )
    )  # fmt: skip


def test_model(environment, tmp_path):
    kit = deploy("openvino", get_model_bundle(), tmp_path / "kit")
    cases = [make_model_arrays(batch, length) for batch, length in ((3, 7), (2, 1), (1, 33))]
    outputs, count = run_cases(environment, kit, cases)
    assert count == 5  # query and key of two layers, and the row that gives the tables
    allowed = TOLERANCES["model"].max_ulp * EPS["float32"]
    worst = compare_cases(outputs, [run_model_eager(case) for case in cases], allowed)
    note = "RoPE ops in the compiled model: 4, and 1 that computes the tables"
    record(
        Row(
            "OpenVINO", get_version(environment), "model", "ran", "portable", ["float32"],
            name_shapes(cases), worst, note=note,
        )
    )  # fmt: skip


def test_a_model_that_reshapes_its_tables(environment, tmp_path):
    model = make_model("gptj", num_hidden_layers=1)
    bundle = export_model(model, make_inputs(model), tmp_path / "bundle", formats=["onnx"])
    kit = deploy("openvino", bundle, tmp_path / "kit")
    done = run_python(environment, kit, "run.py")
    assert done.returncode == 0, done.stderr
    assert "2 operations are its own RoPE" in done.stdout


def test_a_wrong_fusion_is_found(environment, tmp_path, monkeypatch):
    monkeypatch.setattr("rotary_export.deploy.inline._widen_probes", lambda model: model)
    kit = deploy("openvino", get_model_bundle(), tmp_path / "kit")
    done = run_python(environment, kit, "run.py")
    assert done.returncode == 1
    assert "the first row's positions: it fuses an input of batch 1 with" in done.stderr
    program = (kit / "run.py").read_text()
    (kit / "run.py").write_text(program.replace("sys.exit(\n", "print(\n", 1))
    done = run_python(environment, kit, "run.py")  # as soon as it is right, this can go
    assert (done.returncode, done.stderr) == (1, "logits is not what PyTorch computed\n")


RUN = """
import openvino as ov
def run(file, inputs):
    model = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = {port.any_name: value for port, value in model(inputs).items()}
    nodes = model.get_runtime_model().get_ordered_ops()
    return outputs, sum(n.get_rt_info()["layerType"].value == "RoPE" for n in nodes)
"""


def test_every_form_of_node(environment, tmp_path):
    for case, got, want, count in run_forms(environment, tmp_path, 23, RUN):
        allowed = TOLERANCES["native-xpos" if case.scaled else "native"].max_ulp
        compare(got, want, allowed * EPS["float32"])
        is_fused = case.interleaved or not case.rotary_dim
        assert count == (len(want) if is_fused else 0), case.id


def test_the_page(environment, tmp_path):
    kit = deploy("openvino", get_bundle("plain"), tmp_path / "kit")
    model = onnx.load(kit / "rotate.inlined.onnx")
    assert not model.functions
    assert [node.op_type for node in model.graph.node] == [OP_TYPE, OP_TYPE]
    done = run_python(environment, kit, "run.py")
    assert done.returncode == 0, done.stderr
    assert "0 operations are its own RoPE\nquery_out (2, 8, 7, 24): largest" in done.stdout
    wrong = np.load(kit / "example" / "expected" / "key_out.npy")
    wrong[1, 2, 3, 4] += 1
    np.save(kit / "example" / "expected" / "key_out.npy", wrong)
    done = run_python(environment, kit, "run.py")
    assert (done.returncode, done.stderr) == (1, "key_out is not what PyTorch computed\n")


def test_bad_input(environment, tmp_path):
    kit = deploy("openvino", get_bundle("plain"), tmp_path / "kit")
    check_bad_input(environment, kit, make_arrays("plain"))


def test_refuses_types_that_are_not_computed_or_compared(tmp_path):
    act = lambda: deploy("openvino", get_bundle("float64"), tmp_path / "kit")  # noqa: E731
    check_refused("openvino needs a bundle of float32, float16 or bfloat16", act, tmp_path)
    bundle = shutil.copytree(get_model_bundle().path, tmp_path / "bundle")
    edit_manifest(bundle, dtype="bfloat16")
    act = lambda: deploy("openvino", bundle, tmp_path / "kit")  # noqa: E731
    check_refused("openvino needs a whole model of float32 or float16", act, tmp_path)


def test_refuses_an_inlined_graph_that_is_not_equal(tmp_path, monkeypatch):
    right = onnx.inliner.inline_local_functions

    def inline(model):
        model = right(model)
        key = next(node for node in model.graph.node if node.output[0] == "key_out")
        key.input[1], key.input[2] = key.input[2], key.input[1]  # cos and sin
        return model

    monkeypatch.setattr("onnx.inliner.inline_local_functions", inline)
    act = lambda: deploy("openvino", get_bundle("plain"), tmp_path / "kit")  # noqa: E731
    check_refused("not equal to the bundle's, nothing was written: key_out", act, tmp_path)
