"""`tools/matrix`: a wrong or refused run is not taken for an equal one."""

import json
from pathlib import Path

import matrix
import numpy as np
import pytest
from matrix_report import tabulate_packages, tabulate_runtimes

RESULTS = Path(matrix.ROOT, "tools", "results", "matrix.json")
WANT = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (0.0, "bits"),
        (2.0**-20, "equal"),
        (2.0**-14, "WRONG: y is off by 6.1e-05 of its largest"),
        (np.nan, "WRONG: y is off by nan of its largest"),
    ],
)
def test_outputs_are_judged(tmp_path, error, outcome):
    got = WANT.copy()
    got[2] += error
    np.savez(tmp_path / "model.want.npz", y=WANT)
    np.savez(tmp_path / "model.op.npz", y=got)
    rows = {f"{tmp_path.name}, op library": ""}
    assert matrix._judge(tmp_path, "op library", rows, 0) == outcome


def test_a_refusal_and_a_crash_are_told_apart(tmp_path):
    rows = {f"{tmp_path.name}, op library": "refused: needs 1.25"}
    assert matrix._judge(tmp_path, "op library", rows, 0) == "refused: needs 1.25"
    assert matrix._judge(tmp_path, "op library", rows, -11) == "WRONG: the process ended with -11"


def test_the_committed_results_have_a_table_and_nothing_wrong():
    found = json.loads(RESULTS.read_text())
    headers, rows = tabulate_runtimes(found["runtimes"])
    assert headers[1:] == tuple(matrix.RUNTIMES)
    assert {cell for row in rows for cell in row[1:]} == {"bits", "equal", "refused"}
    headers, rows = tabulate_packages(found["packages"])
    assert all(len(row) == len(headers) for row in rows)
    assert "WRONG" not in json.dumps(found)
