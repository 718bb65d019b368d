"""The proof of an export: the graph against the model itself, until it holds or can't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.analyze import Analysis
from rotary_export.models.arguments import FlatModel
from rotary_export.models.decoder.generate import compare_generated
from rotary_export.models.error_text import describe_error
from rotary_export.models.prove.find_difference import find_difference
from rotary_export.models.prove.own_tables import TableRecorder
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import Snapshot
from rotary_export.models.trace.trace_patches import disable_caches
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.proof.models.cases import Case, CaseSpec, Run
from rotary_export.proof.models.compare import compare_model
from rotary_export.proof.models.far_tables import compare_far_tables
from rotary_export.proof.models.plan import Plan, list_unreached, plan_cases
from rotary_export.proof.models.reference import Measured, Reference
from rotary_export.proof.report import FLOAT32_TABLES, Report, describe_failure
from rotary_export.types import Progress

QUICK = "a quick proof: no far positions and no long sequences"
INLINE = "no function of the model applies the rotary embedding: its tables are not known"


@dataclass(frozen=True)
class ProofOptions:
    """How much is proven.

    Attributes:
        quick: Fewer cases, none of them far or long.
        seed: Of the values of the cases.
        case: Name of the one case to run; None: all.
        outcome: What becomes of a rejected bundle, for the message.
    """

    quick: bool = False
    seed: int = 0
    case: str | None = None
    outcome: str = "nothing was written"


class UnknownCaseError(RotaryExportError):
    """A graph's proof has no case of the name that was asked for."""


class RejectedError(CheckFailedError):
    """An export that is not equal to its model.

    Attributes:
        manifest: Of the rejected bundle, its report included.
        case: Name of the case that differs; "": the failure is not of one case.
        seed: Of its values.
    """

    def __init__(self, message: str, manifest: Manifest, case: str, seed: int) -> None:
        super().__init__(message)
        self.manifest = manifest
        self.case = case
        self.seed = seed


def make_run(flat: FlatModel, snapshot: Snapshot) -> Run:
    """Return what runs a model, each time as if it were the first."""

    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        snapshot.restore_state()
        with torch.no_grad(), disable_caches(flat.model):
            return flat.run_named(tensors)

    return run


def prove(
    analysis: Analysis,
    graph: GraphInfo,
    constraints: SizeConstraints,
    traced: TracedRotary,
    snapshot: Snapshot,
    folder: Path,
    make_manifest: Callable[[GraphInfo, Sequence[Measured], dict[str, str]], Manifest],
    options: ProofOptions,
    progress: Progress,
) -> tuple[Manifest, Report]:
    """Compare a graph with its model; limit its sizes where it differs past a bound.

    Args:
        analysis: The model.
        graph: As it was traced.
        constraints: The sizes at which it may equal the model; tightened where it does not.
        traced: Computes its rotary nodes and their tables.
        snapshot: Of the model.
        folder: Contains the graph's files.
        make_manifest: Makes the manifest from the graph, the cases and what was left out.
        options: How much is proven.
        progress: Called with the current step.

    Raises:
        RejectedError: It differs from the model, and no limit is left to set.
    """
    names = [info.name for info in analysis.inputs]
    while True:
        tables = TableRecorder(analysis.found)
        reference = Reference(
            analysis.flat.model,
            make_run(analysis.flat, snapshot),
            analysis.inputs,
            analysis.input_values,
            check=tables.record,
            describe=describe_error,
        )
        plan = analysis.plan(constraints, options.seed, options.quick)
        cases = choose_cases([analysis.example, *plan_cases(plan)], options.case)
        try:
            measured = reference.measure(cases, progress)
        finally:
            snapshot.restore_state()
        limited = replace(
            graph, max_size=dict(constraints.max_size), min_size=dict(constraints.min_size)
        )
        left_out = reference.left_out | list_unreached(plan)
        manifest = make_manifest(limited, measured, left_out)
        report, failure, case, sizes = Report(), "", "", {}
        try:
            report = compare_model(
                folder,
                manifest,
                measured,
                progress,
                reference.measure_again,
                allow_code=True,  # it was written here
            )
            manifest = make_manifest(limited, measured, left_out)  # noise may be measured again
            run = [each.case for each in measured]
            report.add(tables.compare(traced, names, run), {})
            if not options.quick and options.case is None:
                plan = analysis.plan(constraints)
                add_far_tables(plan, traced, folder, manifest, report, progress)
        except CheckFailedError as error:
            failure = str(error)
        else:
            _add_notes(analysis, options, report)
            row = report.find_failure()
            if row is None:
                return manifest, report
            failure, case = describe_failure(row, options.outcome), row.case
            if (found := _find_measured(measured, case)) is not None:
                sizes = dict(found.case.spec.sizes) if found.case.spec else {}
                where = find_difference(
                    analysis.flat.model, reference.run, analysis.found, traced, names, found.case
                )
                failure = f"{failure}; {where}"
        # As when the largest few of many are taken, with ties.
        if constraints.tighten(analysis.example_sizes, sizes):
            progress("limit the sizes: past them the graph differs from the model")
            continue
        if constraints.conditions:
            failure += (
                "; the model takes the traced branch only where "
                f"{'; '.join(constraints.conditions)}: limit that size with dynamic_shapes (min, "
                "max), give it a fixed one, or change the model there"
            )
        manifest = replace(manifest, parity=report.to_dict() | {"passed": False, "error": failure})
        raise RejectedError(failure, manifest, case, options.seed)


