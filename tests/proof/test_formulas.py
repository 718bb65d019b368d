"""The closed forms: known values, what float32 makes of them, and wrong frequencies are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.bundles import check_refused
from helpers.rope_cases import compute_theta, sweep
from helpers.scaled_bundles import ROWS, make_rope
from helpers.tiny_models import make_inputs, make_model
from torch import nn

from rotary_export import RotaryEmbedding, export, export_model, verify
from rotary_export.graphs.config import check_config
from rotary_export.proof import formulas
from rotary_export.proof.comparison import compare
from rotary_export.proof.models.frequencies import compare_frequencies
from rotary_export.proof.plain import _compare_formulas
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.rope import read_rope
from rotary_export.rope.rope_types import ROPE_TYPES
from rotary_export.rope.scaled_embedding import ScaledRotaryEmbedding, list_inv_freq
from rotary_export.rope.types.linear import Linear
from rotary_export.rope.types.longrope import Longrope

ALLOWED = TOLERANCES["formula"].max_ulp


def compute(values, length=1):
    return formulas.compute_inv_freq({"base": 10000.0} | values, np.array([length])).value[0]


def test_every_rope_type_has_a_formula():
    assert set(formulas.FORMULAS) == set(ROPE_TYPES)


# ---- known values

YARN = {"rope_type": "yarn", "dim": 8, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
LONGROPE = {"rope_type": "longrope", "dim": 4, "original_max_position_embeddings": 16}
LONGROPE |= {"short_factor": (2.0, 4.0), "long_factor": (5.0, 10.0)}
DYNAMIC = {"rope_type": "dynamic", "dim": 64, "factor": 2.0, "max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "dim": 8, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
AXIAL = {"rope_type": "axial", "dim": 8}
# Of base 10000, by hand: powers of ten, times what the type makes of each.
KNOWN = [
    ({"rope_type": "default", "dim": 8}, [1, 0.1, 0.01, 0.001]),
    ({"rope_type": "default", "dim": 3}, [1, 10000 ** (-2 / 3)]),
    ({"rope_type": "linear", "dim": 4, "factor": 4.0}, [0.25, 0.0025]),
    # Pair 1.008 turns once in 64 positions: rounded up to 2, with pair 1 half way.
    (YARN, [1, 0.1 * (0.5 + 0.5 / 4), 0.0025, 0.00025]),
    (YARN | {"truncate": False}, [1, 0.1 * (0.0079366 + 0.9920634 / 4), 0.0025, 0.00025]),
    # Pair 1 turns 6.4 / (2 pi) = 1.0186 times.
    (LLAMA3, [1, 0.1 * (0.0061972 + 0.9938028 / 4), 0.0025, 0.00025]),
    ({"rope_type": "proportional", "dim": 8, "rotated_pairs": 2, "factor": 2.0}, [0.5, 0.05, 0, 0]),
    (AXIAL | {"axis_layout": "rows-first"}, [1, 0.1, 0.01, 0.001] * 2),
    (AXIAL | {"axis_layout": "three-axes"}, [1, 0.1, 0.01, 0.001] * 3),
    (AXIAL | {"axis_layout": "even-odd"}, [1, 0.01, 0.1, 0.001]),
    (AXIAL | {"axis_layout": "alternating"}, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
]


@pytest.mark.parametrize(("values", "want"), KNOWN)
def test_known_values(values, want):
    np.testing.assert_allclose(compute(values), want, rtol=1e-6)


def test_known_values_of_lengths():
    """dynamic as a fresh module of transformers has it; longrope on both sides of its boundary."""
    known = {100: 0.749894, 2048: 0.749894, 2049: 0.749871, 3000: 0.734160, 4096: 0.723784}
    for length, want in known.items():
        assert compute(DYNAMIC, length)[1] == pytest.approx(want, abs=6e-7)
    np.testing.assert_allclose(compute(LONGROPE, 16), [0.5, 0.0025], rtol=1e-12)
    np.testing.assert_allclose(compute(LONGROPE, 17), [0.2, 0.001], rtol=1e-12)


def test_known_values_of_the_plain_embedding():
    """NTK by 8 makes the base of 64 channels 85550.3759; zeta is from 0.4 / 1.4 on."""
    values = {"dim": 64, "base": 10000.0, "base_rescale_factor": 8.0}
    inv_freq = formulas.compute_plain_inv_freq(values).value
    assert inv_freq[[0, 1, 31]] == pytest.approx([1, 0.70124223, 85550.3759 ** (-31 / 32)])
    zeta = formulas.compute_zeta(values).value
    assert zeta[[0, 31]] == pytest.approx([0.285714, 0.977679], abs=1e-6)


def test_attention_factor():
    assert formulas.compute_attention_factor(DYNAMIC, 1) == 1
    values = LONGROPE | {"attention_factor": 1.5, "long_attention_factor": None}
    assert formulas.compute_attention_factor(values, 17) == 1.5
    values |= {"long_attention_factor": 2.5}
    assert [formulas.compute_attention_factor(values, n) for n in (16, 17)] == [1.5, 2.5]


# ---- what float32 makes of them


@sweep()
def test_float32_is_within_the_tolerance_and_a_wrong_base_is_not(case):
    parameters = read_rope(case.config)[None]
    values, boundary = parameters.to_dict(), parameters.length_boundary
    got = list_inv_freq(parameters, None if boundary is None else boundary + 200).numpy()
    lengths = formulas.list_lengths(values, len(got))
    want = formulas.compute_inv_freq(values, lengths)
    if case.rope_type in ("dynamic", "longrope"):
        assert lengths[1] == boundary + 1
    for row in (0, -1):
        theta = compute_theta(parameters, max(1, int(lengths[row])))
        np.testing.assert_allclose(want.value[row], theta, rtol=1e-12)
    assert compare(got, want.value, want.unit).max_ulp < ALLOWED
    wrong = list_inv_freq(replace(parameters, base=parameters.base * 1.0001), None).numpy()
    assert compare(wrong[0], want.value[0], want.unit[0]).max_ulp > ALLOWED


@pytest.mark.parametrize("base", [2.0, 10.0, 1e4, 5e5, 1e7, 1e10])
def test_one_wrong_frequency_is_beyond_the_tolerance(base):
    for dim in (4, 24, 64, 128, 512):
        rope = RotaryEmbedding(dim, base=base, use_xpos=True)
        values = {"dim": dim, "base": base, "base_rescale_factor": 1.0}
        for got, want in (
            (rope.inv_freq.numpy(), formulas.compute_plain_inv_freq(values)),
            (rope.scale.numpy(), formulas.compute_zeta(values)),
        ):
            assert compare(got, want.value, want.unit).max_ulp < ALLOWED
            error = np.abs(got * (1 + 1e-5) - want.value) / want.unit
            assert error.min() > ALLOWED


# ---- wrong bundles


def change(tensor, index, factor=1.00001):
    changed = tensor.clone()
    changed[index] *= factor
    return changed


# One for each type: a bundle of `rope_cases.BUNDLES`, and which of the type's formulas is changed.
ALTERED = [
    *((name, "short") for name in ("default", "linear", "dynamic", "yarn", "longrope", "llama3")),
    ("proportional", "short"),
    ("dynamic", "long"),
    ("longrope", "long"),
]


@pytest.mark.parametrize(("name", "part"), ALTERED)
def test_an_altered_formula_is_refused(monkeypatch, name, part):
    cls = type(make_rope(name).rope_parameters)
    method = f"compute_{part}_inv_freq"
    right = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *length: change(right(self, *length), 2))
    config = check_config(make_rope(name), max_seq_len=ROWS)
    tables = {"inv_freq": config.rope.make_buffers(ROWS)["inv_freq"].numpy()}
    ((row,), _) = _compare_formulas(config, tables, config.rope.make_buffers(ROWS))
    assert not row.passed
    assert row.oracle.worst[1] == 2
    assert (row.oracle.worst[0] > 0) == (part == "long")


def test_an_altered_axial_formula_is_refused():
    rope = ScaledRotaryEmbedding(read_rope({"model_type": "pixtral", "head_dim": 20})[None])
    config = check_config(rope, max_seq_len=ROWS)
    fresh = config.rope.make_buffers(ROWS)
    ((row,), _) = _compare_formulas(config, {"inv_freq": rope.inv_freq.numpy()}, fresh)
    assert row.passed
    changed = {"inv_freq": change(rope.inv_freq, (0, 7)).numpy()}
    ((row,), _) = _compare_formulas(config, changed, fresh)
    assert row.oracle.worst == (0, 7)
    assert not row.passed


def test_a_wrong_formula_is_not_proven(tmp_path, monkeypatch):
    """Linear that divides by twice its factor, which eager and the oracle agree on."""
    right = Linear.compute_short_inv_freq
    monkeypatch.setattr(Linear, "compute_short_inv_freq", lambda self: right(self) / 2)
    check_refused(
        "nothing was written: inv_freq[0, 3] is 0.0296379905, the formula of rope type 'linear' "
        "gives 0.0592759803",
        lambda: export(make_rope("linear"), tmp_path / "b", max_seq_len=ROWS, formats=("onnx",)),
        tmp_path,
    )


def test_a_wrong_attention_factor_is_not_proven(tmp_path, monkeypatch):
    monkeypatch.setattr(Longrope, "compute_attention_factor", lambda self, length=None: 1.5)
    check_refused(
        "the export is not equal to eager, nothing was written: tables.cos_cache by ",
        lambda: export(make_rope("longrope"), tmp_path / "b", max_seq_len=ROWS, formats=("onnx",)),
        tmp_path,
    )


def test_a_changed_buffer_is_refused(tmp_path):
    rope = make_rope("yarn")
    rope.inv_freq[0, 3] *= 1.001
    check_refused(
        "nothing was written: inv_freq[0, 3] is 0.0445014425, the formula of rope type 'yarn' "
        "gives 0.0444569853",
        lambda: export(rope, tmp_path / "b", max_seq_len=ROWS, formats=("onnx",)),
        tmp_path,
    )
    rope.inv_freq = torch.ones(1, 3)
    check_refused(
        "inv_freq must have shape (n, 8), got (1, 3)",
        lambda: export(rope, tmp_path / "b", max_seq_len=ROWS, formats=("onnx",)),
        tmp_path,
    )


def test_a_state_that_the_arguments_do_not_describe_is_listed(tmp_path):
    plain = RotaryEmbedding(8, use_xpos=True, max_seq_len=ROWS)
    plain.scale[2] = 0.5
    bundle = export(plain, tmp_path / "b", formats=("onnx",))
    for report in (bundle.report, verify(bundle)):
        assert report.passed
        assert report.unverified == {
            "scale by its formula": (
                "a loaded state: scale[2] is 0.5, the formula of its arguments gives 0.642857143"
            )
        }


def test_the_own_buffer_is_exported(tmp_path):
    """One ulp beside the package's, as of another machine: it is stored, and proven again."""
    rope = make_rope("linear")
    rope.inv_freq[0, 3] = torch.nextafter(rope.inv_freq[0, 3], torch.tensor(1.0))
    bundle = export(rope.to(torch.bfloat16), tmp_path / "b", max_seq_len=ROWS, formats=("onnx",))
    for report in (bundle.report, verify(bundle)):
        assert report.passed
        row = report.rows[0]
        assert (row.graph, row.output, row.runtime) == ("tables", "inv_freq", "formula")
        assert row.case.startswith(f"inv_freq[0, 3] is {rope.inv_freq[0, 3].item():.9g}, ")


