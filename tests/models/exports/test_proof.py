"""The proof of a whole model: what it refuses, what it says, and what repeats it."""

from __future__ import annotations

import pytest
import torch
from helpers.planted import plant_fault
from helpers.tiny_models import make_inputs, make_model
from torch import nn

import rotary_export
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models import export_model as module
from rotary_export.models.arguments import FlatModel
from rotary_export.models.prove import build_graph, verify_model
from rotary_export.models.prove.prove import RejectedError


class HalfAngles(nn.Module):
    """Angles in float16, as after `.half()` where inv_freq is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, 16, 2) / 16))
        self.half()

    def forward(self, x):
        positions = torch.arange(x.shape[1]).to(self.inv_freq.dtype)
        angles = torch.einsum("i,j->ij", positions, self.inv_freq)
        return rotate(x, torch.cat((angles, angles), -1))


def rotate(x, angles):
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


X = {"x": torch.randn(2, 6, 16).half()}
TABLES = "ONNX Runtime, tables alone"


def test_angles_in_half_are_refused(tmp_path):
    with pytest.raises(CheckFailedError, match=r"in float16, at .*test_proof.py:\d+: "):
        rotary_export.export_model(HalfAngles(), X, tmp_path / "b", formats=("onnx",))
    assert not (tmp_path / "b").exists()
    rotary_export.export_model(HalfAngles(), X, tmp_path / "b", formats=("torchscript",))


def test_or_computed_in_float32_in_every_format(tmp_path):
    bundle = rotary_export.export_model(HalfAngles(), X, tmp_path / "b", float32_tables=True)
    assert bundle.manifest.config["float32_tables"] is True
    assert "computed in float32 (float32_tables)" in bundle.report.notes[0]
    assert "batch_size 1, seq_len 3000" in bundle.report.shapes["model"]
    x = torch.randn(1, 3000, 16).half()
    inv_freq = HalfAngles().inv_freq.float()
    angles = torch.arange(3000)[:, None] * inv_freq
    want = rotate(x.float(), torch.cat((angles, angles), -1))
    for runtime in ("onnxruntime", "torchscript", "program"):
        got = rotary_export.load(bundle, "model", runtime, allow_code=True)(x=x)["output"]
        assert (got.float() - want).abs().max() < 1e-2, runtime


class GatheredTables(nn.Module):
    """Tables of exactly seq_len rows, so that no position can be moved."""

    def forward(self, x, position_ids):
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        angles = torch.cat((angles, angles), -1)
        return rotate_at(x, angles.cos(), angles.sin(), position_ids)


def rotate_at(x, cos, sin, position_ids):
    first, second = x.chunk(2, -1)
    return x * cos[position_ids] + torch.cat((-second, first), -1) * sin[position_ids]


def test_positions_that_can_not_be_moved_are_not(tmp_path):
    inputs = {"x": torch.randn(2, 6, 16), "position_ids": torch.arange(6).repeat(2, 1)}
    bundle = rotary_export.export_model(GatheredTables(), inputs, tmp_path / "b", formats=("onnx",))
    roles = {row["input"]: row["role"] for row in bundle.manifest.config["input_values"]}
    assert roles["position_ids"] == "counted"
    assert rotary_export.verify(bundle).passed


class Pooled(nn.Module):
    """A weighted mean over the sequence, in bfloat16."""

    factor = 1.0

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        rotated = rotate(x, torch.cat((angles, angles), -1)).to(x.dtype)
        return (rotated.softmax(1) * x.abs()).sum(1) * self.factor


def test_sums_of_bfloat16_are_those_of_torch(tmp_path):
    """onnx.reference runs such a file: a sum that numpy rounds at each step ends at 256."""
    model, x = Pooled(), {"x": torch.randn(2, 6, 16).bfloat16()}
    report = rotary_export.export_model(model, x, tmp_path / "b", formats=["onnx"]).report
    row = next(row for row in report.rows if row.output == "output")
    assert row.runtime == "onnx.reference"
    assert "batch_size 1, seq_len 3000" in report.shapes["model"]
    assert row.eager.max_ulp <= 4
    real = build_graph.write_graph

    def write(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Pooled, "factor", 1.2)
            return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build_graph, "write_graph", write)
        with pytest.raises(RejectedError, match=r"by onnx\.reference differs"):
            rotary_export.export_model(model, x, tmp_path / "wrong", formats=["onnx"])


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("proof") / "llama"
    return rotary_export.export_model(llama, make_inputs(llama), path, formats=("onnx",))


def test_tables_are_compared_to_the_last_position(bundle):
    alone = [row for row in bundle.report.rows if row.runtime == "ONNX Runtime, tables alone"]
    rows = {row.output: row for row in alone}
    assert rows.keys() == {"cos_cache", "sin_cache"}
    assert all(row.case == "positions up to 63" and row.passed for row in rows.values())


def test_positions_that_only_the_trace_moves_are_refused(llama, tmp_path):
    """Without a cache they change no output: the model's own tables show them."""
    real = FlatModel.forward

    def forward(self, *tensors):
        ids, mask, positions = tensors
        return real(self, ids, mask, positions + 1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FlatModel, "forward", forward)
        with pytest.raises(RejectedError, match=r"tables\.(cos|sin)_cache by the trace differs"):
            rotary_export.export_model(
                llama, make_inputs(llama), tmp_path / "b", formats=("onnx",), quick=True
            )


