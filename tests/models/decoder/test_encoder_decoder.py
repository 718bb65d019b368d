"""Encoder-decoders: two graphs, and the tokens of transformers' own `generate`."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.bundles import make_folder, update_hash
from helpers.multimodal_models import make_moonshine
from helpers.tiny_models import SIZES, make_model

from rotary_export import (
    RotaryExportError,
    export_model,
    load,
    load_decoder,
    verify,
    verify_model,
)
from rotary_export.bundle.manifest import (
    GraphInfo,
    Manifest,
    TensorInfo,
    hash_file,
    read_manifest,
)
from rotary_export.cli.main import cli
from rotary_export.compat.transformers import count_frames, list_frame_counters
from rotary_export.errors import CheckFailedError
from rotary_export.models.analyze import find_rotary_calls
from rotary_export.models.decoder.encoder import Encoder, make_first_tokens
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.parts import split_model
from rotary_export.models.export_model import prove_case
from rotary_export.models.prove.prove import RejectedError, UnknownCaseError
from rotary_export.proof.report import Report
from rotary_export.runtime.decoder.decoder import Decoder

LENGTHS = [9000, 6000, 2500]  # samples


@functools.cache
def get_moonshine():
    """Return a model and its bundle."""
    model = make_moonshine()
    out = make_folder() / "moonshine"
    return model, export_model(model, None, out, formats=["onnx"], quick=True)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(get_moonshine()[1].path)


def make_audio(lengths):
    """Draw audio of these lengths, padded at the right."""
    samples = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_values": samples * mask, "attention_mask": mask}


def to_numpy(inputs):
    return {name: value.numpy() for name, value in inputs.items()}


def generate_eager(model, audio, count):
    with torch.no_grad():
        made = model.generate(
            **audio, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return made.numpy()


def test_the_encoder_returns_what_the_decoder_reads():
    graphs = get_moonshine()[1].manifest.graphs
    assert {name: info.rotary_nodes for name, info in graphs.items()} == {
        "decoder": 1, "encoder": 1
    }  # fmt: skip
    decoder, encoder = graphs["decoder"], graphs["encoder"]
    assert [(info.name, info.shape) for info in decoder.inputs] == [
        ("input_ids", ("batch_size", "seq_len")),
        ("past_key_values.0.decoder.key", ("batch_size", 4, "past_seq_len", 8)),
        ("past_key_values.0.decoder.value", ("batch_size", 4, "past_seq_len", 8)),
        ("past_key_values.0.encoder.key", ("batch_size", 4, "encoder_seq_len", 8)),
        ("past_key_values.0.encoder.value", ("batch_size", 4, "encoder_seq_len", 8)),
        ("encoder_attention_mask", ("batch_size", "encoder_seq_len")),
    ]
    assert [(info.name, info.shape) for info in decoder.outputs] == [
        ("logits", ("batch_size", "seq_len", 96)),
        ("present.0.decoder.key", ("batch_size", 4, "past_seq_len + seq_len", 8)),
        ("present.0.decoder.value", ("batch_size", 4, "past_seq_len + seq_len", 8)),
    ]
    assert [(info.name, info.shape) for info in encoder.inputs] == [
        ("input_values", ("batch_size", "seq_len")),
        ("attention_mask", ("batch_size", "seq_len")),
    ]
    assert [info.name for info in encoder.outputs] == [
        "last_hidden_state",
        "encoder_attention_mask",
        "present.0.encoder.key",
        "present.0.encoder.value",
    ]


def test_both_graphs_are_proven():
    report = get_moonshine()[1].report
    assert report.shapes.keys() == {"decoder", "encoder"}
    assert [each.way for each in report.generated] == [
        "batch 1", "batch 3", "batch 3, rows reordered midway"
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one", "three-padded"])
def test_tokens_are_those_of_transformers(decoder, lengths):
    audio = make_audio(lengths)
    want = generate_eager(get_moonshine()[0], audio, 32)
    first = decoder.encode(**to_numpy(audio))
    assert np.array_equal(decoder.generate(first, max_new_tokens=32, eos_token_id=[]), want)
    streamed = [*decoder.stream(first, max_new_tokens=32, eos_token_id=[])]
    assert np.array_equal(np.stack(streamed, axis=1), want[:, 1:])
    assert len({*map(tuple, want)}) == len(lengths)  # rows differ, as what they heard does


def test_beams_keep_what_their_row_heard(decoder):
    audio, order = make_audio(LENGTHS), np.array([2, 0, 0, 1])
    first = decoder.encode(**to_numpy(audio))
    decoder.prefill(first)
    decoder.step([5, 6, 7])
    decoder.reorder(order)
    got = decoder.step([8, 9, 10, 11])
    rows = {name: value[order] for name, value in audio.items()}
    ids = torch.tensor([[1, 7, 8], [1, 5, 9], [1, 5, 10], [1, 6, 11]])
    with torch.no_grad():
        want = get_moonshine()[0](**rows, decoder_input_ids=ids).logits[:, -1]
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-4)
    again = decoder.prefill(first)  # a new batch has the rows that were encoded
    np.testing.assert_allclose(again, load_first(first, audio), rtol=0, atol=2e-4)


def test_a_batch_ends_where_others_are_encoded(decoder):
    audio = to_numpy(make_audio(LENGTHS[:1]))
    stream = decoder.stream(decoder.encode(**audio), max_new_tokens=4, eos_token_id=[])
    next(stream)
    decoder.encode(**audio)
    with pytest.raises(RotaryExportError, match="has begun another batch: read a stream first"):
        next(stream)
    with pytest.raises(RotaryExportError, match="step must follow prefill"):
        decoder.step([5])


def load_first(first, audio):
    with torch.no_grad():
        outputs = get_moonshine()[0](**audio, decoder_input_ids=torch.from_numpy(first))
    return outputs.logits[:, -1].numpy()


@pytest.mark.parametrize(
    ("generation", "token"),
    [({"decoder_start_token_id": 5}, 5), ({"bos_token_id": 6}, 6), ({}, 1)],
    ids=["start", "begin", "config.json"],
)
def test_the_first_token_of_a_bundle(tmp_path, generation, token):
    path = shutil.copytree(get_moonshine()[1].path, tmp_path / "b")
    (path / "generation_config.json").write_text(json.dumps(generation))
    update_hash(path, "generation_config.json")
    assert load_decoder(path).encode(**to_numpy(make_audio([2000]))).tolist() == [[token]]


def test_the_loop_of_two_sessions():
    """What `Decoder` does, on graphs that any runtime opens."""
    path, audio = get_moonshine()[1].path, to_numpy(make_audio(LENGTHS))
    encoder, decoder = load(path, "encoder"), load(path, "decoder")
    encoded = encoder(**audio)
    fixed = {
        name.replace("present", "past_key_values"): value
        for name, value in encoded.items()
        if name != "last_hidden_state"
    }
    past = {
        info.name: np.zeros((3, info.shape[1], 0, info.shape[3]), np.float32)
        for info in decoder.graph.inputs
        if ".decoder." in info.name
    }
    got = np.ones((3, 1), np.int64)
    for _ in range(8):
        outputs = decoder(input_ids=got[:, -1:], **fixed, **past)
        token = outputs["logits"][:, -1:].argmax(axis=-1)
        got = np.concatenate([got, token], axis=1)
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    want = generate_eager(get_moonshine()[0], make_audio(LENGTHS), 8)
    assert np.array_equal(got, want)


def test_it_is_verified_again():
    model, bundle = get_moonshine()
    assert verify(bundle.path).passed
    report = verify_model(bundle.path, model, None, case="batch_size 3, seq_len 895")
    assert report.passed
    assert report.shapes == {"encoder": ["batch_size 3, seq_len 895"]}
    with pytest.raises(RotaryExportError, match=r"case must be one of: .* got 'none'"):
        verify_model(bundle.path, model, None, case="none")
    with pytest.raises(RotaryExportError, match=r"has the graphs decoder, encoder; such a model"):
        verify_model(bundle.path, make_model("llama"), None)


def test_other_keys_of_the_encoder_are_found():
    model = make_moonshine()
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.k_proj.weight.neg_()
    report = verify_model(get_moonshine()[1].path, model, None, quick=True)
    failed = {(row.graph, row.output) for row in report.rows if not row.passed}
    assert ("encoder", "present.0.encoder.key") in failed
    assert not report.generated[-1].passed


def make_t5():
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def make_whisper():
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


AUDIO = make_audio([2000])
REFUSED = {
    "static": (
        make_moonshine, None, {"cache": "static", "max_cache_len": 8},
        "cache 'static' is for a decoder alone, Moonshine.* has an encoder: use 'full' or 'none'",
    ),
    "window": (make_moonshine, None, {"cache": "window"}, "cache 'window' is for a decoder alone"),
    "last logits": (make_moonshine, None, {"last_logits": True}, "last_logits is for a decoder"),
    "embeddings": (make_moonshine, None, {"inputs_embeds": True}, "inputs_embeds is for a decoder"),
    "a cache": (
        make_moonshine, AUDIO | {"past_key_values": transformers.DynamicCache()}, {},
        "example inputs of an encoder-decoder must have no cache",
    ),
    "other inputs": (
        make_moonshine, {"input_ids": torch.ones(1, 3).long()}, {"cache": "full"},
        "Moonshine.* fails on its example inputs: ",
    ),
    "t5": (make_t5, None, {}, "the layers of T5For.* with k_proj and v_proj.*--cache none"),
    "whisper": (make_whisper, None, {}, "Whisper.* reads input_features; a factory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, inputs, settings, message = REFUSED[case]
    model, options = make(), DecoderOptions(**settings)
    with pytest.raises(RotaryExportError, match=message):
        split_model(model, prepare_inputs(model, inputs, options), options)


def test_keys_that_are_made_in_another_way_are_refused(monkeypatch):
    model, options = make_moonshine(), DecoderOptions()
    inputs = prepare_inputs(model, None, options)
    forward = Encoder.forward

    def scale(self, **given):
        return {name: 2 * value for name, value in forward(self, **given).items()}

    monkeypatch.setattr(Encoder, "forward", scale)
    with pytest.raises(
        RotaryExportError, match="makes its keys of the encoder's output in another"
    ):
        split_model(model, inputs, options)


def test_without_rotary_embeddings_it_is_refused(tmp_path):
    config = transformers.BartConfig(
        vocab_size=32, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    message = "the decoder of BartForConditionalGeneration applies no rotary embedding"
    with pytest.raises(CheckFailedError, match=message):
        export_model(model, None, tmp_path / "b", formats=["torchscript"], quick=True)


def test_without_a_cache_it_is_one_graph():
    model, options = make_moonshine(), DecoderOptions("none")
    (part,) = split_model(model, prepare_inputs(model, None, options), options)
    assert part.name == "model"
    assert [*part.inputs] == ["input_values", "attention_mask", "decoder_input_ids"]
    given = AUDIO | {"decoder_input_ids": torch.ones(1, 3).long()}
    (part,) = split_model(model, prepare_inputs(model, given, DecoderOptions()), DecoderOptions())
    assert part.name == "model"


def test_t5gemma_is_split_in_the_same_way():
    sizes = SIZES | {"num_hidden_layers": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    config = transformers.T5GemmaConfig(
        encoder=sizes, decoder=sizes, vocab_size=96, bos_token_id=1, pad_token_id=0, eos_token_id=2
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    options = DecoderOptions()
    decoder, encoder = split_model(model, prepare_inputs(model, None, options), options)
    assert [*encoder.inputs] == ["input_ids", "attention_mask"]
    assert [*decoder.inputs] == ["input_ids", "past_key_values", "encoder_attention_mask"]
    encoded = encoder.model(**encoder.inputs)
    logits = decoder.model(**decoder.inputs)["logits"]
    want = model(**encoder.inputs, decoder_input_ids=decoder.inputs["input_ids"]).logits
    torch.testing.assert_close(logits, want)
    assert torch.equal(encoded["encoder_attention_mask"], encoder.inputs["attention_mask"])


def test_rotary_calls_of_both_graphs_are_listed():
    found = find_rotary_calls(make_moonshine(), None)
    assert (found.calls, found.fused, len(found.findings)) == (2, 2, 2)


def test_frames_are_counted_as_moonshine_does():
    """In whole numbers, where it truncates a quotient."""
    (encoder, *_) = list_frame_counters(make_moonshine())
    for samples in range(895, 4000):
        assert count_frames(samples) == encoder._get_feat_extract_output_lengths(samples)


@pytest.fixture
def fake_builds(monkeypatch):
    """Replace what builds a graph by what a test says of each."""

    def replace(results):
        def build(part, folder, name, dtype, **options):
            (folder / f"{part.name}.onnx").write_bytes(b"")
            tensors = (TensorInfo("x", "float32", (1,)),)
            graph = GraphInfo(tensors, tensors, {"onnx": f"{part.name}.onnx"})
            files = {file.name: hash_file(file) for file in folder.iterdir()}
            minimum = {"fused": "1.20", "portable": "1.20"}
            config = {"model": part.name, "seed": 0}
            manifest = Manifest(name, config, dtype, 23, {part.name: graph}, minimum, {}, files)
            return results[part.name](manifest)

        monkeypatch.setattr("rotary_export.models.export_model.build_graph", build)

    return replace


def test_a_rejected_bundle_has_the_graphs_before(fake_builds, tmp_path):
    def reject(manifest):
        parity = {"passed": False, "error": "it differs"}
        raise RejectedError("it differs", replace(manifest, parity=parity), "", 0)

    fake_builds({"decoder": lambda manifest: (manifest, Report(), []), "encoder": reject})
    with pytest.raises(RejectedError, match="it differs"):
        export_model(
            make_moonshine(), None, tmp_path / "b", formats=["onnx"], keep_failed=tmp_path / "kept"
        )
    manifest = read_manifest(tmp_path / "kept")
    assert [*manifest.graphs] == ["decoder", "encoder"]
    assert manifest.parity["error"] == "it differs"
    assert [manifest.select(name).config["model"] for name in manifest.graphs] == [
        "decoder", "encoder"
    ]  # fmt: skip


def test_a_case_may_be_one_of_either_graph(fake_builds):
    def refuse(manifest):
        raise UnknownCaseError("case must be one of: a; got 'b'")

    report = Report(shapes={"encoder": ["b"]})
    fake_builds({"decoder": refuse, "encoder": lambda manifest: (manifest, report, [])})
    assert prove_case(make_moonshine(), None, "b").shapes == {"encoder": ["b"]}
    fake_builds({"decoder": refuse, "encoder": refuse})
    with pytest.raises(RotaryExportError, match="case must be one of: a; got 'b'"):
        prove_case(make_moonshine(), None, "b")


def test_sizes_of_several_graphs_are_found(tmp_path):
    with pytest.raises(RotaryExportError, match=r"'auto' where .* decoder, encoder, got None"):
        export_model(make_moonshine(), None, tmp_path / "b", dynamic_shapes=None)


def test_prompts_are_for_a_decoder_alone(tmp_path):
    with pytest.raises(RotaryExportError, match="prompts are for a decoder alone"):
        export_model(make_moonshine(), None, tmp_path / "b", prompts=[[1, 2]])


def test_the_first_token_is_that_of_the_config():
    model = make_moonshine(decoder_start_token_id=7)
    assert make_first_tokens(model, 2, 3).tolist() == [[7, 1, 2]] * 2
    model.config = model.generation_config = SimpleNamespace()
    with pytest.raises(RotaryExportError, match="must have decoder_start_token_id, got none"):
        make_first_tokens(model, 2)


def test_what_a_decoder_refuses(decoder, tmp_path):
    path = get_moonshine()[1].path
    with pytest.raises(RotaryExportError, match="encode must come first: the model is an encoder"):
        load_decoder(path).generate([[1]], max_new_tokens=2)
    decoder.encode(**to_numpy(make_audio([2000])))
    with pytest.raises(RotaryExportError, match="as many rows as encode has read, 1, got 2"):
        decoder.prefill([[1], [1]])
    with pytest.raises(RotaryExportError, match="attention_mask"):
        decoder.encode(input_values=np.zeros((1, 2000), np.float32))
    with pytest.raises(RotaryExportError, match="encode is for an encoder-decoder, the model has"):
        Decoder(decoder.session, {}, {}).encode()
    with pytest.raises(RotaryExportError, match=r"got no past_key_values.0.encoder.key, past_key"):
        decoder._graph.set_encoded({"last_hidden_state": np.zeros((1, 2, 32), np.float32)})
    with pytest.raises(
        RotaryExportError, match="config must have decoder_start_token_id, got None"
    ):
        Decoder(decoder.session, {}, {}, encoder=decoder.encoder).encode()
    with pytest.raises(
        RotaryExportError, match=r"no graph 'rotate' or 'model'; it has decoder, en"
    ):
        load(path)
    shown = CliRunner().invoke(cli, ["inspect", str(path), "--json"])
    assert len(json.loads(shown.output)["rotary"]) == 2  # of both graphs
    done = CliRunner().invoke(cli, ["generate", str(path), "--ids", "1"])
    assert (done.exit_code, "encode must come first" in done.stderr) == (2, True)
