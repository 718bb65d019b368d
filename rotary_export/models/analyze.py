"""What an export must know of a model: its inputs, the sizes to trace at, the rotary calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import PAST, SEQ, TOTAL
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.arguments import (
    FlatModel,
    find_extra_arguments,
    read_arguments,
)
from rotary_export.models.configs import find_last_position, find_length_thresholds
from rotary_export.models.convert import convert_model
from rotary_export.models.decoder.cache import find_cache_dims
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.parts import split_model
from rotary_export.models.describe_inputs import choose_traced_sizes, describe_inputs
from rotary_export.models.dim_names import (
    NamedDims,
    has_own_cache,
    has_samples,
    name_dims,
    read_sizes,
)
from rotary_export.models.error_text import describe_error, name_model
from rotary_export.models.find.replacement import Replacement, find_replacement
from rotary_export.models.trace.legal_sizes import find_legal_sizes
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import Snapshot, take_snapshot
from rotary_export.models.trace.trace_patches import patch_for_tracing
from rotary_export.proof.models.cases import EXAMPLE, Case, CaseSpec, make_case
from rotary_export.proof.models.input_values import (
    InputValues,
)
from rotary_export.proof.models.plan import Plan
from rotary_export.types import Progress

_DEFAULTS = DecoderOptions()


@dataclass(frozen=True)
class Analysis:
    """A model and its example inputs, analysed for an export.

    Attributes:
        flat: The model, with one tensor per input.
        inputs: The inputs.
        named: Their sizes, and the limits of these that were given or found.
        input_values: Where their values come from, when a case is made.
        traced_sizes: The sizes that it is traced at.
        example: The user's own inputs.
        example_sizes: Their sizes.
        traced: The inputs that it is traced with.
        found: What will be replaced.
        length_thresholds: Lengths at which its angles change.
        last: How many positions its config names; None: it names none.
        max_cache_len: How many positions its static cache holds; None: it has none.
    """

    flat: FlatModel
    inputs: tuple[TensorInfo, ...]
    named: NamedDims
    input_values: dict[str, InputValues]
    traced_sizes: dict[str, int]
    example: Case
    example_sizes: dict[str, int]
    traced: Case
    found: Replacement
    length_thresholds: list[int]
    last: int | None
    max_cache_len: int | None = None

    @property
    def max_positions(self) -> int | None:
        """How many positions the model accepts; None: any number, or it is not known."""
        if self.max_cache_len is not None:
            return self.max_cache_len
        return None if self.length_thresholds else self.last

    @property
    def max_run_size(self) -> dict[str, int]:
        """By name of a size, the largest that the model itself runs at, where it is known."""
        longest = self.max_positions
        if longest is None:
            return {}
        past, seq = self.traced_sizes.get(PAST, 0), self.traced_sizes.get(SEQ, 1) + 1
        return {SEQ: longest - past, PAST: longest - seq, TOTAL: longest}

    def plan(self, constraints: SizeConstraints, seed: int = 0, quick: bool = False) -> Plan:
        """Return what the cases of its proof depend on."""
        return Plan(
            sources=self.input_values,
            traced=self.traced_sizes,
            thresholds=self.length_thresholds,
            longest=self.max_positions,
            last=self.last,
            max_size=constraints.max_size,
            min_size=constraints.min_size,
            sizes_to_verify=constraints.sizes_to_verify,
            seed=seed,
            quick=quick,
        )


def analyze_model(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    dynamic_shapes: str | Mapping[str, Any] | None,
    snapshot: Snapshot,
    report_progress: Progress,
    float32_tables: bool = False,
    trace_at: Mapping[str, int] | None = None,
) -> Analysis:
    """Read the inputs, run the model, and find what will be replaced.

    Args:
        model: As `export_model`; in eval mode.
        example_inputs: As `export_model`.
        dynamic_shapes: As `export_model`.
        snapshot: Of the model, restored after each run.
        report_progress: Called with the current step.
        float32_tables: As `export_model`.
        trace_at: By name, sizes to trace at; the others are chosen.

    Raises:
        RotaryExportError: An argument is wrong, or the model fails on its example inputs, or at
            any other size.
    """
    arguments, tensors = read_arguments(example_inputs)
    cache_dims = find_cache_dims(example_inputs)
    named = name_dims(tensors, dynamic_shapes, cache_dims=cache_dims)
    max_cache_len = next((dim for dim in cache_dims.values() if isinstance(dim, int)), None)
    if max_cache_len is not None:
        named.limit(SEQ, None, max_cache_len)
    extra = find_extra_arguments(model, example_inputs)
    flat = FlatModel(model, arguments, extra, float32_tables)
    example = Case(EXAMPLE, tuple(tensors.values()))
    report_progress("find rotary embeddings")
    _run_example(flat, example.tensors, snapshot)
    if dynamic_shapes == "auto" and has_own_cache(tensors):
        named = _open_cache(flat, tensors, named, snapshot)
    named = _narrow_sizes(flat, tensors, named, snapshot, max_cache_len)
    inputs, input_values = describe_inputs(model, tensors, named, max_cache_len)
    own_sizes = read_sizes(tensors, named.dims)
    if max_cache_len is not None:  # no size of a tensor, but what is in the cache
        own_sizes[PAST] = 0
    sizes = choose_traced_sizes(own_sizes, inputs, input_values, named, trace_at)
    has_axes = any(source.has_axes for source in input_values.values())
    spec = CaseSpec(sizes, stagger=True, grid=has_axes)
    candidates = [(make_case(inputs, input_values, spec), input_values)]
    if any(source.role == "position_ids" for source in input_values.values()):
        counted = {
            name: replace(source, role="counted") if source.role == "position_ids" else source
            for name, source in input_values.items()
        }
        candidates.append((make_case(inputs, counted, spec), counted))
    if min(own_sizes.values(), default=2) > 1:  # a size of 1 would be a constant
        candidates.append((replace(example, spec=CaseSpec(own_sizes)), candidates[-1][1]))
    last = None if has_samples(tensors) else find_last_position(model)
    traced, sources, found = _find_rotary(flat, candidates, snapshot)
    return Analysis(
        flat=flat,
        inputs=inputs,
        named=named,
        input_values=dict(sources),
        traced_sizes=dict(traced.spec.sizes) if traced.spec else {},
        example=example,
        example_sizes=own_sizes,
        traced=traced,
        found=found,
        length_thresholds=find_length_thresholds(model),
        last=last if max_cache_len is None else min(last or max_cache_len, max_cache_len),
        max_cache_len=max_cache_len,
    )


def _narrow_sizes(
    flat: FlatModel,
    tensors: Mapping[str, Tensor],
    named: NamedDims,
    snapshot: Snapshot,
    max_cache_len: int | None,
) -> NamedDims:
    """Narrow the sizes that may vary to those at which the model runs.

    They are searched one by one, but only if it does not run at the smallest sizes, or at those
    that follow the ones to trace.
    """
    runs = _make_trial(flat, tensors, named, snapshot, max_cache_len)
    inputs, input_values = describe_inputs(flat.model, tensors, named, max_cache_len)
    own = read_sizes(tensors, named.dims)
    chosen = choose_traced_sizes(own, inputs, input_values, named)
    smallest = {name: named.min_size.get(name, 1) for name in own}
    larger = {name: min(size + 1, named.max_size.get(name, size)) for name, size in chosen.items()}
    if not own or (runs(smallest) and runs(larger)):
        return named
    known = next((sizes for sizes in (chosen, own) if runs(sizes)), None)
    if known is None:
        return named
    names = [name for name in own if name != PAST and name not in named.min_size]
    return named.narrow(find_legal_sizes(runs, known, names))


def _open_cache(
    flat: FlatModel, tensors: Mapping[str, Tensor], named: NamedDims, snapshot: Snapshot
) -> NamedDims:
    """Let the length of a model's own cache vary, if it runs with one more position."""
    for axis in (2, 1):  # (B, N, S, H), then (B, S, N, H)
        try:
            opened = name_dims(tensors, "auto", axis)
        except RotaryExportError:  # other tensors are of other lengths
            continue
        sizes = read_sizes(tensors, opened.dims)
        longer = {**sizes, PAST: sizes.get(PAST, 0) + 1}
        if PAST in sizes and _make_trial(flat, tensors, opened, snapshot)(longer):
            return opened
    return named


