"""`ScaledRotaryEmbedding`: stateless, at the actual length, in every graph format."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from helpers.hf_modules import make_config, make_rotary, run_rotary
from helpers.oracles import assert_same_bits
from helpers.rope_cases import (
    CASES,
    IN_TRANSFORMERS,
    LENGTH_DEPENDENT,
    SOME,
    RopeCase,
    compute_theta,
    sweep,
)

from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch
from rotary_export.rope import ScaledRotaryEmbedding, read_rope
from rotary_export.rope.scaled_embedding import compute_length

LENGTHS = (1, 2, 1023, 1024, 1025, 1500, 1501, 2047, 2048, 2049, 5000)


def make_ids(length, batch=3, seq_len=7):
    """Random ids of which the largest is length - 1, at a place that is not the last."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, length, (batch, seq_len), generator=generator)
    ids[batch // 2, seq_len // 2] = length - 1
    return ids


def expect_half(case, ids):
    """Return the left half of a fresh Hugging Face module's cos and sin."""
    cos, sin = run_rotary("llama", make_config(case.config), ids)
    half = cos.shape[-1] // 2
    assert_same_bits(cos[..., :half], cos[..., half:])
    return cos[..., :half], sin[..., :half]


def assert_same(got, want, what):
    for name, a, b in zip(("cos", "sin"), got, want, strict=True):
        assert_same_bits(a, b, f"{what}, {name}")


@sweep([case for case in IN_TRANSFORMERS if "no-truncate" not in case.name])
def test_equal_to_a_fresh_module(case):
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    for length in LENGTHS:
        assert_same(rope(make_ids(length)), expect_half(case, make_ids(length)), length)


@sweep(LENGTH_DEPENDENT)
def test_stored_frequencies_give_the_same(case):
    parameters = read_rope(case.config)[None]
    limit = 3000
    stored, free = ScaledRotaryEmbedding(parameters, limit), ScaledRotaryEmbedding(parameters)
    for length in (1, 1024, 1025, 2048, 2049, 2999, 3000):
        assert_same(stored(make_ids(length)), free(make_ids(length)), length)
    if case.rope_type == "dynamic" and limit > parameters.max_position_embeddings:
        with pytest.raises(IndexError):
            stored(make_ids(limit + 1))


@sweep()
def test_tables_are_right_in_float64(case):
    """Every row, each error in units of its angle's rounding."""
    parameters = read_rope(case.config)[None]
    rope = ScaledRotaryEmbedding(parameters)
    for length in (1024, 1025, 2048, 2049):
        ids = torch.arange(length)[None]
        angles = ids[0].double()[:, None] * torch.from_numpy(compute_theta(parameters, length))
        factor = float(parameters.compute_attention_factor(length))
        slack = factor * (3e-7 + 4e-6 * angles)
        for got, want in zip(rope(ids), (angles.cos(), angles.sin()), strict=True):
            assert ((got[0] - want * factor).abs() <= slack).all(), length


def test_dynamic_has_no_memory():
    """Hugging Face's is sticky: 3000 after 4096 gives the frequencies of 4096."""
    case = RopeCase("dynamic", {"rope_type": "dynamic", "factor": 2.0})
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    sticky = make_rotary("llama", make_config(case.config))
    x = torch.zeros(1)
    sticky(x, make_ids(4096))
    fresh = expect_half(case, make_ids(3000))
    assert not torch.equal(sticky(x, make_ids(3000))[0][..., :32], fresh[0])
    rope(make_ids(4096))
    assert_same(rope(make_ids(3000)), fresh, 3000)


def test_the_largest_position_decides_wherever_it_stands():
    """A batch padded on the left, a decoded token, positions of several axes."""
    case = next(case for case in CASES if case.name == "longrope")
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    padded = torch.stack((torch.arange(1020, 1026), torch.tensor([1, 1, 1, 0, 1, 2])))
    assert_same(rope(padded), expect_half(case, padded), "left padding")
    for position in (1023, 1024):
        ids = torch.tensor([[position]])
        assert_same(rope(ids), expect_half(case, ids), position)


def test_empty_positions():
    for case in SOME:
        rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
        half = rope.dim // 2
        assert rope(torch.zeros(2, 0, dtype=torch.int64))[0].shape == (2, 0, half)
        assert rope(torch.zeros(0, 5, dtype=torch.int64))[1].shape == (0, 5, half)
    assert int(compute_length(torch.zeros(0, dtype=torch.int64))) == 1


def test_precision_is_kept():
    case = next(case for case in CASES if case.name == "longrope")
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    want = rope(make_ids(2000))
    assert_same(rope.to(torch.bfloat16)(make_ids(2000)), want, "bfloat16")
    assert_same(rope.half()(make_ids(2000)), want, "half")
    assert rope.inv_freq.dtype == torch.float32


@sweep(SOME)
def test_traces(case):
    """Traced at a short length, run at long ones."""
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    with quiet_torch():
        traced = torch.jit.trace(rope, make_ids(5), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    for length in LENGTHS:
        ids = make_ids(length, batch=2, seq_len=11)
        assert_same(loaded(ids), rope(ids), length)


@sweep(SOME)
def test_exports_as_a_program(case):
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},)
    with quiet_torch():
        program = torch.export.export(rope, (make_ids(5),), dynamic_shapes=shapes, strict=False)
    for length in LENGTHS:
        ids = make_ids(length, batch=2, seq_len=11)
        assert_same(program.module()(ids), rope(ids), length)


