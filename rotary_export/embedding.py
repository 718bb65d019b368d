"""The public modules: `RotaryEmbedding` (freqs, scale) and `RotaryQueryKey` (rotated query, key).

This file scripts with TorchScript, which reads its annotations as they are: no postponed ones here.
"""

import math
from collections.abc import Callable
from typing import Any, Optional, Self, Union

import torch
from torch import Tensor, nn

from rotary_export.errors import RotaryExportError
from rotary_export.op.torch_op import rotary_embedding
from rotary_export.reference import build_freqs, build_scale, compute_inv_freq, compute_zeta

MAX_POSITIONS = 2**24  # float32 represents every integer up to here


class PreciseBuffers(nn.Module):
    """A module whose buffers stay float32 or wider: `.half()` and `.to(bfloat16)` skip them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.is_floating_point() and torch.finfo(new.dtype).bits < 32:
                self._buffers[name] = old.to(new.device)
        return self


class RotaryEmbedding(PreciseBuffers):
    """Rotary position embedding of zeta and x-transformers (1.16.24), with xPos: freqs and scale.

    The result is equal to theirs, to the bit in float32, for every argument; state dicts load
    both ways. It scripts, traces and exports. ROPE: arXiv 2104.09864; xPos: arXiv 2212.10554;
    position interpolation: arXiv 2306.15595.

    Args:
        dim: R, the channels of a head that are rotated; even, >= 4.
        use_xpos: Also return xPos's scale.
        scale_base: Positions per power of xPos's zeta, > 0.
        interpolation_factor: Positions are divided by it, >= 1.
        base: Largest wavelength over 2 pi, > 0.
        base_rescale_factor: NTK-aware rescaling of `base`, > 0.
        max_seq_len: Makes a tensor `seq_len` give static shapes; None: no limit.

    Raises:
        RotaryExportError: An argument is out of its range.
    """

    max_seq_len: Optional[int]  # noqa: UP045 (TorchScript reads this annotation)
    inv_freq: Tensor
    scale: Optional[Tensor]  # noqa: UP045

    def __init__(
        self,
        dim: int,
        use_xpos: bool = False,
        scale_base: float = 512,
        interpolation_factor: float = 1.0,
        base: float = 10000,
        base_rescale_factor: float = 1.0,
        *,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim % 2 or dim < 4:
            raise RotaryExportError(f"dim must be an even int >= 4, got {dim!r}")
        if not isinstance(use_xpos, bool):
            raise RotaryExportError(f"use_xpos must be True or False, got {use_xpos!r}")
        _check_number("interpolation_factor", interpolation_factor, ">= 1")
        _check_number("scale_base", scale_base, "> 0")
        _check_number("base", base, "> 0")
        _check_number("base_rescale_factor", base_rescale_factor, "> 0")
        if max_seq_len is not None:
            check_max_seq_len(max_seq_len)
        self.dim = dim
        self.use_xpos = use_xpos
        self.scale_base = float(scale_base)
        self.interpolation_factor = float(interpolation_factor)
        self.base = float(base)
        self.base_rescale_factor = float(base_rescale_factor)
        self.max_seq_len = max_seq_len
        try:
            inv_freq = compute_inv_freq(dim, base, base_rescale_factor)
        except OverflowError:
            inv_freq = torch.full((1,), math.nan)
        if not inv_freq.isfinite().all():
            raise RotaryExportError(
                "base * base_rescale_factor ** (dim / (dim - 2)) must be finite, "
                f"got base={base}, base_rescale_factor={base_rescale_factor}, dim={dim}"
            )
        self.register_buffer("inv_freq", inv_freq)
        # The originals store zeta under the name `scale`, and None without xPos.
        self.register_buffer("scale", compute_zeta(dim) if use_xpos else None)

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return (
            f"{self.dim}, use_xpos={self.use_xpos}, scale_base={self.scale_base}, "
            f"interpolation_factor={self.interpolation_factor}, base={self.base}, "
            f"base_rescale_factor={self.base_rescale_factor}, max_seq_len={self.max_seq_len}"
        )

    def forward(
        self,
        seq_len: Union[int, Tensor],  # noqa: UP007 (TorchScript reads this annotation)
        device: Optional[torch.device] = None,  # noqa: UP045
    ) -> tuple[Tensor, Tensor]:
        """Compute the angles and the scale of positions 0 .. seq_len - 1.

        Args:
            seq_len: An int, or an int64 tensor of shape (). With a tensor and `max_seq_len` the
                shapes are static: rows at or past `seq_len` are the identity (freqs 0, scale 1).
                In an exported graph, which can't raise, a `seq_len` outside [0, max_seq_len] is
                clamped.
            device: Where the result is; default: where the module is.

        Returns:
            freqs: (seq_len, dim) or (max_seq_len, dim), float32, half-tiled.
            scale: As freqs with xPos, else a 0-d 1.0.

        Raises:
            RotaryExportError: `seq_len` is negative, over `max_seq_len`, or not an integer.
        """
        if not torch.jit.is_scripting():
            _check_seq_len(seq_len, self.max_seq_len)
        if device is None:
            device = self.inv_freq.device
        limit = self.max_seq_len
        keep = torch.ones((1, 1), dtype=torch.bool, device=device)
        if isinstance(seq_len, Tensor):
            if limit is not None:
                length = seq_len.to(device).clamp(0, limit)
                positions = torch.arange(limit, device=device)
                keep = (positions < length)[:, None]  # (max_seq_len, 1)
            else:
                length = seq_len.to(device)
                positions = torch.arange(seq_len, device=device)  # type: ignore[call-overload]
        else:
            length = torch.full((), seq_len, dtype=torch.int64, device=device)
            positions = torch.arange(seq_len, device=device)

        freqs = build_freqs(positions, self.inv_freq.to(device), self.interpolation_factor)
        freqs = torch.where(keep, freqs, 0.0)  # (P, dim)
        zeta = self.scale
        if zeta is None:
            return freqs, torch.ones((), dtype=freqs.dtype, device=device)
        center = torch.div(length, 2, rounding_mode="trunc")
        scale = build_scale(positions, center, zeta.to(device), self.scale_base)
        return freqs, torch.where(keep, scale, 1.0)


def _check_number(name: str, value: object, bound: str) -> None:
    is_number = isinstance(value, (int, float)) and 0 < value < math.inf
    if not is_number or (bound == ">= 1" and value < 1):  # type: ignore[operator]
        raise RotaryExportError(f"{name} must be {bound} and finite, got {value!r}")


def check_max_seq_len(value: object) -> None:
    """Refuse what is not a length of tables.

    Raises:
        RotaryExportError: `value` is not an int in [1, 2**24].
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RotaryExportError(f"max_seq_len must be an int >= 1, got {value!r}")
    if value > MAX_POSITIONS:
        raise RotaryExportError(
            f"max_seq_len must be <= {MAX_POSITIONS}, past which float32 positions are not exact, "
            f"got {value}"
        )


