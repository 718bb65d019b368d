"""The model itself in eager PyTorch: what it returns for each case, and its rounding noise."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from rotary_export.bundle.dims import BATCH, PAST
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.proof.models.cases import Case, CaseSpec, Run, make_case
from rotary_export.proof.models.input_values import InputValues
from rotary_export.proof.models.noise import RUNS, Noise, NoiseMeter
from rotary_export.types import Array, Progress

MOST_NOISE = 0.05  # of the largest magnitude: past that, a case can't tell an error from rounding
_DRAWS = 3  # of the values of a case that can't
_LONGEST_RUN = 60.0  # seconds
_SPARE = 2**28  # bytes that the outputs of a long case may take beside half the weights
_MORE_RUNS = 32  # that measure the noise of a case whose error is not within it


@dataclass(frozen=True)
class Measured:
    """A case, what the model returns for it, and its noise.

    Attributes:
        case: The inputs.
        eager: By output; None: the model is not available.
        noise: By floating-point output, its largest absolute change.
    """

    case: Case
    eager: Mapping[str, Array] | None
    noise: Noise

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest contains of it; inputs are made again from the spec."""
        spec = self.case.spec
        made = {} if spec is None else {"spec": spec.to_dict()}
        return {"name": self.case.name, "noise": self.noise, **made}


@dataclass
class Reference:
    """The model that a bundle is compared with.

    Attributes:
        model: Its modules are perturbed to measure its noise.
        run: Runs it on its tensors, in order, as if it were the first run.
        infos: Its inputs.
        sources: Where their values come from.
        check: Of a case, the context of the run that is not perturbed.
        describe: Describes what the model raises, in one line.
        left_out: Cases that were not run, and why.
    """

    model: nn.Module
    run: Run
    infos: Sequence[TensorInfo]
    sources: Mapping[str, InputValues]
    check: Callable[[Case], AbstractContextManager[Any]] = nullcontext
    describe: Callable[[BaseException], str] = first_line
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._meter = NoiseMeter(self.model, self.run)
        self._seconds = float("inf")  # per token, of the fastest run
        self._bytes = float("inf")  # per token, of the outputs in float32, of the smallest run
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        self._spare = _SPARE + sum(t.numel() * t.element_size() for t in tensors) / 2

    def measure(self, cases: Iterable[Case | CaseSpec], progress: Progress) -> list[Measured]:
        """Run the model on cases, and measure its noise for each.

        Args:
            cases: Ready ones, and how to make others. Where rounding hides any error, the values
                are drawn again.
            progress: Called with the current step.

        Raises:
            RotaryExportError: The model fails for a case that is not optional.
        """
        measured = []
        for case in cases:
            progress(f"run the model itself: {case.name}")
            try:
                found = self._measure_case(case)
            except RotaryExportError:
                raise
            except (Exception, SystemExit) as error:  # whatever the model raises
                if isinstance(case, CaseSpec) and case.optional:
                    self.left_out[case.name] = f"the model fails: {self.describe(error)}"
                    continue
                raise RotaryExportError(
                    f"the model fails at {case.name}: {self.describe(error)}; choose the dynamic "
                    "sizes with dynamic_shapes"
                ) from error
            measured += [found] if found else []
        return measured

    def measure_again(self, measured: Measured) -> Measured:
        """Measure the noise of a case by more runs: a model may amplify few roundings, but far.

        Modules are perturbed in half of them, operators in the other half.
        """
        assert measured.eager is not None
        runs = _MORE_RUNS // 4 if measured.case.spec and measured.case.spec.is_long else _MORE_RUNS
        noise = dict(measured.noise)
        for every_operator in (False, True):
            found = self._meter.measure(
                measured.case, measured.eager, runs // 2, every_operator=every_operator
            )
            noise = {name: max(moved, found[name]) for name, moved in noise.items()}
        return replace(measured, noise=noise)

    def _measure_case(self, case: Case | CaseSpec) -> Measured | None:
        """Run the model on one case, drawn again if it tells nothing; None if it takes too long."""
        if isinstance(case, Case):
            return self._run_case(case)
        if case.is_long and (cost := self._find_cost(case)):
            self.left_out[case.name] = cost
            return None
        for draw in range(_DRAWS):
            spec = replace(case, seed=case.seed + 100 * draw)
            measured = self._run_case(make_case(self.infos, self.sources, spec, self.run))
            if not find_ill_conditioned(measured):
                break
        return measured

    def _find_cost(self, case: CaseSpec) -> str:
        """Return what a long case would take, if that is too much; else ""."""
        seconds = self._seconds * (case.length + case.sizes.get(PAST, 0))
        if _LONGEST_RUN < seconds < float("inf"):
            return f"each of its runs would take about {seconds:.0f} s"
        size = self._bytes * case.length
        if self._spare < size < float("inf"):
            return f"its outputs alone would take about {size / 2**30:.1f} GiB"
        return ""

    def _run_case(self, case: Case) -> Measured:
        start = time.perf_counter()
        with self.check(case):
            outputs = self.run(case.tensors)
            eager = case.read_outputs(outputs)
        if case.spec is not None:
            tokens = case.spec.length * case.spec.sizes.get(BATCH, 1)
            self._seconds = min(self._seconds, (time.perf_counter() - start) / tokens)
            size = sum(4 * math.prod(value.shape) for value in outputs.values())
            self._bytes = min(self._bytes, size / tokens)
        del outputs
        runs = 1 if case.spec is not None and case.spec.is_long else RUNS
        return Measured(case, eager, self._meter.measure(case, eager, runs))


def find_ill_conditioned(measured: Measured) -> dict[str, str]:
    """Return the outputs of a case in which rounding hides an error, and by how much it does."""
    found = {}
    for name, value in (measured.eager or {}).items():
        moved, largest = measured.noise.get(name, 0.0), find_largest(measured.case.select(value))
        if moved > MOST_NOISE * largest:
            found[name] = f"rounding alone moves it by {moved:.2g} of {largest:.2g}, its largest"
    return found


def find_largest(value: Array) -> float:
    """Return the largest finite magnitude; of none, 1."""
    wide = value.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    return float(np.abs(finite).max()) if finite.size else 1.0
