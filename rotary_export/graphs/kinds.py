"""The kinds of rope: what an export requires of each, and which kind a module is.

This is the one place that distinguishes them. A third kind is one class and one line of KINDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.embedding import RotaryEmbedding
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.plain import PlainRope
from rotary_export.graphs.scaled import ScaledRope
from rotary_export.rope import ScaledRotaryEmbedding

RopeModule: TypeAlias = RotaryEmbedding | ScaledRotaryEmbedding


class RopeKind(Protocol):
    """One rope to export, of whichever kind: the arguments that make its module.

    Attributes:
        kind: Name of the kind; `proof/oracle.py` has an oracle for each.
        key: Key of a manifest's config that contains the arguments.
    """

    kind: ClassVar[str]
    key: ClassVar[str]

    @classmethod
    def from_module(cls, module: Any) -> Self:
        """Read the arguments of a module of this kind."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the arguments in a manifest.

        Raises:
            TypeError: Something is missing or unknown.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as a manifest contains them."""

    @property
    def rotary_dim(self) -> int:
        """R, the channels of a head that are rotated."""

    @property
    def default_head_dim(self) -> int:
        """H, where the export's arguments leave it out."""

    @property
    def num_axes(self) -> int:
        """A, the number of axes of the positions."""

    @property
    def uses_xpos(self) -> bool:
        """Whether `rotate` multiplies by a scale."""

    def find_max_seq_len(self, module: Any) -> int | None:
        """Return the rows of the tables, where the export's arguments leave them out."""

    def check(self, module: Any, *, max_seq_len: int, static: bool, dtype: torch.dtype) -> None:
        """Refuse what has no graph.

        Raises:
            RotaryExportError: The message names the argument.
        """

    def collect_buffers(self, module: Any, max_seq_len: int) -> dict[str, Tensor]:
        """Return the state dict that is exported, of a module and a number of rows."""

    def make_buffers(self, max_seq_len: int) -> dict[str, Tensor]:
        """Return the state dict of a fresh module."""

    def make_tables(self, max_seq_len: int, buffers: Mapping[str, Tensor]) -> nn.Module:
        """Build the module of the graph `tables`."""

    def describe_tables(self, max_seq_len: int) -> tuple[TensorInfo, ...]:
        """Return the outputs of the graph `tables`."""

    def make_rotate(self, tables: Any, *, interleaved: bool, static: bool) -> nn.Module:
        """Build the module of the graph `rotate` from that of `tables`."""


KINDS: dict[type[nn.Module], type[RopeKind]] = {
    RotaryEmbedding: PlainRope,
    ScaledRotaryEmbedding: ScaledRope,
}


def make_kind(module: object) -> RopeKind:
    """Read which rope a module is.

    Raises:
        RotaryExportError: It is not one that can be exported.
    """
    kind = KINDS.get(type(module))  # type: ignore[arg-type]  # a subclass may compute something else
    if kind is None:
        raise RotaryExportError(
            "module must be a rotary_export.RotaryEmbedding or ScaledRotaryEmbedding, or the "
            "RotaryEmbedding of zeta or x-transformers, "
            f"got {type(module).__module__}.{type(module).__qualname__}"
        )
    return kind.from_module(module)


def read_kind(config: Mapping[str, Any]) -> RopeKind:
    """Read which rope the `config` of a manifest contains.

    Raises:
        TypeError: Something is missing or unknown.
    """
    found = [kind for kind in KINDS.values() if kind.key in config]
    if len(found) != 1:
        keys = " and ".join(kind.key for kind in KINDS.values())
        raise TypeError(f"one of {keys} is required, got {len(found)}")
    values = config[found[0].key]
    if not isinstance(values, Mapping):
        raise TypeError(f"{found[0].key} must be an object, got {type(values).__name__}")
    return found[0].from_dict(values)
