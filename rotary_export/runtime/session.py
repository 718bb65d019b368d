"""What every session has: checked inputs, numpy or torch, and outputs of the same kind."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from rotary_export.bundle.dims import (
    PAST,
    SEQ,
    compute_dim,
    list_names,
    read_bounded,
    solve_dim,
    solve_sum,
)
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import RotaryExportError, UsageWarning
from rotary_export.op.spec import bad_id_message
from rotary_export.runtime.tensors import is_torch
from rotary_export.types import name_dtype

Tensors = Mapping[str, Any]  # numpy arrays, or torch tensors


class Session(ABC):
    """One graph of a bundle, loaded; call it with its inputs by name.

    Attributes:
        graph_name: Of the bundle's manifest: "rotate", "model".
        graph: Its inputs and outputs.
        providers: Execution providers in order of preference, as the runtime reports them.
        kernel_path: What computes the rotary nodes: "fused (<instruction set>)", "fused (cuda)",
            "native" (the runtime's own rotary kernel) or "primitive" (plain Mul, Add, ...).
    """

    def __init__(
        self, graph_name: str, graph: GraphInfo, providers: tuple[str, ...], kernel_path: str
    ) -> None:
        self.graph_name = graph_name
        self.graph = graph
        self.providers = providers
        self.kernel_path = kernel_path
        self._has_warned = False

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.graph_name} on {', '.join(self.providers)}: "
            f"{self.kernel_path}>"
        )

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run the graph.

        Args:
            **inputs: One numpy array per input, or one torch tensor per input (used where they
                are, without a copy, if contiguous). A scalar input may also be an int.

        Returns:
            Outputs by name, of the kind of the inputs.

        Raises:
            RotaryExportError: An input is missing, unknown, of a wrong dtype or shape, or out of
                its limits.
        """
        arrays = {
            name: np.asarray(value) if type(value) is int else value
            for name, value in inputs.items()
        }
        sizes = check_session_inputs(self.graph_name, self.graph, arrays)
        self._warn_of_length(sizes)
        return self._run(arrays, sizes, self._check_kinds(inputs))

    def _check_kinds(self, inputs: Tensors) -> bool:
        """Refuse a mixture and devices that the runtime can't read; return whether it is torch."""
        for name, value in inputs.items():
            device = value.device.type if is_torch(value) else "cpu"
            if device != "cpu" and not (device == "cuda" and "CUDA" in self.providers[0]):
                raise RotaryExportError(
                    f"{name} must be on a device that {self.providers[0]} reads, got {device}"
                )
        kinds = {is_torch(value) for value in inputs.values() if type(value) is not int}
        if len(kinds) > 1:
            given = ", ".join(f"{name} {type(v).__name__}" for name, v in inputs.items())
            raise RotaryExportError(
                f"inputs must be all numpy arrays or all torch tensors, got {given}"
            )
        return True in kinds

    def _warn_of_length(self, sizes: Mapping[str, int]) -> None:
        """Warn, once, of a cache whose keys have other angles than a sequence of that length."""
        past, new = sizes.get(PAST, 0), sizes.get(SEQ, 0)
        passed = [n for n in self.graph.length_thresholds if 0 < past <= n < past + new]
        if passed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"past {passed[0]} tokens the angles of all positions change, and keys in a cache "
                "keep theirs: compute the cache anew from all tokens, as load_decoder does",
                UsageWarning,
                stacklevel=3,
            )

    @abstractmethod
    def _run(self, inputs: Tensors, sizes: Mapping[str, int], wants_torch: bool) -> dict[str, Any]:
        """Run on checked inputs; `sizes` are those of the dynamic axes."""


def check_session_inputs(name: str, graph: GraphInfo, inputs: Tensors) -> dict[str, int]:
    """Check inputs against what the graph declares.

    Args:
        name: Of the graph.
        graph: What it declares.
        inputs: Arrays or tensors by name.

    Returns:
        Sizes of the dynamic axes.

    Raises:
        RotaryExportError: The first thing that does not fit.
    """
    wanted = [info.name for info in graph.inputs]
    for given in inputs:
        if given not in wanted:
            raise RotaryExportError(
                f"{name} has no input {given!r}; it accepts {', '.join(wanted)}"
            )
    sizes: dict[str, int] = {}
    for info in sorted(graph.inputs, key=_rank):
        if info.name not in inputs:
            raise RotaryExportError(
                f"{name} needs the input {info.name!r}; it accepts {', '.join(wanted)}"
            )
        value = inputs[info.name]
        if not (isinstance(value, (np.ndarray, np.generic)) or is_torch(value)):
            raise RotaryExportError(
                f"{info.name} must be a numpy array or a torch tensor, got {type(value).__name__}"
            )
        if name_dtype(value.dtype) != info.dtype:
            raise RotaryExportError(
                f"{info.name} must be {info.dtype}, got {name_dtype(value.dtype)}"
            )
        _check_shape(info, tuple(value.shape), sizes)
        if info.limits is not None:
            _check_limits(info, value)
    for dim, largest in graph.max_size.items():
        if sizes.get(dim, 0) > largest:
            raise RotaryExportError(f"{dim} must be <= {largest}, got {sizes[dim]}")
    for dim, smallest in graph.min_size.items():
        if sizes.get(dim, smallest) < smallest:
            raise RotaryExportError(f"{dim} must be >= {smallest}, got {sizes[dim]}")
    return sizes


def _check_shape(info: TensorInfo, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    def fits(want: int | str, got: int) -> bool:
        if not isinstance(want, str):
            return got == want
        if (solved := solve_dim(want, got)) is not None:
            name, size = solved
            return sizes.setdefault(name, size) == size
        is_open = len(list_names([want])) > 1 or read_bounded(want) is not None
        return is_open and solve_sum(want, got, sizes)

    if len(shape) != len(info.shape) or not all(map(fits, info.shape, shape)):
        known = {name: sizes[name] for name in list_names(info.shape) if name in sizes}
        where = "".join(f", {dim}={size}" for dim, size in known.items())
        wanted = f"({', '.join(str(d) for d in info.shape)})"
        raise RotaryExportError(f"{info.name} must have shape {wanted}{where}, got {shape}")


def _rank(info: TensorInfo) -> int:
    """Return when an input is checked: first what has one name a size, then sums, then bounds."""
    dims = [dim for dim in info.shape if isinstance(dim, str)]
    if any(read_bounded(dim) for dim in dims):
        return 2
    return int(any(len(list_names([dim])) > 1 for dim in dims))


def _check_limits(info: TensorInfo, value: Any) -> None:
    """Refuse values out of range; those on another device are left to the kernel."""
    assert info.limits is not None
    if is_torch(value):
        if value.device.type != "cpu":
            return
        value = value.numpy()
    low, high = info.limits
    bad = np.argwhere((value < low) | (value > high))
    if not len(bad):
        return
    first = tuple(int(i) for i in bad[0])
    if info.name == "position_ids":
        *_, batch, row = first
        raise RotaryExportError(bad_id_message(int(value[first]), batch, row, high + 1))
    raise RotaryExportError(
        f"{info.name} must be >= {low} and <= max_{info.name} = {high}, got {int(value[first])}"
    )


def resolve_shape(info: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a tensor, given the sizes of the dynamic axes.

    Raises:
        KeyError: A size follows from the values of the inputs, or by more than a sum.
    """
    return tuple(compute_dim(d, sizes) if isinstance(d, str) else d for d in info.shape)
