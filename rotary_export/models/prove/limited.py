"""Which limits of a graph its model does not have: they are said, in words."""

from __future__ import annotations

import torch

from rotary_export.models.analyze import Analysis
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import Snapshot
from rotary_export.proof.models.cases import CaseSpec, make_case

_LARGEST = 4096  # size that a model is run at for this alone


def describe_limits(
    analysis: Analysis, constraints: SizeConstraints, snapshot: Snapshot
) -> list[str]:
    """Describe the limits past which the model itself runs, but takes another branch.

    Where a table ends, a model fails by itself, and no words are needed.

    Args:
        analysis: The model.
        constraints: The limits of its graph.
        snapshot: Of the model.
    """
    notes = []
    for limit, condition in constraints.reasons.items():
        name, relation, number = limit.split()
        past = int(number) + (1 if relation == "<=" else -1)
        if _runs(analysis, constraints, snapshot, name, past):
            notes.append(
                f"{limit} in this graph: the model itself accepts {past}, but takes the traced "
                f"branch only where {condition}; export it for other sizes with dynamic_shapes, or "
                "change the model there"
            )
    return notes


def _runs(
    analysis: Analysis, constraints: SizeConstraints, snapshot: Snapshot, name: str, size: int
) -> bool:
    """Return whether the model runs at a size past a limit."""
    if not 0 < size <= _LARGEST:
        return False
    sizes = analysis.plan(constraints).smallest | {name: size}
    case = make_case(analysis.inputs, analysis.input_values, CaseSpec(sizes))
    snapshot.restore_state()
    try:
        with torch.no_grad():
            analysis.flat(*case.tensors)
    except (Exception, SystemExit):  # whatever the model raises
        return False
    finally:
        snapshot.restore_state()
    return True