def export_onnx(module, *inputs, shapes):
    import onnxruntime

    with quiet_torch(), reuse_translations():
        program = torch.onnx.export(
            module, inputs, dynamo=True, dynamic_shapes=shapes, opset_version=23, verbose=False
        )
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


@sweep(SOME)
def test_exports_to_onnx(case):
    """Cos and Sin of ONNX Runtime differ by an ulp; the angles of dynamic by its Pow's ulp."""
    rope = ScaledRotaryEmbedding(read_rope(case.config)[None])
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},)
    session = export_onnx(rope, make_ids(5), shapes=shapes)
    for length in LENGTHS:
        ids = make_ids(length, batch=2, seq_len=11)
        outputs = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        # Pow: the base differs by 2 ulp, each power by 2 more: 4 ulp of an angle.
        slack = 4 * length * 2**-23 if case.rope_type == "dynamic" else 0
        factor = float(rope.rope_parameters.compute_attention_factor())
        for got, want in zip(outputs, rope(ids), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(got), want, rtol=0, atol=factor * (2.4e-7 + slack)
            )


MROPE = {
    "chunked": ("qwen2_vl_text", [16, 24, 24]),
    "interleaved": ("qwen3_vl_text", [24, 20, 20]),
    "pairs-first": ("ernie4_5_vl_moe_text", [22, 22, 20]),
}


def make_mrope(layout):
    model_type, section = MROPE[layout]
    values = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    if layout != "pairs-first":
        values["head_dim"] = 128
    return model_type, {"model_type": model_type, **values, "rope_parameters": rope}


@pytest.mark.parametrize("layout", MROPE)
def test_mrope_is_that_of_its_family(layout):
    model_type, values = make_mrope(layout)
    parameters = read_rope(values)[None]
    assert parameters.axis_layout == layout
    rope = ScaledRotaryEmbedding(parameters)
    ids = torch.stack([make_ids(length) for length in (4000, 300, 50)])
    cos, sin = run_rotary(model_type, make_config(values), ids)
    pick = slice(None, None, 2) if layout == "pairs-first" else slice(None, cos.shape[-1] // 2)
    want = cos[..., pick], sin[..., pick]
    assert_same(rope(ids), want, layout)
    text = make_ids(77)
    assert_same(rope(text), rope(text.expand(3, -1, -1)), "text")


@pytest.mark.parametrize("layout", MROPE)
def test_mrope_exports(layout):
    _, values = make_mrope(layout)
    rope = ScaledRotaryEmbedding(read_rope(values)[None])
    shapes = ({1: torch.export.Dim("batch"), 2: torch.export.Dim("seq")},)
    ids = torch.stack([make_ids(length) for length in (9, 5, 7)])
    session = export_onnx(rope, ids, shapes=shapes)
    ids = torch.stack([make_ids(length, 2, 11) for length in (4000, 300, 50)])
    outputs = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    for got, want in zip(outputs, rope(ids), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=2.4e-7)


def test_axial_is_that_of_qwen2_vl():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding

    config = Qwen2VLVisionConfig(embed_dim=320, num_heads=4)
    parameters = read_rope(config)[None]
    assert parameters.rope_type == "axial"
    assert read_rope(config.to_dict())[None] == parameters
    bare = {"model_type": "qwen2_vl_vision", "embed_dim": 320, "num_heads": 4}
    assert read_rope(bare)[None] == parameters
    rope = ScaledRotaryEmbedding(parameters)
    rows, columns = torch.randint(0, 90, (2, 1, 50))
    cos, sin = Qwen2VLVisionRotaryEmbedding(config)(
        torch.zeros(1), torch.stack((rows[0], columns[0]), dim=-1)
    )
    got = rope(torch.stack((rows, columns)))
    assert_same([table[0] for table in got], (cos[:, :40], sin[:, :40]), "axial")


def test_mrope_with_a_boundary():
    """Axes and longrope at once: the largest position of any axis decides."""
    long = next(case for case in CASES if case.name == "longrope")
    parameters = read_rope(long.config)[None]
    section = {"mrope_section": (12, 10, 10), "axis_layout": "interleaved"}
    rope = ScaledRotaryEmbedding(dataclasses.replace(parameters, **section))
    plain = ScaledRotaryEmbedding(parameters)
    for length in (1024, 1025):
        ids = torch.stack([make_ids(10), make_ids(length), make_ids(20)])
        got = rope(ids)[0]
        for axis in range(3):
            columns = [i for i, a in enumerate(rope.axes.tolist()) if a == axis]
            inv_freq = plain.select_inv_freq(torch.tensor(length))[columns]
            want = (ids[axis][..., None].float() * inv_freq).cos()
            want = want * parameters.attention_factor
            torch.testing.assert_close(got[..., columns], want, rtol=0, atol=1.2e-7)
