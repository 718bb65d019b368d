"""The CPU kernel alone, in every instruction set of the machine, with and without streaming stores.

All must have the bits of the oracle. Outputs lie in memory that is filled with a sentinel, so that
a write outside of them is detected.
"""

from __future__ import annotations

import itertools
import math
import mmap

import numpy as np
import pytest
import torch
from helpers.kernel_calls import Kernel, describe, instruction_sets, load_kernel
from helpers.oracles import Tensors, assert_same_bits, compute_eager

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = pytest.mark.parametrize("interleaved", [0, 1], ids=["half", "interleaved"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SENTINEL = 0xA5
GUARD = 192  # Bytes on either side of an output: more than any vector.


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("kernels")
    return [
        load_kernel(folder, isa, streaming_bytes)
        for isa in instruction_sets(folder)
        for streaming_bytes in (0, 2**62)
    ]


def draw_inputs(
    rng: np.random.Generator,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    *,
    kv_heads: int = 1,
    rotary_dim: int = 0,
    scaled: bool = False,
    table_dtype: torch.dtype | None = None,
) -> Tensors:
    """Draw inputs of every magnitude, with a few infinities and NaNs."""
    batch, _, seq_len, head_dim = sizes
    half = (rotary_dim or head_dim) // 2
    rows = seq_len + 2

    def draw(*shape: int, like: torch.dtype | None = None) -> torch.Tensor:
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-9, 5, shape)
        special = rng.random(shape) < 0.01
        values[special] = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0], special.sum())
        return torch.from_numpy(values).to(like or dtype)

    table_dtype = table_dtype or dtype
    inputs = {"X": draw(*sizes)}
    for name in ("cos_cache", "sin_cache", *(["scale_cache"] if scaled else [])):
        inputs[name] = draw(rows, half, like=table_dtype)
    inputs["position_ids"] = torch.from_numpy(rng.integers(0, rows, (batch, seq_len)))
    if kv_heads:
        inputs["key"] = draw(batch, kv_heads, seq_len, head_dim)
    return inputs


class Output:
    """Memory for an output like `x`, `offset` bytes past a multiple of 64, between guards."""

    def __init__(self, x: torch.Tensor, offset: int) -> None:
        self.like = x
        size = x.numel() * x.element_size()
        self.memory = torch.full((size + 2 * GUARD + 128,), SENTINEL, dtype=torch.uint8)
        self.start = GUARD + (-(self.memory.data_ptr() + GUARD)) % 64 + offset
        self.end = self.start + size
        self.tensor = describe(x, self.memory.data_ptr() + self.start)

    def fill(self, x: torch.Tensor) -> None:
        self.memory[self.start : self.end] = x.contiguous().view(-1).view(torch.uint8)

    def check(self, want: torch.Tensor, what: str) -> None:
        assert (self.memory[: self.start] == SENTINEL).all(), f"{what}: written before the output"
        assert (self.memory[self.end :] == SENTINEL).all(), f"{what}: written past the output"
        got = self.memory[self.start : self.end].clone().view(self.like.dtype)
        assert_same_bits(got.view(self.like.shape), want, what)


def check_kernels(
    kernels: list[Kernel],
    inputs: Tensors,
    *,
    interleaved: int = 0,
    rotary_dim: int = 0,
    offsets: tuple[int, int] = (0, 0),
    in_place: bool = False,
    what: object = "",
) -> None:
    """Run every kernel on inputs and outputs that begin at these offsets, in bytes."""
    wants = compute_eager(inputs, bool(interleaved))
    for kernel in kernels:
        tensors = {name: describe(x) for name, x in inputs.items()}
        outputs = []
        for source, name in (("X", "Y"), ("key", "key_out")):
            if source not in inputs:
                continue
            output = Output(inputs[source], offsets[1])
            outputs.append(output)
            tensors[name] = output.tensor
            moved = output if in_place else Output(inputs[source], offsets[0])
            moved.fill(inputs[source])
            tensors[source] = moved.tensor
            outputs += [] if in_place else [moved]  # Kept alive until the call.
        message = kernel.rotate(tensors, interleaved=interleaved, rotary_embedding_dim=rotary_dim)
        assert message == ""
        written = outputs if in_place else outputs[::2]
        for output, want in zip(written, wants, strict=True):
            output.check(want, f"{kernel.name} {what}")


