"""Prove a bundle: every graph, format and runtime against eager PyTorch and a float64 oracle.

Eager here computes from the tables that the bundle stores, so that the comparison is of the same
operations on the same numbers on every machine; the stored tables themselves are held against the
oracle. Errors are counted in ulp of the output's dtype (`oracle.Expected` says which).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.manifest import Manifest, check_files, read_manifest
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.graphs.graphs import (
    ExportConfig,
    Graph,
    make_buffers,
    make_graphs,
    read_config,
)
from rotary_export.proof.cases import describe_case, make_cases
from rotary_export.proof.oracle import Oracle
from rotary_export.proof.scaled_oracle import ScaledOracle
from rotary_export.proof.stored import check_rotary_nodes, read_constants
from rotary_export.runtime.ways import Runner, open_runners, to_numpy

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tolerance:
    """A bound and why it is what it is.

    Attributes:
        max_ulp: Largest error allowed; 0 means equal to the bit.
        reason: Why it can't be smaller.
    """

    max_ulp: float
    reason: str


# Let u be half an ulp of the largest magnitude m in a head vector. The two products of an output
# sum to at most sqrt(2) m: k roundings of each cost less than 2.83 k u, their sum costs 1 u more.
TOLERANCES = {
    # Against eager, given the same tables.
    "exact": Tolerance(0, "the same operations in the same order on the same numbers, no FMA"),
    "scale": Tolerance(2, "Pow of ONNX Runtime and of numpy differs from torch's by an ulp"),
    "native": Tolerance(4, "ONNX Runtime's kernel may use FMA; both are within 2 of the truth"),
    "native-xpos": Tolerance(
        10, "the scale is folded into the tables, which are rounded again: both are within 5"
    ),
    "cos-sin": Tolerance(
        2, "Cos and Sin of ONNX Runtime and of numpy differ from torch's by an ulp (of 1)"
    ),
    "computed": Tolerance(4, "as `native`, with Cos and Sin that differ by an ulp (of 1)"),
    "native-half": Tolerance(1, "a float32 result that differs by an ulp can round the other way"),
    "bf16-truncated": Tolerance(1, "OpenVINO turns some float32 results to bfloat16 towards zero"),
    # A whole model, in ulp of the largest magnitude of an output, against eager.
    "model": Tolerance(256, "sums are taken in another order, and layers carry the differences on"),
    "model-half": Tolerance(
        32, "eager rounds to the half type where the op and fused kernels compute in float32"
    ),
    # Against the oracle.
    "oracle-freqs": Tolerance(1.5, "position / interpolation_factor and the product are rounded"),
    "oracle-scale": Tolerance(2, "the exponent is rounded, then Pow; per unit of exponent"),
    "oracle-angle": Tolerance(2, "in ulp of the angle, which is rounded before its cos and sin"),
    "oracle-rotate": Tolerance(2, "k = 1: (2.83 + 1) u"),
    "oracle-xpos": Tolerance(5, "k = 3, with the scale and, for the key, its reciprocal"),
    "oracle-half": Tolerance(0.51, "computed in float32 and rounded once to nearest"),
}


@dataclass(frozen=True)
class Error:
    """The largest difference of an output from what it is compared with.

    Attributes:
        max_abs: Largest absolute difference.
        max_ulp: Largest difference in the unit that the tolerance counts in.
        exact: Equal to the bit everywhere; a NaN equals a NaN.
        worst: Index of the largest difference.
    """

    max_abs: float = 0.0
    max_ulp: float = 0.0
    exact: bool = True
    worst: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON takes it, which has no infinity."""
        values = asdict(self).items()
        return {k: str(v) if isinstance(v, float) and np.isinf(v) else v for k, v in values}

    def merge(self, other: Error) -> Error:
        """Return the worse of two."""
        worse = self if self.max_ulp >= other.max_ulp else other
        return Error(
            max(self.max_abs, other.max_abs), worse.max_ulp, self.exact and other.exact, worse.worst
        )


