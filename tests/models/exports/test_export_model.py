"""export_model: a whole model, every format, proven, loaded and run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from helpers.tiny_models import make_cache, make_inputs, make_model

import rotary_export
from rotary_export import RotaryExportError, export_model, load, verify
from rotary_export.bundle.manifest import read_manifest
from rotary_export.errors import CheckFailedError
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    return export_model(llama, make_inputs(llama), tmp_path_factory.mktemp("models") / "llama")


def run_eager(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.numpy()


@pytest.mark.parametrize("runtime", ["onnxruntime", "portable", "torchscript", "program"])
def test_equals_eager_at_another_batch_and_length(llama, bundle, runtime):
    options = {"use_op_library": False} if runtime == "portable" else {}
    session = load(
        bundle, "model", "onnxruntime" if options else runtime, allow_code=True, **options
    )
    ids = torch.arange(3 * 23).reshape(3, 23) % 96
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(3, 23, dtype=torch.int64),
        "position_ids": torch.arange(23).repeat(3, 1) + torch.tensor([[0], [4], [9]]),
    }
    got = session(**inputs)["logits"]
    want = run_eager(llama, **inputs)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4 * abs(want).max())
    kernel = {"onnxruntime": "fused", "portable": "native"}.get(runtime, "primitive")
    assert session.kernel_path.startswith(kernel)


def test_one_node_a_layer_and_tables_once(bundle):
    model = onnx.load(bundle.path / "model.onnx")
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("RotaryEmbedding") == 2
    assert ops.count("Cos") == 1
    assert ops.count("Sin") == 1
    tables = {tuple(n.input[1:3]) for n in model.graph.node if n.op_type == "RotaryEmbedding"}
    assert len(tables) == 1
    assert bundle.manifest.graphs["model"].rotary_nodes == 2


def test_nothing_of_this_machine_in_the_files(bundle):
    for file in bundle.path.iterdir():
        data = file.read_bytes()
        assert b"site-packages" not in data, file.name
        assert str(bundle.path).encode() not in data, file.name


def test_manifest_contains_what_was_found(bundle):
    manifest = read_manifest(bundle.path)
    (finding,) = manifest.config["rotary"]
    assert finding["function"].endswith("modeling_llama.apply_rotary_pos_emb")
    assert (finding["calls"], finding["fused"]) == (2, 2)
    assert finding["rotation"] == "half, channels 0 to 16, BNSH"
    graph = manifest.graphs["model"]
    assert [i.shape for i in graph.inputs] == [("batch_size", "seq_len")] * 3
    assert graph.inputs[0].limits == (0, 95)
    assert graph.outputs[0].shape == ("batch_size", "seq_len", 96)
    assert manifest.parity["passed"]
    assert any("padded" in shape for shape in manifest.parity["shapes"]["model"])


def test_verify_needs_no_model(bundle):
    report = verify(bundle, allow_code=True)
    assert report.passed
    runtimes = [row.runtime for row in report.rows]
    assert runtimes[0] == "torch.export"
    assert len(runtimes) == 4
    assert {row.eager_tolerance for row in report.rows} == {"model"}


def test_verify_compares_the_manifest_with_the_file(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["graphs"]["model"]["rotary_nodes"] = 3
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = "model.onnx has 2 rotary nodes of native bodies, the manifest names 3 of native"
    with pytest.raises(CheckFailedError, match=message):
        verify(copy, allow_code=True)


def test_limits_are_checked(bundle):
    session = load(bundle, "model")
    ids = np.full((1, 3), 96)
    with pytest.raises(RotaryExportError, match="input_ids must be >= 0"):
        session(input_ids=ids, attention_mask=np.ones_like(ids), position_ids=np.zeros_like(ids))


def test_model_is_left_as_it_was(tmp_path):
    model = make_model("llama", num_hidden_layers=1).train()
    model.model.layers[0].mlp.eval()
    before = {
        name: (value.data_ptr(), value.dtype, value.requires_grad, value.clone())
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    modes = [module.training for module in model.modules()]
    import transformers.models.llama.modeling_llama as code

    function = code.apply_rotary_pos_emb
    export_model(model, make_inputs(model), tmp_path / "b", formats=["onnx"], dtype=torch.float16)
    bad = make_inputs(model) | {"input_ids": torch.full((2, 6), 1000)}
    with pytest.raises(RotaryExportError, match="fails on its example inputs"):
        export_model(model, bad, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert code.apply_rotary_pos_emb is function
    assert [module.training for module in model.modules()] == modes
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        pointer, dtype, requires_grad, content = before[name]
        assert (value.data_ptr(), value.dtype, value.requires_grad) == (
            pointer,
            dtype,
            requires_grad,
        )
        assert torch.equal(value, content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_models_have_float32_tables(tmp_path, dtype):
    model = make_model("llama", num_hidden_layers=1)
    bundle = export_model(model, make_inputs(model), tmp_path / "half", dtype=dtype)
    proto = onnx.load(bundle.path / "model.onnx")
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    nodes = [n for n in proto.graph.node if n.op_type == "RotaryEmbedding"]
    assert {types[name] for node in nodes for name in node.input[1:3]} == {onnx.TensorProto.FLOAT}
    of_model = [row for row in bundle.report.rows if row.graph == "model"]
    assert {row.eager_tolerance for row in of_model} == {"model-half"}
    assert {"TorchScript", "torch.export"} < {row.runtime for row in bundle.report.rows}
    assert bundle.report.passed
    skipped = json.loads((bundle.path / "manifest.json").read_text())["parity"]["skipped"]
    assert skipped == bundle.report.skipped
    if dtype == torch.bfloat16:
        reason = "ONNX Runtime's CPU has no bfloat16 kernel for some operator"
        assert set(skipped.values()) == {reason}


def test_cache(tmp_path, llama):
    cache = make_cache([torch.randn(2, 2, 5, 16) for _ in range(4)])
    inputs = {
        "input_ids": torch.tensor([[5], [6]]),
        "attention_mask": torch.ones(2, 6, dtype=torch.int64),
        "position_ids": torch.tensor([[5], [5]]),
        "past_key_values": cache,
    }
    bundle = export_model(llama, inputs, tmp_path / "cached", formats=["onnx", "torchscript"])
    assert cache.get_seq_length() == 5
    info = bundle.manifest.graphs["model"]
    names = [i.name for i in info.inputs]
    assert names[3:] == [f"past_key_values.{n}.{kv}" for n in (0, 1) for kv in ("key", "value")]
    assert info.inputs[1].shape == ("batch_size", "past_seq_len + seq_len")
    assert info.outputs[1].name == "present.0.key"
    assert info.outputs[1].shape == ("batch_size", 2, "past_seq_len + seq_len", 16)

    # Decode token by token with the bundle: the logits of the whole prompt at once.
    ids = torch.arange(3 * 9).reshape(3, 9) % 96
    want = run_eager(llama, input_ids=ids)
    for options in ({}, {"use_op_library": False}, {"runtime": "torchscript", "allow_code": True}):
        session = load(bundle, "model", **options)
        past = {name: torch.zeros(3, 2, 1, 16) for name in names[3:]}  # one row, masked
        for start, end in ((0, 4), (4, 5), (5, 9)):
            mask = torch.ones(3, end + 1, dtype=torch.int64)
            mask[:, 0] = 0
            out = session(
                input_ids=ids[:, start:end].contiguous(),
                attention_mask=mask,
                position_ids=torch.arange(start, end).repeat(3, 1),
                **past,
            )
            got = out.pop("logits").numpy()
            np.testing.assert_allclose(got, want[:, start:end], rtol=0, atol=1e-4 * abs(want).max())
            past = {
                name.replace("present", "past_key_values"): value for name, value in out.items()
            }


def make_decode_inputs(cache, past):
    return {
        "input_ids": torch.tensor([[5], [6]]),
        "attention_mask": torch.ones(2, past + 1, dtype=torch.int64),
        "position_ids": torch.tensor([[past], [past]]),
        "past_key_values": cache,
    }


def test_sliding_window_cache(tmp_path):
    """Beyond the window, the logits of transformers' own sliding cache, which drops positions."""
    from transformers import DynamicCache

    model = make_model("gemma2", num_hidden_layers=1)
    window = model.config.sliding_window
    cache = make_cache([torch.randn(2, 2, 5, 16) for _ in range(2)], config=model.config)
    inputs = make_decode_inputs(cache, 5)
    bundle = export_model(model, inputs, tmp_path / "b", formats=["onnx"])
    assert any("past_seq_len 11" in shape for shape in bundle.report.shapes["model"])
    assert window == 8

    ids, cache = torch.randint(0, 96, (3, window + 6)), DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        keys = [layer.keys.shape[2] for layer in cache.layers]
        want = model(input_ids=ids[:, -1:], past_key_values=cache).logits.numpy()
        whole = model(input_ids=ids[:, :-1], past_key_values=make_cache([])).past_key_values
    assert keys == [window - 1]
    past = {}
    for index, layer in enumerate(whole.layers):
        past[f"past_key_values.{index}.key"] = layer.keys
        past[f"past_key_values.{index}.value"] = layer.values
    inputs = make_decode_inputs(None, window + 5) | {"input_ids": ids[:, -1:]}
    del inputs["past_key_values"]
    inputs |= {"attention_mask": torch.ones(3, window + 6, dtype=torch.int64)}
    inputs |= {"position_ids": torch.full((3, 1), window + 5)}
    got = load(bundle, "model")(**inputs, **past)["logits"].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * abs(want).max())