def _make_trial(
    flat: FlatModel,
    tensors: Mapping[str, Tensor],
    named: NamedDims,
    snapshot: Snapshot,
    max_cache_len: int | None = None,
) -> Callable[[Mapping[str, int]], bool]:
    """Return what tells whether a model runs at such sizes."""
    inputs, input_values = describe_inputs(flat.model, tensors, named, max_cache_len)

    def runs(sizes: Mapping[str, int]) -> bool:
        try:
            with torch.no_grad():
                flat(*make_case(inputs, input_values, CaseSpec(sizes)).tensors)
        except (Exception, SystemExit):  # whatever the model raises
            return False
        finally:
            snapshot.restore_state()
        return True

    return runs


def _run_example(flat: FlatModel, example: Sequence[Tensor], snapshot: Snapshot) -> None:
    """Run the model on its example, as it is."""
    try:
        with torch.no_grad():
            flat(*example)
    except (Exception, SystemExit) as error:  # whatever the model raises
        raise RotaryExportError(
            f"{type(flat.model).__name__} fails on its example inputs: {describe_error(error)}"
        ) from error
    finally:
        snapshot.restore_state()


def _find_rotary(
    flat: FlatModel,
    candidates: Sequence[tuple[Case, Mapping[str, InputValues]]],
    snapshot: Snapshot,
) -> tuple[Case, Mapping[str, InputValues], Replacement]:
    """Record the model's rotary calls on the first inputs that it accepts.

    Args:
        flat: The model.
        candidates: Inputs to trace with, and where more of their values come from: with positions
            that differ by row, with counted ones, the example's own.
        snapshot: Restored after each run.
    """
    failure: BaseException | None = None
    for case, sources in candidates:
        try:
            with patch_for_tracing(flat.model):
                found = find_replacement(flat.model, functools.partial(flat, *case.tensors))
            return case, sources, found
        except RotaryExportError:
            raise
        except (Exception, SystemExit) as error:  # whatever the model raises
            failure = failure or error
        finally:
            snapshot.restore_state()
    assert failure is not None
    raise RotaryExportError(
        f"{type(flat.model).__name__} runs on its example inputs, but fails at "
        f"{candidates[0][0].name}: {describe_error(failure)}; choose the dynamic sizes with "
        "dynamic_shapes"
    ) from failure


