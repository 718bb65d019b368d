"""Compare a model's frequencies with the formula of the rope type that its config names.

A model and its export share the buffers `inv_freq`, so that no comparison of the two finds a wrong
one. The buffers are those of transformers: `inv_freq`, `original_inv_freq` and `long_inv_freq`,
with the type of layer before it where a module has several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from rotary_export.compat.modules import get_buffers
from rotary_export.errors import RotaryExportError, first_line
from rotary_export.proof.comparison import to_comparable
from rotary_export.proof.formulas import compare_formula, compute_inv_freq
from rotary_export.proof.oracle import Expected
from rotary_export.proof.report import Row
from rotary_export.rope.config import read_rope
from rotary_export.rope.fields import Fields
from rotary_export.rope.parameters import RopeParameters
from rotary_export.types import name_dtype

_NAME = "inv_freq"


@dataclass(frozen=True)
class _Buffer:
    """One buffer of frequencies.

    Attributes:
        path: Of its module; empty: the model itself.
        name: In its module.
        value: Its value.
        module: Its module.
        config: Of its module, or of the nearest one around it; None: there is none.
        is_own: Whether the config is the module's.
    """

    path: str
    name: str
    value: Tensor
    module: nn.Module
    config: Any
    is_own: bool

    @property
    def full_name(self) -> str:
        """The name in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def prefix(self) -> str:
        """The type of layer with a "_", or nothing."""
        return self.name.removesuffix(_NAME).removesuffix("original_").removesuffix("long_")


def compare_frequencies(model: nn.Module) -> tuple[list[Row], dict[str, str]]:
    """Compare every buffer of frequencies whose rope type is known.

    A module that was called may keep the frequencies of a long input: those of its longest one are
    accepted too.

    Args:
        model: Any module.

    Returns:
        A row for each buffer, of those of equal layers the worst; and the buffers that were not
        compared, with the reason.
    """
    rows: dict[str, Row] = {}
    unverified: dict[str, str] = {}
    for buffer in _find_buffers(model):
        name = ".".join("*" if part.isdigit() else part for part in buffer.full_name.split("."))
        row = _compare(buffer)
        if isinstance(row, str):
            unverified[name] = row
        elif name not in rows or row.oracle.max_ulp > rows[name].oracle.max_ulp:
            rows[name] = replace(row, output=name)
    return list(rows.values()), unverified


def _find_buffers(model: nn.Module) -> Iterator[_Buffer]:
    configs: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = vars(module).get("config")
        configs[path] = configs.get(path.rpartition(".")[0]) if own is None else own
        for name, value in get_buffers(module).items():
            if name.endswith(_NAME) and isinstance(value, Tensor):
                yield _Buffer(path, name, value, module, configs[path], own is not None)


def _compare(buffer: _Buffer) -> Row | str:
    """Return the row of a buffer, or why it is not compared."""
    if buffer.value.is_meta or buffer.value.dim() != 1:
        return f"it has shape {tuple(buffer.value.shape)}, on {buffer.value.device.type}"
    try:
        rope, names_type = _find_rope(buffer)
    except Exception as error:  # whatever a foreign config raises
        return f"its rope can't be read: {first_line(error)}"
    got = to_comparable(buffer.value.detach().cpu())
    lengths = np.asarray(_list_lengths(buffer, rope))
    dtype = name_dtype(buffer.value.dtype)
    if dtype == "float64":  # of a converted model: they were computed in float32
        dtype = "float32"
    expected = compute_inv_freq(rope.to_dict(), lengths, dtype)
    if rope.axis_layout:  # a model may order the columns by their axes, or store one for all axes
        got, expected = -np.sort(-got), _sort_columns(expected)
        times = expected.value.shape[1] // len(got)
        expected = Expected(*(part[:, :: max(times, 1)] for part in expected))
    if len(got) != expected.value.shape[1]:
        return f"it has {len(got)} values, its config names {expected.value.shape[1]}"
    source = f"rope type {rope.rope_type!r}, which its config names,"
    rows = [
        compare_formula(buffer.full_name, got, Expected(*parts), source)
        for parts in zip(*expected, strict=True)
    ]
    row = min(rows, key=lambda row: row.oracle.max_ulp)
    if not row.passed and not (buffer.is_own and names_type):
        return f"its module may not follow the nearest config: {row.case}"
    return row


def _find_rope(buffer: _Buffer) -> tuple[RopeParameters, bool]:
    """Return what a config contains about a buffer, and whether it names the rope type itself.

    Raises:
        Exception: It contains nothing, or what can't be read.
    """
    if not hasattr(buffer.config, "model_type"):
        raise RotaryExportError("no module around it has a config of transformers")
    ropes = read_rope(buffer.config)
    layer_type = buffer.prefix.removesuffix("_") or None
    if layer_type is None and len(ropes) == 1:
        (layer_type,) = ropes
    rope = ropes.get(layer_type)
    if rope is None:
        raise RotaryExportError(f"its config has no rope for {layer_type or 'all layers'}")
    fields = Fields(buffer.config, "the config")
    names_type = fields.get("rope_parameters", "rope_scaling") is not None
    return rope, names_type and fields.get("text_config") is None


def _list_lengths(buffer: _Buffer, rope: RopeParameters) -> list[int]:
    """List the lengths of which a buffer may have the frequencies."""
    boundary = rope.length_boundary
    kind = buffer.name.removeprefix(buffer.prefix).removesuffix(_NAME)
    if boundary is None or kind == "original_":
        return [0]
    if not rope.varies_past_boundary:
        return [boundary + 1] if kind == "long_" else [0, boundary + 1]
    longest = getattr(buffer.module, "max_seq_len_cached", boundary)
    return [0, int(getattr(buffer.module, f"{buffer.prefix}max_seq_len_cached", longest))]


def _sort_columns(expected: Expected) -> Expected:
    order = np.argsort(-expected.value, axis=1)
    return Expected(*(np.take_along_axis(part, order, axis=1) for part in expected))
