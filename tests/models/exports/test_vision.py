"""Vision models and multimodal positions through `export_model`: tiny ones with random weights."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from rotary_export import export_model, load
from rotary_export.errors import RotaryExportError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
QWEN2_VL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}


def make_model(model_type, name, **values):
    """Make a model whose attention is far from uniform, so that a wrong angle shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        config = CONFIG_MAPPING[model_type](**{**SIZES, **values})
        module = type(config).__module__.replace("configuration_", "modeling_")
        torch.manual_seed(0)
        model = getattr(importlib.import_module(module), name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model


def check(tmp_path, model, example, other, calls, **options):
    """Export, run on inputs that were not traced, compare with the model; return the bundle."""
    bundle = export_model(model, example, tmp_path / "bundle", **options)
    graph = bundle.manifest.graphs["model"]
    found = bundle.manifest.config["rotary"]
    assert [(row["calls"], row["fused"]) for row in found] == [(calls, calls)]
    with torch.no_grad():
        want = {k: v for k, v in model(**other).items() if isinstance(v, torch.Tensor)}
    for arguments in ({}, {"use_op_library": False}):
        session = load(bundle, "model", **arguments)
        got = session(**{i.name: other[i.name] for i in graph.inputs})
        assert set(got) == set(want)
        for name, value in want.items():
            largest = value.abs().max().item()
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5 * largest, msg=name)
    return bundle


def test_dinov3(tmp_path):
    """Rotates patches only, not the class and register tokens before them."""
    values = {"image_size": 16, "num_register_tokens": 2}
    model = make_model("dinov3_vit", "DINOv3ViTModel", **values)
    example, other = ({"pixel_values": torch.randn(n, 3, 16, 16)} for n in (2, 5))
    shapes = {"pixel_values": {0: "images"}}
    bundle = check(tmp_path, model, example, other, 2, dynamic_shapes=shapes, formats=["onnx"])
    assert bundle.manifest.graphs["model"].rotary_nodes == 2


def test_llama4(tmp_path):
    """Complex numbers, pairs of channels."""
    values = {"image_size": 16, "intermediate_size": 128, "vision_output_dim": 32}
    values |= {"projector_input_dim": 32, "projector_output_dim": 32}
    model = make_model("llama4_vision_model", "Llama4VisionModel", **values)
    example, other = ({"pixel_values": torch.randn(n, 3, 16, 16)} for n in (2, 5))
    shapes = {"pixel_values": {0: "images"}}
    bundle = check(tmp_path, model, example, other, 2, dynamic_shapes=shapes, formats=["onnx"])
    (finding,) = bundle.manifest.config["rotary"]
    assert finding["rotation"].startswith("interleaved, channels 0 to 16")


def test_pixtral(tmp_path):
    """Images of two sizes, given as numbers, one after the other in one sequence."""
    model = make_model("pixtral", "PixtralVisionModel", image_size=16)
    sizes = [(16, 12), (8, 16)]
    example, other = (
        {"pixel_values": torch.randn(2, 3, 16, 16), "image_sizes": sizes} for _ in range(2)
    )
    check(tmp_path, model, example, other, 2, dynamic_shapes=None, formats=["onnx"])


def test_gemma4(tmp_path):
    """Each half of a head is rotated for itself; a size depends on the values of an input."""
    values = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    model = make_model("gemma4_vision", "Gemma4VisionModel", **values)
    grid = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    ids = torch.stack(grid, -1).reshape(1, 16, 2).repeat(2, 1, 1)
    example, other = (
        {"pixel_values": torch.rand(2, 16, 48), "pixel_position_ids": ids} for _ in range(2)
    )
    bundle = check(
        tmp_path, model, example, other, 4, dynamic_shapes=None, formats=["onnx", "program"]
    )
    assert bundle.manifest.graphs["model"].rotary_nodes == 4


def test_multimodal_positions(tmp_path):
    """Qwen2-VL's text model: position ids of three axes, at another batch and length."""
    model = make_model("qwen2_vl_text", "Qwen2VLTextModel", **TEXT)

    def make_inputs(batch, length):
        return {
            "inputs_embeds": torch.randn(batch, length, 32),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
            "position_ids": torch.randint(0, 64, (3, batch, length)),
        }

    example, other = make_inputs(2, 6), make_inputs(3, 11)
    bundle = check(tmp_path, model, example, {**other, "use_cache": False}, 2, formats=["onnx"])
    assert bundle.manifest.graphs["model"].inputs[2].shape == (3, "batch_size", "seq_len")


def test_a_size_that_is_a_value_is_refused(tmp_path):
    """Qwen2-VL's vision tower cuts its sequence at places that it reads out of grid_thw."""
    model = make_model("qwen2_vl_vision", "Qwen2VisionTransformerPretrainedModel", **QWEN2_VL)
    example = {"hidden_states": torch.randn(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}
    message = r"torch.export can't trace the model: the model decides.*modeling_qwen2_vl\.py"
    with pytest.raises(RotaryExportError, match=message):
        export_model(model, example, tmp_path / "b", dynamic_shapes=None)
    assert not list(tmp_path.iterdir())
