"""Inputs whose values matter: numbers of a row, packed positions, tables, masks of scores."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from rotary_export import export_model, load

H = 8
FREQUENCIES = 0.5 ** torch.arange(H // 2)
ROWS = 12  # of the stored tables


def find_tables(positions):
    angles = (positions[..., None] * FREQUENCIES).repeat(*[1] * positions.dim(), 2)
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """Rotate x, (..., S, H), by tables (..., S, H)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Model(nn.Module):
    """One head of attention over features, and what its subclass does with another input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.embed = nn.Linear(H, H), nn.Embedding(9, H)
        cos, sin = find_tables(torch.arange(ROWS))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def attend(self, x, cos, sin, mask=None):
        turned = apply_rotary(self.project(x), cos, sin)
        return scaled_dot_product_attention(turned, turned, x, mask)


class Labels(Model):
    """A label and a length for each row, as in diffusion and speech models."""

    def forward(self, x, labels, lengths):
        mask = (torch.arange(x.shape[1]) < lengths[:, None])[:, None]
        x = x + self.embed(labels)[:, None]
        return self.attend(x, *find_tables(torch.arange(x.shape[1])), mask)


class Packed(Model):
    """Sequences one behind the other: ids restart, and there are more tokens than table rows."""

    def forward(self, tokens, position_ids):
        return self.attend(self.embed(tokens), self.cos[position_ids], self.sin[position_ids])


class Ragged(Model):
    """Sequences one behind the other: offsets say where each begins and ends."""

    def forward(self, tokens, cu_seqlens):
        rows = torch.arange(tokens.shape[0])
        sequence = (rows[:, None] >= cu_seqlens[1:]).sum(-1)
        tables = find_tables(rows - cu_seqlens[:-1][sequence])
        return self.attend(self.embed(tokens), *tables, sequence[:, None] == sequence)


class Given(Model):
    """Is given its cosines and sines."""

    def forward(self, x, emb):
        return self.attend(x, *emb)


class Masked(Model):
    """Is given a mask of scores."""

    def forward(self, x, attention_mask):
        return self.attend(x, *find_tables(torch.arange(x.shape[1])), attention_mask[:, 0])


def make_labels(batch, length):
    labels = torch.randint(0, 9, (batch,))
    lengths = torch.randint(1, length + 1, (batch,), dtype=torch.int32)
    return {"x": torch.randn(batch, length, H), "labels": labels, "lengths": lengths}


def make_packed(batch, length):
    total = batch * length
    ids = torch.arange(length).repeat(batch)
    return {"tokens": torch.randint(0, 9, (total,)), "position_ids": ids}


def make_ragged(batch, length):
    inputs = make_packed(batch, length)
    ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return {"tokens": inputs["tokens"], "cu_seqlens": ends}


def make_given(batch, length):
    return {"x": torch.randn(batch, length, H), "emb": find_tables(torch.arange(length))}


def make_masked(batch, length):
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    return {"x": torch.randn(batch, length, H), "attention_mask": mask}


CASES = {
    "numbers": (Labels, make_labels),
    "packed": (Packed, make_packed),
    "offsets": (Ragged, make_ragged),
    "tables": (Given, make_given),
    "mask": (Masked, make_masked),
}


def name_inputs(inputs):
    """Name nested tensors as bundles do."""
    named = {}
    for name, value in inputs.items():
        if isinstance(value, tuple):
            named |= {f"{name}.{n}": each for n, each in enumerate(value)}
        else:
            named[name] = value
    return named


@pytest.mark.parametrize("case", CASES)
def test_is_equal_at_other_sizes(tmp_path, case):
    make_module, make_inputs = CASES[case]
    model = make_module().eval()
    bundle = export_model(model, make_inputs(2, 6), tmp_path / "b", quick=True)
    assert bundle.manifest.graphs["model"].rotary_nodes >= 1
    inputs = make_inputs(3, 11)
    with torch.no_grad():
        want = model(**inputs)
    for options in ({}, {"use_op_library": False}, {"runtime": "program", "allow_code": True}):
        got = torch.as_tensor(load(bundle, "model", **options)(**name_inputs(inputs))["output"])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_offsets_are_known_at_every_size(tmp_path):
    model = Ragged().eval()
    bundle = export_model(model, make_ragged(2, 6), tmp_path / "b", formats=["onnx"], quick=True)
    assert bundle.manifest.graphs["model"].inputs[1].shape == ("num_sequences + 1",)
    assert bundle.report.unverified.keys() == {"other values of tokens"}
    sizes = {"tokens": {0: "total"}, "cu_seqlens": {0: "count"}}
    bundle = export_model(
        model,
        make_ragged(2, 6),
        tmp_path / "c",
        dynamic_shapes=sizes,
        formats=["onnx"],
        quick=True,
    )
    assert bundle.manifest.graphs["model"].min_size == {"count": 2}


class OwnCache(Model):
    """Keeps keys and values in tuples of its own; (B, N, S, H) or (B, S, N, H)."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x, past):
        ((keys, values),) = ([each.transpose(self.axis, 2) for each in pair] for pair in past)
        start = keys.shape[2]
        tables = find_tables(torch.arange(start, start + x.shape[1]))
        turned = apply_rotary(self.project(x), *tables)[:, None]
        keys, values = torch.cat((keys, turned), 2), torch.cat((values, x[:, None]), 2)
        kept = [each.transpose(self.axis, 2) for each in (keys, values)]
        return scaled_dot_product_attention(turned, keys, values), kept


