"""The proof as a table."""

from __future__ import annotations

from rotary_export.cli.report import print_report
from rotary_export.cli.terminal import Terminal


def make_row(output, ulp=1.0, runtime="onnxruntime"):
    return {
        "graph": "model",
        "output": output,
        "runtime": runtime,
        "kernel_path": "native",
        "eager": {"exact": False, "max_ulp": ulp},
        "eager_allowed": 8.0,
        "oracle_allowed": None,
        "noise": 1.0,
        "passed": ulp <= 8,
    }


def test_a_grown_cache_is_a_row_of_each_runtime_but_for_what_failed(capsys):
    names = [f"present.{index}.{kind}" for index in range(30) for kind in ("key", "value")]
    ulps = {"present.17.value": 2.5, "present.3.key": 9.0}
    runs = ("onnxruntime", "program")
    rows = [make_row("logits", runtime=run) for run in runs]
    rows += [make_row(name, ulps.get(name, 1.0), run) for run in runs for name in names]
    report = {"rows": rows, "shapes": {}, "skipped": {}, "unverified": {}, "notes": []}
    print_report(Terminal(as_json=False), report | {"reference": "eager PyTorch"})
    header, _, *lines, kernel, last = capsys.readouterr().out.splitlines()
    assert (header, kernel) == ("model, error in ulp:", "kernel native: onnxruntime; program")
    assert [line.split("  ")[0] for line in lines] == [
        "logits",
        "logits",
        "present.* (worst of 59)",
        "present.3.key",
        "present.* (worst of 59)",
        "present.3.key",
    ]
    assert lines[2].split()[-4:] == ["2.5", "8", "1", "ok"]
    assert lines[3].split()[-4:] == ["9", "8", "1", "FAILED"]
    assert last == "FAILED: 2 of 122 comparisons are out of tolerance"
