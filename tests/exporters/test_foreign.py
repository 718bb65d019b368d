"""`export` of the real RotaryEmbedding of zeta and x-transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings

import numpy as np
import pytest
import torch
from helpers.library_models import import_alone
from helpers.oracles import assert_same_bits

from rotary_export import RotaryExportError, apply_rotary_emb, export, load
from rotary_export.compat.foreign_rope import is_foreign_rope
from rotary_export.graphs.foreign import convert_foreign_rope
from rotary_export.reference import compute_inv_freq

ZETA = ("zeta.nn.embeddings.rope", "zeta.structs.transformer")
MODULES = {"zeta.nn": ZETA[0], "zeta.structs": ZETA[1], "x_transformers": "x_transformers"}
if importlib.util.find_spec("zeta") is None and not os.environ.get("CI"):
    skip = pytest.mark.skip(reason="pip install --no-deps zetascale loguru")
    MODULES |= {key: pytest.param(MODULES[key], marks=skip) for key in ("zeta.nn", "zeta.structs")}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
ARGUMENTS = {
    "plain": {},
    "xpos": {"use_xpos": True, "scale_base": 77.5},
    "interpolated": {"use_xpos": True, "interpolation_factor": 4.0},
    "interpolated by 3.7": {"interpolation_factor": 3.7},
    "base": {"base": 500000},
    "rescaled": {"base_rescale_factor": 8.0},
}


def find_class(module):
    if module != "x_transformers":
        return import_alone(module).RotaryEmbedding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from x_transformers.x_transformers import RotaryEmbedding
    return RotaryEmbedding


def apply_pairs(x, freqs, scale):
    """Turn pairs (2i, 2i + 1) by freqs that are tiled in pairs, as x-transformers does."""
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * freqs.cos() * scale + turned * freqs.sin() * scale


@every_module
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_it_is_exported_as_ours_of_its_state_dict(module, arguments, tmp_path):
    theirs = find_class(module)(16, **arguments)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    bundle = export(theirs, tmp_path / "b", max_seq_len=32, num_heads=2, formats=("onnx",))
    rope, interleaved = convert_foreign_rope(theirs, None)
    assert interleaved == (module == "x_transformers")
    for found in (rope.state_dict(), theirs.state_dict()):
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert_same_bits(found[name], value, name)
    config = bundle.manifest.config
    assert config["interleaved"] == interleaved
    assert bundle.report.unverified == {}  # inv_freq is that of the base that was found
    expected = {"base": 10000.0, "scale_base": 512.0, "interpolation_factor": 1.0} | arguments
    if "base_rescale_factor" in arguments:
        del expected["base"], expected["base_rescale_factor"]
        assert config["embedding"]["base"] == pytest.approx(10000 * 8 ** (16 / 14), rel=1e-6)
    for name, value in expected.items():
        assert config["embedding"][name] == value
    package = "x-transformers" if module == "x_transformers" else "zetascale"
    assert package in bundle.manifest.producers


@every_module
@pytest.mark.parametrize("use_xpos", [False, True], ids=["plain", "xpos"])
def test_the_bundle_turns_as_the_library_does(module, use_xpos, tmp_path):
    theirs = find_class(module)(16, use_xpos)
    # Both centre xPos's scale on 16 // 2.
    bundle = export(theirs, tmp_path / "b", max_seq_len=16, formats=("onnx",))
    query, key = torch.randn(2, 2, 2, 16, 24).unbind(0)
    with torch.no_grad():
        if module == "x_transformers":
            freqs, scale = theirs.forward_from_seq_len(16)
            freqs, apply = freqs[0], apply_pairs
            scale = scale[0] if use_xpos else torch.ones(())
        else:
            freqs, scale = theirs(16, torch.device("cpu"))
            apply, scale = apply_rotary_emb, torch.as_tensor(scale)
    session = load(bundle, use_op_library=True)
    ids = np.arange(16)[None].repeat(2, 0)
    got = session(query=query[..., :16].numpy(), key=key[..., :16].numpy(), position_ids=ids)
    wanted = {"query_out": apply(query[..., :16], freqs, scale)}
    wanted["key_out"] = apply(key[..., :16], freqs, scale**-1)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-6, atol=1e-6)


def test_a_layout_that_is_given_is_kept(tmp_path):
    theirs = find_class("x_transformers")(8)
    bundle = export(theirs, tmp_path / "b", max_seq_len=8, interleaved=False, formats=("onnx",))
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["config"]["interleaved"] is False


def make_changed():
    theirs = find_class("x_transformers")(8, True)
    theirs.forward_from_seq_len = lambda rows: (torch.zeros(1, rows, 8), torch.ones(1, rows, 8))
    return theirs


def make_equal():
    theirs = find_class("x_transformers")(8)
    theirs.inv_freq.fill_(1.0)
    return theirs


BAD = {
    "half": (lambda: find_class("x_transformers")(8).half(), "module must be float32, got torch.f"),
    "changed": (
        make_changed,
        "x_transformers.RotaryEmbedding computes other angles or scales than",
    ),
    "equal": (make_equal, "does not show its layout, as all its frequencies are equal: pass inter"),
    "subclass": (
        lambda: type("Mine", (find_class("x_transformers"),), {})(8),
        "RotaryEmbedding of zeta or x-transformers, got tests.exporters.test_foreign.Mine",
    ),
    "no length": (lambda: find_class("x_transformers")(8), "max_seq_len must be given to export"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_one_clear_error(case, tmp_path):
    make, message = case
    options = {} if message.startswith("max_seq_len") else {"max_seq_len": 8}
    with pytest.raises(RotaryExportError) as raised:
        export(make(), tmp_path / "b", **options)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_frequencies_of_no_base_are_loaded_and_reported(tmp_path):
    theirs = find_class("x_transformers")(8)
    theirs.inv_freq.copy_(torch.tensor([3.0, 2.0, 1.5, 1.25]))
    bundle = export(theirs, tmp_path / "b", max_seq_len=8, formats=("onnx",))
    assert list(bundle.report.unverified) == ["inv_freq by its formula"]


class OfAnOlderRelease(torch.nn.Module):
    """x-transformers 1.22 to 1.25: forward(seq_len), without the argument `device`."""

    def __init__(self):
        super().__init__()
        self.inv_freq = torch.nn.Buffer(compute_inv_freq(8))

    def forward(self, seq_len):
        freqs = torch.arange(seq_len)[:, None] * self.inv_freq
        return torch.cat((freqs, freqs), -1), 1.0


def test_a_release_without_the_argument_device():
    OfAnOlderRelease.__name__ = "RotaryEmbedding"
    OfAnOlderRelease.__module__ = "x_transformers.x_transformers"
    assert is_foreign_rope(OfAnOlderRelease())
    rope, interleaved = convert_foreign_rope(OfAnOlderRelease(), None)
    assert (rope.dim, rope.base, interleaved) == (8, 10000.0, False)