def make_full_window():
    config = make_model("gemma2").config
    return make_cache([torch.randn(2, 2, 12, 16) for _ in range(4)], config=config)


def make_encoder_decoder():
    from transformers import EncoderDecoderCache

    filled = make_cache([torch.randn(2, 2, 5, 16) for _ in range(4)])
    return EncoderDecoderCache(filled, make_cache([]))


def make_static():
    from transformers import StaticCache

    return StaticCache(make_model("llama").config, max_cache_len=16)


CACHES = {
    "full window": (make_full_window, r"got 7 of 12 in layer 0 \(DynamicSlidingWindowLayer\)"),
    "encoder and decoder": (make_encoder_decoder, "got an EncoderDecoderCache"),
    "static": (make_static, "got layer 0 of StaticLayer"),
}


@pytest.mark.parametrize("case", CACHES.values(), ids=CACHES.keys())
def test_other_caches_are_refused(tmp_path, llama, case):
    make, message = case
    with pytest.raises(RotaryExportError, match=f"past_key_values must .*{message}"):
        export_model(llama, make_decode_inputs(make(), 5), tmp_path / "b")


def make_pairs():
    return tuple((torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)) for _ in range(2))


def test_float64_with_padding(tmp_path):
    """Rows of padding see nothing: in ONNX they would be NaN, and so would all others then."""
    model = make_model("llama").double()
    bundle = export_model(model, make_inputs(model), tmp_path / "b", formats=["onnx"], quick=True)
    assert any("padded at the left" in case for case in bundle.report.shapes["model"])


