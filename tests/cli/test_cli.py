"""The commands: human-readable output, JSON, files in and out."""

import json
import shutil

import numpy as np
import pytest
from helpers.commands import EXPORT, call


def test_export_prints_the_proof_in_plain_lines(tmp_path):
    result = call(*EXPORT, "--out", tmp_path / "b", "--format", "torchscript")
    assert result.exit_code == 0
    assert "proven: " in result.stdout
    assert "rotate" in result.stdout
    assert "export rotate.pt\n" in result.stderr
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "manifest.json",
        "rotate.pt",
        "tables.pt",
    ]


def test_export_passes_every_flag_on(tmp_path):
    result = call(
        *("export", "--dim", 8, "--max-seq-len", 16, "--out", tmp_path / "b"),
        *("--interpolation-factor", 2, "--base", 500, "--base-rescale-factor", 1.5),
        *("--use-xpos", "--scale-base", 256, "--num-heads", 4, "--num-kv-heads", 2),
        *("--head-dim", 16, "--interleaved", "--static", "--batch-size", 3),
        *("--format", "onnx", "--opset", 21, "--dtype", "float16"),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["opset"] == 21
    assert manifest["config"] == {
        "embedding": {
            "dim": 8,
            "use_xpos": True,
            "scale_base": 256.0,
            "interpolation_factor": 2.0,
            "base": 500.0,
            "base_rescale_factor": 1.5,
        },
        "max_seq_len": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "interleaved": True,
        "static": True,
        "batch_size": 3,
        "dtype": "float16",
    }


def test_force_is_needed_to_replace(bundle):
    before = (bundle / "manifest.json").read_bytes()
    result = call(*EXPORT, "--out", bundle)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before


def test_verify(bundle):
    result = call("verify", bundle)
    assert result.exit_code == 0
    assert "within tolerance" in result.stdout


def test_verify_json(bundle):
    result = call("verify", bundle, "--json")
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert {row["graph"] for row in report["rows"]} == {"tables", "rotate"}


def test_verify_of_a_changed_file_exits_1(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "rotate.pt").open("ab") as file:
        file.write(b"x")
    result = call("verify", copy)
    assert result.exit_code == 1
    assert "rotate.pt" in result.stderr
    assert "sha256" in result.stderr


def test_run_npy_and_npz(bundle, tmp_path):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 2, 5, 8), dtype=np.float32)
    ids = np.tile(np.arange(5), (3, 1))
    np.save(tmp_path / "q.npy", query)
    np.savez(tmp_path / "rest.npz", key=query, position_ids=ids)
    out = tmp_path / "out.npz"
    arguments = ("run", bundle, "--input", f"query={tmp_path / 'q.npy'}")
    arguments += ("--input", tmp_path / "rest.npz", "--out", out)

    result = call(*arguments)
    assert result.exit_code == 0, result.output
    with np.load(out) as outputs:
        assert outputs["query_out"].shape == query.shape
        np.testing.assert_array_equal(outputs["query_out"].shape, outputs["key_out"].shape)
        assert not np.array_equal(outputs["query_out"], query)
    assert not list(tmp_path.glob(".*"))

    again = call(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    forced = call(*arguments, "--force", "--json", "--no-op-library")
    assert json.loads(forced.stdout)["kernel_path"] == "native"


def test_run_scalar(bundle, tmp_path):
    out = tmp_path / "out.npz"
    result = call("run", bundle, "--graph", "tables", "--input", "seq_len=3", "--out", out)
    assert result.exit_code == 0, result.output
    with np.load(out) as outputs:
        assert outputs["freqs"].shape == (16, 8)
        assert not outputs["freqs"][3:].any()


def test_inspect_bundle_and_onnx(bundle):
    text = call("inspect", bundle).stdout
    assert "query: float32(batch_size, 2, seq_len, 8)" in text
    found = json.loads(call("inspect", bundle / "rotate.onnx", "--json").stdout)
    assert found["rotary nodes"] == 1
    assert found["rotary"][0]["op"] == "rotary_export::RotaryEmbedding"
    assert found["opsets"] == "rotary_export 1, ai.onnx 23"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\x1b[31mred", "\\x1b[31mred"), ("\ud800", "\\ud800")],
    ids=["code", "half"],
)
def test_control_codes_of_a_file_are_escaped(bundle, tmp_path, name, shown):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    rotate = manifest["graphs"].pop("rotate")
    manifest |= {"name": name, "graphs": {name: rotate, "other": rotate}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = call("inspect", copy)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"bundle: {shown}\n")
    assert f"\ngraph: {shown}\n" in result.stdout
    refused = call("run", copy, "--input", "a=1", "--out", tmp_path / "o.npz")
    assert f"it has {shown}, other" in refused.stderr
    assert json.loads(call("inspect", copy, "--json").stdout)["bundle"] == name


def test_doctor():
    result = call("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["facts"]
    assert facts["CUDA"].startswith("no: ")
    assert facts["on the CPU"].startswith("fused (")
