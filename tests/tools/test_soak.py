"""The long runs, cut short: damaged files, and changed graphs for `fuse`."""

import itertools
import json
import subprocess
import sys

import fuse_graphs
import numpy as np
import op_calls
import pytest
from helpers.paths import ROOT


def run_tool(name, *arguments):
    command = [sys.executable, ROOT / "tools" / "soak" / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_threads_and_sessions_return_the_same_bits():
    found = op_calls.run_threads(threads=3, count=70, seed=1)
    assert (found["done"], found["wrong"]) == (210, [])
    found = op_calls.run_sessions(count=10, seed=1)
    assert (found["done"], found["wrong"]) == (10, [])


def test_other_bits_are_counted(monkeypatch):
    load, numbers = op_calls.rotary_export.load, itertools.count()

    class Wrong:
        """A session that is wrong at its 100th call of all."""

        def __init__(self, *arguments, **options):
            self.right = load(*arguments, **options)
            self.graph = self.right.graph

        def __call__(self, **inputs):
            outputs = self.right(**inputs)
            if next(numbers) == 100:
                outputs["key_out"] = -outputs["key_out"]
            return outputs

    monkeypatch.setattr(op_calls.rotary_export, "load", Wrong)
    assert len(op_calls.run_threads(threads=3, count=70, seed=1)["wrong"]) == 1
    numbers = itertools.count(95)
    assert op_calls.run_sessions(count=10, seed=1)["wrong"] == ["session 4"]


def test_mutations_are_refused_or_do_no_harm():
    found = run_tool("mutations.py", "--seed", 1, "--count", 12)
    assert found["mutations"] == 12
    assert min(found["succeeded"], found["refused"]) > 0


def test_changed_graphs_are_refused_or_stay_equal():
    found = run_tool("fuse_graphs.py", "--seed", 1, "--count", 100)
    assert found["graphs"] == 100
    assert sum(found["outcomes"].values()) == 100
    assert found["outcomes"]["fused, equal"] >= 20
    assert found["outcomes"]["refused"] >= 10


def test_the_fuzzer_sees_a_graph_that_is_not_equal(monkeypatch):
    """As where `fuse` does not compare, and returns another graph."""
    found = None
    for number in range(20):
        with monkeypatch.context() as patched:
            patched.setattr(fuse_graphs, "run", lambda model, feeds: [model.graph.name])
            patched.setattr(fuse_graphs, "_compare", lambda *_: "output 0 is 1, not 2")
            counts, found = fuse_graphs.try_graph(1, number, lambda _: None)
        if "unequal" in counts:
            break
    assert found["unequal"]
    assert found["unequal"][0].endswith("at batch 1, length 5: output 0 is 1, not 2")


def test_what_the_fuzzer_calls_equal(monkeypatch):
    old = [np.array([1.0, np.nan, np.inf, -3.0], np.float32)]
    results = iter(
        [
            [np.array([1.0, np.nan, np.inf, -3.00003], np.float32)],
            [np.array([1.0, np.nan, np.inf, -3.001], np.float32)],
            [np.array([1.0, 0.0, np.inf, -3.0], np.float32)],
            [np.array([1.0], np.float32)],
        ]
    )
    monkeypatch.setattr(fuse_graphs, "run", lambda model, feeds: next(results))
    assert fuse_graphs._compare(old, None, {}) == ""
    assert fuse_graphs._compare(old, None, {}).startswith("output 0 is -3.00099")
    assert fuse_graphs._compare(old, None, {}) == "output 0 is 0 at (1,), not nan"
    assert "is float32(1,), not" in fuse_graphs._compare(old, None, {})
    monkeypatch.setattr(fuse_graphs, "run", pytest.fail)