@pytest.mark.parametrize("rows", [None, 16, 20, 100])
def test_the_frequencies_of_other_lengths_are_added(rows):
    """A module with fewer or more rows of inv_freq than the export needs."""
    rope = ScaledRotaryEmbedding(make_rope("dynamic").rope_parameters, rows)
    config = check_config(rope, max_seq_len=ROWS)
    rope.inv_freq[-1] *= 2
    got = config.rope.collect_buffers(rope, ROWS)["inv_freq"]
    fresh = config.rope.make_buffers(ROWS)["inv_freq"]
    assert got.shape == fresh.shape
    own = len(rope.inv_freq)
    assert torch.equal(got[own:], fresh[own:])
    assert torch.equal(got[:own], rope.inv_freq[: len(fresh)])


# ---- whole models


def find_rotary(model):
    return model.model.rotary_emb


LENGTH_DEPENDENT = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + i for i in range(8)],
            "long_factor": [2.0 + 3 * i for i in range(8)],
            "original_max_position_embeddings": 32,
        },
    ),
}


def test_a_changed_model_is_refused(tmp_path):
    model = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        find_rotary(model).inv_freq[1] *= 1.0001
    check_refused(
        "nothing was written: model.rotary_emb.inv_freq[1] is 0.316259384, the formula of rope "
        "type 'default', which its config names, gives 0.316227766",
        lambda: export_model(model, make_inputs(model), tmp_path / "b", formats=["onnx"]),
        tmp_path,
    )


