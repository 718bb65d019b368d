"""Prove a plain bundle: every graph, every way to run it, against eager PyTorch and the oracle.

Eager here computes from the tables that the bundle stores, so that the comparison is of the same
operations on the same numbers on every machine. The stored tables themselves are held against the
oracle; inv_freq, from which both start, against its closed form (`formulas.py`). Errors are counted
in ulp of the output's dtype (`oracle.Expected` defines them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotary_export.bundle.manifest import Manifest
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.graphs.config import ExportConfig, read_config
from rotary_export.graphs.graph import Graph, make_graphs
from rotary_export.proof.comparison import compare, to_comparable
from rotary_export.proof.formulas import (
    compare_formula,
    compute_inv_freq,
    compute_plain_inv_freq,
    compute_zeta,
    list_lengths,
)
from rotary_export.proof.oracle import Expected, Oracle
from rotary_export.proof.plain_cases import describe_case, make_cases
from rotary_export.proof.report import Report, Row
from rotary_export.proof.scaled_oracle import ScaledOracle
from rotary_export.proof.stored import check_rotary_nodes, read_constants
from rotary_export.runtime.ways import list_ways
from rotary_export.types import Array, Arrays, Progress, ignore_progress

Case = tuple[Tensor, ...]  # inputs in order
ORACLES = {"plain": Oracle, "scaled": ScaledOracle}  # by `RopeKind.kind`
Run = Callable[[Case], list[Array]]  # from inputs in order to outputs in order


def compare_plain(
    path: Path,
    manifest: Manifest,
    progress: Progress = ignore_progress,
    state: Mapping[str, Tensor] | None = None,
    *,
    allow_code: bool,
) -> Report:
    """Run a plain bundle in every way and compare.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        progress: Called with what is being run.
        state: State dict of the module that was exported: the files must contain the same.
        allow_code: Open the files whose code may run, too.

    Raises:
        CheckFailedError: The files contain other tables than `state`.
        RotaryExportError: The manifest is not one of a plain bundle.
    """
    config = read_config(manifest.config)
    if missing := {"tables", "rotate"} - manifest.graphs.keys():
        raise RotaryExportError(f"the manifest has no graph {', '.join(sorted(missing))}")
    if manifest.graphs["tables"].outputs != config.rope.describe_tables(
        config.max_seq_len
    ):  # before any is made
        raise RotaryExportError("the manifest's graph 'tables' is not of its config")
    for info in manifest.graphs.values():
        check_rotary_nodes(path, info)
    stored = {
        name: read_constants(path, info, allow_code=allow_code)
        for name, info in manifest.graphs.items()
    }
    fresh = config.rope.make_buffers(config.max_seq_len)
    for tables in stored["tables"].values():
        for name in tables.keys() & fresh.keys():
            tables[name] = _restore_shape(tables[name], fresh[name])
    if state is not None:
        _check_state(stored["tables"], state)
    constants = {name: _pick_constants(by_format) for name, by_format in stored.items()}
    buffers = dict(fresh)  # a graph of position 0 alone stores none
    buffers |= {name: torch.from_numpy(value) for name, value in constants["tables"].items()}
    constants["tables"] = {name: to_comparable(value) for name, value in buffers.items()}
    oracle = ORACLES[config.rope.kind](config, constants["tables"], constants["rotate"])
    report = Report()
    report.add(*_compare_formulas(config, constants["tables"], fresh))
    for graph in make_graphs(config, buffers):
        for name, value in constants[graph.name].items():
            setattr(graph.module, name, torch.from_numpy(value))
        if graph.name == "rotate":
            report.rows += _compare_stored(stored["rotate"], constants["rotate"], oracle)
        _compare_graph(path, manifest, graph, config, oracle, report, progress, allow_code)
    return report


def _restore_shape(stored: Array, buffer: Tensor) -> Array:
    """Return a stored table in its buffer's shape; ONNX stores an only row without its axis."""
    return stored.reshape(buffer.shape) if buffer.shape == (1, *stored.shape) else stored


def _check_state(stored: Mapping[str, Arrays], state: Mapping[str, Tensor]) -> None:
    for file_format, tables in stored.items():
        for name, value in tables.items():
            if not torch.equal(torch.from_numpy(value), state[name]):
                raise CheckFailedError(
                    f"tables ({file_format}) does not contain the module's {name}"
                )


