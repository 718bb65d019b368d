"""The sizes of a model's inputs that may vary: names, multiples and limits."""

import pytest
import torch
from torch.export import Dim

from rotary_export.errors import RotaryExportError
from rotary_export.models.dim_names import NamedDims, name_dims, read_sizes
from rotary_export.models.trace.legal_sizes import LegalSize

N = Dim("n", min=3, max=9)


def name(*dims, shape=(2, 24)):
    tensors = {"x": torch.ones(shape)}
    named = name_dims(tensors, {"x": dict(enumerate(dims))})
    return named, read_sizes(tensors, named.dims)


GIVEN = {
    "names": (("b", "n"), ("b", "n"), {}, {}, {"b": 2, "n": 24}),
    "multiple": (("b", "8 * n"), ("b", "8 * n"), {}, {}, {"b": 2, "n": 3}),
    "torch": ((Dim("b"), 8 * N), ("b", "8 * n"), {"n": 3}, {"n": 9}, {"b": 2, "n": 3}),
    "torch-fixed": ((None, Dim.STATIC), (2, 24), {}, {}, {}),
    "torch-hint": ((Dim.AUTO, Dim.DYNAMIC(min=4)), ("batch_size", "x_1"), {"x_1": 4}, {}, None),
    "minimum": (({}, {"min": 9, "max": 64}), ("batch_size", "x_1"), {"x_1": 9}, {"x_1": 64}, None),
    "named": (
        (None, {"name": "w", "multiple": 8, "min": 10, "max": 39}),
        (2, "8 * w_div_8"),
        {"w_div_8": 2},
        {"w_div_8": 4},
        {"w_div_8": 3},
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_given_sizes(case):
    given, dims, smallest, largest, sizes = GIVEN[case]
    named, found = name(*given)
    assert named == NamedDims({"x": dims}, smallest, largest)
    assert sizes is None or found == sizes


def test_a_tuple_of_sizes_as_torch_export_has_it():
    tensors = {"x": torch.ones(2, 24)}
    assert name_dims(tensors, {"x": (None, N * 8)}).dims == {"x": (2, "8 * n")}


WRONG = {
    "no-multiple": ((None, "7 * n"), r"x must have a size 7 \* n, got \(2, 24\)"),
    "too-small": ((None, {"name": "n", "min": 25}), "limits n to 25 <= n, the example has 24"),
    "too-large": ((None, {"name": "n", "max": 23}), "limits n to 0 <= n <= 23, the example has 24"),
    "difference": ((None, Dim("n") - 1), "must be a name, a sum 'a \\+ b' or a multiple"),
    "number": (
        (None, 24),
        "must be a name, a sum .* or a dict of name, min, max, multiple, got 24",
    ),
    "unknown": (
        (None, {"least": 3}),
        "must be a dict of name, min, max, multiple: .* got {'least'",
    ),
    "zero": ((None, {"multiple": 0}), "a name and numbers >= 1, got {'multiple': 0}"),
    "two": (("n", "n"), r"x must have n=2, as the tensors before it, got shape \(2, 24\)"),
    "sum": ((None, "n + m"), "has a sum with 'n', which no dimension is alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sizes(case):
    given, message = WRONG[case]
    with pytest.raises(RotaryExportError, match=message):
        name(*given)


MASKS = {
    "square": ((2, 1, 6, 6), 0, ("batch_size", 1, "seq_len", "seq_len")),
    "cached": ((2, 1, 6, 11), 5, ("batch_size", 1, "seq_len", "past_seq_len + seq_len")),
    "three": ((2, 6, 6), 0, ("batch_size", "seq_len", "seq_len")),
    "two": ((6, 6), 0, ("seq_len", "seq_len")),
    "one-row": ((2, 1, 1, 6), 0, ("batch_size", 1, 1, "seq_len")),
    "one-row-cached": ((2, 1, 1, 11), 5, ("batch_size", 1, 1, "past_seq_len + seq_len")),
    "rows": ((2, 6), 0, ("batch_size", "seq_len")),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case):
    shape, past, dims = MASKS[case]
    tensors = {
        "input_ids": torch.ones(2, 6, dtype=torch.int64),
        "attention_mask": torch.ones(shape),
    }
    if past:
        tensors["past_key_values.0.key"] = torch.ones(2, 4, past, 8)
    assert name_dims(tensors, "auto").dims["attention_mask"] == dims


@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        ("attention_mask", torch.int64, "batch_size"),
        ("attention_mask", torch.bool, "batch_size"),
        ("padding_mask", torch.int64, "batch_size"),
        ("causal_mask", torch.bool, "seq_len"),
        ("causal_mask", torch.float32, "seq_len"),
    ],
)
def test_masks_of_as_many_rows_as_tokens(name, dtype, rows):
    tensors = {
        "input_ids": torch.ones(3, 3, dtype=torch.int64),
        name: torch.ones(3, 7, dtype=dtype),
        "past_key_values.0.key": torch.ones(3, 2, 4, 8),
    }
    assert name_dims(tensors, "auto").dims[name] == (rows, "past_seq_len + seq_len")


def test_what_an_encoder_made_does_not_grow():
    """Also where it is as long as the tokens."""
    tensors = {
        "input_ids": torch.ones(2, 3, dtype=torch.int64),
        "past_key_values.0.decoder.key": torch.ones(2, 4, 2, 8),
        "past_key_values.0.encoder.key": torch.ones(2, 4, 5, 8),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    assert name_dims(tensors, "auto").dims == {
        "input_ids": ("batch_size", "seq_len"),
        "past_key_values.0.decoder.key": ("batch_size", 4, "past_seq_len", 8),
        "past_key_values.0.encoder.key": ("batch_size", 4, "encoder_seq_len", 8),
        "encoder_attention_mask": ("batch_size", "encoder_seq_len"),
    }


def test_sequences_of_other_lengths_have_names_of_their_own():
    tensors = {
        "hidden_states": torch.ones(2, 6, 4),
        "encoder_hidden_states": torch.ones(2, 5, 8),
        "encoder_attention_mask": torch.ones(2, 1, 1, 5),
        "context": torch.ones(2, 9, 8),
        "image": torch.ones(2, 6, 8),
    }
    named = name_dims(tensors, "auto").dims
    assert [dims[-1 if "mask" in name else 1] for name, dims in named.items()] == [
        "seq_len",
        "encoder_seq_len",
        "encoder_seq_len",
        "context_seq_len",
        "seq_len",
    ]


@pytest.mark.parametrize("name", ["pos", "input_pos", "positions", "position_ids"])
def test_positions_that_all_rows_share(name):
    tensors = {"x": torch.ones(2, 6, 4), name: torch.arange(6)}
    assert name_dims(tensors, "auto").dims[name] == ("seq_len",)
    assert name_dims({"x": torch.ones(2, 6, 4), "lengths": torch.arange(6)}, "auto").dims[
        "lengths"
    ] == (6,)


TABLES = {
    "rows": ((6, 4), ("seq_len", 4)),
    "one-batch": ((1, 6, 4), (1, "seq_len", 4)),
    "batch": ((2, 6, 4), ("batch_size", "seq_len", 4)),
    "heads": ((2, 1, 6, 4), ("batch_size", 1, "seq_len", 4)),
    "other": ((5, 4), (5, 4)),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_cosines_and_sines(case):
    shape, dims = TABLES[case]
    angles = torch.rand(shape)
    tensors = {"x": torch.ones(2, 6, 8), "emb.0": angles.cos(), "emb.1": angles.sin()}
    named = name_dims(tensors, "auto").dims
    assert (named["emb.0"], named["emb.1"]) == (dims, dims)


def test_sizes_are_narrowed():
    named = NamedDims({"x": ("b", "n + past", 3), "y": ("n", "past")}, {"b": 2}, {"n": 50})
    narrowed = named.narrow({"n": LegalSize(16, 8), "past": LegalSize(5, 1)})
    assert narrowed == NamedDims(
        {"x": ("b", "8 * n_div_8 + past", 3), "y": ("8 * n_div_8", "past")},
        {"b": 2, "n_div_8": 2, "past": 5},
        {"n_div_8": 6},
    )