@pytest.mark.parametrize("axis", [1, 2])
def test_the_length_of_a_cache_of_tuples_is_open(tmp_path, axis):
    def make(batch, rows, past):
        cache = torch.randn(2, batch, 1, past, H).transpose(axis + 1, 3)
        return {"x": torch.randn(batch, rows, H), "past": ((cache[0], cache[1]),)}

    model = OwnCache(axis).eval()
    bundle = export_model(model, make(2, 2, 5), tmp_path / "b", formats=["onnx"], quick=True)
    info = bundle.manifest.graphs["model"].inputs[1]
    wanted = {1: ("batch_size", "past_seq_len", 1, H), 2: ("batch_size", 1, "past_seq_len", H)}
    assert (info.name, info.shape) == ("past.0.0", wanted[axis])
    session = load(bundle, "model")
    for sizes in ((3, 4, 9), (1, 1, 0)):
        inputs = make(*sizes)
        ((keys, values),) = inputs["past"]
        got = session(**{"x": inputs["x"], "past.0.0": keys, "past.0.1": values})
        with torch.no_grad():
            output, kept = model(**inputs)
        for have, want in zip(got.values(), (output, *kept), strict=True):
            torch.testing.assert_close(torch.as_tensor(have), want, rtol=0, atol=1e-5)


def test_a_cache_of_which_the_length_is_not_open(tmp_path):
    class Fixed(Model):
        def forward(self, x, cache):
            return self.attend(x, *find_tables(torch.arange(x.shape[1]))) + cache[:, :3, :2].sum()

    inputs = {"x": torch.randn(2, 6, H), "cache": torch.randn(2, 3, 2, 5)}
    model = Fixed().eval()
    model.register_forward_pre_hook(check_cache, with_kwargs=True)
    bundle = export_model(model, inputs, tmp_path / "b", formats=["onnx"], quick=True)
    assert bundle.manifest.graphs["model"].inputs[1].shape == ("batch_size", 3, 2, 5)


def check_cache(module, args, kwargs):
    if kwargs["cache"].shape[1:] != (3, 2, 5):
        raise ValueError("cache must be (B, 3, 2, 5)")


class Samples(Model):
    """A waveform, and a stem that reads windows of it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, H, 32, stride=8)

    def forward(self, input_values):
        x = self.stem(input_values[:, None]).transpose(1, 2)
        return self.attend(x, *find_tables(torch.arange(x.shape[1])))


def test_the_length_of_samples_is_open(tmp_path):
    model = Samples().eval()
    example = {"input_values": torch.randn(2, 400)}
    bundle = export_model(model, example, tmp_path / "b", formats=["onnx"], quick=True)
    info = bundle.manifest.graphs["model"]
    assert info.inputs[0].shape == ("batch_size", "seq_len")
    assert info.min_size == {"seq_len": 32}
    wave = torch.randn(3, 801)
    with torch.no_grad():
        want = model(wave)
    got = torch.as_tensor(load(bundle, "model")(input_values=wave)["output"])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_mask_of_scores_with_a_cache(tmp_path):
    model = make_model("llama", num_hidden_layers=1)

    def make(batch, past):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.randint(0, 90, (batch, past)), past_key_values=cache)
        return {
            "input_ids": torch.randint(0, 90, (batch, 1)),
            "attention_mask": torch.zeros(batch, 1, 1, past + 1),
            "position_ids": torch.full((batch, 1), past),
            "past_key_values": cache,
        }

    bundle = export_model(model, make(2, 5), tmp_path / "b", formats=["onnx"], quick=True)
    inputs = make(3, 9)
    (layer,) = inputs["past_key_values"].layers
    feeds = {name: inputs[name] for name in list(inputs)[:3]}
    feeds |= {
        "past_key_values.0.key": layer.keys.clone(),
        "past_key_values.0.value": layer.values.clone(),
    }
    with torch.no_grad():
        want = model(**inputs).logits
    got = torch.as_tensor(load(bundle, "model")(**feeds)["logits"])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
