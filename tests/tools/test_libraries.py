"""`tools/coverage/libraries.py`: outcomes are told apart, counted and shown; no library needed."""

import json
import os
import signal
import time
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
import torch
from libraries_report import (
    classify,
    describe_row,
    describe_summary,
    summarize,
    tabulate,
    tabulate_refusals,
    write_json,
)
from library_cases import CASES
from library_cases.case import Case, randomize
from library_runs import compare, prepare, read_feeds, run_eager, try_export, try_fuse
from runs import measure_error, run_guarded
from torch import nn

import rotary_export
from rotary_export.errors import RotaryExportError

EQUAL = {"status": "equal", "calls": 2, "fused": 2, "error": 3e-7, "effect": 0.2}
REFUSED = {"status": "refused", "reason": "no | sentence <here>"}


def make_row(model="Flux", **ways):
    return {"model": model, "library": "diffusers", **ways}


class Rotation(nn.Module):
    """Rotates by position and mixes, in a function that is found by name."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] * 100.0 ** (-torch.arange(4) / 4)
        angles = torch.cat((angles, angles), -1)
        return self.mix(apply_rotary_pos_emb(x[:, None], angles.cos(), angles.sin()))[:, 0]


def apply_rotary_pos_emb(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class RotationCase(Case):
    name = "rotation"
    library = "torch"

    def build(self):
        return Rotation()

    def inputs(self, batch, length):
        return {"x": torch.randn(batch, length, 8)}


# ---- outcomes


@pytest.mark.parametrize(
    ("ways", "outcome"),
    [
        ({"export": EQUAL}, ("export", "equal")),
        ({"export": REFUSED, "fuse": EQUAL}, ("fuse", "equal")),
        ({"export": REFUSED, "fuse": REFUSED}, ("export", "refused")),
        ({"export": REFUSED, "fuse": {"status": "WRONG"}}, ("fuse", "WRONG")),
        ({"export": {"status": "CRASH"}}, ("export", "CRASH")),
        ({"export": {"status": "crashed"}}, ("export", "crashed")),
        ({"export": {"status": "timeout"}, "fuse": REFUSED}, ("export", "timeout")),
        ({"export": {"status": "no model"}}, ("export", "no model")),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "-".join(value),
)
def test_the_outcome_that_counts(ways, outcome):
    assert classify(make_row(**ways)) == outcome


def test_outcomes_are_counted(tmp_path):
    rows = [
        make_row("Flux", export=EQUAL),
        make_row("Wan", export=REFUSED, fuse=EQUAL | {"error": 4e-6}),
        make_row("LTX", export=REFUSED, fuse=REFUSED),
        make_row("Mochi", export={"status": "WRONG", "error": float("inf")} | REFUSED),
        make_row("PRX", export={"status": "CRASH", "reason": "KeyError: 1"}),
        make_row("Sana", export={"status": "not installed", "reason": "pip install diffusers"}),
    ]
    rows[3]["export"]["status"] = "WRONG"
    found = summarize(rows)
    names = ("tried", "not_tried", "exported", "fused", "refused", "wrong", "crashed")
    assert [found[name] for name in names] == [5, 1, 1, 1, 1, 1, 1]
    assert found["error"] == 4e-6
    write_json(tmp_path / "found.json", rows)
    read = json.loads((tmp_path / "found.json").read_text())
    assert read["rows"][3]["export"]["error"] == "inf"
    assert read["versions"]["torch"] == torch.__version__
    assert "exports 1 (20%)" in describe_summary(read)
    assert tabulate(read["rows"])[1] == tabulate(rows)[1]


def test_rows_of_the_tables():
    rows = [make_row("Wan", export=REFUSED, fuse=EQUAL), make_row("Flux", export=EQUAL)]
    assert tabulate(rows)[1] == [
        ["diffusers", "Flux", "`export_model`", "equal", "2 of 2", "3.0e-07", "2.0e-01"],
        ["diffusers", "Wan", "torch.onnx, `fuse`", "fused, equal", "2 of 2", "3.0e-07", "2.0e-01"],
    ]
    assert tabulate_refusals(rows)[1] == [["Wan", "no \\| sentence &lt;here>", ""]]
    assert describe_row(rows[1]).startswith("Flux (diffusers): export_model: equal, 2 of 2 calls")


# ---- runs


def test_a_model_is_exported_and_fused():
    for attempt in (try_export, try_fuse):
        row = attempt(RotationCase())
        assert row["status"] == "equal", row
        assert row["fused"] == row["calls"] == 1
        assert row["error"] < 1e-5 < 0.1 < row["effect"]
        assert row["compared"] == 4


def test_a_crash_names_the_line(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("q")

    monkeypatch.setattr("rotary_export.models.prove.build_graph.analyze_model", fail)
    row = try_export(RotationCase())
    assert row["status"] == "CRASH"
    assert row["reason"].startswith("KeyError: 'q' (at rotary_export/models/prove/build_graph.py:")


def test_a_refusal_is_its_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise RotaryExportError("x must be y")

    monkeypatch.setattr(rotary_export, "export_model", refuse)
    assert try_export(RotationCase())["reason"] == "x must be y"


def test_results_are_told_apart():
    case = RotationCase()
    model = case.make_model()

    def run(change):
        return lambda feeds: [change(*run_eager(model, {"x": torch.from_numpy(feeds["x"])}))]

    def refuse(feeds):
        if len(feeds["x"]) == 3:
            raise RotaryExportError("batch must be <= 2")
        return run(lambda y: y)(feeds)

    def fail(feeds):
        raise ValueError("no kernel")

    assert compare(case, model, [run(lambda y: y)]) == {
        "status": "equal",
        "error": 0,
        "compared": 2,
    }
    assert compare(case, model, [run(lambda y: y * 1.01)])["status"] == "WRONG"
    assert compare(case, model, [run(lambda y: y[..., :2])])["error"] == np.inf
    assert compare(case, model, [lambda feeds: []])["reason"] == "0 outputs, eager has 1"
    assert "no kernel" in compare(case, model, [fail])["reason"]
    limited = compare(case, model, [refuse])
    assert limited["status"] == "equal"
    assert limited["limits"] == ["(3, 11): batch must be <= 2"]


def test_what_is_not_there_is_said(monkeypatch):
    class Missing(RotationCase):
        library = "not-a-library"

    class Broken(RotationCase):
        def inputs(self, batch, length):
            return {"y": torch.zeros(batch, length)}

    assert prepare(Missing())[1]["status"] == "not installed"
    model, row = prepare(Broken())
    assert model is None
    assert row["status"] == "no model"


@pytest.mark.parametrize(
    ("function", "status", "words"),
    [
        (lambda: {"status": "equal"}, "equal", ""),
        (lambda: time.sleep(60), "timeout", "took over 1 s"),
        (lambda: os._exit(3), "crashed", "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crashed", "SIGKILL"),
        (lambda: [][1], "crashed", "IndexError"),
        (lambda: {"status": len(bytearray(1 << 34))}, "crashed", "MemoryError"),
    ],
    ids=["row", "hang", "exit", "kill", "raise", "memory"],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_each_function_has_limits(function, status, words):
    row = run_guarded(function, seconds=1, gib=4)
    assert row["status"] == status
    assert words in row.get("reason", "")


def test_errors_are_relative():
    want = np.array([1.0, -4.0], np.float32)
    assert measure_error(want + 0.4, want) == pytest.approx(0.1)
    assert measure_error(want[:1], want) == np.inf
    assert measure_error(want * np.nan, want) == np.inf
    assert measure_error(np.array([True]), np.array([True])) == 0


# ---- cases


def test_cases_are_complete():
    assert len(CASES) >= 40
    for name, case in CASES.items():
        assert case.name == name
        assert type(case).__doc__.strip().endswith("."), name
        assert len(case.sizes) >= 2, name


def test_cases_are_selected():
    assert [case.name for case in libraries.select_cases("flux 2;mochi")] == ["Flux 2", "Mochi"]
    with pytest.raises(SystemExit, match="no model is called"):
        libraries.select_cases("nothing")


def test_the_exit_code_counts_faults(monkeypatch, capsys):
    case = SimpleNamespace(name="Flux", library="diffusers")
    monkeypatch.setattr(libraries, "select_cases", lambda only: [case])
    monkeypatch.setattr("sys.argv", ["libraries.py"])
    for export, code in ((EQUAL, 0), ({"status": "CRASH", "reason": "KeyError"}, 1)):
        monkeypatch.setattr(libraries, "run_guarded", lambda *args, row=export: row)
        assert libraries.main() == code
    assert "1/1 Flux (diffusers)" in capsys.readouterr().out


def test_weights_keep_magnitudes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    randomize(model)
    with torch.no_grad():
        assert 0.8 < model[0](torch.randn(100, 64)).std() < 1.2
        assert model[1].weight.mean() > 0.9
        assert model[1].bias.abs().max() > 0


def test_feeds_are_named_as_a_bundle_names_them():
    feeds = read_feeds({"x": torch.zeros(1), "tables": (torch.zeros(2), torch.zeros(3)), "n": 4})
    assert {name: value.size for name, value in feeds.items()} == {
        "x": 1, "tables.0": 2, "tables.1": 3,
    }  # fmt: skip
