"""Whole models that use the rotary embeddings of other libraries: fused, and equal to eager."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from helpers import library_models as library
from helpers import rotary_styles as styles
from helpers.rotary_styles import rope_pairs
from torch import nn

from rotary_export import RotaryExportError, export_model, load
from rotary_export.bundle.manifest import DEFAULT_FORMATS

# name: how to make it, rotary calls, nodes, layout
MODELS = {
    "x-transformers": (
        lambda: library.make_x_transformers(rotary_pos_emb=True),
        4,
        4,
        "interleaved, channels 0 to 32, BNSH",
    ),
    "x-transformers-xpos": (
        lambda: library.make_x_transformers(rotary_xpos=True),
        4,
        4,
        "interleaved, channels 0 to 32, BNSH",
    ),
    "rotary-embedding-torch": (
        library.make_rotary_embedding_torch,
        2,
        2,
        "interleaved, channels 0 to 16, BNSH",
    ),
    "rotary-embedding-torch-xpos": (
        lambda: library.make_rotary_embedding_torch(use_xpos=True),
        2,
        4,
        "interleaved, channels 0 to 16, BNSH",
    ),
    "torchtune": (library.make_torchtune, 2, 2, "interleaved, channels 0 to 16, BSNH"),
    # zeta turns values too.
    "zeta": (lambda: library.make_zeta(rotary_pos_emb=True), 6, 6, "half, channels 0 to 32, BNSH"),
    "zeta-xpos": (
        lambda: library.make_zeta(rotary_xpos=True),
        6,
        6,
        "half, channels 0 to 32, BNSH",
    ),
}


# Their requirements exclude torch 2.13 and transformers 5.
for name, distribution in (("torchtune", "torchtune"), ("zeta", "zetascale loguru")):
    if importlib.util.find_spec(name) is None and not os.environ.get("CI"):
        for key in [key for key in MODELS if key.startswith(name)]:
            reason = f"pip install --no-deps {distribution}"
            MODELS[key] = pytest.param(MODELS[key], marks=pytest.mark.skip(reason=reason))


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
@pytest.mark.filterwarnings("ignore")
def test_fused_and_equal_to_eager(tmp_path, request, case):
    make, calls, nodes, rotation = case
    model, inputs = make()
    formats = ("onnx", "program") if "xpos" in request.node.name else DEFAULT_FORMATS
    bundle = export_model(model, inputs, tmp_path / "bundle", formats=formats)
    (finding,) = bundle.manifest.config["rotary"]
    assert (finding["calls"], finding["fused"], finding["rotation"]) == (calls, calls, rotation)
    assert bundle.manifest.graphs["model"].rotary_nodes == nodes
    rows = [row for row in bundle.report.rows if row.graph == "model"]
    kernels = {row.kernel_path.partition(" ")[0] for row in rows}
    assert kernels == {"primitive", "native", "fused"}
    shapes = bundle.report.shapes["model"]
    assert "batch_size 3, seq_len 3" in shapes
    assert "batch_size 1, seq_len 19" in shapes
    assert model.training is False


@pytest.mark.filterwarnings("ignore")
def test_scales_that_an_earlier_call_cached_are_not_used(tmp_path):
    model, inputs = library.make_rotary_embedding_torch(use_xpos=True)
    with torch.no_grad():
        model(torch.arange(80).reshape(2, 40) % 96)
    assert model.rope.cached_scales_seq_len == 40
    bundle = export_model(model, inputs, tmp_path / "bundle", formats=["onnx"], quick=True)
    assert "tables" in {row.graph for row in bundle.report.rows}
    assert (model.rope.cached_scales_seq_len, model.rope.cache_if_possible) == (40, True)


class Table(nn.Module):
    """Rows of a table that ends."""

    def __init__(self):
        super().__init__()
        self.cos = nn.Buffer(styles.make_angles(40, 8)[0].cos())
        self.sin = nn.Buffer(styles.make_angles(40, 8)[0].sin())

    def forward(self, x):
        rows = x.shape[1]
        heads = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return rope_pairs(heads, heads, self.cos[None, :rows], self.sin[None, :rows])[0]


def test_a_table_that_ends_is_a_limit_of_the_graph(tmp_path):
    inputs = {"x": torch.randn(2, 6, 32)}
    bundle = export_model(Table().eval(), inputs, tmp_path / "bundle", formats=["onnx"])
    graph = bundle.manifest.graphs["model"]
    assert graph.max_size == {"seq_len": 40}
    session = load(bundle, "model")
    assert session(x=torch.randn(1, 40, 32))["output"].shape == (1, 2, 40, 16)
    with pytest.raises(RotaryExportError, match="seq_len must be <= 40, got 41"):
        session(x=torch.randn(1, 41, 32))


def test_a_cache_of_x_transformers(tmp_path):
    """Token by token, what the model returns for all at once; its cached keys are not rotated."""
    model, inputs = library.make_x_transformers(rotary_pos_emb=True)
    with torch.no_grad():
        _, cache = model(inputs["x"], return_intermediates=True)
    constants = {"return_intermediates": True, "input_not_include_cache": True}
    example = {"x": inputs["x"][:, :1], "cache": cache, **constants}
    bundle = export_model(model, example, tmp_path / "b", formats=["onnx"], quick=True)
    session = load(bundle, "model")
    ids = torch.randint(0, 96, (3, 9))
    with torch.no_grad():
        want = model(ids)
    names = [info.name for info in session.graph.inputs[1:]]
    past = {name: torch.zeros(3, 4, 0, 64) for name in names}
    for at in range(9):
        outputs = session(x=ids[:, at : at + 1].contiguous(), **past)
        torch.testing.assert_close(outputs["output.0"][:, 0], want[:, at], rtol=0, atol=1e-4)
        past = {name: outputs[name.replace("past_key_values", "present")] for name in names}


@pytest.mark.filterwarnings("ignore:.*reduce_op")  # einx looks at all of torch
def test_a_mask_of_x_transformers(tmp_path):
    model, inputs = library.make_x_transformers(rotary_pos_emb=True)
    inputs["mask"] = torch.arange(6) < torch.tensor([[6], [4]])
    bundle = export_model(model, inputs, tmp_path / "b", formats=["onnx"], quick=True)
    ids, mask = torch.randint(0, 96, (3, 9)), torch.arange(9) < torch.tensor([[9], [4], [7]])
    with torch.no_grad():
        want = model(ids, mask=mask)
    got = load(bundle, "model")(x=ids, mask=mask)["output"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
