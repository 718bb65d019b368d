"""Trials of faults: the effect of a fault in float64, and whether the proof refuses its export."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_plants import change_attribute
from torch import Tensor, nn
from trace_faults import Fault

from rotary_export.errors import CheckFailedError
from rotary_export.exporters.export import Bundle
from rotary_export.models import export_model as exporting
from rotary_export.models import write_graph as writing
from rotary_export.models.find import replace as replacing
from rotary_export.models.prove import build_graph as building
from rotary_export.models.prove import prove as proving
from rotary_export.proof.models.cases import Case
from rotary_export.proof.models.compare import GRAPH, Results, compare_results
from rotary_export.proof.models.reference import Measured, Reference
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.runtime import torch_runtime
from rotary_export.types import Progress, ignore_progress

COUNTS = 10.0  # a fault counts if its effect is more than so many times what the proof allows


@dataclass(frozen=True)
class Effect:
    """By how much a fault moves a model, computed in float64; 1 is what the proof allows.

    Attributes:
        outputs: The largest share of an output's limit, over the proof's cases.
        tables: That of the rotary tables, relative to their first position: only differences of
            positions reach an output.
    """

    outputs: float
    tables: float

    @property
    def counts(self) -> bool:
        """Whether the proof must refuse the fault."""
        return max(self.outputs, self.tables) > COUNTS


@dataclass(frozen=True)
class Trial:
    """One export with a fault.

    Attributes:
        size: Of the fault.
        effect: Of the fault.
        refusal: The proof's message; "" if the export was accepted.
    """

    size: float
    effect: Effect
    refusal: str


class Proof:
    """The exports of one model; what does not depend on a fault is computed once.

    The model itself is the same in all of them, and so are its cases, eager's results and their
    noise. The first export has no fault, and must be accepted.

    Args:
        model: The model.
        inputs: Its example inputs.
        formats: As of `export_model`.
        progress: Called with the current step.
        quick: Use the quick proof: whatever that refuses, the whole proof refuses, too.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        formats: Sequence[str],
        progress: Progress = ignore_progress,
        quick: bool = False,
    ) -> None:
        self._quick = quick
        self._model, self._inputs, self._formats = model, inputs, formats
        self._progress = progress
        self._measured: dict[tuple[str, ...], tuple[list[Measured], dict[str, str]]] = {}
        self._analysis: Any = None
        self._recorder: Any = None
        self._graph = self._export().manifest.graphs[GRAPH]
        self._cases = next(reversed(self._measured.values()))[0]
        self._wide = copy.deepcopy(self._analysis.flat).double().eval()
        self._want, self._tables = self._run_wide()

    def try_fault(self, fault: Fault, size: float) -> Trial:
        """Measure the effect of a fault, and export the model with it."""
        effect = self.measure_effect(fault, size)
        try:
            with self._plant_while_tracing(fault, size):
                self._export()
        except CheckFailedError as error:
            return Trial(size, effect, str(error))
        return Trial(size, effect, "")

    def measure_effect(self, fault: Fault, size: float) -> Effect:
        """Run the model in float64 with a fault, and compare with it without the fault."""
        got, tables = self._run_wide(fault, size)
        measured = [
            replace(each, eager=want) for each, want in zip(self._cases, self._want, strict=True)
        ]
        rows = compare_results(self._graph, "", "", measured, got)
        moved = [
            _compare_tables(ours, theirs, each.case) / self._find_unit(each.case)
            for ours, theirs, each in zip(tables, self._tables, measured, strict=True)
        ]
        return Effect(max(row.eager_share for row in rows), max(moved))

    def _export(self) -> Bundle:
        with (
            tempfile.TemporaryDirectory(prefix="teeth.") as folder,
            _keep_program(),
            self._reuse_eager(),
        ):
            return exporting.export_model(
                self._model,
                self._inputs,
                Path(folder) / "bundle",
                formats=self._formats,
                quick=self._quick,
                progress=self._progress,
            )

    @contextmanager
    def _reuse_eager(self) -> Iterator[None]:
        """Compute eager's results and their noise once for the same cases."""
        analyze, measure = building.analyze_model, Reference.measure
        make_recorder = proving.TableRecorder

        def keep_recorder(*args: Any) -> Any:
            self._recorder = self._recorder or make_recorder(*args)
            return self._recorder

        def analyze_model(*args: Any, **kwargs: Any) -> Any:
            analysis = analyze(*args, **kwargs)
            self._analysis = self._analysis or analysis
            return analysis

        def measure_once(
            reference: Reference, cases: Sequence[Any], *args: Any, **options: Any
        ) -> Any:
            key = tuple(case.name for case in cases)
            if key not in self._measured:
                measured = measure(reference, cases, *args, **options)
                self._measured[key] = measured, dict(reference.left_out)
            measured, left_out = self._measured[key]
            reference.left_out |= left_out
            return list(measured)  # noise may be measured again

        with (
            change_attribute(building, "analyze_model", analyze_model),
            change_attribute(Reference, "measure", measure_once),
            change_attribute(proving, "TableRecorder", keep_recorder),
        ):
            yield

    @contextmanager
    def _plant_while_tracing(self, fault: Fault, size: float) -> Iterator[None]:
        """Plant a fault in whatever traces the model, and in nothing else."""

        def with_fault(trace: Callable[..., Any]) -> Callable[..., Any]:
            def traced(flat: Any, *args: Any) -> Any:
                with fault.plant(flat.model, size):
                    return trace(flat, *args)

            return traced

        with (
            change_attribute(writing, "trace_program", with_fault(writing.trace_program)),
            change_attribute(writing, "save_traced", with_fault(writing.save_traced)),
        ):
            yield

    def _run_wide(
        self, fault: Fault | None = None, size: float = 1.0
    ) -> tuple[Results, list[list[Tensor]]]:
        """Run the model in float64, with the op; return its outputs and the op's tables by case."""
        rotate = replacing.rotate_slots
        results, tables = [], []

        def record(xs: Any, pairs: Any, lowering: Any) -> Any:
            tables[-1] += [torch.complex(cos.double(), sin.double()) for cos, sin in pairs]
            return rotate(xs, pairs, lowering)

        for case in (each.case for each in self._cases):
            tables.append([])
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(change_attribute(replacing, "rotate_slots", record))
                if fault is not None:
                    stack.enter_context(fault.plant(self._wide.model, size))
                stack.enter_context(replacing.replace_calls(self._analysis.found))
                values = self._wide.run_named([_widen(tensor) for tensor in case.tensors])
                results.append(case.read_outputs(values))
        return results, tables

    def _find_unit(self, case: Case) -> float:
        """Return what the proof allows of an angle: ulp of a case's last position."""
        given = zip(self._graph.inputs, case.tensors, strict=True)
        last = [float(tensor.max()) for info, tensor in given if info.name == "position_ids"]
        rows = max(max(tensor.shape) for tensor in case.tensors)
        largest = np.asarray(max(*last, 1.0) if last else float(rows))
        return TOLERANCES["oracle-angle"].max_ulp * float(compute_ulp(largest, "float32"))


