"""`Decoder`: the tokens of transformers' own `generate`, and one clear error for what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers.bundles import edit_manifest, get_bundle, update_hash
from helpers.counting_decoder import write_counting_decoder
from helpers.decoders import generate_eager, get_decoder, make_prompts

from rotary_export import RotaryExportError, load, load_decoder
from rotary_export.errors import UsageWarning

KERNELS = {"body": {"use_op_library": False}, "library": {"require_fused": True}}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*longrope changes the angles", "ignore:.*reduce_op"
)


@pytest.fixture(scope="module")
def llama():
    return get_decoder("llama")


@pytest.fixture(scope="module")
def decoder(llama):
    return load_decoder(llama[1])


def change_generation(bundle, out, **entries):
    shutil.copytree(bundle, out)
    (out / "generation_config.json").write_text(json.dumps(entries))
    update_hash(out, "generation_config.json")
    return out


@every_kernel
@pytest.mark.parametrize("lengths", [[7], [9, 4, 1, 6]], ids=["one", "four-padded"])
def test_tokens_are_those_of_transformers(llama, kernel, lengths):
    ids, mask = make_prompts(lengths)
    got = load_decoder(llama[1], **KERNELS[kernel]).generate(ids, mask, max_new_tokens=32)
    assert np.array_equal(got, generate_eager(llama[0], ids, mask, 32))


def test_chunks_and_steps_give_the_logits_of_the_whole(llama, decoder):
    ids, mask = make_prompts([11, 5, 8])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        want = llama[0](input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -4:]
    got = [decoder.prefill(ids[:, :8], mask[:, :8], chunk=3)]
    got += [decoder.step(column) for column in ids[:, 8:].T]
    np.testing.assert_allclose(np.stack(got, 1), want.numpy(), rtol=0, atol=2e-4)


def test_rows_are_reordered_as_beams_are(llama, decoder):
    """Also into more rows, and into fewer."""
    ids, mask = make_prompts([6, 9, 3])
    order = np.array([2, 2, 0, 1])
    decoder.prefill(ids, mask)
    decoder.step(np.array([5, 6, 7]))
    decoder.reorder(order)
    got = decoder.step(np.array([8, 9, 10, 11]))
    new = torch.tensor([[7, 8], [7, 9], [5, 10], [6, 11]])
    rows = torch.cat([ids[order], new], 1), torch.cat([mask[order], torch.ones_like(new)], 1)
    want = load_decoder(llama[1]).prefill(*rows)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
    decoder.reorder([1])
    assert decoder.step([12]).shape == (1, 96)


def test_a_cache_that_outgrows_its_room_is_kept(llama, decoder):
    ids, mask = make_prompts([4, 2])
    logits, found = decoder.prefill(ids, mask), []
    for _ in range(24):  # prefill makes room for one token
        found.append(logits.argmax(-1))
        logits = decoder.step(found[-1])
    want = generate_eager(llama[0], ids, mask, 24, eos_token_id=-1)
    assert np.array_equal(np.stack(found, 1), want[:, 4:])


def test_rows_end_by_themselves(llama, decoder):
    """What follows the end of a row is padding; all rows ended, nothing more is generated."""
    ids, mask = make_prompts([7, 5, 6])
    new = generate_eager(llama[0], ids, mask, 20, eos_token_id=-1)[:, 7:]
    ends = [int(new[0, 3]), int(new[1, 9]), int(new[2, 6])]
    want = generate_eager(llama[0], ids, mask, 20, eos_token_id=ends, pad_token_id=1)
    got = decoder.generate(ids, mask, max_new_tokens=20, eos_token_id=ends, pad_token_id=1)
    assert want.shape[1] < 27
    assert (want[:, 7:] == 1).any()
    assert np.array_equal(got, want)


def test_a_stream_has_the_tokens_of_generate(decoder):
    ids, mask = make_prompts([7, 5])
    stream = decoder.stream(ids, mask, max_new_tokens=5)
    columns = [next(stream) for _ in range(5)]
    assert {(column.dtype, column.shape) for column in columns} == {(np.dtype(np.int64), (2,))}
    want = decoder.generate(ids, mask, max_new_tokens=5)
    assert np.array_equal(np.stack(columns, 1), want[:, 7:])
    stream = decoder.stream(ids, mask, max_new_tokens=5)
    next(stream)
    decoder.prefill(ids, mask)
    with pytest.raises(RotaryExportError, match="begun another batch"):
        next(stream)


def test_prompts_without_a_mask(llama, decoder):
    """Padding is found by its token, as transformers does, and lists of ids are padded."""
    ids, _ = make_prompts([7, 5])
    want = generate_eager(llama[0], ids, None, 6)
    assert np.array_equal(decoder.generate(ids.numpy(), max_new_tokens=6), want)
    rows = [row[row > 0].tolist() for row in ids]
    assert np.array_equal(decoder.generate(rows, max_new_tokens=6), want)


def test_settings_are_those_of_the_generation_config(llama, tmp_path):
    ids, mask = make_prompts([7, 5])
    entries = {"eos_token_id": [44, 61], "repetition_penalty": 1.7, "suppress_tokens": [20, 50]}
    bundle = change_generation(llama[1], tmp_path / "b", **entries)
    want = generate_eager(llama[0], ids, mask, 24, **entries)
    assert not np.array_equal(want, generate_eager(llama[0], ids, mask, 24))
    assert np.array_equal(load_decoder(bundle).generate(ids, mask, max_new_tokens=24), want)


def test_sampling_is_repeated_by_its_seed(decoder):
    ids, mask = make_prompts([7, 5])

    def draw(**options):
        return decoder.generate(ids, mask, max_new_tokens=12, eos_token_id=[], **options)

    sampled = draw(do_sample=True, temperature=3.0, top_k=0, seed=1)
    assert np.array_equal(sampled, draw(do_sample=True, temperature=3.0, top_k=0, seed=1))
    assert not np.array_equal(sampled, draw(do_sample=True, temperature=3.0, top_k=0, seed=2))
    assert np.array_equal(draw(do_sample=True, top_k=1), draw())


# ---- longrope: past a length the cache is computed anew


def test_a_cache_is_computed_anew_where_transformers_does():
    model, bundle = get_decoder("phi3")
    decoder = load_decoder(bundle)
    for lengths in ([20], [21, 9, 12, 3], [30, 26]):  # on both sides of 24 tokens
        ids, mask = make_prompts(lengths)
        got = decoder.generate(ids, mask, max_new_tokens=32)
        assert np.array_equal(got, generate_eager(model, ids, mask, 32)), lengths
    ids, mask = make_prompts([30, 26])
    np.testing.assert_allclose(
        decoder.prefill(ids, mask, chunk=3), decoder.prefill(ids, mask), rtol=0, atol=2e-4
    )


def test_a_session_warns_once_of_the_length():
    session = load(get_decoder("phi3")[1])
    assert session.graph.length_thresholds == (24,)
    past = {i.name: np.zeros((1, 2, 24, 16), np.float32) for i in session.graph.inputs[3:]}
    step = {
        "input_ids": np.ones((1, 1), np.int64),
        "attention_mask": np.ones((1, 25), np.int64),
        "position_ids": np.full((1, 1), 24),
    }
    with pytest.warns(UsageWarning, match="past 24 tokens the angles of all positions change"):
        session(**step, **past)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session(**step, **past)
        session = load(get_decoder("phi3")[1])
        past = {name: array[:, :, :23] for name, array in past.items()}
        session(**step | {"attention_mask": np.ones((1, 24), np.int64)}, **past)


# ---- what is wrong


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[3] * 65], {}, "prompts must have <= 64 tokens, the model's positions, got 65"),
        (
            [[3] * 60, [3] * 5],
            {"max_new_tokens": 6},
            "max_new_tokens must be <= 5 after a prompt of 60 tokens, the model has 64 positions",
        ),
        ([[3, 96]], {}, "token ids must be >= 0 and < 96, got 96 in row 0, column 1"),
        ([[3], []], {}, "row 1 must be a list of token ids, got []"),
        ([], {}, "input_ids must have at least one row"),
        ("text", {}, "input_ids must be integers of shape (batch_size, seq_len), neither 0"),
        (np.ones((1, 2)), {}, "neither 0, got float64 (1, 2)"),
        (np.ones((1, 2), int), {"attention_mask": [[1, 1]]}, "attention_mask must be integers"),
        (
            np.ones((1, 2), int),
            {"attention_mask": np.array([[1, 0]])},
            "rows must be padded at the left, got padding at the end of row 0",
        ),
        (np.ones((1, 2), int), {"attention_mask": np.ones((1, 3), int)}, "shape of input_ids"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([[3]], {"max_new_tokens": 1.5}, "max_new_tokens must be >= 1, got 1.5"),
        ([[3]], {"eos_token_id": "2"}, "eos_token_id must be an int or a list of ints, got '2'"),
        ([[3], [4]], {"pad_token_id": 99}, "pad_token_id must be >= 0 and < 96, got 99"),
        ([[3]], {"temperature": 0.5}, "temperature=0.5 is for sampling: pass do_sample=True"),
        ([[3]], {"do_sample": True, "temperature": 0}, "temperature must be > 0, got 0"),
        ([[3]], {"do_sample": True, "top_k": -1}, "top_k must be an int >= 0, got -1"),
        ([[3]], {"do_sample": True, "top_p": 1.5}, "top_p must be > 0 and <= 1, got 1.5"),
        ([[3]], {"do_sample": True, "seed": -1}, "seed must be an int >= 0, got -1"),
        ([[3]], {"do_sample": 1}, "do_sample must be a bool, got 1"),
    ],
)
def test_bad_input_is_one_error_before_anything_runs(decoder, monkeypatch, ids, options, message):
    monkeypatch.setattr(decoder._graph, "run", lambda *inputs: pytest.fail("it ran"))
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        decoder.stream(ids, **{"max_new_tokens": 4} | options)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d.prefill([[3] * 65]), "prompts must have <= 64 tokens"),
        (lambda d: d.prefill([[3]], chunk=0), "chunk must be an int >= 1, got 0"),
        (lambda d: d.step([3]), "step must follow prefill"),
        (lambda d: d.reorder([0]), "reorder must follow prefill"),
        (lambda d: (d.prefill([[3]]), d.step([3, 4])), "tokens must be integers of shape (1,)"),
        (lambda d: (d.prefill([[3]]), d.step([-1])), "token ids must be >= 0 and < 96, got -1"),
        (lambda d: (d.prefill([[3]]), d.reorder([1])), "order must have rows >= 0 and < 1, got 1"),
        (lambda d: (d.prefill([[3] * 64]), d.step([3])), "rows must have <= 64 tokens"),
    ],
)
def test_bad_calls(llama, act, message):
    with pytest.raises(RotaryExportError, match=re.escape(message)):
        act(load_decoder(llama[1]))


def test_a_generation_config_that_is_not_applied_is_refused(llama, tmp_path):
    decoder = load_decoder(change_generation(llama[1], tmp_path / "a", num_beams=4))
    with pytest.raises(RotaryExportError, match="has num_beams=4, which is not applied here"):
        decoder.generate([[3]], max_new_tokens=1)
    decoder = load_decoder(change_generation(llama[1], tmp_path / "b", min_p=0.1))
    decoder.generate([[3]], max_new_tokens=1)
    with pytest.raises(RotaryExportError, match=r"has min_p=0\.1"):
        decoder.generate([[3]], max_new_tokens=1, do_sample=True)


def test_what_is_not_a_decoder_is_refused(llama, tmp_path):
    with pytest.raises(RotaryExportError, match="has no key/value cache: export the model with"):
        load_decoder(get_bundle("plain").path)
    slow = write_counting_decoder(tmp_path / "slow")
    file = slow / "manifest.json"
    file.write_text(file.read_text().replace("past_seq_len + seq_len", "past_seq_len + 1"))
    with pytest.raises(
        RotaryExportError, match=r"present\.0\.key has the length past_seq_len \+ 1"
    ):
        load_decoder(slow)
    damaged = shutil.copytree(llama[1], tmp_path / "b")
    (damaged / "generation_config.json").write_text("{}")
    with pytest.raises(RotaryExportError, match=r"generation_config\.json in .* is not the file"):
        load_decoder(damaged)
    edit_manifest(damaged, config={"decoder": {"cache": "none"}})
    with pytest.raises(RotaryExportError, match=r"config\.decoder\.cache must be one of"):
        load_decoder(damaged)
