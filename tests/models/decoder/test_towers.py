"""Language models that read embeddings, as those of multimodal models do."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.bundles import make_folder
from helpers.decoders import generate_eager, make_prompts
from helpers.multimodal_models import IMAGE_TOKEN, make_gemma3, make_qwen2_vl
from helpers.tiny_models import make_model
from torch import nn

from rotary_export import RotaryExportError, export_model, load, load_decoder, verify_model
from rotary_export.cli.main import cli
from rotary_export.deploy.deploy import deploy
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.parts import split_model

MODELS = {"qwen2_vl": make_qwen2_vl, "gemma3": make_gemma3}
IMAGE = "batch_size 3, seq_len 13, past_seq_len 5, position_ids of an image"
pytestmark = pytest.mark.filterwarnings("ignore:.*attend to each other, by token_type_ids")
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def get_tower(name):
    """Return a model and its bundle."""
    model = MODELS[name]()
    out = make_folder() / f"tower-{name}"
    return model, export_model(model, None, out, formats=["onnx"], quick=True, inputs_embeds=True)


@every_model
def test_a_graph_reads_embeddings_and_another_one_makes_them(name):
    model, bundle = get_tower(name)
    graphs, layers = bundle.manifest.graphs, model.config.get_text_config().num_hidden_layers
    assert [*graphs] == ["model", "embed_tokens"]
    axes = (3,) if name == "qwen2_vl" else ()
    assert [(info.name, info.shape) for info in graphs["model"].inputs][:4] == [
        ("inputs_embeds", ("batch_size", "seq_len", 64)),
        ("attention_mask", ("batch_size", "past_seq_len + seq_len")),
        ("position_ids", (*axes, "batch_size", "seq_len")),
        ("past_key_values.0.key", ("batch_size", 2, "past_seq_len", 16)),
    ]
    assert [info.name for info in graphs["embed_tokens"].inputs] == ["input_ids"]
    assert [info.name for info in graphs["embed_tokens"].outputs] == ["inputs_embeds"]
    assert graphs["model"].rotary_nodes == layers
    shapes = bundle.report.shapes
    assert shapes.keys() == {"model", "embed_tokens"}
    assert (IMAGE in shapes["model"]) == bool(axes)
    assert len(bundle.report.generated) == 4
    noted = any("token_type_ids" in note for note in bundle.report.notes)
    assert noted == (name == "gemma3")


@every_model
def test_tokens_are_those_of_transformers(name):
    model, bundle = get_tower(name)
    ids, mask = make_prompts([9, 4, 1], high=90)
    got = load_decoder(bundle.path).generate(ids, mask, max_new_tokens=32)
    assert np.array_equal(got, generate_eager(model, ids, mask, 32))


def test_other_sections_show_at_the_positions_of_an_image_alone():
    """In a text, all axes are the same."""
    bundle, other = get_tower("qwen2_vl")[1].path, make_qwen2_vl((3, 3, 2))
    assert verify_model(bundle, other, None, case="the example", quick=True).passed
    assert not verify_model(bundle, other, None, case=IMAGE, quick=True).passed


def test_a_prompt_with_an_image():
    """As the page has it: the model's own vision tower, then both graphs in a loop."""
    model, bundle = get_tower("qwen2_vl")
    generator = torch.Generator().manual_seed(0)
    grid, pixels = torch.tensor([[1, 4, 6]]), torch.randn(24, 1176, generator=generator)
    ids = torch.tensor([[5, 92, *[IMAGE_TOKEN] * 6, 93, 7, 8]])
    is_image = ids == IMAGE_TOKEN
    given = {"image_grid_thw": grid, "mm_token_type_ids": is_image.int()}
    with torch.no_grad():
        want = model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=12, do_sample=False, **given
        )
        image = model.get_image_features(pixels, grid).pooler_output[0]
        positions, shift = model.model.get_rope_index(ids, **given)
    assert (positions[1:] != positions[0]).any()  # the axes differ

    embed, session = load(bundle.path, "embed_tokens"), load(bundle.path)
    embeds = embed(input_ids=ids.numpy())["inputs_embeds"]
    embeds[is_image.numpy()] = image.numpy()
    got, positions = ids.numpy(), positions.numpy()
    past = {
        info.name: np.zeros((1, info.shape[1], 0, info.shape[3]), np.float32)
        for info in session.graph.inputs
        if info.name.startswith("past_key_values")
    }
    while got.shape[1] < want.shape[1]:
        outputs = session(
            inputs_embeds=embeds, attention_mask=np.ones_like(got), position_ids=positions, **past
        )
        token = outputs["logits"][:, -1:].argmax(axis=-1)
        got = np.concatenate([got, token], axis=1)
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        embeds = embed(input_ids=token)["inputs_embeds"]
        positions = np.full((3, 1, 1), got.shape[1] - 1 + int(shift))
    assert np.array_equal(got, want.numpy())


REFUSED = {
    "static cache": (
        make_qwen2_vl, {"cache": "static", "max_cache_len": 8}, None,
        "cache 'static' is for positions of one axis, Qwen2VLForConditionalGeneration has 3",
    ),
    "no ids": (
        lambda: make_model("llama"), {}, {"inputs_embeds": torch.zeros(1, 3, 64)},
        "example inputs with input_ids, which are embedded; LlamaForCausalLM has inputs_embeds",
    ),
    "not of transformers": (
        lambda: nn.Embedding(4, 4), {}, {"input": torch.ones(1, 2)}, "Embedding has input$"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, settings, inputs, message = REFUSED[case]
    model, options = make(), DecoderOptions(inputs_embeds=True, **settings)
    with pytest.raises(RotaryExportError, match=message):
        split_model(model, prepare_inputs(model, inputs, options), options)


def test_a_number_is_no_bool():
    with pytest.raises(RotaryExportError, match="inputs_embeds must be a bool, got 1"):
        DecoderOptions(inputs_embeds=1)


def test_a_kit_for_javascript_has_both_graphs(tmp_path):
    """transformers.js does not open them, so that nothing is moved for it."""
    kit = deploy("node", get_tower("gemma3")[1].path, tmp_path / "kit")
    assert {file.name for file in (kit / "bundle").glob("*.onnx")} == {
        "model.onnx", "embed_tokens.onnx"
    }  # fmt: skip


def test_the_command_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(make_qwen2_vl().config.to_json_string(use_diff=False))
    command = ["export-model", str(path), "--inputs-embeds", "--dry-run"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "1 of 1 rotary calls would be fused" in done.output
    done = CliRunner().invoke(cli, [*command, "--cache", "static", "--max-cache-len", "8"])
    assert (done.exit_code, "positions of one axis" in done.stderr) == (2, True)


def test_genai_has_no_such_input(tmp_path):
    message = "genai needs tokenizer.json|genai has the inputs input_ids.*also has inputs_embeds"
    with pytest.raises(RotaryExportError, match=re.compile(message)):
        deploy("genai", get_tower("gemma3")[1].path, tmp_path / "kit")
