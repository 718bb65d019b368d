"""What the tests of OpenVINO and tract share: both run a kit's `Model` in an environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from helpers.cases import FORMS
from helpers.function_bodies import make_with_bodies

from rotary_export.op import spec
from rotary_export.op.onnx_schema import register_schema

Arrays = Mapping[str, np.ndarray]

# Runs every case in one process; says what the kit says of itself.
_DRIVER = """
import json, sys
import run
from arrays import read_arrays, write_arrays
model = run.Model()
for folder in sys.argv[1:]:
    write_arrays(f"{folder}/out", model(read_arrays(folder, model.inputs)))
print(json.dumps(len(getattr(model, "ropes", ()))))
"""


def run_python(environment: Path, kit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a kit's folder, with its environment."""
    command = [str(environment / "bin" / "python"), "-B", *arguments]
    return subprocess.run(command, cwd=kit, capture_output=True, text=True, timeout=300)


def run_cases(
    environment: Path, kit: Path, cases: Sequence[Arrays]
) -> tuple[list[dict[str, Any]], int]:
    """Run cases; return their outputs, and how many operations are the runtime's own RoPE."""
    folders = []
    for index, case in enumerate(cases):
        folders.append(kit / f"case{index}")
        folders[-1].mkdir()
        for name, array in case.items():
            np.save(folders[-1] / f"{name}.npy", array)
    done = run_python(environment, kit, "-c", _DRIVER, *map(str, folders))
    assert done.returncode == 0, done.stderr
    outputs = [
        {file.stem: np.load(file) for file in sorted((folder / "out").iterdir())}
        for folder in folders
    ]
    return outputs, json.loads(done.stdout.splitlines()[-1])


def name_shapes(cases: Sequence[Arrays]) -> list[str]:
    """Return batch and length of each case, by its position ids."""
    return ["x".join(map(str, case["position_ids"].shape)) for case in cases]


def check_bad_input(environment: Path, kit: Path, case: Arrays) -> None:
    """Give `plain` what a newcomer gets wrong: one line that names it, nothing written."""
    ids, query = case["position_ids"], case["query"]
    wrong: list[tuple[str, Arrays]] = [
        ("position_ids must be in [0, 31], got 32", {"position_ids": ids * 0 + 32}),
        ("position_ids must be in [0, 31], got -1", {"position_ids": ids * 0 - 1}),
        ("position_ids must be int64, got int32", {"position_ids": ids.astype(np.int32)}),
        ("query must be float32, got float64", {"query": query.astype(np.float64)}),
        ("query must have shape ['batch_size', 'num_heads', 'seq_len', 24]", {"query": query[0]}),
        ("where batch_size is", {"position_ids": ids[:, 1:]}),
        ("key.npy can't be read: ", {"key": None}),
    ]
    for index, (message, changed) in enumerate(wrong):
        folder, out = kit / f"wrong{index}", kit / f"wrong{index}-out"
        folder.mkdir()
        for name, array in (case | changed).items():
            if array is not None:
                np.save(folder / f"{name}.npy", array)
        done = run_python(environment, kit, "run.py", str(folder), str(out))
        assert done.returncode == 1
        assert message in done.stderr
        assert "\n" not in done.stderr.strip()
        assert not out.exists()


def run_forms(environment: Path, folder: Path, opset: int, program: str) -> Iterator[Any]:
    """Run one node of every float32 form, as its inlined body.

    Args:
        environment: Of the runtime.
        folder: To write in.
        opset: Of the bodies.
        program: Defines `run(file, inputs)`, which returns outputs by name, and the operations
            that are the runtime's own RoPE.

    Yields:
        The form, outputs, what eager gives, and that number.
    """
    register_schema()
    forms = [case for case in FORMS if case.types == ("float32", "float32")]
    wants = []
    for case in forms:
        inputs = case.make_inputs(3)
        wants.append(dict(zip(spec.OUTPUTS, case.compute_eager(inputs), strict=False)))
        model = make_with_bodies(case, opset=opset, dynamic=True)
        del model.graph.value_info[:]
        onnx.save(onnx.inliner.inline_local_functions(model), folder / f"{case.id}.onnx")
        np.savez(folder / f"{case.id}.npz", **{k: v.numpy() for k, v in inputs.items()})
    names = [case.id for case in forms]
    done = run_python(environment, folder, "-c", program + _RUN_FORMS, *names)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    for case, want, count in zip(forms, wants, counts, strict=True):
        with np.load(folder / f"{case.id}.out.npz") as got:
            yield case, dict(got), {k: v.numpy() for k, v in want.items()}, count


_RUN_FORMS = """
import json, sys
import numpy as np
counts = []
for name in sys.argv[1:]:
    with np.load(f"{name}.npz") as inputs:
        outputs, count = run(f"{name}.onnx", dict(inputs))
    np.savez(f"{name}.out.npz", **outputs)
    counts.append(count)
print(json.dumps(counts))
"""
