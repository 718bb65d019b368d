"""`replace_stateful`: Hugging Face's own rotary modules, without their state."""

from __future__ import annotations

import pytest
import torch
from helpers.hf_modules import make_config, make_rotary
from helpers.oracles import assert_same_bits
from helpers.rope_cases import IN_TRANSFORMERS, LENGTH_DEPENDENT, RopeCase, sweep
from torch import nn

from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import RotaryExportError
from rotary_export.rope.stateless_replacement import is_stateful, replace_stateful

LENGTHS = (3, 1024, 1025, 2048, 2049, 6000, 3000, 10)  # up and down
LONG = next(case for case in LENGTH_DEPENDENT if case.name == "longrope")
DYNAMIC = RopeCase("dynamic", {"rope_type": "dynamic", "factor": 2.0})
# Half and interleaved tables, tables in float32, complex ones, multimodal positions.
FAMILIES = ("llama", "cohere", "olmo2", "deepseek_v2", "glm4v_text", "qwen2_vl_text", "gpt_oss")


def make_ids(length, batch=2, seq_len=5):
    ids = torch.randint(0, length, (batch, seq_len), generator=torch.Generator().manual_seed(7))
    ids[0, 0] = length - 1
    return ids


def assert_same(got, want, what):
    got, want = (v if isinstance(v, tuple) else (torch.view_as_real(v),) for v in (got, want))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b, what)


def make_values(model_type, case):
    values = case.config | {"model_type": model_type}
    if model_type == "deepseek_v2":
        values |= {"qk_rope_head_dim": 64}
    if model_type.endswith("_text"):
        values["rope_parameters"] |= {"mrope_section": [12, 10, 10]}
    return values


def check(model_type, config, x=None, layer_type=None):
    """Call the replacement up and down, and compare with a fresh module each time."""
    x = torch.zeros(1) if x is None else x
    options = {} if layer_type is None else {"layer_type": layer_type}
    module = make_rotary(model_type, config)
    replacement = replace_stateful(module)
    assert replacement is not None
    for length in LENGTHS:
        want = make_rotary(model_type, config)(x, make_ids(length), **options)
        assert_same(replacement(x, position_ids=make_ids(length), **options), want, length)
    return module, replacement


@sweep(LENGTH_DEPENDENT)
def test_llama(case):
    check("llama", make_config(case.config))


