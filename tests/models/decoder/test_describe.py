"""What the manifest says of a decoder's lengths."""

from __future__ import annotations

import pytest
from helpers.tiny_models import make_model

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.models.decoder.describe import describe_decoder, find_cache_resets
from rotary_export.models.decoder.options import DecoderOptions

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}


def make_longrope(family):
    extra = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    return make_model(family, num_hidden_layers=1, rope_parameters=LONGROPE, **extra)


def test_only_some_models_throw_their_cache_away():
    assert find_cache_resets(make_longrope("phi3")) == [32]
    assert find_cache_resets(make_longrope("llama")) == []
    assert find_cache_resets(make_model("llama", num_hidden_layers=1)) == []


def test_a_model_that_can_not_be_asked_computes_its_cache_anew():
    model = make_longrope("llama")
    model.prepare_inputs_for_generation = None
    assert find_cache_resets(model) == [32]


@pytest.mark.parametrize(("kind", "longest"), [("default", 64), ("dynamic", None)])
def test_positions(kind, longest):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    model = make_model("llama", num_hidden_layers=1, rope_parameters=rope)
    past = TensorInfo("past_key_values.0.key", "float32", ("batch_size", 2, "past_seq_len", 16))
    graph = GraphInfo((past,), (), {})
    decoder = describe_decoder(model, graph, DecoderOptions())["decoder"]
    assert decoder["max_positions"] == longest
    assert describe_decoder(model, GraphInfo((), (), {}), DecoderOptions()) == {
        "last_logits": False
    }