TWO_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {"llama": {}, "gemma3_text": TWO_LAYERS, "phi": {}, "esm": {}}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_every_buffer_of_a_model_is_compared(family, dtype):
    rows, unverified = compare_frequencies(make_model(family, **MODELS[family]).to(dtype))
    assert unverified == {}
    assert all(row.passed for row in rows)
    names = {row.output.rpartition(".")[2] for row in rows}
    if family == "gemma3_text":
        layers = TWO_LAYERS["layer_types"]
        assert names == {f"{n}{kind}inv_freq" for n in layers for kind in ("_", "_original_")}
    else:
        assert names == {"inv_freq"} | ({"original_inv_freq"} if family != "esm" else set())


def test_layers_share_a_row():
    """The one of the worst layer, whose text names it."""
    config = make_model("llama").config
    right = 10000.0 ** (-torch.arange(8) / 8)
    layers = [Around(value, config) for value in (right, right * 1.01, right * 1.001)]
    (row,), unverified = compare_frequencies(nn.ModuleDict({"layers": nn.ModuleList(layers)}))
    assert unverified == {}
    assert row.output == "layers.*.rotary.inv_freq"
    assert row.case.startswith("layers.1.rotary.inv_freq[")
    assert not row.passed


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_what_a_model_keeps_of_a_long_input_is_accepted(name):
    family, rope = LENGTH_DEPENDENT[name]
    sizes = {"original_max_position_embeddings": 32} if name == "longrope" else {}
    model = make_model(family, rope_parameters=rope, **sizes)
    module = find_rotary(model)
    fresh = module.inv_freq.clone()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 80, dtype=torch.int64))
    assert not torch.equal(module.inv_freq, fresh)
    rows, unverified = compare_frequencies(model)
    assert {row.passed for row in rows} == {True}
    assert {row.output for row in rows} == {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }
    assert unverified == {}
    module.original_inv_freq.copy_(module.inv_freq)
    rows, _ = compare_frequencies(model)
    assert [row.passed for row in rows] == [row.output.endswith("b.inv_freq") for row in rows]