@LAYOUTS
@TYPES
def test_every_alignment_of_input_and_output(kernels, dtype, interleaved):
    rng = np.random.default_rng(1)
    inputs = draw_inputs(rng, dtype, (1, 2, 5, 42), rotary_dim=38, scaled=True)
    for offset in range(64):
        for offsets in ((offset, 37 * offset % 64), (offset, 0), (0, offset)):
            check_kernels(
                kernels,
                inputs,
                interleaved=interleaved,
                rotary_dim=38,
                offsets=offsets,
                what=f"offsets {offsets}",
            )


@LAYOUTS
@TYPES
def test_every_head_dim_and_rotary_dim_up_to_320(kernels, dtype, interleaved):
    rng = np.random.default_rng(2)
    for head_dim in range(2, 321):
        largest = head_dim // 2
        for rotary_dim in {2 * largest, 2 * int(rng.integers(1, largest + 1))}:
            scaled = bool(rng.integers(2))
            inputs = draw_inputs(
                rng, dtype, (1, 2, 3, head_dim), rotary_dim=rotary_dim, scaled=scaled
            )
            check_kernels(
                kernels,
                inputs,
                interleaved=interleaved,
                rotary_dim=rotary_dim,
                in_place=bool(rng.integers(2)),
                what=f"head_dim={head_dim} rotary_dim={rotary_dim} scaled={scaled}",
            )


@LAYOUTS
@TYPES
def test_every_form_of_tables_and_heads(kernels, dtype, interleaved):
    rng = np.random.default_rng(3)
    for kv_heads, rotary_dim, scaled, wide, in_place in itertools.product(
        (0, 1, 3), (0, 6), (False, True), (False, True), (False, True)
    ):
        inputs = draw_inputs(
            rng,
            dtype,
            (2, 3, 9, 24),
            kv_heads=kv_heads,
            rotary_dim=rotary_dim,
            scaled=scaled,
            table_dtype=torch.float32 if wide else dtype,
        )
        check_kernels(
            kernels,
            inputs,
            interleaved=interleaved,
            rotary_dim=rotary_dim,
            in_place=in_place,
            what=f"{kv_heads} {rotary_dim} {scaled} {wide} {in_place}",
        )


@LAYOUTS
@TYPES
@pytest.mark.parametrize("seq_len", [0, 1, 2, 700])
def test_every_length_from_none_to_several_blocks(kernels, dtype, interleaved, seq_len):
    rng = np.random.default_rng(4)
    for heads in (0, 1, 5):
        inputs = draw_inputs(rng, dtype, (2, heads, seq_len, 20), scaled=True)
        check_kernels(kernels, inputs, interleaved=interleaved, offsets=(16, 16), what=heads)


@LAYOUTS
@TYPES
def test_a_row_that_is_too_long_for_one_block_of_tables(kernels, dtype, interleaved):
    inputs = draw_inputs(np.random.default_rng(5), dtype, (1, 2, 2, 5000), scaled=True)
    for in_place in (False, True):
        check_kernels(kernels, inputs, interleaved=interleaved, in_place=in_place)


def spread(x: torch.Tensor, strides: tuple[int, ...], memory: mmap.mmap) -> torch.Tensor:
    """Return a copy of `x` with these strides in `memory`, which is too large to allocate."""
    whole = torch.frombuffer(memory, dtype=x.dtype)
    wide = torch.as_strided(whole, x.shape, strides)
    wide.copy_(x)
    return wide