def find_rotary_calls(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    decoder: DecoderOptions = _DEFAULTS,
) -> Replacement:
    """Find out what `export_model` would replace; export nothing.

    Args:
        model: As `export_model`; it is restored.
        example_inputs: As `export_model`.
        dtype: As `export_model`.
        decoder: As of `prepare_inputs`.

    Returns:
        `findings`, one per graph, function and kind of call; `calls` and `fused`, their sums.

    Raises:
        RotaryExportError: The model does not run on its example inputs.
    """
    inputs = prepare_inputs(model, example_inputs, decoder)
    if dtype is not None:
        model, inputs = convert_model(model, inputs, dtype)
    found = Replacement()
    for part in split_model(model, inputs, decoder):
        if part.is_rotary:
            with take_snapshot(part.model) as snapshot:
                each = analyze_model(part.model, part.inputs, "auto", snapshot, lambda _: None)
            found.findings += each.found.findings
    return found


def check_found(model: nn.Module, found: Replacement, formats: Sequence[str]) -> None:
    """Check that the op replaces a call of a model, or that one may be found in its ONNX graph.

    Raises:
        CheckFailedError: It replaces none, and ONNX is not written; the message has the reason.
    """
    if not found.fused and "onnx" not in formats:
        raise CheckFailedError(
            f"{describe_missing(model, found)}; a rotary embedding that is written inline can be "
            f"found in an ONNX graph alone: add 'onnx' to formats, got {', '.join(formats)}"
        )


def describe_missing(model: nn.Module, found: Replacement) -> str:
    """Say why the op replaces no call of a model."""
    name = name_model(model)
    if not found.findings:
        return (
            f"{name} applies no rotary embedding (no function with such a name, or registered by "
            "register_rotary, returns a tensor rotated by its position)"
        )
    finding = found.findings[0]
    return (
        f"none of the {found.calls} rotary calls of {name} can be replaced: {finding.function}: "
        f"{finding.reason}"
    )
