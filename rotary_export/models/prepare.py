"""A model and its example inputs, read: named inputs, sizes to trace at, what will be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rotary_export.bundle.dims import PAST, SEQ, TOTAL
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.models.find.replace import Replacement, find_replacement
from rotary_export.models.inputs import FlatModel, name_dims, read_arguments, read_sizes
from rotary_export.models.trace.program import describe
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import Snapshot, copy_as, preserve
from rotary_export.models.trace.trace_patches import (
    find_longest,
    find_thresholds,
    patch_for_tracing,
)
from rotary_export.proof.model_cases import (
    TRACED,
    Case,
    InputValues,
    choose_values,
    make_case,
    make_cases,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A model, ready to be traced.

    Attributes:
        flat: The model, with one tensor per input.
        inputs: The inputs.
        sources: Where their values come from.
        sizes: That it will be traced at.
        example: The user's own inputs.
        traced: What it will be traced with.
        found: What will be replaced.
        thresholds: Lengths at which its angles change.
        longest: Positions that it takes; None: any.
    """

    flat: FlatModel
    inputs: tuple[TensorInfo, ...]
    sources: dict[str, InputValues]
    sizes: dict[str, int]
    example: Case
    traced: Case
    found: Replacement
    thresholds: list[int]
    longest: int | None

    @property
    def max_run_size(self) -> dict[str, int]:
        """By name of a size, what the model itself runs at, at most, where that is known."""
        if self.longest is None:
            return {}
        past, seq = self.sizes.get(PAST, 0), self.sizes.get(SEQ, 1) + 1
        return {SEQ: self.longest - past, PAST: self.longest - seq, TOTAL: self.longest}

    def make_cases(self, paths: SizeConstraints) -> list[Case]:
        """Make what it will be proven with."""
        cases = make_cases(
            self.inputs,
            self.sources,
            self.sizes,
            self.thresholds,
            self.longest,
            paths.max_size,
            paths.points,
        )
        return [self.example, *cases]


def check_model(model: object, example_inputs: object) -> None:
    """Refuse what is no model, or no example of its arguments.

    Raises:
        RotaryExportError: Naming what was given, or the argument that forward does not take.
    """
    if not isinstance(model, nn.Module):
        raise RotaryExportError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_inputs, Mapping):
        raise RotaryExportError(
            f"example_inputs must be a dict by argument name, got {type(example_inputs).__name__}"
        )
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in example_inputs:
        if name not in parameters:
            raise RotaryExportError(
                f"{type(model).__name__}.forward takes {', '.join(parameters)}, "
                f"example_inputs has {name!r}"
            )


def prepare(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    dynamic_shapes: str | Mapping[str, Any] | None,
    snapshot: Snapshot,
    say: Progress,
) -> Prepared:
    """Read the inputs, run the model once and find what will be replaced."""
    arguments, tensors = read_arguments(example_inputs)
    named = name_dims(tensors, dynamic_shapes)
    inputs = tuple(
        TensorInfo(
            name, str(v.dtype).removeprefix("torch."), named[name], _find_limits(model, name)
        )
        for name, v in tensors.items()
    )
    sources = {i.name: choose_values(i.name, tensors[i.name], i.limits) for i in inputs}
    thresholds = find_thresholds(model)
    longest = find_longest(model, thresholds)
    flat = FlatModel(model, arguments, _find_extra(model, example_inputs))
    sizes = _choose_sizes(read_sizes(tensors, named), inputs, sources)
    example = Case("the example", tuple(tensors.values()))
    traced = make_case(inputs, sources, sizes, stagger=True)
    say("look for rotary embeddings")
    try:
        with torch.no_grad():
            flat(*example.tensors)
        snapshot.restore_state()
        with patch_for_tracing(model):
            found = find_replacement(model, lambda: flat(*traced.tensors))
    except RotaryExportError:
        raise
    except (Exception, SystemExit) as error:  # whatever the model raises
        raise RotaryExportError(
            f"{type(model).__name__} fails on its example inputs: {describe(error)}"
        ) from error
    finally:
        snapshot.restore_state()
    return Prepared(flat, inputs, sources, sizes, example, traced, found, thresholds, longest)


def find_rotary(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
) -> Replacement:
    """Find out what `export_model` would replace, without exporting.

    Args:
        model: As `export_model`.
        example_inputs: As `export_model`.
        dynamic_shapes: As `export_model`.

    Returns:
        `findings`, one per function and kind of call; `calls` and `fused`, their sums.

    Raises:
        RotaryExportError: The model does not run on its example inputs.
    """
    check_model(model, example_inputs)
    with preserve(model) as snapshot:
        return prepare(model, example_inputs, dynamic_shapes, snapshot, lambda _: None).found


def check_found(model: nn.Module, found: Replacement) -> None:
    """Refuse a model in which there is nothing to replace."""
    if found.fused:
        return
    name = type(model).__name__
    if not found.findings:
        raise CheckFailedError(
            f"{name} applies no rotary embedding (no function named so, or registered by "
            "register_rotary, returns a tensor turned by its position)"
        )
    finding = found.findings[0]
    raise CheckFailedError(
        f"none of the {found.calls} rotary calls of {name} can be replaced: {finding.function}: "
        f"{finding.reason}"
    )


def _find_extra(model: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that an export needs: no cache where none comes in."""
    parameters = inspect.signature(model.forward).parameters
    given = "past_key_values" in example_inputs
    wanted = {"use_cache": given} if "use_cache" in parameters else {}
    if "return_dict" in parameters and hasattr(model, "config"):
        wanted["return_dict"] = True
    return {name: value for name, value in wanted.items() if name not in example_inputs}


def _find_limits(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the smallest and largest token id."""
    if not name.endswith("input_ids") or not hasattr(model, "get_input_embeddings"):
        return None
    try:
        rows = cast(Any, model).get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return 0, int(rows) - 1


def _choose_sizes(
    example: Mapping[str, int], inputs: Sequence[TensorInfo], sources: Mapping[str, InputValues]
) -> dict[str, int]:
    """Choose what to trace at: small sizes, all different; the example's where they may matter."""
    sizes: dict[str, int] = {}
    for name, size in example.items():
        held = [i for i in inputs if any(name in str(d).split(" + ") for d in i.shape)]
        free = all(sources[i.name].role != "values" for i in held)
        wanted = TRACED.get(name, max(size, 2)) if free or size < 2 else size
        while wanted in sizes.values():
            wanted += 1
        sizes[name] = wanted
    return sizes


def convert_model(
    model: nn.Module, example_inputs: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Copy a model into another type, unless it is of it; and the floating example inputs."""

    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        try:
            model = copy_as(model, dtype)
        except Exception as error:  # what deepcopy raises, and the model's own conversion
            raise RotaryExportError(
                f"{type(model).__name__} can't be copied as {dtype}: {describe(error)}"
            ) from error
    inputs = {}
    for name, value in example_inputs.items():
        if hasattr(value, "layers"):  # a cache: convert what is in it, in a copy
            arguments, tensors = read_arguments({name: value})
            inputs[name] = arguments[0].rebuild([convert(t) for t in tensors.values()])
        else:
            inputs[name] = torch.utils._pytree.tree_map(convert, value)
    return model, inputs
