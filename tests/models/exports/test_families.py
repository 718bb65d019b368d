"""The families of transformers that the page names: every rotary call is fused.

One family of each kind is exported here, all of transformers' by `tools/coverage/coverage.py`.
"""

from __future__ import annotations

import pytest
from helpers.tiny_models import FAMILIES, make_inputs, make_model

from rotary_export import export_model
from rotary_export.models.analyze import find_rotary_calls

# Calls of one layer, layout and channels, dimensions.
EXPECTED = dict.fromkeys(FAMILIES, (1, "half, channels 0 to 16", "BNSH"))
EXPECTED |= {
    "phi": (1, "half, channels 0 to 8", "BNSH"),
    "gpt_neox": (1, "half, channels 0 to 4", "BNSH"),
    "stablelm": (1, "half, channels 0 to 4", "BNSH"),
    "gptj": (2, "interleaved, channels 0 to 8", "BSNH"),
    "codegen": (2, "interleaved, channels 0 to 8", "BSNH"),
    "cohere": (1, "interleaved, channels 0 to 16", "BNSH"),
    "glm": (1, "interleaved, channels 0 to 8", "BNSH"),
    "roformer": (1, "interleaved, channels 0 to 16", "BNSH"),
}
TWO_KINDS_OF_LAYERS = ("gemma2", "gemma3_text", "modernbert")
# Norms of heads, one product for all heads, two bases, a mask of positions, an encoder, partial
# rotation in halves and in pairs, a function for query and for key, tables of pairs.
EXPORTED = (
    "qwen3",
    "phi3",
    "gemma3_text",
    "falcon",
    "modernbert",
    "gpt_neox",
    "glm",
    "gptj",
    "roformer",
)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPORTED])
def test_calls_are_found(family):
    layers = 2 if family in TWO_KINDS_OF_LAYERS else 1
    model = make_model(family, num_hidden_layers=layers)
    calls, rotation, axes = EXPECTED[family]
    (finding,) = find_rotary_calls(model, make_inputs(model)).findings
    assert (finding.calls, finding.fused) == (layers * calls, layers * calls)
    assert finding.rotation == f"{rotation}, {axes}"


@pytest.mark.parametrize("family", EXPORTED)
def test_exported(tmp_path, family):
    layers = 2 if family in TWO_KINDS_OF_LAYERS else 1
    model = make_model(family, num_hidden_layers=layers)
    bundle = export_model(model, make_inputs(model), tmp_path / "bundle", formats=["onnx"])
    calls, rotation, axes = EXPECTED[family]
    (finding,) = bundle.manifest.config["rotary"]
    assert (finding["calls"], finding["fused"]) == (layers * calls, layers * calls)
    assert finding["rotation"] == f"{rotation}, {axes}"
    assert bundle.manifest.graphs["model"].rotary_nodes == layers * calls
    rows = [row for row in bundle.report.rows if row.graph == "model"]
    assert {row.kernel_path.partition(" ")[0] for row in rows} == {"native", "fused"}
    assert any(shape.startswith("batch_size 3") for shape in bundle.report.shapes["model"])


def test_one_key_for_all_heads(tmp_path):
    """Falcon's first models: torch broadcasts one head of keys and values over all queries."""
    model = make_model("falcon", multi_query=True, new_decoder_architecture=False)
    bundle = export_model(model, make_inputs(model), tmp_path / "bundle", formats=["onnx"])
    assert bundle.manifest.graphs["model"].rotary_nodes == 2
