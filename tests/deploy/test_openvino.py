"""OpenVINO: a wrong fusion that it makes, and bundles that deploy refuses."""

import shutil

import onnx
import onnx.inliner
import pytest
from helpers.bundles import check_refused, edit_manifest, get_bundle
from helpers.inline_runs import OPENVINO, run_python
from helpers.target_runs import get_model_bundle
from helpers.tiny_models import make_inputs, make_model

from rotary_export import export_model
from rotary_export.deploy.deploy import deploy


@pytest.fixture(scope="module")
def environment():
    return OPENVINO.environment


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
    assert (done.returncode, done.stderr) == (1, "logits differs from what ONNX Runtime computed\n")


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
