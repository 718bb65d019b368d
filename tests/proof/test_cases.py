"""The inputs that a model is proven with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_model

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.proof.models.cases import Case, CaseSpec, make_case
from rotary_export.proof.models.input_values import (
    InputValues,
    choose_values,
    find_offsets,
    find_tables,
    read_input_values,
    write_input_values,
)
from rotary_export.types import name_dtype

INFOS = [
    TensorInfo("input_ids", "int64", ("batch_size", "seq_len")),
    TensorInfo("past_key_values.0.key", "float32", ("batch_size", 2, "past_seq_len", 16)),
    TensorInfo("past_key_values.0.value", "float32", ("batch_size", 2, "past_seq_len", 16)),
]
SOURCES = {
    "input_ids": InputValues("ids", (0, 95)),
    "past_key_values.0.key": InputValues("past", spread=(3.0, 0.1)),
    "past_key_values.0.value": InputValues("past"),
}
SIZES = {"batch_size": 2, "seq_len": 3, "past_seq_len": 5}
ANGLES = torch.arange(5)[:, None] * 0.5 ** torch.arange(4)


def test_a_past_is_what_the_model_keeps():
    from transformers import DynamicCache

    model = make_model("llama", num_hidden_layers=1)
    prompts = []

    def run(tensors):
        ids, *past = tensors
        assert [tensor.shape for tensor in past] == [(2, 2, 0, 16)] * 2
        prompts.append(ids)
        with torch.no_grad():
            (layer,) = model(ids, past_key_values=DynamicCache()).past_key_values.layers
        return {"present.0.key": layer.keys, "present.0.value": layer.values}

    case = make_case(INFOS, SOURCES, CaseSpec(SIZES), run)
    (prompt,) = prompts
    assert prompt.shape == (2, 5)
    assert not torch.equal(prompt[:, :3], case.tensors[0])
    kept = run([prompt, *torch.zeros(2, 2, 2, 0, 16)]).values()
    assert all(torch.equal(*pair) for pair in zip(case.tensors[1:], kept, strict=True))


def test_values_have_the_spread_of_the_example():
    case = make_case(INFOS, SOURCES, CaseSpec(SIZES))
    keys = case.tensors[1].numpy()
    assert abs(keys.mean() - 3.0) < 0.1
    assert 0.05 < np.std(keys) < 0.2


def test_another_seed_is_another_draw():
    first, second = (make_case(INFOS, SOURCES, CaseSpec(SIZES, seed=s)).tensors for s in (1, 2))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], make_case(INFOS, SOURCES, CaseSpec(SIZES, seed=1)).tensors[0])


def choose(name, value, dims=(), total=()):
    value = torch.as_tensor(value)
    return choose_values(name, value, dims, None, name in find_tables({name: value}), total)


def test_the_infinity_of_a_mask_is_no_spread():
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -3.4e38)
    assert choose("bias", mask).spread == (0.0, 1.0)


@pytest.mark.parametrize("name", ["cos", "sin", "freqs", "image_rotary_emb.0", "rope_tables"])
def test_tables_are_the_rows_of_the_example(name):
    tables = torch.randn(5, 4)
    source = choose(name, tables, ("seq_len", 4))
    assert source.role == "rows"
    assert torch.equal(source.repeat_rows((3, 4)), tables[:3])
    assert torch.equal(source.repeat_rows((12, 4))[5:10], tables)


COS, SIN = ANGLES.cos(), ANGLES.sin()
BY_VALUE = {
    "two": ({"a": COS, "x": torch.ones(5, 4), "b": SIN}, {"a", "b"}),
    "half": ({"a.0": COS.half(), "a.1": SIN.half()}, {"a.0", "a.1"}),
    "bfloat16": ({"a.0": COS.bfloat16(), "a.1": SIN.bfloat16()}, {"a.0", "a.1"}),
    "joined": ({"a": torch.cat((SIN, COS), -1)}, {"a"}),
    "pairs": ({"a": torch.stack((COS, SIN), -1)}, {"a"}),
    "stacked": ({"a": torch.stack((COS, SIN))}, {"a"}),
    "cosines-alone": ({"a": COS, "b": COS}, set()),
    "random": ({"a": torch.randn(5, 4), "b": torch.randn(5, 4)}, set()),
    "other-sizes": ({"a": COS, "b": SIN[:4]}, set()),
    "one-row": ({"a": COS[0], "b": SIN[0]}, set()),
    "none": ({"a": COS[:0], "b": SIN[:0], "c": torch.ones(3)}, set()),
}


@pytest.mark.parametrize("case", BY_VALUE)
def test_tables_are_found_by_their_values(case):
    tensors, tables = BY_VALUE[case]
    assert find_tables(tensors) == tables


@pytest.mark.parametrize("name", ["hidden_states", "using", "single"])
def test_other_floats_are_random(name):
    assert choose(name, torch.randn(5, 4), ("seq_len", 4)).role == "values"


def test_integers_that_are_no_ids_are_repeated():
    source = choose("lengths", [8, 7, 5], ("batch_size",))
    assert source.repeat_rows((5,)).tolist() == [8, 7, 5, 8, 7]
    assert choose("position_ids", [0, 1, 2, 0], ("total",)).role == "rows"
    assert choose("position_ids", [[0, 1, 2, 0]], (1, "seq_len")).role == "position_ids"


def test_offsets_rise_to_the_number_of_tokens():
    """At every size, none empty where there are enough tokens."""
    infos = [
        TensorInfo("x", "float32", ("total", 3)),
        TensorInfo("cu_seqlens", "int32", ("num_sequences + 1",)),
    ]
    example = {"x": torch.randn(9, 3), "cu_seqlens": torch.tensor([0, 4, 9])}
    offsets = find_offsets(example, {info.name: info.shape for info in infos})
    assert offsets == {"cu_seqlens": ["total"]}
    source = choose("cu_seqlens", [0, 4, 9], ("num_sequences + 1",), total=["total"])
    sources = {"x": InputValues("values"), "cu_seqlens": source}
    for total, count in ((1, 1), (9, 2), (30, 7), (3, 3), (2, 5), (3000, 1)):
        spec = CaseSpec({"total": total, "num_sequences": count}, seed=total)
        _, made = make_case(infos, sources, spec).tensors
        assert (made[0], made[-1], len(made)) == (0, total, count + 1)
        assert made.dtype == torch.int32
        empty = int((made.diff() == 0).sum())
        assert empty == max(0, count - total)
        assert made.diff().min() >= 0


X = torch.randn(2, 6, 3)
OFFSETS = {
    "rows": ("cu_seqlens", [0, 2, 6], {"x": X[0]}, [6]),
    "of one row": ("cu_seqlens", [0, 4, 6], {"x": X[:1]}, [6]),
    "of all rows": ("indptr", [0, 6, 12], {"x": X}, [2, 6]),
    "by value alone": ("where", [0, 4, 6], {"x": X[0]}, [6]),
    "counted, by name": ("cu_seqlens_q", [0, 1, 2, 3, 4, 5, 6], {"x": X[0]}, [6]),
    "counted": ("where", [0, 1, 2, 3, 4, 5, 6], {"x": X[0]}, None),
    "positions": ("position_ids", [0, 4, 6], {"x": X[0]}, None),
    "lengths": ("lengths", [4, 6], {"x": X[0]}, None),
    "falls": ("cu_seqlens", [0, 4, 3, 6], {"x": X[0]}, None),
    "ends elsewhere": ("cu_seqlens", [0, 4, 5], {"x": X[0]}, None),
    "floats": ("cu_seqlens", [0.0, 4.0, 6.0], {"x": X[0]}, None),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_offsets_are_found_by_their_values(case):
    name, value, others, total = OFFSETS[case]
    tensors = {**others, name: torch.tensor(value)}
    found = find_offsets(tensors, {key: tuple(each.shape) for key, each in tensors.items()})
    assert found.get(name) == total


def test_offsets_of_fixed_sizes_are_the_example_s():
    assert choose("cu_seqlens", [0, 4, 9], (3,), total=[9]).role == "rows"


@pytest.mark.parametrize(
    ("name", "value", "role"),
    [
        ("pos", [[0, 1, 2], [4, 5, 6]], "position_ids"),
        ("input_pos", [[0, 0, 1]], "position_ids"),
        ("pos", [[0, 3, 1]], "ids"),
        ("pos", [[0.0, 1.0, 2.0]], "ids"),
        ("tokens", [[0, 1, 2]], "ids"),
        ("pos_weight", [[0, 1, 2]], "ids"),
    ],
)
def test_positions_by_other_names_count(name, value, role):
    assert choose(name, value, ("batch_size", "seq_len")).role == role


def test_a_manifest_contains_few_rows():
    source = choose("cos", torch.randn(100, 3), ("seq_len", 3))
    assert len(source.value) == 16
    rows = write_input_values({"cos": source, "ids": InputValues("ids", (2, 9))})
    assert read_input_values(rows) == {"cos": source, "ids": InputValues("ids", (2, 9))}


MASKED = [
    TensorInfo("mask", "int64", ("batch_size", "past_seq_len + seq_len")),
    TensorInfo("position_ids", "int64", ("batch_size", "seq_len")),
]


def make_masked(role="position_ids", **spec):
    sources = {"mask": InputValues("mask"), "position_ids": InputValues(role)}
    return make_case(MASKED, sources, CaseSpec({"batch_size": 2, "seq_len": 4} | SHORT, **spec))


SHORT = {"past_seq_len": 0}


def test_padding_at_either_side():
    left, right = (make_masked(padding=side) for side in ("left", "right"))
    assert left.tensors[0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert right.tensors[0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert left.tensors[1].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert torch.equal(left.keep, left.tensors[0].bool())
    assert torch.equal(right.keep, right.tensors[0].bool())


def test_counted_positions_are_never_moved():
    assert make_masked(offset=9, stagger=True).tensors[1][1].tolist() == [10, 11, 12, 13]
    counted = make_masked("counted", offset=9, stagger=True)
    assert counted.tensors[1].tolist() == [[0, 1, 2, 3]] * 2


def test_positions_with_a_jump():
    assert make_masked(jump=True).tensors[1].tolist() == [[0, 1, 5, 6], [0, 1, 7, 8]]


def test_positions_of_an_image():
    """As many columns as keep it nearly square, from where each row begins."""
    info = TensorInfo("position_ids", "int64", (3, "batch_size", "seq_len"))
    source = choose("position_ids", torch.ones(3, 2, 4, dtype=torch.int64), info.shape)
    assert source.has_axes
    spec = CaseSpec({"batch_size": 2, "seq_len": 4, "past_seq_len": 5}, grid=True, stagger=True)
    assert spec.name.endswith("position_ids of an image")
    case = make_case([info], {"position_ids": source}, spec)
    assert case.tensors[0].tolist() == [
        [[5, 5, 5, 5], [6, 6, 6, 6]],
        [[5, 5, 5, 6], [6, 6, 6, 7]],
        [[5, 6, 7, 5], [6, 7, 8, 6]],
    ]


def test_padding_of_an_encoder_leaves_every_row_of_its_decoder():
    infos = [
        TensorInfo("input_ids", "int64", ("batch_size", "seq_len")),
        TensorInfo("encoder_attention_mask", "int64", ("batch_size", "encoder_seq_len")),
    ]
    sources = {"input_ids": InputValues("ids"), "encoder_attention_mask": InputValues("mask")}
    sizes = {"batch_size": 2, "seq_len": 3, "encoder_seq_len": 4}
    case = make_case(infos, sources, CaseSpec(sizes, padding="right"))
    assert case.tensors[1].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert case.keep is None


def test_padded_rows_are_not_compared_and_places_are_real():
    case = make_masked(padding="left")
    outputs = np.ones((2, 4, 3), np.float32)
    assert case.select(outputs)[..., 0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert case.locate((1, 2, 0), ("batch_size", "seq_len", 3)) == "batch row 1, position 2"


def test_a_sample_of_a_long_output_is_compared():
    spec = CaseSpec({"batch_size": 1, "seq_len": 1000, "past_seq_len": 5})
    case = Case(spec.name, (), None, spec)
    values = torch.arange(1000.0)[None, :, None].expand(1, 1000, 2)
    total = torch.arange(1005.0)[None, None, :, None]
    read = case.read_outputs({"y": values, "present": total, "other": torch.ones(3)})
    assert {name: value.shape for name, value in read.items()} == {
        "y": (1, 64, 2),
        "present": (1, 1, 64, 1),
        "other": (3,),
    }
    assert read["y"][0, [0, -1], 0].tolist() == [0, 999]
    dims = ("batch_size", 2, "past_seq_len + seq_len", 1)
    place = case.locate((0, 0, 40, 0), dims)
    assert place == f"batch row 0, position {int(read['present'][0, 0, 40, 0])}"


SQUARE = TensorInfo("attention_mask", "float32", ("batch_size", 1, "seq_len", "seq_len"))


def make_square(example, padding=""):
    source = choose("attention_mask", example, SQUARE.shape)
    assert source.role == "square_mask"
    info = replace(SQUARE, dtype=str(example.dtype).removeprefix("torch."))
    spec = CaseSpec({"batch_size": 2, "seq_len": 4}, padding=padding)
    return make_case([info], {"attention_mask": source}, spec)


SEEN = torch.ones(1, 1, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("example", "seen", "hidden"),
    [
        (SEEN.tril(), True, False),
        (~SEEN.tril(), False, True),
        (SEEN.tril().long(), 1, 0),
        (torch.zeros(SEEN.shape).masked_fill(~SEEN.tril(), -9e9), 0.0, -3.4028234663852886e38),
    ],
    ids=["seen", "hidden", "numbers", "added"],
)
def test_a_square_mask_is_causal_as_its_example(example, seen, hidden):
    mask = make_square(example).tensors[0]
    rows = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(mask, torch.where(rows, seen, hidden).to(mask.dtype).expand(2, 1, 4, 4))


ONE_ROW = torch.tensor([[[[1, 1, 0]]], [[[1, 0, 0]]], [[[1, 1, 0]]]])


@pytest.mark.parametrize(
    ("example", "seen", "hidden"),
    [(ONE_ROW.bool(), True, False), (~ONE_ROW.bool(), False, True), (ONE_ROW, 1, 0)],
    ids=["seen", "hidden", "numbers"],
)
def test_a_mask_of_one_row_hides_padding(example, seen, hidden):
    info = TensorInfo("mask", name_dtype(example.dtype), ("batch_size", 1, 1, "seq_len"))
    source = choose("mask", example, info.shape)
    assert source.role == "square_mask"
    spec = CaseSpec({"batch_size": 2, "seq_len": 4}, padding="left")
    mask = make_case([info], {"mask": source}, spec).tensors[0]
    assert mask[:, 0, 0].tolist() == [[hidden, seen, seen, seen], [hidden, hidden, seen, seen]]


def test_a_square_mask_hides_padding():
    case = make_square(SEEN, "right")
    assert case.keep.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2]
    assert case.tensors[0][0, 0].tolist() == [[True] * 3 + [False]] * 3 + [[True] * 4]
    assert make_square(SEEN).tensors[0].all()


WHOLE = {
    "coordinates": ("img_ids", [[0.0, 2.0], [1.0, 0.0]], (0, 2)),
    "zeros-of-coordinates": ("txt_ids", [[0.0, 0.0]], (0, 0)),
    "flags": ("visible", [[1.0, 0.0]], (0, 1)),
    "fractions": ("img_ids", [[0.0, 0.5]], None),
    "a-placeholder": ("hidden_states", [[1.0, 1.0]], None),
    "infinity": ("bias", [[0.0, -np.inf]], None),
}


@pytest.mark.parametrize("case", WHOLE)
def test_floats_that_are_whole_numbers_stay_so(case):
    name, value, limits = WHOLE[case]
    source = choose(name, value, (1, "n"))
    assert (source.role, source.limits) == (("ids", limits) if limits else ("values", (0, 0)))
