"""The kind of rope that `RotaryEmbedding` is: tables of angles, and a scale with xPos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.embedding import RotaryEmbedding, RotaryQueryKey
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.static import StoredStatic
from rotary_export.types import name_dtype

ZETA = "zeta"  # the name in ONNX of RotaryEmbedding's buffer `scale`
ARGUMENTS = (
    "dim",
    "use_xpos",
    "scale_base",
    "interpolation_factor",
    "base",
    "base_rescale_factor",
)


@dataclass(frozen=True)
class PlainRope:
    """A `RotaryEmbedding`; see `kinds.RopeKind`.

    Attributes:
        arguments: Of `RotaryEmbedding`, without max_seq_len.
    """

    kind: ClassVar[str] = "plain"
    key: ClassVar[str] = "embedding"

    arguments: Mapping[str, Any]

    @classmethod
    def from_module(cls, module: RotaryEmbedding) -> Self:
        """Read the arguments of a module."""
        return cls({name: getattr(module, name) for name in ARGUMENTS})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the arguments in a manifest; TypeError if something is missing or unknown."""
        RotaryEmbedding(**values)
        return cls(dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments."""
        return dict(self.arguments)

    @property
    def rotary_dim(self) -> int:
        """R."""
        return int(self.arguments["dim"])

    @property
    def default_head_dim(self) -> int:
        """The whole head is rotated."""
        return self.rotary_dim

    @property
    def num_axes(self) -> int:
        """Positions have one axis."""
        return 1

    @property
    def uses_xpos(self) -> bool:
        """Whether there is a scale."""
        return bool(self.arguments["use_xpos"])

    def find_max_seq_len(self, module: RotaryEmbedding) -> int | None:
        """Return the module's, if it has one."""
        return module.max_seq_len

    def check(
        self, module: RotaryEmbedding, *, max_seq_len: int, static: bool, dtype: torch.dtype
    ) -> None:
        """Refuse a length at which xPos's scale, or its reciprocal, is not finite in dtype."""
        if not module.use_xpos:
            return
        longest = find_longest_xpos(module, dtype)
        if max_seq_len > longest:
            name = name_dtype(dtype)
            raise RotaryExportError(
                f"with xPos (dim={module.dim}, scale_base={module.scale_base:g}) the scale leaves "
                f"the range of {name} at max_seq_len={max_seq_len}; the longest that fits is "
                f"{longest}"
            )

    def collect_buffers(self, module: RotaryEmbedding, max_seq_len: int) -> dict[str, Tensor]:
        """Return the module's own."""
        return module.state_dict()

    def make_buffers(self, max_seq_len: int) -> dict[str, Tensor]:
        """Return those of a fresh module."""
        return RotaryEmbedding(**self.arguments).state_dict()

    def make_tables(self, max_seq_len: int, buffers: Mapping[str, Tensor]) -> RotaryEmbedding:
        """Build the module with static shapes."""
        rope = RotaryEmbedding(**self.arguments, max_seq_len=max_seq_len)
        rope.load_state_dict(buffers)
        return rope

    def describe_tables(self, max_seq_len: int) -> tuple[TensorInfo, ...]:
        """Return freqs and scale."""
        shape = (max_seq_len, self.rotary_dim)
        return (
            TensorInfo("freqs", "float32", shape),
            TensorInfo("scale", "float32", shape if self.uses_xpos else ()),
        )

    def make_rotate(self, tables: RotaryEmbedding, *, interleaved: bool, static: bool) -> nn.Module:
        """Build the module that stores the tables."""
        rotate = RotaryQueryKey(tables, interleaved=interleaved)
        return StoredStatic(rotate) if static else rotate


def find_longest_xpos(rope: RotaryEmbedding, dtype: torch.dtype) -> int:
    """Find the longest max_seq_len whose xPos scale, and its reciprocal, are finite in dtype.

    Args:
        rope: With xPos.
        dtype: Of query and key; the tables are float32.

    Returns:
        Rows.
    """
    assert rope.scale is not None
    info = torch.finfo(dtype)
    rounded = info.max * (1 + info.eps / 4)  # what rounds to info.max, not to infinity
    largest = min(rounded, torch.finfo(torch.float32).max)
    # The first row is max_seq_len // 2 steps before the centre: zeta ** -(max_seq_len // 2 / base).
    steps = math.log(largest) / -math.log(float(rope.scale.min()))
    return 2 * int(steps * rope.scale_base) + 1