def _compare_formulas(
    config: ExportConfig, tables: Arrays, fresh: Mapping[str, Tensor]
) -> tuple[list[Row], dict[str, str]]:
    """Compare inv_freq, and xPos's zeta, with their closed forms.

    A `RotaryEmbedding` may have loaded a state that its arguments don't describe: that is exported
    as it is, and listed.
    """
    values = config.rope.to_dict()
    if config.rope.kind == "plain":
        source, expected = "its arguments", {"inv_freq": compute_plain_inv_freq(values)}
        if config.rope.uses_xpos:
            expected["scale"] = compute_zeta(values)
    else:
        source = f"rope type {values['rope_type']!r}"
        lengths = list_lengths(values, len(tables["inv_freq"]))
        expected = {"inv_freq": compute_inv_freq(values, lengths)}
    rows = [compare_formula(name, tables[name], want, source) for name, want in expected.items()]
    loaded = [
        row
        for row in rows
        if config.rope.kind == "plain"
        and not row.passed
        and not np.array_equal(tables[row.output], to_comparable(fresh[row.output]))
    ]
    unverified = {f"{row.output} by its formula": f"a loaded state: {row.case}" for row in loaded}
    return [row for row in rows if row not in loaded], unverified


def _compare_graph(
    path: Path,
    manifest: Manifest,
    graph: Graph,
    config: ExportConfig,
    oracle: Oracle,
    report: Report,
    progress: Progress,
    allow_code: bool,
) -> None:
    """Compare one graph in every way to run it; adds to the report."""
    info = manifest.graphs[graph.name]
    if (info.inputs, info.outputs) != (graph.inputs, graph.outputs):
        raise RotaryExportError(f"the manifest's graph {graph.name!r} is not of its config")
    cases = make_cases(graph, config.max_seq_len, oracle.length_boundary)
    report.shapes[graph.name] = [describe_case(graph, case) for case in cases]

    def run_eager(case: Case) -> list[Array]:
        return [to_comparable(value) for value in graph.module(*case)]

    with torch.no_grad():
        eager = [run_eager(case) for case in cases]
        expected = [
            oracle.run(graph.name, [to_comparable(value) for value in case]) for case in cases
        ]

    def add_rows(runtime: str, kernel_path: str, by_torch: bool, run: Run) -> None:
        progress(f"{graph.name}: {runtime}")
        rows = _make_rows(graph, runtime, kernel_path, by_torch, config, oracle)
        for case, want, exact in zip(cases, eager, expected, strict=True):
            _compare_outputs(rows, run(case), want, exact)
        report.rows.extend(rows)

    with torch.no_grad():
        add_rows("eager", "eager", True, run_eager)
    for way in list_ways(info, manifest.compiled_for, report.skipped, allow_code=allow_code):
        session = way.open(path, manifest, graph.name)

        def run(case: Case, session: Any = session) -> list[Array]:
            inputs = {i.name: value for i, value in zip(graph.inputs, case, strict=True)}
            return [to_comparable(value) for value in session(**inputs).values()]

        add_rows(way.name, session.kernel_path, way.computed_by_torch, run)


def _compare_outputs(
    rows: Sequence[Row],
    outputs: Sequence[Array],
    eager: Sequence[Array],
    expected: Sequence[Expected],
) -> None:
    for row, got, want, exact in zip(rows, outputs, eager, expected, strict=True):
        row.eager = row.eager.merge(compare(got, want, exact.ulp))
        row.oracle = row.oracle.merge(compare(got, exact.value, exact.unit))


def _pick_constants(stored: Mapping[str, Arrays]) -> dict[str, Array]:
    """Take each table from the first format that has it; ONNX stores two equal tables as one."""
    picked: dict[str, Array] = {}
    for tables in stored.values():
        picked = {**tables, **picked}
    return picked


def _compare_stored(stored: Mapping[str, Arrays], constants: Arrays, oracle: Oracle) -> list[Row]:
    """Compare the tables that each format stores with those of eager and of the oracle."""
    rows = []
    for file_format, tables in stored.items():
        for name, table in tables.items():
            expected = oracle.stored(name)
            tolerance = "oracle-scale" if name == "scale_cache" else "oracle-angle"
            row = Row("rotate", name, f"stored ({file_format})", "", "exact", tolerance)
            row.eager = compare(table, constants[name], expected.ulp)
            row.oracle = compare(table, expected.value, expected.unit)
            rows.append(row)
    return rows


def _make_rows(
    graph: Graph,
    runtime: str,
    kernel_path: str,
    by_torch: bool,
    config: ExportConfig,
    oracle: Oracle,
) -> list[Row]:
    """Make the empty rows of one way to run a graph, with its tolerances."""
    rows = []
    xpos = config.rope.uses_xpos
    is_half = config.dtype in ("float16", "bfloat16")
    for info in graph.outputs:
        if graph.name == "tables":
            inexact, true = oracle.table_tolerances[info.name]
            eager = "exact" if by_torch else inexact
        else:
            true = "oracle-half" if is_half else "oracle-xpos" if xpos else "oracle-rotate"
            eager = "exact"
            if oracle.computes_tables and not by_torch:
                eager = "native-half" if is_half else "computed"
            elif kernel_path == "native":
                eager = "native-half" if is_half else "native-xpos" if xpos else "native"
        rows.append(Row(graph.name, info.name, runtime, kernel_path, eager, true))
    return rows
