"""RotaryQueryKey: the op with stored tables, against apply_rotary_emb."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from helpers.cases import TYPES
from helpers.oracles import assert_same_bits
from torch import Tensor

from rotary_export import RotaryEmbedding, RotaryExportError, RotaryQueryKey, apply_rotary_emb

XPOS = pytest.mark.parametrize("use_xpos", [False, True], ids=["plain", "xpos"])
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
ROWS = 23
IDS = {
    "per-batch": torch.tensor([[0, 1, 2, 3, 4], [22, 0, 7, 7, 3]]),
    "shared": torch.tensor([[4, 3, 9, 9, 22]]),
    "offset": torch.tensor([18]),
}


def make_pair(use_xpos: bool, interleaved: bool = False, rows: int = ROWS) -> RotaryQueryKey:
    rope = RotaryEmbedding(6, use_xpos, scale_base=8, max_seq_len=rows)
    return RotaryQueryKey(rope, interleaved=interleaved)


def draw(dtype: torch.dtype = torch.float32, seq_len: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, seq_len, 8, generator=generator).to(dtype)
    return query, torch.randn(2, 2, seq_len, 8, generator=generator).to(dtype)


@XPOS
@LAYOUTS
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rows_of_tables", [ROWS, ROWS + 1], ids=["odd", "even"])
def test_equal_to_apply_rotary_emb_around_one_centre(
    use_xpos, interleaved, name, ids, rows_of_tables
):
    query, key = draw(TYPES[name])
    got = make_pair(use_xpos, interleaved, rows_of_tables)(query, key, ids)
    freqs, scale = RotaryEmbedding(6, use_xpos, scale_base=8)(rows_of_tables)
    rows = ids if ids.dim() == 2 else (ids + torch.arange(5))[None]
    freqs = freqs[rows][:, None]
    if use_xpos:
        scale = scale[rows][:, None]
    if query.dtype == torch.float64 and use_xpos:
        scale = scale.double()  # the op computes the reciprocal in double, too
    for y, x, factor in zip(got, (query, key), (scale, scale**-1), strict=True):
        assert_same_bits(y, apply_rotary_emb(x, freqs, factor, interleaved=interleaved))


@XPOS
@pytest.mark.parametrize("rows", [ROWS, ROWS + 1], ids=["odd", "even"])
def test_every_row_of_the_tables(use_xpos, rows):
    """Around the centre rows // 2, whether there are an odd or an even number of rows."""
    pair, (freqs, scale) = make_pair(use_xpos, rows=rows), RotaryEmbedding(6, use_xpos, 8)(rows)
    assert_same_bits(pair.cos_cache, freqs.cos()[:, :3].contiguous())
    assert_same_bits(pair.sin_cache, freqs.sin()[:, :3].contiguous())
    if use_xpos:
        assert_same_bits(pair.scale_cache, scale[:, :3].contiguous())
        assert (pair.scale_cache[rows // 2] == 1).all()


@XPOS
@LAYOUTS
def test_cached_decode_scores_as_the_full_pass(use_xpos, interleaved):
    pair = make_pair(use_xpos, interleaved)
    query, key = draw(seq_len=ROWS)
    key = key.repeat_interleave(2, 1)
    q, k = pair(query, key, torch.arange(ROWS)[None])
    cached = []
    for step in range(ROWS):
        token = slice(step, step + 1)
        q_step, k_step = pair(query[:, :, token], key[:, :, token], torch.tensor([step]))
        cached.append(k_step)
        assert_same_bits(q_step, q[:, :, token])
        assert_same_bits(torch.cat(cached, 2), k[:, :, : step + 1])
    if use_xpos:  # any other centre gives the same scores: it cancels
        wide = RotaryQueryKey(
            RotaryEmbedding(6, True, scale_base=8), max_seq_len=40, interleaved=interleaved
        )
        other_q, other_k = wide(query, key, torch.arange(ROWS)[None])
        assert not torch.allclose(other_q, q, rtol=1e-2)
        want = q.double() @ k.double().mT
        got = other_q.double() @ other_k.double().mT
        # Rounded to float32 a few times each, relative to the terms of the sum.
        size = q.double().abs() @ k.double().abs().mT
        assert ((got - want).abs() <= 16 * 2**-24 * size + 1e-5 * want.abs()).all()


@XPOS
def test_gradients_are_those_of_apply_rotary_emb(use_xpos):
    query, key = (x.requires_grad_() for x in draw())
    pair, ids = make_pair(use_xpos), torch.arange(5)[None]
    freqs, scale = RotaryEmbedding(6, use_xpos, scale_base=8)(ROWS)
    scale = scale[:5] if use_xpos else scale
    plain = [apply_rotary_emb(query, freqs[:5], scale), apply_rotary_emb(key, freqs[:5], scale**-1)]
    weights = [torch.randn_like(x) for x in plain]
    grads = [
        torch.autograd.grad(list(outputs), (query, key), weights)
        for outputs in (pair(query, key, ids), plain)
    ]
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@XPOS
def test_a_lowered_module_rotates_lowered_activations(use_xpos):
    query, key = draw(torch.float16)
    ids = IDS["per-batch"]
    want = make_pair(use_xpos)(query, key, ids)
    for got, value in zip(make_pair(use_xpos).half()(query, key, ids), want, strict=True):
        assert_same_bits(got, value)


@XPOS
def test_copies_and_pickles(use_xpos):
    pair = make_pair(use_xpos, interleaved=True)
    for twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert repr(twin) == repr(pair)
        for got, want in zip(
            twin(*draw(), IDS["shared"]), pair(*draw(), IDS["shared"]), strict=True
        ):
            assert_same_bits(got, want)
    assert not pair.state_dict()


def test_tables_are_built_from_the_buffers_of_the_rope():
    rope = RotaryEmbedding(6, max_seq_len=ROWS)
    rope.load_state_dict({"inv_freq": torch.tensor([1.0, 0.5, 0.25])})
    pair = RotaryQueryKey(rope)
    assert torch.allclose(pair.sin_cache[1], torch.tensor([1.0, 0.5, 0.25]).sin())


def test_max_seq_len_is_needed():
    with pytest.raises(RotaryExportError, match=r"^max_seq_len must be given here or to Rotary"):
        RotaryQueryKey(RotaryEmbedding(8))
    for wrong in (0, 9.5, True):
        with pytest.raises(RotaryExportError, match=f"^max_seq_len must be an int .* {wrong}$"):
            RotaryQueryKey(RotaryEmbedding(8), max_seq_len=wrong)


@pytest.mark.parametrize(("bad", "batch", "row"), [(-1, 0, 2), (ROWS, 1, 4)])
def test_an_id_outside_the_tables_is_refused(bad, batch, row):
    ids = IDS["per-batch"].clone()
    ids[batch, row] = bad
    message = f"position_ids must be in [0, {ROWS}), got {bad} at batch {batch}, row {row}"
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        make_pair(False)(*draw(), ids)