def _find_measured(measured: Sequence[Measured], name: str) -> Measured | None:
    return next((each for each in measured if each.case.name == name), None)


def choose_cases(cases: Sequence[Case | CaseSpec], name: str | None) -> Sequence[Case | CaseSpec]:
    """Return all cases, or those of one name.

    Raises:
        UnknownCaseError: There is none of that name.
    """
    chosen = [case for case in cases if name in (None, case.name)]
    if not chosen:
        names = "; ".join(case.name for case in cases)
        raise UnknownCaseError(f"case must be one of: {names}; got {name!r}")
    return chosen


def add_generated(
    model: nn.Module,
    folder: Path,
    manifest: Manifest,
    prompts: Sequence[Sequence[int]] | None,
    snapshot: Snapshot,
    report: Report,
    options: ProofOptions,
    progress: Progress,
) -> None:
    """Add the tokens that a decoder generates to the report of its proof.

    Args:
        model: What was exported.
        folder: The bundle's.
        manifest: Of the bundle.
        prompts: As of `compare_generated`.
        snapshot: Of the model.
        report: Receives what was found, and what was left out.
        options: How much is proven.
        progress: Called with the current step.

    Raises:
        RejectedError: A token is not the model's own, and not by a tie.
    """
    found, left_out = compare_generated(
        model, folder, manifest, prompts, snapshot, options.quick, options.seed, progress
    )
    report.generated += found
    report.unverified |= left_out
    for each in found:
        if not each.passed:
            failure = (
                f"the export does not generate the model's own tokens, {options.outcome}: "
                f"{each.describe()}"
            )
            parity = report.to_dict() | {"passed": False, "error": failure}
            raise RejectedError(failure, replace(manifest, parity=parity), "", options.seed)


def add_far_tables(
    plan: Plan,
    traced: TracedRotary,
    folder: Path,
    manifest: Manifest,
    report: Report,
    progress: Progress,
) -> None:
    """Add the rows of the tables that the ONNX file computes, where there is one.

    Args:
        plan: What the cases depend on.
        traced: Computes the model's own tables.
        folder: The bundle's.
        manifest: Of the bundle.
        report: Receives the rows, and what was left out.
        progress: Called with the current step.
    """
    info = manifest.graphs[manifest.only_graph]
    if "onnx" not in info.files or not info.rotary_nodes:
        return
    if not traced.has_nodes:
        report.add([], {"tables at far positions": INLINE})
        return
    progress("verify tables at far positions")
    rows, left_out = compare_far_tables(
        folder / info.files["onnx"],
        info,
        manifest.minimum_onnxruntime,
        traced.inputs,
        traced.compute_tables,
        plan,
    )
    report.add(rows, left_out)


def _add_notes(analysis: Analysis, options: ProofOptions, report: Report) -> None:
    if analysis.flat.float32_tables:
        report.notes.append(FLOAT32_TABLES)
    if options.quick:
        report.notes.append(QUICK)
