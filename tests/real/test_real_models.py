"""Trained weights: exported by the README's command and with a cache, proven, text generated.

The models are fetched before: see tools/real/README.md. SmolLM2 is part of CI. `pytest -m gemma`
runs the same tests with Gemma 3.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from greedy import find_differences, generate_eager, load_model, make_text_example
from helpers.real_models import require_model

from rotary_export import export_model, load
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli

TOKENS = 8
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
def cached(loaded, tmp_path_factory):
    example = make_text_example(*loaded, cached=True)
    out = tmp_path_factory.mktemp("real") / "cached"
    return export_model(loaded[0], example, out, formats=["onnx"], quick=True)


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


def test_the_command_exports_it(name, folder, tmp_path):
    out = tmp_path / "bundle"
    arguments = ["export-model", str(folder), "--format", "onnx", "--out", str(out), "--json"]
    arguments.append("--quick")  # tools/real/measure_real.py has the whole proof
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"]["passed"]
    check_proof(read_manifest(out), name)


def test_a_cache_of_text_is_proven(name, cached):
    check_proof(cached.manifest, name)
    rows = [row for row in cached.manifest.parity["rows"] if row["graph"] == "model"]
    outputs = cached.manifest.graphs["model"].outputs
    assert {row["output"] for row in rows} == {info.name for info in outputs}


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_generates_what_eager_generates(name, loaded, cached, generated, kernel):
    assert generated.mask.min() == 0  # padded at the left
    assert generated.keep.sum() > 2 * TOKENS
    session = load(cached, "model", **KERNELS[kernel])
    assert find_differences(loaded[0], session, generated) == []
