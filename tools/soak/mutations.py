"""Damage bundles and ONNX files at random, with the right hashes, and do with them what users do.

    python tools/soak/mutations.py --count 3000 --json tools/results/mutations.json

Each mutation goes through `load`, `inspect`, `verify`, `run`, `fuse` and `deploy`. A call may
succeed or raise one RotaryExportError of one line. Counted are tracebacks (any other exception),
signals that end the process, control codes in what is printed, and files outside the bundle that
are opened. A mutation follows from the seed and its number: `--first NUMBER --count 1` repeats it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from damage import CHANNELS, HEADS, ROWS, damage, make_subjects
from workers import run_apart, run_command, try_all

CALLS = ("load", "inspect", "verify", "run", "fuse", "deploy")
KINDS = ("tracebacks", "control_codes", "opened_outside")
# Targets whose kits need nothing that is not installed.
TARGETS = ("cpp-onnxruntime", "cpp-libtorch", "node", "triton", "mlserver", "tract", "openvino")


class Watch:
    """Sees which files of a folder any code of this process opens."""

    _OPEN, _ACCESS, _NONBLOCK = 0x20, 0x1, 0o4000

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._file = library.inotify_init1(self._NONBLOCK)
        for path in (folder, *folder.iterdir()):
            if (
                library.inotify_add_watch(self._file, os.fsencode(path), self._OPEN | self._ACCESS)
                < 0
            ):
                raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def has_seen(self) -> bool:
        """Return whether one was opened since the last call."""
        try:
            return bool(os.read(self._file, 65536))
        except BlockingIOError:
            return False


def list_calls(
    draw: random.Random, subject: str, path: Path, folder: Path
) -> dict[str, Callable[[], Any]]:
    """Return what is done with a damaged subject, by name."""
    import rotary_export
    from rotary_export.cli.main import cli

    is_bundle = subject != "file"
    target = path if is_bundle else path / "model.onnx"
    code = ["--allow-code"] if draw.random() < 0.25 else []
    runtime = draw.choice(("torchscript", "program", "onnxruntime")) if code else "onnxruntime"
    shape = (2, HEADS, ROWS if subject == "static" else 3, CHANNELS)
    x, ids = np.ones(shape, np.float32), np.arange(3)[None].repeat(2, 0)
    inputs: dict[str, Any] = {"query": x, "key": x, "position_ids": ids}
    if subject == "static":
        inputs = {"query": x, "key": x, "seq_len": np.array(3)}
    elif subject in ("fused", "file"):
        inputs = {"x": x, "position_ids": ids}

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    def load() -> None:
        if is_bundle:
            session = rotary_export.load(path, runtime=runtime, allow_code=bool(code))
            session(**inputs)

    def run() -> Any:
        np.savez(folder / "in.npz", **inputs)
        how = ["--runtime", runtime, *code] if is_bundle else []
        out = ("--out", folder / "out.npz", "--force")
        return invoke("run", target, "--input", folder / "in.npz", *how, *out)

    onnx_file = path / draw.choice(["rotate.onnx", "tables.onnx"])
    if subject in ("fused", "file"):
        onnx_file = path / "model.onnx"
    kit = draw.choice(TARGETS)
    return {
        "load": load,
        "inspect": lambda: invoke("inspect", target),
        "verify": lambda: invoke("verify", target, *code),
        "run": run,
        "fuse": lambda: invoke("fuse", onnx_file, folder / "fused.onnx", "--force"),
        "deploy": lambda: invoke("deploy", kit, target, "--out", folder / "kit", "--force", *code),
    }


def try_mutation(
    seed: int, subjects: Path, number: int, report: Callable[[str], None]
) -> tuple[Counter[str], dict[str, list[str]]]:
    """Damage one subject and do everything with it.

    Args:
        seed: Of all mutations.
        subjects: As `make_subjects` wrote them.
        number: Of the mutation.
        report: Called with what is being done, for the case of a signal.

    Returns:
        How many calls succeeded and were refused, and the findings.
    """
    from rotary_export.errors import RotaryExportError

    draw = random.Random(f"{seed}-{number}")
    subject = draw.choice(("plain", "plain", "static", "fused", "file"))
    counts: Counter[str] = Counter()
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=subjects) as name:
        folder = Path(name)
        path = Path(shutil.copytree(subjects / subject, folder / subject))
        shutil.copytree(subjects / "outside", folder / "outside")
        os.chdir(folder)
        what = ""
        for _ in range(draw.choice((1, 1, 2))):
            try:
                what = " and ".join(filter(None, (what, damage(draw, path, subject != "file"))))
            except (ValueError, LookupError, OSError, TypeError, zipfile.BadZipFile):
                break  # damaged too much to be damaged once more
            except Exception as error:
                if type(error).__name__ != "DecodeError":
                    raise
                break
        watch = Watch(folder / "outside")
        for call, act in list_calls(draw, subject, path, folder).items():
            if call == "fuse" and what.endswith("symlink"):
                continue  # the file is named by the user
            place = f"{number}: {call} of {subject}, {what}"
            report(place)
            printed = ""
            try:
                result = act()
                error = getattr(result, "exception", None)
                printed = getattr(result, "output", "")
                if error is not None and not isinstance(error, SystemExit):
                    raise error
                counts["refused" if error else "succeeded"] += 1
            except RotaryExportError as error:
                printed = str(error)
                counts["refused"] += 1
                if len(printed.splitlines()) != 1:
                    found["tracebacks"].append(f"{place}: {len(printed.splitlines())} lines")
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                text = " ".join(str(error).split())[:200]
                found["tracebacks"].append(f"{place}: {type(error).__name__} at {where}: {text}")
            if any(not c.isprintable() and c not in "\n" for c in printed):
                found["control_codes"].append(place)
            if watch.has_seen():
                found["opened_outside"].append(place)
        os.chdir(subjects)
        os.close(watch._file)
    return counts, found


def soak(first: int, count: int, seed: int, jobs: int, seconds: float) -> dict[str, Any]:
    """Try mutations; return the counts and what was found, as the JSON has it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        run_apart(make_subjects, Path(name))
        try_one = functools.partial(try_mutation, seed, Path(name))
        found = try_all(try_one, range(first, first + count), jobs, seconds)
    return {
        "seed": seed,
        "first": first,
        "mutations": found.done,
        "calls": list(CALLS),
        "succeeded": found.counts["succeeded"],
        "refused": found.counts["refused"],
        **{kind: [] for kind in KINDS},
        **found.findings,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    sys.exit(run_command(__doc__ or "", 3000, KINDS, soak))