def test_a_quick_proof_says_what_it_left_out(llama, tmp_path):
    quick = rotary_export.export_model(
        llama, make_inputs(llama), tmp_path / "b", formats=("onnx",), quick=True, seed=3
    )
    assert quick.manifest.config["quick"] is True
    assert quick.manifest.config["seed"] == 3
    assert "no far positions and no long sequences" in quick.report.notes[0]
    assert not any("+" in name for name in quick.report.shapes["model"])
    assert TABLES not in {row.runtime for row in quick.report.rows}


def test_verify_with_the_model(llama, bundle):
    report = rotary_export.verify_model(bundle, llama, make_inputs(llama), seed=5, allow_code=True)
    assert report.passed
    assert report.shapes == bundle.report.shapes
    assert {row.runtime for row in bundle.report.rows} - {"the trace"} == {
        row.runtime for row in report.rows
    }
    name = report.shapes["model"][2]
    report = rotary_export.verify_model(bundle, llama, make_inputs(llama), case=name)
    assert report.shapes == {"model": [name]}


def test_verify_lists_far_tables_where_the_model_can_not_be_traced_again(
    llama, bundle, monkeypatch
):
    def refuse(*args):
        raise RotaryExportError("torch.export can't trace the model: it is tired")

    monkeypatch.setattr(verify_model, "trace_analyzed", refuse)
    report = rotary_export.verify_model(bundle, llama, make_inputs(llama))
    assert report.passed
    reason = report.unverified["tables at far positions"]
    assert reason == "torch.export can't trace the model: it is tired"
    assert TABLES not in {row.runtime for row in report.rows}


def test_verify_with_another_model_fails(llama, bundle):
    rope = {"rope_theta": 9e3, "rope_type": "default"}
    other = make_model("llama", num_hidden_layers=2, rope_parameters=rope)
    report = rotary_export.verify_model(bundle, other, make_inputs(llama))
    assert not report.passed
    assert {row.output for row in report.rows if row.runtime == TABLES and not row.passed} == {
        "cos_cache",
        "sin_cache",
    }
    inputs = make_inputs(llama)
    del inputs["position_ids"]
    with pytest.raises(RotaryExportError, match=r"has input_ids, attention_mask$"):
        rotary_export.verify_model(bundle, llama, inputs)
    with pytest.raises(RotaryExportError, match=r"case must be one of: the example; .*got 'none'"):
        rotary_export.verify_model(bundle, llama, make_inputs(llama), case="none")


PLACE = (
    r"differs from eager by .* ulp .* are allowed, the model's own rounding noise is .*; "
    r"the result of rotary call 3 of 4 \(model\.layers\.1\.self_attn, apply_rotary_pos_emb\) "
    r"is the first that differs, at batch row \d, position \d"
)


def test_a_failure_names_the_layer_and_is_repeated(llama, tmp_path):
    inputs, options = make_inputs(llama), {"formats": ("onnx",), "quick": True}
    with plant_fault():
        with pytest.raises(RejectedError, match=PLACE) as caught:
            rotary_export.export_model(
                llama, inputs, tmp_path / "b", keep_failed=tmp_path / "kept", **options
            )
        assert f"the rejected bundle is {tmp_path / 'kept'}" in str(caught.value)
        case = caught.value.case
        with pytest.raises(RejectedError, match="rotary call 3 of 4"):
            module.prove_case(llama, inputs, case, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert module.prove_case(llama, inputs, case, **options).shapes == {"model": [case]}
    with pytest.raises(CheckFailedError, match=r"failed its proof: .*allowed, .*allow_failed=True"):
        rotary_export.load(tmp_path / "kept", "model")
    rotary_export.load(tmp_path / "kept", "model", allow_failed=True)
    assert not rotary_export.verify_model(tmp_path / "kept", llama, inputs, case=case).passed


def test_bad_options_are_refused_before_the_export(llama, tmp_path):
    steps = []
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "letter.txt").write_text("mine")
    for options, message in (
        ({"keep_failed": tmp_path / "kept"}, "kept exists and is not a bundle"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"seed": "x"}, "seed must be an int >= 0, got 'x'"),
    ):
        with pytest.raises(RotaryExportError, match=message):
            rotary_export.export_model(
                llama, make_inputs(llama), tmp_path / "b", progress=steps.append, **options
            )
    assert steps == []
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
