"""A cache of a fixed length: equal to no cache at all, row by row, wherever rows are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.decoders import generate_eager, make_prompts, step_through
from helpers.tiny_models import make_model

from rotary_export import export_model, load, load_decoder, verify, verify_model
from rotary_export.bundle.dims import is_past, name_output
from rotary_export.deploy.deploy import deploy
from rotary_export.errors import RotaryExportError
from rotary_export.models.decoder.cache import make_empty_cache
from rotary_export.models.decoder.generate import NOT_COMPARED
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.runtime.decoder import graph
from rotary_export.runtime.providers import CPU

LENGTH = 48
LENGTHS = torch.tensor([7, 4])  # of two prompts in one batch, the second padded at the right
STEPS = 5


def decode(run, ids, slots=LENGTH):
    """Run two prompts and then token after token; return the logits of each row's own tokens.

    Args:
        run: Called with input_ids, attention_mask, position_ids; returns logits.
        ids: (2, 7 + STEPS): each row's tokens, without padding.
        slots: Of the cache.
    """
    longest = int(LENGTHS.max())
    found = [[], []]

    def step(tokens, positions, filled):
        mask = (torch.arange(slots) < filled[:, None]).long()
        return run(input_ids=tokens, attention_mask=mask, position_ids=positions)

    logits = step(ids[:, :longest].contiguous(), torch.arange(longest).repeat(2, 1), LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        found[row].append(logits[row, :length])
    for count in range(STEPS):
        positions = (LENGTHS + count)[:, None]
        logits = step(ids.gather(1, positions), positions, LENGTHS + count + 1)
        for row in range(2):
            found[row].append(logits[row])
    return [torch.cat(row) for row in found]


def check_rows(model, run):
    torch.manual_seed(2)
    ids = torch.randint(1, 96, (2, int(LENGTHS.max()) + STEPS))
    for row, got in enumerate(decode(run, ids)):
        with torch.no_grad():
            want = model(input_ids=ids[row : row + 1, : len(got)], use_cache=False).logits[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma2", "eager"), ("gemma3_text", "sdpa"), ("mistral", "sdpa"), ("gptj", "eager")],
)
def test_steps_equal_the_whole(family, attention):
    windows = {"sliding_window": 4} if family in ("gemma2", "gemma3_text", "mistral") else {}
    model = make_model(family, **windows)
    model.set_attn_implementation(attention)
    cache = make_empty_cache(model, DecoderOptions("static", max_cache_len=LENGTH), "static")

    def run(**arguments):
        cache.arrange(arguments)
        with torch.no_grad():
            return model(**arguments, past_key_values=cache, use_cache=True).logits

    check_rows(model, run)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("static") / "llama"
    return export_model(
        llama, None, out, formats=["onnx"], quick=True, cache="static", max_cache_len=LENGTH
    )


def test_the_graph_has_a_fixed_cache(llama, bundle):
    graph = bundle.manifest.graphs["model"]
    shapes = {info.name: info.shape for info in (*graph.inputs, *graph.outputs)}
    assert shapes["past_key_values.0.key"] == ("batch_size", 2, LENGTH, 16)
    assert shapes["present.0.value"] == ("batch_size", 2, LENGTH, 16)
    assert shapes["attention_mask"] == ("batch_size", LENGTH)
    assert graph.max_size == {"seq_len": LENGTH}
    decoder = bundle.manifest.config["decoder"]
    assert (decoder["cache"], decoder["max_cache_len"]) == ("static", LENGTH)
    session = load(bundle)
    past = {name: torch.zeros(2, 2, LENGTH, 16) for name in shapes if is_past(name)}

    def run(**arguments):
        outputs = session(**arguments, **past)
        past.update({name: outputs[name_output(name)] for name in past})
        return outputs["logits"]

    check_rows(llama, run)


def test_it_is_verified_again(llama, bundle):
    assert verify(bundle.path).passed
    report = verify_model(bundle.path, llama, None, quick=True, case="the example")
    assert report.passed


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("lengths", [[7], [9, 4, 1, 6]], ids=["one", "four-padded"])
def test_tokens_are_those_of_transformers(llama, bundle, lengths, in_place, monkeypatch):
    """In one set of buffers, as on the CPU, and in two, as elsewhere."""
    monkeypatch.setattr(graph, "CPU", CPU if in_place else "another")
    decoder = load_decoder(bundle.path)
    ids, mask = make_prompts(lengths)
    want = generate_eager(llama, ids, mask, 32, eos_token_id=None)
    got = decoder.generate(ids, mask, max_new_tokens=32, eos_token_id=[])
    assert np.array_equal(got, want)
    new = want[:, max(lengths) :]
    for chunk in (3, 512):
        assert np.array_equal(step_through(decoder, ids, mask, new, chunk), new), chunk


def test_two_sets_of_buffers_have_the_same_bits(bundle, monkeypatch):
    decoders = [load_decoder(bundle.path)]
    monkeypatch.setattr(graph, "CPU", "another")
    decoders.append(load_decoder(bundle.path))
    for lengths in ([1], [40, 2, 17]):
        ids, mask = make_prompts(lengths)
        first, second = (decoder.prefill(ids, mask, chunk=7) for decoder in decoders)
        for _ in range(6):
            assert np.array_equal(first, second)
            first, second = (decoder.step(first.argmax(-1)) for decoder in decoders)


def test_rows_become_more_and_fewer(bundle):
    """And a new batch has nothing of the last one."""
    ids, mask = make_prompts([6, 9, 3])
    decoder, want = load_decoder(bundle.path), load_decoder(bundle.path).prefill(ids, mask)
    decoder.prefill(ids[:1], mask[:1])
    for order in ([0, 0, 0], [1]):
        decoder.reorder(order)
        assert decoder.step([5] * len(order)).shape == (len(order), 96)
    assert np.array_equal(decoder.prefill(ids, mask), want)


def test_no_run_ends_below_a_length_where_angles_change(bundle, monkeypatch):
    """Else the shorter rows of a prompt would have other angles than the longest one."""
    decoder, found = load_decoder(bundle.path), []
    decoder._resets = decoder._lengths = [8]
    run = decoder._graph.run
    monkeypatch.setattr(
        decoder._graph, "run", lambda *inputs: (found.append(int(inputs[1].max())), run(*inputs))[1]
    )
    decoder.prefill(*make_prompts([3, 12]), chunk=2)
    assert found == [8, 10, 11, 11]  # the last position of each run, and the last tokens again


def test_the_export_compares_tokens(bundle):
    assert len(bundle.report.generated) == 4
    assert all(each.passed for each in bundle.report.generated)
    assert NOT_COMPARED not in bundle.report.unverified


def test_what_the_cache_can_not_hold_is_refused(bundle):
    decoder = load_decoder(bundle.path)
    with pytest.raises(RotaryExportError, match=r"<= 48 tokens, the cache's positions, got 49"):
        decoder.prefill([[3] * 49])
    with pytest.raises(
        RotaryExportError, match=r"must be <= 4 after a prompt of 45 .* cache has 48"
    ):
        decoder.generate([[3] * 45], max_new_tokens=5)
    assert decoder.generate([[3] * 45], max_new_tokens=4, eos_token_id=[]).shape == (1, 49)
    decoder.prefill([[3] * 48])
    with pytest.raises(RotaryExportError, match=r"rows must have <= 48 tokens, the cache's"):
        decoder.step([3])


def test_a_kit_has_it(bundle, tmp_path):
    kit = deploy("cpp-onnxruntime", bundle, tmp_path / "kit")
    assert np.load(kit / "example" / "past_key_values.0.key.npy").shape == (2, 2, LENGTH, 16)


def test_a_position_past_the_cache_is_refused(bundle):
    cached = {
        f"past_key_values.0.{kind}": torch.zeros(1, 2, LENGTH, 16) for kind in ("key", "value")
    }
    with pytest.raises(RotaryExportError, match=f"position_ids.*{LENGTH}"):
        load(bundle)(
            input_ids=torch.ones(1, 1, dtype=torch.int64),
            attention_mask=torch.ones(1, LENGTH, dtype=torch.int64),
            position_ids=torch.full((1, 1), LENGTH),
            **cached,
        )


REFUSED = {
    "no length": ("static", None, {}, "is for cache 'static', which needs it"),
    "of a growing cache": (
        "full",
        8,
        {},
        "is for cache 'static', which needs it; got cache 'full'",
    ),
    "a float": ("static", 8.0, {}, "max_cache_len must be an int >= 2, got 8.0"),
    "too short": ("static", 4, {}, "max_cache_len must be >= 7, the length of the example, got 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(llama, case):
    kind, length, inputs, message = REFUSED[case]
    with pytest.raises(RotaryExportError, match=message):
        prepare_inputs(llama, inputs or None, DecoderOptions(kind, max_cache_len=length))
