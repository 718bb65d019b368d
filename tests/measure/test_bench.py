"""The benches: what they print, write and exit with. No time is asserted."""

from __future__ import annotations

import ctypes
import json
import re
import sys

import bench
import bench_cases
import bench_share
import pytest
import torch
from bench_graphs import OURS, PEERS, PRIMITIVES, BenchCase, make_runner
from click.testing import CliRunner, Result
from helpers.bundles import copy_bundle, get_bundle

from rotary_export.cli.main import cli
from rotary_export.errors import RotaryExportError
from rotary_export.measure import benchmark, machine
from rotary_export.measure.timing import Goal, Spread
from rotary_export.op import library as op_library
from rotary_export.runtime.ways import AOTI, FUNCTION_BODY, OP_LIBRARY, REFERENCE, WAYS

SMALL = BenchCase(2, 4, 2, 6, 8)
M_MMAP_THRESHOLD = -3  # of malloc.h
RUNS = [way.name for way in WAYS if way not in (AOTI, REFERENCE)]  # of the default formats


@pytest.fixture(scope="module", autouse=True)
def restored_settings():
    """Restore what the benches set for their process: later tests would take several times as long.

    A bench chooses torch's threads. It also sets limits of malloc, which then no longer learns
    which sizes are worth keeping.
    """
    yield
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)


# ---- rotary-export bench


def call(*arguments: object) -> Result:
    words = ["bench", *map(str, arguments), "--allow-code", "--seconds", "0"]
    return CliRunner().invoke(cli, words)


def read_table(text: str) -> list[list[str]]:
    """Return the cells of the lines that begin with two numbers."""
    cells = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return [row for row in cells if len(row) > 2 and row[0].isdecimal()]


def test_bench_prints_every_run_at_every_shape():
    result = call(get_bundle("plain").path, "--shape", 1, 1, "--shape", 2, 5)
    assert result.exit_code == 0, result.output
    rows = read_table(result.stdout)
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (batch, length, run) for batch, length in (("1", "1"), ("2", "5")) for run in RUNS
    ]
    isa = op_library.instruction_set()
    assert [row[3] for row in rows[:4]] == ["primitive", "primitive", "native", f"fused ({isa})"]
    for row in rows:
        low, middle, high = map(float, row[4:7])
        assert 0 < low <= middle <= high
    assert [row[7] for row in rows if row[2] == FUNCTION_BODY.name] == ["1.00", "1.00"]
    assert "time batch_size=2, seq_len=5\n" in result.stderr


