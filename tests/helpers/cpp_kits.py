"""The C++ kits with libtorch: how they are built and run, and the checks that both must pass."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.bundles import make_arrays, run_eager, to_numpy
from helpers.target_runs import (
    TargetRun,
    compare,
    get_model,
    get_model_allowed,
    make_model_arrays,
    record,
    run_model_eager,
)
from helpers.text_decoders import NUM_TOKENS, PROMPTS, generate_rows

from rotary_export.bundle.dims import is_past
from rotary_export.bundle.manifest import read_manifest

VERSION = torch.__version__.partition("+")[0]
MODEL_SHAPES = ((1, 1), (3, 17), (2, 40))  # batch_size, seq_len; none was traced
MISSING = None  # of an input: its file does not exist


@dataclass(frozen=True)
class CppKit:
    """A kit that runs files of one format.

    Attributes:
        name: Of the target.
        row: In the table of targets.
        suffix: Of the files that it opens.
        wrong_file: The message for another file.
        path: In the table of targets.
    """

    name: str
    row: str
    suffix: str
    wrong_file: str
    path: str

    def record(
        self, graph: str, dtype: str, shapes: Sequence[tuple[int, int]], worst: float, exact: bool
    ) -> None:
        """Keep a row for the table of targets."""
        names = [f"{batch}x{length}" for batch, length in shapes]
        version = f"torch {VERSION}"
        record(TargetRun(self.row, version, graph, "ran", self.path, [dtype], names, worst, exact))

    def check_rotate(
        self,
        program: Path,
        kit: Path,
        name: str,
        shapes: Sequence[tuple[int, int]],
        folder: Path,
    ) -> None:
        """Run the graph `rotate` of a bundle of `bundles.SPECS`: it has the bits of eager."""
        cases = [make_arrays(name, batch=b, seq_len=s, seed=s) for b, s in shapes]
        folders = [write_folder(folder / str(i), case) for i, case in enumerate(cases)]
        done = run_kit(program, kit, f"rotate{self.suffix}", *folders)
        assert done.returncode == 0, done.stderr
        for each, case in zip(folders, cases, strict=True):
            want = {key: to_numpy(value) for key, value in run_eager(name, case).items()}
            got = read_folder(each, want)
            assert {k: (v.shape, v.dtype, v.tobytes()) for k, v in got.items()} == {
                k: (v.shape, v.dtype, v.tobytes()) for k, v in want.items()
            }
        self.record("rotate", str(case["query"].dtype), shapes, 0.0, exact=True)

    def check_model(self, program: Path, kit: Path, folder: Path) -> None:
        """Run the small whole model: it is within tolerance of eager. A cache is empty."""
        cases = [make_model_arrays(b, s) for b, s in MODEL_SHAPES]
        caches = [
            i for i in read_manifest(kit / "bundle").graphs["model"].inputs if is_past(i.name)
        ]
        folders = []
        for case in cases:
            sizes = {"batch_size": len(case["input_ids"]), "past_seq_len": 0}
            shapes = {i.name: [sizes.get(dim, dim) for dim in i.shape] for i in caches}
            empty = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
            folders.append(write_folder(folder / str(len(folders)), case | empty))
        done = run_kit(program, kit, f"model{self.suffix}", *folders)
        assert done.returncode == 0, done.stderr
        allowed = get_model_allowed()
        results = []
        for each, case in zip(folders, cases, strict=True):
            want = run_model_eager(case)
            got = {"logits": read_folder(each, want)["logits"]}
            results.append(compare(got, want, allowed))
        worst, exact = max(r[0] for r in results), all(r[1] for r in results)
        self.record("model", "float32", MODEL_SHAPES, worst, exact)

    def check_generates(self, program: Path, kits: Sequence[Path], note: str) -> None:
        """Generate with decoders of the small model: the tokens are those of transformers."""
        expected = [generate_rows(get_model(), [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]
        words = ["--generate", str(NUM_TOKENS), *(",".join(map(str, row)) for row in PROMPTS)]
        for kit in kits:
            done = run_kit(program, kit, f"model{self.suffix}", *words)
            assert done.returncode == 0, done.stderr
            rows = [[int(word) for word in line.split(",")] for line in done.stdout.splitlines()]
            assert rows == expected
            assert "tokens/s" in done.stderr
        shapes = [f"1x{len(prompt)}" for prompt in PROMPTS]
        note = f"{NUM_TOKENS} tokens, all those of model.generate; {note}"
        version = f"torch {VERSION}"
        record(
            TargetRun(
                self.row, version, "decoder", "ran", self.path, ["float32"], shapes, note=note
            )
        )

    def check_mistake(self, program: Path, kit: Path, mistake: str, folder: Path) -> None:
        """Run one of MISTAKES or FILES: the error is one line, and nothing is written."""
        if mistake in FILES:
            file, changed = FILES[mistake], {}
            message = f"bundle/{file} {self.wrong_file}; torch: "
        else:
            file = f"rotate{self.suffix}"
            changed, message = MISTAKES[mistake]
        inputs = make_arrays("plain") | changed
        case = write_folder(folder, {k: v for k, v in inputs.items() if v is not MISSING})
        done = run_kit(program, kit, file, case)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (case / "out").exists()


LIBTORCH = CppKit(
    "cpp-libtorch", "C++, libtorch", ".pt", "must be a TorchScript file, GRAPH.pt", "TorchScript"
)
AOTI = CppKit(
    "cpp-aoti",
    "C++, AOTInductor",
    ".aoti.pt2",
    "must be a compiled graph, GRAPH.aoti.pt2",
    "compiled (AVX2)",
)

FILES = {"no file": "nix.pt2", "a program": "rotate.pt2"}  # that no kit opens
# Changed inputs of `plain` at batch 3, length 7, and the message.
MISTAKES: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "no input": ({"key": MISSING}, "key.npy can't be read"),
    "type of ids": (
        {"position_ids": np.zeros((3, 7), np.int32)},
        "position_ids must be int64, got Int",
    ),
    "type": ({"query": np.zeros((3, 4, 7, 24))}, "query must be float32, got Double"),
    "shape of ids": (
        {"position_ids": np.zeros((1, 7), np.int64)},
        "position_ids must have shape (batch_size, seq_len), batch_size=3, num_heads=4, "
        "num_kv_heads=2, seq_len=7, got [1, 7]",
    ),
    "shape": (
        {"key": np.zeros((3, 2, 6, 24), np.float32)},
        "key must have shape (batch_size, num_kv_heads, seq_len, 24), batch_size=3, num_heads=4, "
        "num_kv_heads=2, seq_len=7, got [3, 2, 6, 24]",
    ),
    "bad id": (
        {"position_ids": np.where(np.arange(21).reshape(3, 7) == 19, 32, 31)},
        "position_ids must be in [0, 32), got 32 at batch 2, row 5",
    ),
    "negative id": (
        {"position_ids": np.full((3, 7), -1)},
        "position_ids must be in [0, 32), got -1 at batch 0, row 0",
    ),
}


def build_kit(kit: Path) -> Path:
    """Build a kit as its page says, and return the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-B", "build", prefix], ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return kit / "build" / "run"


def run_kit(program: Path, kit: Path, file: str, *folders: Path | str, **environment: str) -> Any:
    """Run a program where its kit is."""
    command = [program, f"bundle/{file}", "signature.txt", *folders]
    return subprocess.run(
        command, cwd=kit, capture_output=True, text=True, check=False, env=environment or None
    )


def check_example(program: Path, kit: Path, file: str) -> None:
    """Run the example as the page says."""
    done = run_kit(program, kit, file, "example")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("differs from expected by 0\n") == 2


def write_folder(folder: Path, arrays: Mapping[str, Any]) -> Path:
    """Write inputs for the program."""
    folder.mkdir()
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return folder


def read_folder(folder: Path, want: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the outputs of the program; numpy lacks bfloat16, so `want` has the types."""
    arrays = {file.stem: np.load(file) for file in (folder / "out").glob("*.npy")}
    return {
        name: value.view(want[name].dtype) if value.dtype.kind == "V" else value
        for name, value in arrays.items()
    }
