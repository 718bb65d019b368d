"""The proof of a decoder generates tokens, and compares them with the model's own."""

from __future__ import annotations

import re

import pytest
import torch
from click.testing import CliRunner
from helpers.tiny_models import make_model

from rotary_export import RotaryExportError, export_model, verify_model
from rotary_export.bundle.manifest import read_manifest
from rotary_export.cli.main import cli
from rotary_export.models.decoder.generate import QUICK_TOKENS, encode_prompts
from rotary_export.models.prove.prove import RejectedError
from rotary_export.proof.generated import Difference, Generated

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12]]
WAYS = [
    "batch 1",
    "batch 2, padded at the left",
    "batch 2, padded at the left, in chunks of 3",
    "batch 2, padded at the left, rows reordered midway",
]


def make_llama():
    return make_model("llama", num_hidden_layers=1, eos_token_id=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated") / "llama"
    make_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("generated") / "bundle"
    return export_model(make_llama(), None, out, formats=["onnx"], quick=True, prompts=PROMPTS)


def test_no_token_differs(bundle):
    """The token that ends a text does not end the comparison."""
    counts = [QUICK_TOKENS, *[2 * QUICK_TOKENS] * 3]
    assert bundle.report.generated == [
        Generated(way, count, []) for way, count in zip(WAYS, counts, strict=True)
    ]
    (first, *_) = read_manifest(bundle.path).parity["generated"]
    assert first == {"way": "batch 1", "tokens": QUICK_TOKENS, "differences": [], "passed": True}


def test_it_is_verified_again(bundle):
    report = verify_model(bundle.path, make_llama(), None, quick=True)
    assert report.passed
    assert [each.way for each in report.generated] == [way.replace("2", "4") for way in WAYS]


def test_other_weights_generate_other_tokens(bundle):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.neg_()
    report = verify_model(bundle.path, model, None, quick=True)
    assert not report.passed
    found = report.generated[-1].differences[-1]
    assert found.gap > found.noise > 0


def test_a_decoder_that_reads_other_positions_is_refused(tmp_path, monkeypatch):
    """Every output of a step is right; only the loop is wrong."""
    from rotary_export.runtime.decoder.graph import DecoderGraph

    run = DecoderGraph.run

    def shift(self, ids, positions, mask, past):
        return run(self, ids, positions + (past > 0), mask, past)

    monkeypatch.setattr(DecoderGraph, "run", shift)
    with pytest.raises(RejectedError, match=r"does not generate the model's own tokens, nothing"):
        export_model(make_llama(), None, tmp_path / "b", formats=["onnx"], quick=True)
    assert not any(tmp_path.iterdir())


def test_only_a_tie_passes():
    tie = Difference(0, 3, 5, 6, gap=0.1, noise=0.2)
    fault = Difference(1, 4, 5, 6, gap=0.2, noise=0.1)
    assert Generated("batch 1", 9, [tie]).passed
    assert not Generated("batch 1", 9, [tie, fault]).passed
    assert Generated("batch 1", 9, [tie]).describe() == (
        "batch 1: 1 of 9 tokens differ (token 3 of row 0 is 6, the model's is 5; its logits differ "
        "by 0.1, rounding moves them by 0.2: a tie within the noise)"
    )


BAD = {
    "a text": ("Once", "prompts must be a list of texts or of token ids, got 'Once'"),
    "none": ([], r"prompts must be a list of texts or of token ids, got \[\]"),
    "empty": ([[]], r"a prompt must have at least one token, got \[\]"),
    "no numbers": ([[1, 2.0]], r"a prompt must have at least one token"),
    "no folder": (["Once"], "prompts of text need the tokenizer in the model's folder: none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts(case):
    prompts, message = BAD[case]
    with pytest.raises(RotaryExportError, match=message):
        encode_prompts(prompts, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Once upon\n", "prompts of text need the tokenizer in the model's folder: "),
        (" \n", "must contain at least one prompt, got none"),
        (None, "can't be read: .*No such file"),
    ],
)
def test_prompts_of_a_file(folder, tmp_path, text, message):
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    arguments = ["export-model", str(folder), "--prompts", str(file), "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert re.search(message, done.stderr)
    assert not (tmp_path / "b").exists()
