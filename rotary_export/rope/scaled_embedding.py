"""`ScaledRotaryEmbedding`: cos and sin of run-time positions, for every rope type, stateless."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotary_export.embedding import PreciseBuffers, check_max_seq_len
from rotary_export.errors import RotaryExportError
from rotary_export.rope.parameters import RopeParameters


def compute_length(position_ids: Tensor) -> Tensor:
    """Return the actual sequence length, the largest position + 1, as a tensor of shape ().

    Args:
        position_ids: Of any shape; of no position at all the length is 1.
    """
    ids = position_ids.flatten()
    return torch.cat((ids, ids.new_zeros(1))).max() + 1


def list_inv_freq(parameters: RopeParameters, max_seq_len: int | None) -> Tensor:
    """Compute the frequencies of every length up to `max_seq_len`.

    Args:
        parameters: From `read_rope`.
        max_seq_len: None: any length; of a type that varies past its boundary then only row 0.

    Returns:
        (n, R/2), float32. Row 0 is that of lengths up to the boundary. Longrope has a second row
        for those past it, dynamic has one row for each.
    """
    boundary = parameters.length_boundary
    rows = [parameters.compute_short_inv_freq()]
    if boundary is not None and (max_seq_len is None or max_seq_len > boundary):
        lengths = torch.arange(boundary + 1, boundary + 2)  # tensors, as Hugging Face's forward has
        if parameters.varies_past_boundary:
            lengths = torch.arange(boundary + 1, (max_seq_len or boundary) + 1)
        rows += [parameters.compute_long_inv_freq(length) for length in lengths]
    return torch.stack(rows)


def select_inv_freq(
    parameters: RopeParameters, inv_freq: Tensor, length: Tensor, max_seq_len: int | None
) -> Tensor:
    """Return the frequencies of a length.

    Args:
        parameters: From `read_rope`.
        inv_freq: (n, R/2), from `list_inv_freq`.
        length: (), int64.
        max_seq_len: As in `list_inv_freq`.

    Returns:
        (R/2,), float32.
    """
    boundary = parameters.length_boundary
    if boundary is None or (max_seq_len is not None and max_seq_len <= boundary):
        return inv_freq[0]
    if not parameters.varies_past_boundary:
        return torch.embedding(inv_freq, (length > boundary).long())
    if max_seq_len is not None:
        return torch.embedding(inv_freq, (length - boundary).clamp(min=0))
    return torch.where(length > boundary, parameters.compute_long_inv_freq(length), inv_freq[0])


def build_cos_sin_cache(
    parameters: RopeParameters,
    inv_freq: Tensor,
    axes: Tensor | None,
    position_ids: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the tables of positions in a sequence of a given length.

    Args:
        parameters: From `read_rope`.
        inv_freq: (R/2,), of that length.
        axes: (R/2,), int64: the axis of the positions of each column; None: positions have one.
        position_ids: (B, S), or (A, B, S).
        length: (), int64.

    Returns:
        cos_cache: (B, S, R/2), float32, times the attention factor.
        sin_cache: As cos_cache.
    """
    if axes is None or position_ids.dim() == 2:
        steps = position_ids[..., None]  # (B, S, 1)
    else:
        steps = position_ids.index_select(0, axes).permute(1, 2, 0).contiguous()  # (B, S, R/2)
    steps = steps.float()
    if parameters.coordinates:
        steps = 2 * math.pi * steps
    angles = steps * inv_freq  # (B, S, R/2)
    factor = parameters.compute_attention_factor(length)
    if isinstance(factor, float) and factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


class ScaledRotaryEmbedding(PreciseBuffers):
    """Cos and sin of positions, for one rope type of a Hugging Face config.

    Stateless: the actual sequence length, max(position_ids) + 1, selects the frequencies of dynamic
    and longrope, in the graph. The result is that of a fresh Hugging Face module, whatever was
    computed before. It traces and exports.

    Args:
        parameters: From `read_rope`.
        max_seq_len: The longest length. Given, the frequencies of every length up to it are stored,
            so that no runtime computes powers of its own; None: dynamic computes them in the graph.

    Raises:
        RotaryExportError: The parameters don't go together.
    """

    inv_freq: Tensor
    axes: Tensor | None

    def __init__(self, parameters: RopeParameters, max_seq_len: int | None = None) -> None:
        super().__init__()
        if not isinstance(parameters, RopeParameters):
            raise RotaryExportError(
                "parameters must be RopeParameters, one value of what read_rope returns, "
                f"got {type(parameters).__name__}"
            )
        if max_seq_len is not None:
            check_max_seq_len(max_seq_len)
        self.rope_parameters = parameters  # `parameters` is nn.Module's
        self.max_seq_len = max_seq_len
        axes = parameters.find_axes()
        self.num_axes = max(axes, default=0) + 1
        self.register_buffer("inv_freq", list_inv_freq(parameters, max_seq_len))  # (n, R/2)
        # The axis of position_ids of each column, (R/2,). Derived, so not in the state dict.
        self.register_buffer("axes", torch.tensor(axes) if axes else None, persistent=False)

    @property
    def dim(self) -> int:
        """R, the channels of a head that are rotated."""
        return self.rope_parameters.rotary_dim

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"{self.rope_parameters}, max_seq_len={self.max_seq_len}"

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the tables of some positions.

        Args:
            position_ids: (B, S), int64; with several axes also (A, B, S). Where the positions are
                coordinates, (2, B, S), float32, in [-1, 1].

        Returns:
            cos_cache: (B, S, R/2), float32, times the attention factor.
            sin_cache: As cos_cache.

        Raises:
            RotaryExportError: `position_ids` has not those dimensions.
        """
        shape = tuple(position_ids.shape)
        if len(shape) != 2 and (self.axes is None or len(shape) != 3 or shape[0] != self.num_axes):
            several = "" if self.axes is None else f" or ({self.num_axes}, B, S)"
            raise RotaryExportError(f"position_ids must have shape (B, S){several}, got {shape}")
        return self.build_tables(position_ids, compute_length(position_ids))

    def select_inv_freq(self, length: Tensor) -> Tensor:
        """Return the frequencies, (R/2,), of a length, int64 of shape ()."""
        return select_inv_freq(self.rope_parameters, self.inv_freq, length, self.max_seq_len)

    def build_tables(self, position_ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the tables of positions in a sequence of a given length; as `forward`."""
        inv_freq = self.select_inv_freq(length)
        return build_cos_sin_cache(self.rope_parameters, inv_freq, self.axes, position_ids, length)
