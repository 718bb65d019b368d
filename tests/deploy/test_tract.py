"""tract: the inlined graph of opset 18, in plain operations."""

import functools

import onnx
import pytest
from helpers.bundles import check_refused, get_bundle, make_arrays, make_folder, run_eager, to_numpy
from helpers.inline_runs import check_bad_input, name_shapes, run_cases, run_forms, run_python
from helpers.target_runs import (
    Row,
    compare,
    get_model,
    get_model_bundle,
    make_model_arrays,
    record,
    require,
    run_model_eager,
)
from helpers.tiny_models import make_inputs

import rotary_export
from rotary_export.deploy.deploy import deploy
from rotary_export.proof.tolerances import TOLERANCES

SHAPES = ((1, 1), (3, 7), (5, 1), (2, 32))
ROTATE = {"float32": ("plain", "xpos", "opset18"), "float16": ("float16",), "float64": ("float64",)}


@pytest.fixture(scope="module")
def environment():
    return require("tract")


@functools.cache
def get_version(environment):
    done = run_python(environment, make_folder(), "-c", "import tract; print(tract.version())")
    return done.stdout.strip()


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


@pytest.mark.parametrize("dtype", ROTATE)
def test_rotate_has_the_bits_of_eager(environment, tmp_path, dtype):
    for name in ROTATE[dtype]:
        kit = deploy("tract", get_bundle(name), tmp_path / name)
        cases = [make_arrays(name, batch=batch, seq_len=length) for batch, length in SHAPES]
        outputs, _ = run_cases(environment, kit, cases)
        for case, got in zip(cases, outputs, strict=True):
            want = {key: to_numpy(value) for key, value in run_eager(name, case).items()}
            compare(got, want, 0)
    record(
        Row(
            "tract", get_version(environment), "rotate", "ran", "portable", [dtype],
            name_shapes(cases), 0.0, exact=True, note="primitives of opset 18",
        )
    )  # fmt: skip


def test_model(environment, tmp_path):
    kit = deploy("tract", get_old_model(), tmp_path / "kit")
    assert (kit / "bundle" / "model.onnx.data").is_file()
    assert (kit / "model.inlined.onnx").stat().st_size < 100_000  # the weights are not copied
    cases = [make_model_arrays(batch, length) for batch, length in ((3, 7), (2, 1), (1, 33))]
    outputs, _ = run_cases(environment, kit, cases)
    allowed = TOLERANCES["model"].max_ulp * 2.0**-23
    errors = [
        compare(got, run_model_eager(case), allowed)[0]
        for case, got in zip(cases, outputs, strict=True)
    ]
    record(
        Row(
            "tract", get_version(environment), "model", "ran", "portable", ["float32"],
            name_shapes(cases), max(errors), note="primitives of opset 18; one plan per shape",
        )
    )  # fmt: skip


RUN = """
import tract
def run(file, inputs):
    model = tract.onnx().load(file)
    names = [model.input_name(index) for index in range(model.input_count())]
    for index, name in enumerate(names):
        kind = {"float32": "f32", "int64": "i64"}[inputs[name].dtype.name]
        model.set_input_fact(index, ",".join([*map(str, inputs[name].shape), kind]))
    outputs = [model.output_name(index) for index in range(model.output_count())]
    results = model.into_model().into_runnable().run([inputs[name] for name in names])
    return {name: value.to_numpy() for name, value in zip(outputs, results)}, 0
"""


def test_every_form_of_node_has_the_bits_of_eager(environment, tmp_path):
    for _, got, want, _ in run_forms(environment, tmp_path, 18, RUN):
        compare(got, want, 0)


def test_the_page(environment, tmp_path):
    kit = deploy("tract", get_bundle("plain"), tmp_path / "kit")
    model = onnx.load(kit / "rotate.inlined.onnx")
    assert not model.functions
    assert [o.version for o in model.opset_import] == [18]
    assert {node.domain for node in model.graph.node} == {""}
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph.node}
    done = run_python(environment, kit, "run.py")
    assert done.returncode == 0, done.stderr
    assert "query_out (2, 8, 7, 24): largest difference from PyTorch 0\n" in done.stdout


def test_bad_input(environment, tmp_path):
    kit = deploy("tract", get_bundle("plain"), tmp_path / "kit")
    check_bad_input(environment, kit, make_arrays("plain"))


def test_refusals(tmp_path):
    act = lambda: deploy("tract", get_bundle("bfloat16"), tmp_path / "kit")  # noqa: E731
    check_refused("it has no bfloat16), got bfloat16", act, tmp_path)
    act = lambda: deploy("tract", get_model_bundle(), tmp_path / "kit")  # noqa: E731
    check_refused("(rotary-export export-model --opset 18), got opset 23, whose", act, tmp_path)