class Around(nn.Module):
    """A module with a buffer of frequencies, and perhaps a config."""

    def __init__(self, inv_freq, config=None, own=True):
        super().__init__()
        self.rotary = nn.Module()
        self.rotary.inv_freq = nn.Buffer(inv_freq)
        if config is not None:
            (self.rotary if own else self).config = config


class Broken:
    model_type = "llama"

    def __getattr__(self, name):
        raise RuntimeError("not this one")


def test_what_can_not_be_compared_is_listed():
    config = make_model("llama").config
    cases = {
        "its rope can't be read: no module around it has a config": Around(torch.ones(8)),
        "its rope can't be read: not this one": Around(torch.ones(8), Broken()),
        "it has 7 values, its config names 8": Around(torch.ones(7), config),
        "it has shape (2, 8), on cpu": Around(torch.ones(2, 8), config),
        "it has shape (8,), on meta": Around(torch.ones(8, device="meta"), config),
        "its module may not follow the nearest config: rotary.inv_freq[7] is 1, the formula": (
            Around(torch.ones(8), config, own=False)
        ),
    }
    for reason, model in cases.items():
        rows, unverified = compare_frequencies(model)
        assert rows == []
        assert list(unverified) == ["rotary.inv_freq"]
        assert unverified["rotary.inv_freq"].startswith(reason), unverified
    rows, unverified = compare_frequencies(Around(torch.ones(8), config))
    assert [row.passed for row in rows] == [False]
    assert compare_frequencies(nn.Linear(2, 2)) == ([], {})