@dataclass
class Row:
    """One line of the report: one output of one graph, run by one runtime.

    Attributes:
        graph: "tables", "rotate" or "model".
        output: Its name.
        runtime: What ran it.
        kernel_path: As `Session.kernel_path`.
        eager: Error against eager PyTorch.
        eager_tolerance: Key of TOLERANCES.
        oracle_tolerance: Key of TOLERANCES; None: there is no oracle of a whole model.
        oracle: Error against the float64 oracle (float64 outputs: long double).
    """

    graph: str
    output: str
    runtime: str
    kernel_path: str
    eager_tolerance: str
    oracle_tolerance: str | None
    eager: Error = field(default_factory=Error)
    oracle: Error = field(default_factory=Error)

    @property
    def passed(self) -> bool:
        """Whether both errors are within their tolerances."""
        limit = TOLERANCES[self.eager_tolerance].max_ulp
        close = self.eager.exact if limit == 0 else self.eager.max_ulp <= limit
        return close and (self.oracle_allowed is None or self.oracle.max_ulp <= self.oracle_allowed)

    @property
    def oracle_allowed(self) -> float | None:
        """The largest error against the oracle, in ulp."""
        if self.oracle_tolerance is None:
            return None
        return TOLERANCES[self.oracle_tolerance].max_ulp

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON takes it."""
        return {
            **asdict(self),
            "eager": self.eager.to_dict(),
            "oracle": self.oracle.to_dict(),
            "eager_allowed": TOLERANCES[self.eager_tolerance].max_ulp,
            "oracle_allowed": self.oracle_allowed,
            "passed": self.passed,
        }


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        rows: One per output, graph and runtime.
        shapes: What was tried, by graph.
        skipped: Runtimes that are not here, and why.
        unverified: Sizes and values of a model that were not compared, and why.
    """

    rows: list[Row] = field(default_factory=list)
    shapes: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerances."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "shapes": self.shapes,
            "skipped": self.skipped,
            "unverified": self.unverified,
        }


def compare(got: Array, want: Array, unit: Array) -> Error:
    """Compare element by element; NaN equals NaN.

    Args:
        got: Any shape.
        want: As got; exact means of the same dtype too.
        unit: What one ulp is, broadcastable to got, in the type to compute in.

    Returns:
        The largest difference; infinite where only one side is NaN or the shapes differ.
    """
    if got.shape != want.shape:
        return Error(float("inf"), float("inf"), exact=False)
    same_dtype = got.dtype == want.dtype
    got, want = got.astype(unit.dtype), want.astype(unit.dtype)
    both_nan = np.isnan(got) & np.isnan(want)
    same_bits = both_nan | ((got == want) & (np.signbit(got) == np.signbit(want)))
    if same_bits.all():
        return Error(exact=same_dtype)
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    difference[both_nan | (got == want)] = 0
    difference[np.isnan(difference)] = np.inf
    ulp = difference / unit
    worst = np.unravel_index(int(ulp.argmax()), ulp.shape)
    index = tuple(int(i) for i in worst)
    return Error(float(difference.max()), float(ulp[worst]), exact=False, worst=index)