GROWING = {"empty": (lambda: make_cache([]), 0), "pairs": (make_pairs, 5)}


@pytest.mark.parametrize("case", GROWING)
def test_caches_that_become_tensors(tmp_path, llama, case):
    make, past = GROWING[case]
    inputs = make_decode_inputs(make(), past)
    bundle = export_model(llama, inputs, tmp_path / "b", formats=["onnx"], quick=True)
    mask, *_, last = bundle.manifest.graphs["model"].inputs[1:]
    assert mask.shape == ("batch_size", "past_seq_len + seq_len")
    assert (last.name, last.shape[2]) == ("past_key_values.1.value", "past_seq_len")
    assert {"the example", "batch_size 2, seq_len 8, past_seq_len 0"} <= set(
        bundle.report.shapes["model"]
    )


def test_a_cache_is_left_empty(llama):
    cache = make_cache([])
    inputs = prepare_inputs(
        llama, {"input_ids": torch.ones(2, 3).long(), "past_key_values": cache}, DecoderOptions()
    )
    assert cache.get_seq_length() == 0
    (layer, _) = inputs["past_key_values"].layers
    assert layer.keys.shape == (2, 2, 0, 16)


def test_an_empty_cache_with_windows():
    from transformers import DynamicCache

    model = make_model("gemma2")
    cache = DynamicCache(config=model.config)  # the example is longer than the window of 8
    ids = torch.ones(2, 12, dtype=torch.int64)
    inputs = prepare_inputs(model, {"input_ids": ids, "past_key_values": cache}, DecoderOptions())
    assert [tuple(layer.keys.shape) for layer in inputs["past_key_values"].layers] == [
        (2, 2, 0, 16)
    ] * 2


def test_weights_in_a_file_of_their_own(tmp_path, llama):
    bundle = export_model(
        llama, make_inputs(llama), tmp_path / "big", formats=["onnx"], max_inline_bytes=10_000
    )
    assert {"model.onnx", "model.onnx_data"} < bundle.manifest.files.keys()
    assert (bundle.path / "model.onnx").stat().st_size < 60_000
    load(bundle, "model")
    data = bundle.path / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckFailedError, match=r"model\.onnx_data .* is not the file"):
        load(bundle, "model")
    data.unlink()
    with pytest.raises(CheckFailedError, match=r"model\.onnx_data is missing"):
        load(bundle, "model")


def test_failed_proof_leaves_nothing(tmp_path, llama, monkeypatch):
    from rotary_export.models.find import lowering

    real = lowering.rotary_embedding
    calls = []

    def wrong(x, cos, sin, **options):
        calls.append(1)
        if not torch.compiler.is_exporting():
            return real(x, cos, sin, **options)
        return real(x, cos, -sin, **options)

    monkeypatch.setattr(lowering, "rotary_embedding", wrong)
    with pytest.raises(CheckFailedError, match="the export is not equal to eager"):
        export_model(llama, make_inputs(llama), tmp_path / "b", formats=["onnx"])
    assert calls
    assert not list(tmp_path.iterdir())


def test_manifest_is_json(bundle):
    data = json.loads((bundle.path / "manifest.json").read_text())
    assert data["config"]["model"] == "LlamaForCausalLM"
    assert data["producers"]["transformers"]
    assert rotary_export.__version__ == data["producers"]["rotary_export"]