@pytest.mark.parametrize("name", ["xpos", "static", "float16", "bfloat16", "float64", "opset18"])
def test_bench_json(name):
    result = call(get_bundle(name).path, "--shape", 1, 3, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bundle"] == name
    assert report["baseline"] == FUNCTION_BODY.name
    assert report["machine"]["instruction set"] == op_library.instruction_set()
    runs = [FUNCTION_BODY.name, OP_LIBRARY.name] if name == "opset18" else RUNS
    assert [row["run"] for row in report["rows"]] == runs
    shape = (2, 32) if name == "static" else (1, 3)
    assert {(row["batch_size"], row["seq_len"]) for row in report["rows"]} == {shape}
    for row in report["rows"]:
        assert list(row["seconds"]) == ["min", "median", "max"]
    assert (report["warning"] is None) == (report["noise"] <= 0.05)


def test_long_shapes_are_cut_to_the_tables():
    rows = json.loads(call(get_bundle("plain").path, "--json").stdout)["rows"]
    assert list(dict.fromkeys((r["batch_size"], r["seq_len"]) for r in rows)) == [
        (1, 1),
        (16, 1),
        (1, 32),
    ]


def test_a_noisy_machine_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(benchmark, "measure_noise", lambda *arguments: 0.3)
    result = call(get_bundle("plain").path, "--shape", 1, 1)
    assert "warning: this machine is noisy: identical calls differ by 30%" in result.stdout
    monkeypatch.setattr(benchmark, "measure_noise", lambda *arguments: 0.01)
    assert "warning" not in call(get_bundle("plain").path, "--shape", 1, 1).stdout


def test_a_missing_op_library_is_named(monkeypatch, tmp_path):
    def refuse() -> str:
        raise RotaryExportError("no library here")

    monkeypatch.setattr(op_library, "op_library_path", refuse)
    result = call(get_bundle("plain").path, "--shape", 1, 1)
    assert result.exit_code == 0, result.output
    assert "not run: ONNX Runtime, op library: no library here" in result.stdout
    assert {row[2] for row in read_table(result.stdout)} == set(RUNS) - {OP_LIBRARY.name}


def test_a_changed_bundle_exits_1_and_a_wrong_one_2(tmp_path):
    bundle = copy_bundle("plain", tmp_path)
    with (bundle / "rotate.onnx").open("ab") as file:
        file.write(b"x")
    assert call(bundle).exit_code == 1
    assert call(tmp_path).exit_code == 2
    assert call(get_bundle("plain").path, "--shape", 0, 1).exit_code == 2


# ---- tools/bench/bench.py


def run_tool(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", *arguments])
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    return bench.main()


def test_the_tool_names_a_case_for_every_line_of_the_table():
    for pattern in (
        r"float32 half \(1, 32, 2048, 128\) 1 thread",
        r"float32 interleaved \(8, 32, 512, 64\) 2 threads",
        r"float16 interleaved .* 1 thread",
        r"bfloat16 half .* 1 thread",
        r"xPos half",
        r"partial half",
        r"in cache interleaved",
        r"decode half batch 1$",
        r"decode half batch 16$",
        r"in place 64 MB",
        r"in place, memory",
        r"reader 0\.5 MB",
        r"torch eager, fresh memory, threads 1",
    ):
        assert any(re.fullmatch(f"{pattern}.*", name) for name in bench_cases.CASES), pattern


def test_the_tool_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    file = tmp_path / "found.json"
    code = run_tool(monkeypatch, "--only", "decode half|share, 135M, decode", "--json", str(file))
    found = json.loads(file.read_text())
    printed = capsys.readouterr()
    verdicts = [result["verdict"] for result in found["results"]]
    assert code == int("missed" in verdicts)
    assert [result["case"] for result in found["results"]] == [
        "decode half batch 1",
        "decode half batch 16",
    ]
    for result in found["results"]:
        assert result["case"] in printed.out
        assert result["min"] <= result["median"] <= result["max"]
        assert set(result["seconds"]) == {OURS, *PEERS}
    assert [share["op"] for share in found["shares"]] == [OURS, *PEERS, PRIMITIVES]
    assert "135M, decode of 1 token" in printed.out
    assert "1 of 3: share, 135M, decode of 1 token" in printed.err
    assert str(tmp_path) not in file.read_text()


def test_what_a_copy_would_reach_is_said(monkeypatch):
    seconds = {OURS: 4.0, PEERS[0]: 9.0, PEERS[1]: 12.0, "reader": 2.0, "copy": 1.0}
    seconds |= {"plain stores": 4.0}
    pretended = {name: Spread((value,)) for name, value in seconds.items()}
    monkeypatch.setattr(bench_cases, "time_interleaved", lambda *arguments, **more: pretended)
    reader, plain = bench_cases.measure_reader("r", 0.0, case=SMALL)
    assert (reader.ratio.values, reader.of_copy.values) == ((9 / 4,), (9 / 3,))
    assert plain.to_dict()["of a copy"] is None
    options = {"case": SMALL, "threads": 1, "peer": None, "copy": None}
    peer, copy = bench_cases.measure_op("o", 0.0, **options)
    assert (peer.ratio.values, peer.to_dict()["of a copy"]) == ((9 / 4,), 9.0)
    assert copy.of_copy is None


@pytest.mark.parametrize(("noise", "warns"), [(0.01, False), (0.3, True)])
def test_the_tool_warns_of_noise_by_either_clock(monkeypatch, capsys, noise, warns):
    def pretend(call, seconds, clock):
        return 0.0 if clock is bench.time.thread_time else noise

    monkeypatch.setattr(bench, "measure_noise", pretend)
    monkeypatch.setattr(bench, "CASES", {"c": lambda *arguments: iter(())})
    assert run_tool(monkeypatch, "--only", "^c$") == 0
    warning = "warning: 2 threads: this machine is noisy: identical calls differ by 30%"
    assert (warning in capsys.readouterr().out) == warns


def test_the_tool_names_what_is_uncertain():
    results = [
        bench_cases.Result(name, "r", None, Spread(values))
        for name, values in {"quiet": (1.0, 1.1), "busy": (1.0, 2.0), "worse": (1.0, 3.0)}.items()
    ]
    assert bench.list_uncertain(results) == ["uncertain by more than 20%: busy; worse"]
    assert bench.list_uncertain(results[:1]) == []


def test_missed_is_exit_code_1(monkeypatch):
    for limit, code in ((1e-6, 0), (1e6, 1)):
        case = bench_cases.Result("c", "r", Goal(limit), Spread((1.0,)))
        monkeypatch.setattr(bench, "CASES", {"c": lambda *arguments, case=case: iter([case])})
        assert run_tool(monkeypatch, "--only", "^c$") == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing like it"), "matches no case"),
        (("--only", "("), "--only '('"),
        (("--only", "decode", "--plot", "x.png"), "--plot needs the case 'cost per element'"),
        (("--plot", "x.svg"), "--plot writes a .png, got x.svg"),
        (("--json", "no/such/folder.json"), "no/such is no folder"),
    ],
)
def test_mistakes_are_exit_code_2(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_plot_is_a_png(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "choose_lengths", lambda quick: [1, 2])
    file = tmp_path / "costs.png"
    assert run_tool(monkeypatch, "--only", "cost per", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        BenchCase(2, 4, 2, 6, 8, interleaved=True),
        BenchCase(2, 4, 2, 6, 8, rotary_dim=4),
        BenchCase(2, 4, 2, 6, 8, use_xpos=True),
        BenchCase(2, 4, 2, 6, 8, torch.float16),
    ],
    ids=["half", "interleaved", "partial", "xpos", "float16"],
)
@pytest.mark.parametrize("chain", [1, 3])
def test_peers_compute_the_same(case, chain):
    ops = (OURS, *PEERS) + ((PRIMITIVES,) if case.dtype == torch.float32 else ())
    runners = {op: make_runner(case, op, chain=chain) for op in ops}
    bench_cases.check_equal(runners)
    assert all(output.any() for output in runners[OURS].outputs.values())


def test_what_computes_something_else_is_not_timed():
    runners = {OURS: make_runner(SMALL, OURS), PEERS[0]: make_runner(SMALL, PEERS[0], chain=2)}
    with pytest.raises(AssertionError, match=f"{PEERS[0]} differs from {OURS} by "):
        bench_cases.check_equal(runners)


def test_the_layer_has_the_matmuls_of_its_model():
    sizes = bench_share.MODELS["135M"]
    model, _ = bench_share.make_layer(sizes, 1)
    weights = sum(len(t.raw_data) // 4 for t in model.graph.initializer if len(t.dims) == 2)
    assert weights == 576 * (2 * 576 + 2 * 3 * 64 + 3 * 1536)


def test_machine_is_described_without_a_name():
    found = machine.describe_machine()
    assert found["instruction set"] == op_library.instruction_set()
    assert found["versions"]["torch"] == torch.__version__
    assert machine.platform.node() not in json.dumps(found)