def _check_seq_len(seq_len: object, max_seq_len: int | None) -> None:
    """Refuse what is not a length, in eager mode; in a graph the value is not known."""
    value: Any = seq_len
    if isinstance(seq_len, Tensor):
        if seq_len.dtype != torch.int64 or seq_len.dim() != 0:
            raise RotaryExportError(
                "seq_len must be an int or an int64 tensor of shape (), "
                f"got {str(seq_len.dtype).removeprefix('torch.')} of shape {tuple(seq_len.shape)}"
            )
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        value = seq_len.item()
    elif isinstance(seq_len, bool) or not isinstance(seq_len, (int, torch.SymInt)):
        raise RotaryExportError(f"seq_len must be an int or an int64 tensor, got {seq_len!r}")
    if value < 0 or (max_seq_len is not None and value > max_seq_len):
        upper = "" if max_seq_len is None else f" and <= max_seq_len = {max_seq_len}"
        raise RotaryExportError(f"seq_len must be >= 0{upper}, got {value}")


class RotaryQueryKey(PreciseBuffers):
    """Rotate query and key with the one fused op, from stored float32 tables.

    With xPos, query is multiplied by the scale and key by its reciprocal, around one fixed centre
    `max_seq_len // 2`, so that cached keys and later queries share it.

    The tables are built once, from the buffers that `rope` has when this module is made.

    Args:
        rope: The angles and the scale.
        max_seq_len: Rows of the tables; default: `rope.max_seq_len`.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + dim/2).

    Raises:
        RotaryExportError: No `max_seq_len` is known.
    """

    cos_cache: Tensor
    sin_cache: Tensor
    scale_cache: Tensor | None

    def __init__(
        self, rope: RotaryEmbedding, *, max_seq_len: int | None = None, interleaved: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(rope, RotaryEmbedding):
            raise RotaryExportError(
                f"rope must be a rotary_export.RotaryEmbedding, got {type(rope).__name__}"
            )
        rows = rope.max_seq_len if max_seq_len is None else max_seq_len
        if rows is None:
            raise RotaryExportError("max_seq_len must be given here or to RotaryEmbedding")
        check_max_seq_len(rows)
        self.rotary_dim = rope.dim
        self.max_seq_len = rows
        self.interleaved = interleaved
        half = rope.dim // 2
        positions = torch.arange(rows, device=rope.inv_freq.device)
        freqs = build_freqs(positions, rope.inv_freq, rope.interpolation_factor)
        scale = None
        if rope.scale is not None:
            center = torch.full((), rows // 2, device=positions.device)
            scale = build_scale(positions, center, rope.scale, rope.scale_base)
            scale = scale[:, :half].contiguous()
        # (max_seq_len, dim/2) each, float32. Derived, so not in the state dict.
        self.register_buffer("cos_cache", freqs.cos()[:, :half].contiguous(), persistent=False)
        self.register_buffer("sin_cache", freqs.sin()[:, :half].contiguous(), persistent=False)
        self.register_buffer("scale_cache", scale, persistent=False)

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return (
            f"rotary_dim={self.rotary_dim}, max_seq_len={self.max_seq_len}, "
            f"interleaved={self.interleaved}, xpos={self.scale_cache is not None}"
        )

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate.

        Args:
            query: (B, N, S, H), float32, float16, bfloat16 or float64.
            key: (B, Nkv, S, H), as query.
            position_ids: (B, S), (1, S), or (1,) = position of row 0; int64, in [0, max_seq_len).

        Returns:
            query and key, rotated; same shapes and dtypes.

        Raises:
            RotaryExportError: Shapes or dtypes don't fit, or an id is outside [0, max_seq_len).
        """
        return rotary_embedding(
            query,
            self.cos_cache,
            self.sin_cache,
            position_ids,
            key,
            self.scale_cache,
            interleaved=self.interleaved,
            rotary_dim=self.rotary_dim,
        )
