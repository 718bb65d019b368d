"""A cache whose layers with a window keep that alone: equal to transformers' own, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.decoders import generate_eager, make_prompts, step_through
from helpers.tiny_models import make_model
from transformers import DynamicCache

from rotary_export import export_model, load, load_decoder, verify, verify_model
from rotary_export.bundle.dims import is_past, name_output
from rotary_export.deploy.deploy import deploy
from rotary_export.errors import RotaryExportError
from rotary_export.models.decoder.generate import NOT_COMPARED
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.window import WindowCache

WINDOW = 4  # of tiny layers: a token and three before it
STEPS = (2, 1, 1, 3, 1, 6, 1, 1)  # before the window, across it, longer than it


def make_windowed(family):
    return make_model(
        family, num_hidden_layers=2, sliding_window=WINDOW, max_position_embeddings=64
    )


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_steps_equal_those_of_transformers(family):
    model = make_windowed(family)
    theirs = DynamicCache(config=model.config)
    ours = WindowCache([getattr(layer, "sliding_window", None) for layer in theirs.layers])
    torch.manual_seed(1)
    seen = 0
    for length in STEPS:
        step = {
            "input_ids": torch.randint(1, 96, (2, length)),
            "position_ids": torch.arange(seen, seen + length).repeat(2, 1),
            "attention_mask": torch.ones(2, seen + length, dtype=torch.int64),
        }
        step["attention_mask"][1, 0] = 0  # padded at the left
        with torch.no_grad():
            ours.arrange(step)
            got = model(**step, past_key_values=ours).logits
            want = model(**step, past_key_values=theirs).logits
        seen += length
        torch.testing.assert_close(got, want)
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert mine.keys.shape == other.keys.shape
            assert torch.equal(mine.values, other.values)


@pytest.fixture(scope="module")
def mistral():
    return make_windowed("mistral")


@pytest.fixture(scope="module")
def bundle(mistral, tmp_path_factory):
    out = tmp_path_factory.mktemp("window") / "mistral"
    return export_model(mistral, None, out, formats=["onnx"], quick=True, cache="window")


def test_the_graph_keeps_the_window(mistral, bundle):
    graph = bundle.manifest.graphs["model"]
    shapes = {info.name: info.shape for info in graph.inputs}
    assert shapes["past_key_values.1.value"] == ("batch_size", 2, "min(past_seq_len, 3)", 16)
    assert shapes["attention_mask"] == ("batch_size", "past_seq_len + seq_len")
    assert bundle.manifest.config["decoder"]["cache"] == "window"
    session, seen = load(bundle), 0
    past = {n: torch.zeros(2, 2, 0, 16) for n in shapes if is_past(n)}
    ids = torch.randint(1, 96, (2, sum(STEPS)))
    logits = []
    for length in STEPS:
        outputs = session(
            input_ids=ids[:, seen : seen + length].contiguous(),
            attention_mask=torch.ones(2, seen + length, dtype=torch.int64),
            position_ids=torch.arange(seen, seen + length).repeat(2, 1),
            **past,
        )
        logits.append(outputs["logits"])
        past = {name: outputs[name_output(name)] for name in past}
        seen += length
        assert {value.shape[2] for value in past.values()} == {min(seen, WINDOW - 1)}
    with torch.no_grad():
        want = mistral(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=0, atol=1e-4 * want.abs().max())


def test_it_is_verified_again(mistral, bundle):
    assert verify(bundle.path).passed
    report = verify_model(bundle.path, mistral, None, quick=True, case="the example")
    assert report.passed


@pytest.mark.parametrize("lengths", [[7], [9, 4, 1, 6]], ids=["one", "four-padded"])
def test_tokens_are_those_of_transformers(mistral, bundle, lengths):
    decoder = load_decoder(bundle.path)
    ids, mask = make_prompts(lengths)
    want = generate_eager(mistral, ids, mask, 32, eos_token_id=None)
    got = decoder.generate(ids, mask, max_new_tokens=32, eos_token_id=[])
    assert np.array_equal(got, want)
    new = want[:, max(lengths) :]
    for chunk in (2, 3, 512):  # shorter than the window, and longer
        assert np.array_equal(step_through(decoder, ids, mask, new, chunk), new), chunk


def test_the_export_compares_tokens(bundle):
    assert len(bundle.report.generated) == 4
    assert all(each.passed for each in bundle.report.generated)
    assert NOT_COMPARED not in bundle.report.unverified


def test_a_cache_of_another_length_is_refused(bundle):
    cached = {f"past_key_values.{n}.{kind}" for n in range(2) for kind in ("key", "value")}
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.int64),
        "attention_mask": torch.ones(1, 9, dtype=torch.int64),
        "position_ids": torch.full((1, 1), 8),
    } | dict.fromkeys(cached, torch.zeros(1, 2, 2, 16))
    with pytest.raises(RotaryExportError, match=r"min\(past_seq_len, 3\).* got \(1, 2, 2, 16\)"):
        load(bundle)(**inputs)


def test_a_kit_that_counts_positions_by_the_cache_is_refused(bundle, tmp_path):
    with pytest.raises(RotaryExportError, match=r"browser .*cache 'window'.*--cache full"):
        deploy("browser", bundle, tmp_path / "kit")


def test_a_model_without_windows_is_refused():
    with pytest.raises(RotaryExportError, match="LlamaForCausalLM has none: use 'full'"):
        prepare_inputs(make_model("llama"), None, DecoderOptions("window"))