@pytest.mark.parametrize("case", [LONG, DYNAMIC], ids=lambda case: case.name)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type, case):
    values = make_values(model_type, case)
    check(model_type, make_config(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tables_take_the_type_of_x(dtype):
    check("llama", make_config(LONG.config), torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("case", [LONG, DYNAMIC], ids=lambda case: case.name)
def test_layers_of_several_types(case):
    config = make_config(
        case.config
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, **case.rope},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    )
    for layer_type in config.layer_types:
        check("gemma3_text", config, layer_type=layer_type)
    config.layer_types = ["sliding_attention"] * 2  # the other rope is of no layer
    stateless = make_rotary("gemma3_text", config)
    assert replace_stateful(stateless) is None


def test_phimoe_is_as_transformers_has_it():
    rope = LONG.rope | {"short_mscale": 1.1, "long_mscale": 1.3, "rope_theta": 1e4}
    values = {"model_type": "phimoe", "original_max_position_embeddings": 1024}
    check("phimoe", make_config(LONG.config | values | {"rope_parameters": rope}))


def test_the_module_is_left_as_it_was():
    module = make_rotary("llama", make_config(LONG.config))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    replacement = replace_stateful(module)
    replacement(torch.zeros(1), make_ids(5000))
    for name, buffer in module.named_buffers():
        assert_same_bits(buffer, before[name], name)
    assert [name for name, _ in module.named_modules()] == [""]


@pytest.mark.parametrize("case", [LONG, DYNAMIC], ids=lambda case: case.name)
@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl_text"])
def test_exports(case, model_type):
    """As a program and to ONNX, which Hugging Face's dynamic does not; right past the boundary."""
    import onnxruntime

    values = make_values(model_type, case)
    replacement = replace_stateful(make_rotary(model_type, make_config(values)))
    x = torch.zeros(1)
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    shapes = {"x": None, "position_ids": {0: batch, 1: seq}}
    with quiet_torch(), reuse_translations():
        program = torch.export.export(
            replacement, (x, make_ids(7)), dynamic_shapes=shapes, strict=False
        )
        onnx = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
    session = onnxruntime.InferenceSession(
        onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for length in LENGTHS:
        ids = make_ids(length, 3, 9)
        want = replacement(x, ids)
        assert_same(program.module()(x, ids), want, length)
        slack = 4 * length * 2**-23 if case is DYNAMIC else 0
        for got, table in zip(
            session.run(None, {"x": x.numpy(), "position_ids": ids.numpy()}), want, strict=True
        ):
            torch.testing.assert_close(
                torch.from_numpy(got), table, rtol=0, atol=1.2 * (2.4e-7 + slack)
            )


@pytest.mark.parametrize("case", [LONG, DYNAMIC], ids=lambda case: case.name)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_traces(model_type, case):
    """Traced at a short length; Hugging Face's own bakes the side of the boundary that it saw."""
    values = make_values(model_type, case)
    replacement = replace_stateful(make_rotary(model_type, make_config(values)))
    x = torch.zeros(1)
    with quiet_torch():
        traced = torch.jit.trace(replacement, (x, make_ids(7)), check_trace=False)
    for length in LENGTHS:
        assert_same(
            traced(x, make_ids(length, 3, 9)), replacement(x, make_ids(length, 3, 9)), length
        )


@pytest.mark.parametrize("case", [LONG, DYNAMIC], ids=lambda case: case.name)
def test_a_whole_model(case):
    """A tiny Llama, exported short with its rotary module replaced, right at lengths past it."""
    from transformers.models.llama.modeling_llama import LlamaModel

    values = case.config | {
        "num_hidden_layers": 2,
        "vocab_size": 32,
        "intermediate_size": 64,
        "attn_implementation": "eager",
        "use_cache": False,
    }

    def make_model():
        torch.manual_seed(0)
        return LlamaModel(make_config(values)).eval()

    model = make_model()
    model.rotary_emb = replace_stateful(model.rotary_emb)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids):
            mask = torch.zeros(1, 1, input_ids.shape[1], input_ids.shape[1])
            outputs = self.model(input_ids, attention_mask=mask, position_ids=position_ids)
            return outputs.last_hidden_state

    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    shapes = {"input_ids": {0: batch, 1: seq}, "position_ids": {0: batch, 1: seq}}
    ids = torch.randint(0, 32, (2, 7))
    with quiet_torch(), torch.no_grad():
        program = torch.export.export(
            Hidden(), (ids, make_ids(7, 2, 7)), dynamic_shapes=shapes, strict=False
        ).module()
    for length in LENGTHS:
        ids, positions = torch.randint(0, 32, (3, 11)), make_ids(length, 3, 11)
        fresh = make_model()
        mask = torch.zeros(1, 1, 11, 11)
        with torch.no_grad():
            want = fresh(ids, attention_mask=mask, position_ids=positions).last_hidden_state
            torch.testing.assert_close(program(ids, positions), want, rtol=0, atol=2e-6)


def test_nothing_to_replace():
    for case in IN_TRANSFORMERS:
        if case.rope_type in ("default", "yarn", "llama3"):
            module = make_rotary("llama", make_config(case.config))
            assert not is_stateful(module)
            assert replace_stateful(module) is None
    assert replace_stateful(nn.Linear(2, 2)) is None


def test_a_module_that_computes_something_else():
    module = make_rotary("llama", make_config(DYNAMIC.config))

    class Other(type(module)):
        def forward(self, x, position_ids):
            self.max_seq_len_cached = 2048
            return module_forward(self, x, position_ids // 2)

    module_forward = type(module).forward
    module.__class__ = Other
    with pytest.raises(RotaryExportError, match="Other has a state, and its tables are not those"):
        replace_stateful(module)
