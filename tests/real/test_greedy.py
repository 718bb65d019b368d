"""`tools/real/greedy.py` on a tiny model: a bundle of other weights chooses other tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from greedy import Difference, find_differences, generate_eager, make_text_example
from helpers.tiny_models import make_model
from transformers import BatchEncoding

from rotary_export import export_model, load


class Letters:
    """In place of a tokenizer: a token for each letter, padded at the left."""

    def __call__(self, texts, return_tensors, padding=False):
        rows = [
            [ord(c) % 90 + 3 for c in t] for t in ([texts] if isinstance(texts, str) else texts)
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=1, max_position_embeddings=128)


@pytest.fixture(scope="module")
def generated(model):
    return generate_eager(model, Letters(), 6)


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_other_weights_choose_other_tokens(model, generated, cached, tmp_path):
    example = make_text_example(model, Letters(), cached)
    bundle = export_model(model, example, tmp_path / "same", formats=["onnx"])
    assert find_differences(model, load(bundle, "model"), generated) == []

    other = make_model("llama", num_hidden_layers=1, max_position_embeddings=128)
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight.neg_()
    bundle = export_model(other, example, tmp_path / "other", formats=["onnx"])
    found = find_differences(model, load(bundle, "model"), generated)
    assert found
    assert not any(difference.explained for difference in found)
    assert all(difference.gap > 0 for difference in found)


def test_only_a_gap_below_the_noise_is_explained():
    assert Difference(0, 1, gap=0.1, noise=0.2).explained
    assert not Difference(0, 1, gap=0.2, noise=0.2).explained


def test_what_follows_the_end_is_left_out(model, generated, monkeypatch):
    end = int(generated.tokens[0, 2])
    monkeypatch.setattr(model, "generation_config", SimpleNamespace(eos_token_id=end))
    monkeypatch.setattr(
        model,
        "generate",
        lambda **options: SimpleNamespace(
            sequences=torch.cat([generated.prompts, generated.tokens], 1),
            logits=generated.logits.unbind(1),
        ),
    )
    keep = generate_eager(model, Letters(), 6).keep
    first = (generated.tokens[0] == end).nonzero()[0, 0]
    assert keep[0].tolist() == [index <= first for index in range(keep.shape[1])]