@contextmanager
def _keep_program() -> Iterator[None]:
    """Keep a traced program in memory, not in its file: to write and load it takes longest."""
    kept: list[Any] = []

    def save(program: Any, path: Path) -> None:
        kept.append(program)
        path.touch()

    with (
        change_attribute(writing, "save_program", save),
        change_attribute(torch_runtime, "open_torch_file", lambda *_: kept[-1]),
    ):
        yield


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compare_tables(got: Sequence[Tensor], want: Sequence[Tensor], case: Case) -> float:
    """Return the largest change of tables (B or 1, S, R/2), relative to their first positions."""
    changes = [0.0]
    for ours, theirs in zip(got, want, strict=True):
        if ours.shape[-2:] == theirs.shape[-2:]:  # else outputs alone show the effect
            moved = _relate(ours, case.keep) - _relate(theirs, case.keep)
            changes.append(float(moved.abs().max()))
    return max(changes)


def _relate(table: Tensor, keep: Tensor | None) -> Tensor:
    """Return the rows of a table, each relative to the first of its batch row; no padding."""
    if keep is None or keep.shape[1] != table.shape[1]:
        return table * table[:, :1].conj()
    table = table.expand(len(keep), -1, -1)
    first = table[torch.arange(len(keep)), keep.int().argmax(1)]  # (B, R/2)
    return (table * first[:, None].conj())[keep]