@LAYOUTS
@TYPES
def test_strides_beyond_32_bits(kernels, dtype, interleaved):
    inputs = draw_inputs(np.random.default_rng(6), dtype, (2, 2, 3, 24), kv_heads=0)
    (want,) = compute_eager(inputs, bool(interleaved))
    gigabytes = 2**30 // inputs["X"].element_size()
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Named since Python 3.13.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    for strides in (
        (9 * gigabytes, 4 * gigabytes, gigabytes, 1),
        (9 * gigabytes, gigabytes // 2, 3 * gigabytes, 1),
    ):
        with mmap.mmap(-1, 20 * 2**30, flags=flags) as memory:
            for kernel in kernels:
                x = spread(inputs["X"], strides, memory)
                tensors = {name: describe(t) for name, t in (inputs | {"X": x, "Y": x}).items()}
                assert kernel.rotate(tensors, interleaved=interleaved) == ""
                assert_same_bits(x.contiguous(), want, kernel.name)
                del x  # The memory can't be closed with a tensor in it.


@LAYOUTS
@TYPES
def test_heads_inside_rows(kernels, dtype, interleaved):
    """(B, S, N*H): the heads of a row are adjacent in memory."""
    rng = np.random.default_rng(7)
    inputs = draw_inputs(rng, dtype, (2, 6, 40, 20), kv_heads=2, rotary_dim=12, scaled=True)
    wants = compute_eager(inputs, bool(interleaved))
    sources = {"X": "Y", "key": "key_out"}
    flat = inputs | {name: inputs[name].transpose(1, 2).flatten(2) for name in sources}
    for kernel in kernels:
        outputs = {sources[name]: Output(flat[name], 16) for name in sources}
        tensors = {name: describe(x) for name, x in flat.items()}
        tensors |= {name: output.tensor for name, output in outputs.items()}
        options = {"num_heads": 6, "kv_num_heads": 2, "interleaved": interleaved}
        assert kernel.rotate(tensors, rotary_embedding_dim=12, **options) == ""
        for output, want in zip(outputs.values(), wants, strict=True):
            output.check(want.transpose(1, 2).flatten(2), kernel.name)


def every_float32_of_interest(dtype: torch.dtype) -> torch.Tensor:
    """Return random bit patterns, every tie of a half type and the values next to it."""
    bits = np.random.default_rng(8).integers(0, 2**32, 2**16, dtype=np.uint32)
    lower = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16)
    ties = (lower.view(dtype).double() + (lower + 1).view(dtype).double()) / 2
    tie_bits = ties.float().view(torch.int32).numpy().view(np.uint32)
    patterns = np.concatenate([bits, tie_bits - 1, tie_bits, tie_bits + 1])
    return torch.from_numpy(patterns[: len(patterns) // 64 * 64].view(np.float32)).view(1, -1, 64)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_rounding_is_to_nearest_even_in_every_instruction_set(kernels, dtype, interleaved):
    cos = every_float32_of_interest(dtype)
    for second in (0, 1):  # x = (1, second), sin = 0: y is cos, rounded, and second * cos.
        x = torch.full((1, 1, cos.shape[1], 128), second, dtype=dtype)
        x[..., :: 2 if interleaved else 1][..., :64] = 1
        inputs = {"X": x, "cos_cache": cos, "sin_cache": torch.zeros_like(cos)}
        check_kernels(kernels, inputs, interleaved=interleaved)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_value_is_loaded_exactly(kernels, dtype, interleaved):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one = torch.ones(1, 1024, 32)
    inputs = {"X": every.reshape(1, 1, 1024, 64), "cos_cache": one, "sin_cache": 0.375 * one}
    check_kernels(kernels, inputs, interleaved=interleaved)
    x = torch.ones(1, 1, 512, 256, dtype=dtype)
    table = every.reshape(1, 512, 128)
    inputs = {"X": x, "cos_cache": table, "sin_cache": table.flip(1)}
    check_kernels(kernels, inputs, interleaved=interleaved)
