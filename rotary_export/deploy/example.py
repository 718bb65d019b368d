"""Inputs that tell a wrong runtime from a right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import Manifest
from rotary_export.proof.models.cases import Run
from rotary_export.proof.sample_inputs import make_inputs
from rotary_export.runtime.session import Session
from rotary_export.runtime.tensors import is_torch

SHAPE = (2, 7)  # batch_size, seq_len


def make_example(
    manifest: Manifest, graph: str, batch_size: int, seq_len: int, run: Run | None = None
) -> Mapping[str, Any]:
    """Make inputs of `rotate` (numpy) or `model` (torch), each row with positions of its own.

    `run` runs the graph, to fill a key/value cache: random keys would amplify rounding errors.

    Row r counts in steps of r + 1. Attention depends on distances only: with rows that are merely
    shifted, a runtime that swaps the positions of two rows would give the same result.
    """
    inputs = dict(make_inputs(manifest, graph, batch_size, seq_len, run))
    info = next((i for i in manifest.graphs[graph].inputs if i.name == "position_ids"), None)
    if info is None or len(info.shape) < 2:
        return inputs
    ids = np.asarray(inputs["position_ids"])
    ids = ids * np.arange(1, ids.shape[-2] + 1)[:, None]
    rows = info.limits[1] + 1 if info.limits else manifest.config.get("max_positions")
    ids = ids % rows if rows else ids
    if is_torch(inputs["position_ids"]):
        import torch

        return inputs | {"position_ids": torch.from_numpy(ids)}
    return inputs | {"position_ids": ids}


def run_by_position(session: Session) -> Run:
    """Return what runs a session on tensors in the order of its inputs."""

    def run(tensors: Sequence[Any]) -> dict[str, Any]:
        names = [info.name for info in session.graph.inputs]
        return session(**dict(zip(names, tensors, strict=True)))

    return run
