"""Trained weights: exported by the README's command, proven, text generated.

The models are fetched before: see tools/real/README.md. SmolLM2 is part of CI. `pytest -m gemma`
runs the same tests with Gemma 3.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from greedy import find_differences, generate_eager, load_model
from helpers.real_models import require_model
from helpers.text_bundles import make_text_decoder
from helpers.text_runtimes import RUNTIMES, check_tokens

from rotary_export import load
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli

TOKENS = 8
TEXTS = ("The capital of France is", "Once upon a time, there was", "Water boils")
KERNELS = {"fused": {"require_fused": True}, "portable": {"use_op_library": False}}
ROTARY_CALLS = {"smollm2": 30, "gemma3": 18}  # one a layer

pytestmark = pytest.mark.parametrize(
    "name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.gemma)], scope="module"
)


@pytest.fixture(scope="module")
def folder(name):
    return require_model(name)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The bundle of the README's command, and what it printed."""
    out = tmp_path_factory.mktemp("real") / "bundle"
    arguments = ["export-model", str(folder), "--format", "onnx", "--out", str(out), "--json"]
    arguments.append("--quick")  # tools/real/measure_real.py has the whole proof
    return out, CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def generated(loaded):
    return generate_eager(*loaded, TOKENS)


def check_proof(manifest, name):
    """Everything passed and is fused; error and noise of the logits are numbers above 0."""
    parity = manifest.parity
    assert parity["passed"]
    assert parity["skipped"] == {}
    rows = [row for row in parity["rows"] if row["output"] == "logits"]
    runtimes = {"ONNX Runtime, op library", "ONNX Runtime, function body"}
    assert {row["runtime"] for row in rows} == runtimes
    for row in rows:
        assert row["passed"]
        assert 0 < row["eager"]["max_ulp"] <= row["eager_allowed"]
        assert row["noise"] > 1  # trained weights amplify rounding
    fused = sum(found["fused"] for found in manifest.config["rotary"])
    calls = sum(found["calls"] for found in manifest.config["rotary"])
    assert fused == calls == manifest.graphs["model"].rotary_nodes == ROTARY_CALLS[name]


def test_the_command_exports_it(name, exported):
    out, result = exported
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"]["passed"]
    manifest = read_manifest(out)
    check_proof(manifest, name)
    rows = [row for row in manifest.parity["rows"] if row["graph"] == "model"]
    outputs = manifest.graphs["model"].outputs
    assert len(outputs) == 1 + 2 * ROTARY_CALLS[name]  # with the cache
    assert {row["output"] for row in rows} == {info.name for info in outputs}


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_generates_what_eager_generates(name, loaded, exported, generated, kernel):
    assert generated.mask.min() == 0  # padded at the left
    assert generated.keep.sum() > 2 * TOKENS
    session = load(exported[0], "model", **KERNELS[kernel])
    assert find_differences(loaded[0], session, generated) == []


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_generate_what_eager_generates(name, loaded, exported, runtime, tmp_path):
    title = f"{loaded[0].config.model_type}, trained weights"
    decoder = make_text_decoder(title, loaded[0], exported[0], TEXTS)
    check_tokens(runtime, "fused", decoder, tmp_path, name)
