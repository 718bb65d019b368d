"""What the tests of deploy's targets share: bundles, environments, the row that each reports."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundles import make_folder
from helpers.fuse_graphs import make_model as make_half_model
from helpers.paths import ROOT
from helpers.tiny_models import make_inputs, make_model

import rotary_export
from rotary_export.models.fused.bundle import write_fused_bundle

ENVIRONMENTS = ROOT / "build" / "targets"  # of tools/targets/setup_targets
ROWS = ENVIRONMENTS / "rows"  # read by tools/targets/targets.py


@dataclass(frozen=True)
class TargetRun:
    """What one test showed of one target.

    Attributes:
        target: The title of the kit's page, and what to add: "C++, ONNX Runtime".
        version: Of what ran it.
        graph: "rotate" or "model".
        how: "ran", "parsed" or "compiled"; only "ran" is proof.
        path: "fused", "portable", "TorchScript", ...
        dtypes: Of query and key.
        shapes: Those that were tried, as "2x7": batch and length.
        max_error: Largest absolute difference from eager PyTorch; None where nothing ran.
        exact: Whether every result had the bits of eager.
        note: Other facts.
    """

    target: str
    version: str
    graph: str
    how: str
    path: str
    dtypes: Sequence[str]
    shapes: Sequence[str] = ()
    max_error: float | None = None
    exact: bool = False
    note: str = ""


def record(run: TargetRun) -> None:
    """Keep a run for the table of tools/targets/README.md."""
    ROWS.mkdir(parents=True, exist_ok=True)
    name = "-".join((run.target, run.graph, run.path, *run.dtypes))
    name = "".join(c if c.isalnum() else "-" for c in name)
    (ROWS / f"{name}.json").write_text(json.dumps(asdict(run), indent=1))


def require(name: str) -> Path:
    """Return the folder that `tools/targets/setup_targets NAME` made; where it is not there, skip.

    In CI nothing is skipped.
    """
    folder = ENVIRONMENTS / name
    if not (folder / "ready").is_file():
        why = f"{name} is not installed: tools/targets/setup_targets {name}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return folder


def read_version(python: Path, package: str) -> str:
    """Return the version of a package in the environment of a target."""
    (found,) = python.parent.parent.glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return found.name.removeprefix(f"{package}-").removesuffix(".dist-info")


@functools.cache
def get_model() -> torch.nn.Module:
    """Return the small whole model: llama, two layers, random weights."""
    return make_model("llama")


@functools.cache
def get_model_bundle() -> rotary_export.Bundle:
    """Return its bundle, exported once per process; nobody writes into it."""
    model = get_model()
    return rotary_export.export_model(model, make_inputs(model), make_folder() / "llama")


@functools.cache
def get_fused_bundle() -> rotary_export.Bundle:
    """Return a bundle of `fuse`: query and key, each rotated; nobody writes into it."""
    return write_fused_bundle(rotary_export.fuse(make_half_model()), make_folder() / "fused")


def get_model_allowed() -> float:
    """Return the largest error that its proof allows, relative to the largest logit."""
    ulp = max(row.eager_allowed for row in get_model_bundle().report.rows)
    return ulp * float(np.finfo(np.float32).eps)


def make_model_arrays(batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """Make inputs of the model, with positions that no row shares with another.

    Rows count in steps of 1, 2, 3, ...: attention sees distances alone, so that a mere shift
    would not reveal a runtime that swaps the positions of two rows.
    """
    ids = np.arange(batch_size * seq_len).reshape(batch_size, seq_len) % 96
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(seq_len) * np.arange(1, batch_size + 1)[:, None],
    }


def run_model_eager(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return eager's outputs of the model."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        return {"logits": get_model()(**tensors, use_cache=False).logits.numpy()}


def compare(got: Mapping[str, Any], want: Mapping[str, Any], allowed: float) -> tuple[float, bool]:
    """Assert that outputs agree.

    Args:
        got: By name.
        want: By name, of eager.
        allowed: Largest difference, relative to the largest magnitude of the output; 0: equal to
            the bit.

    Returns:
        The largest absolute difference, and whether all are equal to the bit.
    """
    assert got.keys() == want.keys()
    worst, exact = 0.0, True
    for name, right in want.items():
        left, right = np.asarray(got[name]), np.asarray(right)
        assert left.shape == right.shape, name
        assert left.dtype == right.dtype, name
        exact &= left.tobytes() == right.tobytes()
        error = np.abs(left.astype(np.float64) - right.astype(np.float64))
        index = np.unravel_index(int(error.argmax()), error.shape)
        scale = np.abs(right.astype(np.float64)).max()
        assert error.max() <= allowed * scale, f"{name} at {index}: {left[index]}, {right[index]}"
        worst = max(worst, float(error.max()))
    assert exact or allowed > 0
    return worst, exact
