"""The runtimes of inlined graphs, OpenVINO and tract: each runs a kit's `Model`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from helpers.bundles import make_folder
from helpers.cases import FORMS
from helpers.function_bodies import make_with_bodies
from helpers.target_runs import TargetRun, record, require

from rotary_export.op import spec
from rotary_export.op.onnx_schema import register_schema

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class InlineRuntime:
    """A runtime that opens `GRAPH.inlined.onnx`.

    Attributes:
        name: Of the target and of the environment.
        row: In the table of targets.
        version: A program that prints the version.
        opset: Of the inlined graph.
        shapes: Batch and length of the cases of `rotate`.
        rotate: By dtype and bundle, the number of operations that are the runtime's own RoPE, and
            the tolerance.
        run: A program that defines `run(file, inputs)`; it returns outputs by name, and that
            number.
    """

    name: str
    row: str
    version: str
    opset: int
    shapes: Sequence[tuple[int, int]]
    rotate: Mapping[str, Mapping[str, tuple[int, str]]]
    run: str

    @property
    def environment(self) -> Path:
        """The folder of its environment; skips where it is not installed."""
        return require(self.name)

    def record(
        self, graph: str, dtype: str, cases: Sequence[Arrays], worst: float, exact: bool, note: str
    ) -> None:
        """Keep a row for the table of targets."""
        done = run_python(self.environment, make_folder(), "-c", self.version)
        version = done.stdout.strip().partition("-")[0]
        shapes = name_shapes(cases)
        record(
            TargetRun(
                self.row, version, graph, "ran", "portable", [dtype], shapes, worst, exact, note
            )
        )


OPENVINO = InlineRuntime(
    "openvino",
    "OpenVINO",
    "import openvino as ov; print(ov.__version__)",
    23,
    ((1, 1), (3, 7), (5, 1), (2, 32), (0, 3), (2, 0)),
    {
        # Of half the channels, in halves: OpenVINO runs plain operations.
        "float32": {"plain": (0, "native"), "xpos": (2, "native-xpos")},
        "float16": {"float16": (2, "native-half")},
        "bfloat16": {"bfloat16": (2, "bf16-truncated")},
    },
    """
import openvino as ov
def run(file, inputs):
    model = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = {port.any_name: value for port, value in model(inputs).items()}
    nodes = model.get_runtime_model().get_ordered_ops()
    return outputs, sum(n.get_rt_info()["layerType"].value == "RoPE" for n in nodes)
""",
)
TRACT = InlineRuntime(
    "tract",
    "tract",
    "import tract; print(tract.version())",
    18,
    ((1, 1), (3, 7), (5, 1), (2, 32)),
    {
        "float32": {"plain": (0, "exact"), "xpos": (0, "exact"), "opset18": (0, "exact")},
        "float16": {"float16": (0, "exact")},
        "float64": {"float64": (0, "exact")},
    },
    """
import tract
def run(file, inputs):
    model = tract.onnx().load(file)
    names = [model.input_name(index) for index in range(model.input_count())]
    for index, name in enumerate(names):
        kind = {"float32": "f32", "int64": "i64"}[inputs[name].dtype.name]
        model.set_input_fact(index, ",".join([*map(str, inputs[name].shape), kind]))
    outputs = [model.output_name(index) for index in range(model.output_count())]
    results = model.into_model().into_runnable().run([inputs[name] for name in names])
    return {name: value.to_numpy() for name, value in zip(outputs, results)}, 0
""",
)

# Runs every case in one process; prints the number of the runtime's own RoPE operations.
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
    command = [str(environment / "bin" / "python"), *arguments]
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
    """Run `plain` with typical mistakes: one line that names each, nothing written."""
    ids, query = case["position_ids"], case["query"]
    wrong: list[tuple[str, Arrays]] = [
        ("position_ids must be in [0, 32), got 32 at batch 0", {"position_ids": ids * 0 + 32}),
        ("position_ids must be in [0, 32), got -1 at batch 0", {"position_ids": ids * 0 - 1}),
        ("position_ids must be int64, got int32", {"position_ids": ids.astype(np.int32)}),
        ("query must be float32, got float64", {"query": query.astype(np.float64)}),
        ("query must have shape (batch_size, num_heads, seq_len, 24), got", {"query": query[0]}),
        ("must have shape (batch_size, seq_len), batch_size=", {"position_ids": ids[:, 1:]}),
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


def run_forms(runtime: InlineRuntime, folder: Path) -> Iterator[Any]:
    """Run one node of every float32 form, as its inlined body.

    Args:
        runtime: What runs it.
        folder: To write in.

    Yields:
        The form, outputs, eager's outputs, and the number of the runtime's own RoPE operations.
    """
    register_schema()
    forms = [case for case in FORMS if case.types == ("float32", "float32")]
    wants = []
    for case in forms:
        inputs = case.make_inputs(3)
        wants.append(dict(zip(spec.OUTPUTS, case.compute_eager(inputs), strict=False)))
        model = make_with_bodies(case, opset=runtime.opset, dynamic=True)
        del model.graph.value_info[:]
        onnx.save(onnx.inliner.inline_local_functions(model), folder / f"{case.id}.onnx")
        np.savez(folder / f"{case.id}.npz", **{k: v.numpy() for k, v in inputs.items()})
    names = [case.id for case in forms]
    done = run_python(runtime.environment, folder, "-c", runtime.run + _RUN_FORMS, *names)
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
