"""RotaryEmbedding and RotaryQueryKey, against the originals' formulas written anew here."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers.oracles import assert_same_bits
from torch import Tensor, nn

from rotary_export import RotaryEmbedding, RotaryExportError, RotaryQueryKey, apply_rotary_emb

# torch 2.13 says that TorchScript is deprecated whenever it is used.
TORCHSCRIPT = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)
XPOS = pytest.mark.parametrize("use_xpos", [False, True], ids=["plain", "xpos"])
LENGTHS = (0, 1, 2, 7, 16, 31, 32)


class Original(nn.Module):
    """What zeta and x-transformers 1.16.24 compute, from their formulas (ROPE.md A1)."""

    def __init__(self, dim, use_xpos, scale_base, interpolation_factor, base, rescale):
        super().__init__()
        stretched = base * rescale ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2).float() / dim
        self.register_buffer("inv_freq", 1.0 / torch.pow(stretched, exponent))
        zeta = (torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim) if use_xpos else None
        self.register_buffer("scale", zeta)
        self.interpolation_factor, self.scale_base = interpolation_factor, scale_base

    def forward(self, seq_len: int) -> tuple[Tensor, Tensor | float]:
        t = torch.arange(seq_len).to(self.inv_freq.dtype) / self.interpolation_factor
        freqs = torch.outer(t, self.inv_freq).repeat(1, 2)
        if self.scale is None:
            return freqs, 1.0
        power = (torch.arange(seq_len) - seq_len // 2) / self.scale_base
        return freqs, torch.pow(self.scale, power.unsqueeze(1)).repeat(1, 2)


ARGUMENTS = list(
    itertools.product(
        (4, 6, 64, 130), (False, True), (512, 77.7), (1.0, 3.7), (10000, 5e5), (1.0, 8.0)
    )
)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_equal_to_the_originals_to_the_bit(arguments):
    ours, original = RotaryEmbedding(*arguments), Original(*arguments)
    for seq_len in (*LENGTHS, 1000):
        freqs, scale = ours(seq_len)
        want_freqs, want_scale = original(seq_len)
        assert_same_bits(freqs, want_freqs, seq_len)
        if isinstance(want_scale, float):
            want_scale = torch.tensor(want_scale)
        assert_same_bits(scale, want_scale, seq_len)

    for source, target in ((ours, original), (original, ours)):  # state dicts, both ways
        state = {name: value + 1 for name, value in source.state_dict().items()}
        target.load_state_dict(state, strict=True)
        for name, value in target.state_dict().items():
            assert_same_bits(value, state[name], name)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"use_xpos": True}, (10, 64)),
        ({"use_xpos": True, "scale_base": 1024}, (10, 64)),
        ({"use_xpos": False}, ()),
    ],
    ids=["xpos", "scale-base", "plain"],
)
def test_usage_examples_of_the_original_documentation(options, shape):
    rotary_embedding = RotaryEmbedding(dim=64, **options)
    freqs, scale = rotary_embedding(10, torch.device("cpu"))
    assert freqs.shape == (10, 64)
    assert scale.shape == shape
    assert (freqs * scale).shape == (10, 64)
    assert torch.equal(scale**-1, 1 / scale)


# ---- precision


@XPOS
@pytest.mark.parametrize(
    "lower",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        lambda m: m.to(torch.bfloat16),
        lambda m: nn.Sequential(m).half()[0],
        lambda m: m.double().half().float(),
    ],
    ids=["half", "bfloat16", "to", "inside", "there-and-back"],
)
def test_lower_precision_passes_by(use_xpos, lower):
    rope = RotaryEmbedding(8, use_xpos)
    pair = RotaryQueryKey(rope, max_seq_len=16)
    want, tables = rope(3000), dict(pair.named_buffers())
    rope, pair = lower(rope), lower(pair)
    for got, value in zip(rope(3000), want, strict=True):
        assert_same_bits(got, value)
    for name, buffer in pair.named_buffers():
        assert_same_bits(buffer, tables[name], name)


@XPOS
def test_autocast_changes_nothing(use_xpos):
    rope, x = RotaryEmbedding(8, use_xpos), torch.randn(1, 2, 3000, 8)
    pair, ids = RotaryQueryKey(rope, max_seq_len=3000), torch.arange(3000)[None]

    def run() -> list[Tensor]:
        freqs, scale = rope(3000)
        return [freqs, scale, apply_rotary_emb(x, freqs, scale), *pair(x, x, ids)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for value, wanted in zip(got, want, strict=True):
        assert_same_bits(value, wanted)


def test_double_is_double():
    rope = RotaryEmbedding(8, True).double()
    assert {t.dtype for t in rope(5)} == {torch.float64}
    pair = RotaryQueryKey(rope, max_seq_len=5)
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    got, _ = pair(x, x, torch.arange(5)[None])
    freqs, _ = rope(5)
    plain = apply_rotary_emb(x, freqs) * torch.cat((pair.scale_cache,) * 2, -1)
    assert torch.allclose(got, plain, rtol=1e-14)


# ---- seq_len


@XPOS
@pytest.mark.parametrize("dim", [6, 64, 130])
def test_a_tensor_equals_an_int(use_xpos, dim):
    rope = RotaryEmbedding(dim, use_xpos)
    static = RotaryEmbedding(dim, use_xpos, max_seq_len=32)
    for seq_len in LENGTHS:
        want, padded = rope(seq_len), static(torch.tensor(seq_len))
        for got, value in zip(rope(torch.tensor(seq_len)), want, strict=True):
            assert_same_bits(got, value, seq_len)
        for got, value in zip(static(seq_len), want, strict=True):
            assert_same_bits(got, value, seq_len)
        assert_same_bits(padded[0][:seq_len], want[0], seq_len)
        assert padded[0].shape == (32, dim)
        assert not padded[0][seq_len:].any()
        if use_xpos:
            assert_same_bits(padded[1][:seq_len], want[1], seq_len)
            assert (padded[1][seq_len:] == 1).all()
        x = torch.randn(2, 32, dim)
        assert torch.equal(apply_rotary_emb(x, *padded)[:, seq_len:], x[:, seq_len:])


BAD_LENGTHS = {
    "negative": (-1, "seq_len must be >= 0 and <= max_seq_len = 32, got -1"),
    "over": (33, "seq_len must be >= 0 and <= max_seq_len = 32, got 33"),
    "tensor-negative": (
        torch.tensor(-1),
        "seq_len must be >= 0 and <= max_seq_len = 32, got -1",
    ),
    "tensor-over": (torch.tensor(33), "seq_len must be >= 0 and <= max_seq_len = 32, got 33"),
    "float": (10.0, "seq_len must be an int or an int64 tensor, got 10.0"),
    "bool": (True, "seq_len must be an int or an int64 tensor, got True"),
    "none": (None, "seq_len must be an int or an int64 tensor, got None"),
    "int32": (
        torch.tensor(3, dtype=torch.int32),
        "seq_len must be an int or an int64 tensor of shape (), got int32 of shape ()",
    ),
    "positions": (
        torch.arange(3),
        "seq_len must be an int or an int64 tensor of shape (), got int64 of shape (3,)",
    ),
}


@pytest.mark.parametrize(("seq_len", "message"), BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths_are_refused(seq_len, message):
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        RotaryEmbedding(8, max_seq_len=32)(seq_len)


def test_without_a_limit_only_negative_lengths_are_refused():
    with pytest.raises(RotaryExportError, match=r"^seq_len must be >= 0, got -1$"):
        RotaryEmbedding(8)(-1)


BAD_ARGUMENTS = {
    "odd": ({"dim": 7}, "dim must be an even int >= 4, got 7"),
    "small": ({"dim": 2}, "dim must be an even int >= 4, got 2"),
    "float": ({"dim": 8.0}, "dim must be an even int >= 4, got 8.0"),
    "interpolation": (
        {"interpolation_factor": 0.5},
        "interpolation_factor must be >= 1 and finite, got 0.5",
    ),
    "interpolation-nan": (
        {"interpolation_factor": float("nan")},
        "interpolation_factor must be >= 1 and finite, got nan",
    ),
    "scale-base": ({"scale_base": 0}, "scale_base must be > 0 and finite, got 0"),
    "base": ({"base": -1.0}, "base must be > 0 and finite, got -1.0"),
    "base-nan": ({"base": float("nan")}, "base must be > 0 and finite, got nan"),
    "rescale": ({"base_rescale_factor": 0}, "base_rescale_factor must be > 0 and finite, got 0"),
    "base-infinite": ({"base": float("inf")}, "base must be > 0 and finite, got inf"),
    "max-seq-len": ({"max_seq_len": 0}, "max_seq_len must be an int >= 1, got 0"),
    "max-seq-len-float": ({"max_seq_len": 9.0}, "max_seq_len must be an int >= 1, got 9.0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        RotaryEmbedding(**{"dim": 8, **arguments})


# ---- graphs


@TORCHSCRIPT
@XPOS
@pytest.mark.parametrize("limit", [None, 32], ids=["dynamic", "static"])
def test_scripts(use_xpos, limit):
    rope = RotaryEmbedding(8, use_xpos, max_seq_len=limit)
    scripted = torch.jit.script(rope)
    for seq_len in LENGTHS:
        for given in (seq_len, torch.tensor(seq_len)):
            for got, want in zip(scripted(given), rope(given), strict=True):
                assert_same_bits(got, want, seq_len)


def trace(rope: RotaryEmbedding) -> nn.Module:
    return torch.jit.trace(rope, torch.tensor(5), check_trace=False)


def export(rope: RotaryEmbedding) -> nn.Module:
    return torch.export.export(rope, (torch.tensor(5),), strict=False).module()


def compile_eager(rope: RotaryEmbedding) -> nn.Module:
    return torch.compile(rope, backend="eager", fullgraph=True)


@TORCHSCRIPT
@XPOS
@pytest.mark.parametrize("convert", [trace, export, compile_eager])
def test_graphs_hold_at_other_lengths_and_clamp(use_xpos, convert):
    rope = RotaryEmbedding(8, use_xpos, max_seq_len=32)
    graph = convert(rope)
    for seq_len in (*LENGTHS, -3, 40):
        want = rope(torch.tensor(min(max(seq_len, 0), 32)))
        for got, value in zip(graph(torch.tensor(seq_len)), want, strict=True):
            assert_same_bits(got, value, seq_len)


@TORCHSCRIPT
@XPOS
def test_a_trace_without_a_limit_keeps_the_length_dynamic(use_xpos):
    rope = RotaryEmbedding(8, use_xpos)
    traced = trace(rope)
    for seq_len in LENGTHS:
        for got, want in zip(traced(torch.tensor(seq_len)), rope(seq_len), strict=True):
            assert_same_bits(got, want, seq_len)


@XPOS
def test_compiles_for_ints(use_xpos):
    rope = RotaryEmbedding(8, use_xpos, max_seq_len=32)
    compiled = compile_eager(rope)
    for seq_len in LENGTHS:
        for got, want in zip(compiled(seq_len), rope(seq_len), strict=True):
            assert_same_bits(got, want, seq_len)