def verify(bundle_dir: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Compare every graph of a bundle, in every format and runtime present, with eager PyTorch.

    Args:
        bundle_dir: The bundle's folder.
        progress: Called with what is being run.

    Returns:
        The report; `report.passed` says whether it is within the tolerances.

    Raises:
        RotaryExportError: The bundle is damaged or can't be loaded.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)
    check_files(path, manifest)
    return compare_bundle(path, manifest, progress)


def compare_bundle(
    path: Path,
    manifest: Manifest,
    progress: Progress | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Report:
    """Verify a bundle whose manifest is at hand; arguments as `verify`.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        progress: Called with what is being run.
        state: State dict of the module that was exported: the files must hold the same.
    """
    config = read_config(manifest.config)
    if missing := {"tables", "rotate"} - manifest.graphs.keys():
        raise RotaryExportError(f"the manifest has no graph {', '.join(sorted(missing))}")
    for info in manifest.graphs.values():
        check_rotary_nodes(path, info)
    stored = {name: read_constants(path, info) for name, info in manifest.graphs.items()}
    constants = {name: _pick_constants(by_format) for name, by_format in stored.items()}
    for kind, tables in stored["tables"].items():
        for name, value in tables.items():
            if state is not None and not torch.equal(torch.from_numpy(value), state[name]):
                raise CheckFailedError(f"tables ({kind}) does not hold the module's {name}")
    buffers = make_buffers(config)  # a one-row graph stores none
    buffers |= {name: torch.from_numpy(value) for name, value in constants["tables"].items()}
    constants["tables"] = {name: to_numpy(value) for name, value in buffers.items()}
    make_oracle = Oracle if config.rope is None else ScaledOracle
    oracle = make_oracle(config, constants["tables"], constants["rotate"])
    report = Report()
    for graph in make_graphs(config, buffers):
        for name, value in constants[graph.name].items():
            setattr(graph.module, name, torch.from_numpy(value))
        info = manifest.graphs[graph.name]
        if (info.inputs, info.outputs) != (graph.inputs, graph.outputs):
            raise RotaryExportError(f"the manifest's graph {graph.name!r} is not of its config")
        cases = make_cases(graph, config.max_seq_len, oracle.switch_length)
        report.shapes[graph.name] = [describe_case(graph, case) for case in cases]
        with torch.no_grad():
            eager = [[to_numpy(value) for value in graph.module(*case)] for case in cases]
        truth = [oracle.run(graph.name, [to_numpy(value) for value in case]) for case in cases]
        if graph.name == "rotate":
            report.rows.extend(_compare_stored(stored["rotate"], constants["rotate"], oracle))
        for runner in open_runners(path, manifest, graph, report.skipped):
            if progress is not None:
                progress(f"{graph.name}: {runner.name}")
            rows = _make_rows(graph, runner, config, oracle)
            for case, want, true in zip(cases, eager, truth, strict=True):
                outputs = runner.run(case)
                for row, got, eager_value, truth_value in zip(
                    rows, outputs, want, true, strict=True
                ):
                    row.eager = row.eager.merge(compare(got, eager_value, truth_value.ulp))
                    row.oracle = row.oracle.merge(compare(got, truth_value.value, truth_value.unit))
            report.rows.extend(rows)
    return report


def _pick_constants(stored: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Take each table from the first format that has it; ONNX stores two equal tables as one."""
    picked: dict[str, Array] = {}
    for tables in stored.values():
        picked = {**tables, **picked}
    return picked


def _compare_stored(
    stored: Mapping[str, Mapping[str, Array]], constants: Mapping[str, Array], oracle: Oracle
) -> list[Row]:
    """Hold the tables that each format stores against those that eager gets, and the oracle."""
    rows = []
    for kind, tables in stored.items():
        for name, table in tables.items():
            truth = oracle.stored(name)
            tolerance = "oracle-scale" if name == "scale_cache" else "oracle-angle"
            row = Row("rotate", name, f"stored ({kind})", "", "exact", tolerance)
            row.eager = compare(table, constants[name], truth.ulp)
            row.oracle = compare(table, truth.value, truth.unit)
            rows.append(row)
    return rows


def _make_rows(graph: Graph, runner: Runner, config: ExportConfig, oracle: Oracle) -> list[Row]:
    """Make the empty rows of one runner, with the tolerances that hold for it."""
    rows = []
    xpos = config.embedding.get("use_xpos", False)
    is_half = config.dtype in ("float16", "bfloat16")
    is_numpy = runner.name.startswith("ONNX Runtime") or runner.name == "onnx.reference"
    for info in graph.outputs:
        if graph.name == "tables":
            inexact = {"scale": "scale", "cos_cache": "cos-sin", "sin_cache": "cos-sin"}
            eager = inexact.get(info.name, "exact") if is_numpy else "exact"
            true = f"oracle-{info.name}" if config.rope is None else "oracle-angle"
        else:
            true = "oracle-half" if is_half else "oracle-xpos" if xpos else "oracle-rotate"
            eager = "exact"
            if oracle.computes_tables and is_numpy:
                eager = "native-half" if is_half else "computed"
            elif runner.kernel_path == "native":
                eager = "native-half" if is_half else "native-xpos" if xpos else "native"
        rows.append(Row(graph.name, info.name, runner.name, runner.kernel_path, eager, true))
    return rows
