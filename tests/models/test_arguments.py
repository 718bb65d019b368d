"""A model's arguments and results as named tensors, with names for dynamic sizes."""

import pytest
import torch
from helpers.tiny_models import make_cache
from torch import nn

from rotary_export.bundle.dims import is_past
from rotary_export.errors import RotaryExportError
from rotary_export.models.arguments import FlatModel, find_extra_arguments, read_arguments
from rotary_export.models.convert import convert_model
from rotary_export.models.dim_names import name_dims, read_sizes

CACHE_NAMES = [f"past_key_values.{n}.{kv}" for n in (0, 1) for kv in ("key", "value")]


def make_keys(past=5):
    return [torch.full((2, 4, past, 8), float(n)) for n in range(4)]


class Nested(nn.Module):
    def forward(self, x, pair, factor, past_key_values=None, use_cache=True):
        result = {"sum": x + pair[0] + pair[1]["b"], "x": x * factor, "states": (x, [x, None])}
        if past_key_values is not None:
            result["past_key_values"] = past_key_values
        return result


def test_nested_arguments_and_results_have_names():
    a, b = torch.ones(3), torch.full((3,), 2.0)
    arguments, tensors = read_arguments({"x": a, "pair": (a, {"b": b, "c": 7}), "factor": 3})
    assert list(tensors) == ["x", "pair.0", "pair.1.b"]
    flat = FlatModel(Nested(), arguments, {})
    got = flat.run_named([a, a * 10, b])
    assert list(got) == ["sum", "output.x", "states.0", "states.1.0"]
    assert got["sum"].tolist() == [13.0] * 3
    assert got["output.x"].tolist() == [3.0] * 3
    assert [value.tolist() for value in flat(a, a * 10, b)] == [v.tolist() for v in got.values()]


def test_a_cache_is_named_as_optimum_names_it():
    keys = make_keys()
    inputs = {"x": torch.ones(3), "past_key_values": make_cache(keys)}
    arguments, tensors = read_arguments(inputs)
    assert list(tensors) == ["x", *CACHE_NAMES]
    assert all(map(is_past, CACHE_NAMES))
    assert [tensors[name][0, 0, 0, 0].item() for name in CACHE_NAMES] == [0, 1, 2, 3]
    rebuilt = arguments[1].rebuild(keys)
    assert rebuilt.get_seq_length() == 5
    assert [layer.values[0, 0, 0, 0].item() for layer in rebuilt.layers] == [1, 3]


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_is_a_result_only_if_it_is_an_argument(given):
    model = Nested()
    model.forward = lambda past_key_values=None: {"past_key_values": make_cache(make_keys())}
    arguments, _ = read_arguments({"past_key_values": make_cache(make_keys())})
    flat = FlatModel(model, arguments if given else [], {})
    names = [f"present.{n}.{kv}" for n in (0, 1) for kv in ("key", "value")]
    assert list(flat.run_named(make_keys())) == (names if given else [])


def test_an_export_adds_no_cache():
    x = torch.ones(3)
    assert find_extra_arguments(Nested(), {"x": x}) == {"use_cache": False}
    assert find_extra_arguments(Nested(), {"past_key_values": x}) == {"use_cache": True}
    assert find_extra_arguments(Nested(), {"use_cache": True}) == {}


NAMES = {
    "past_key_values.0.key": True,
    "past_key_values.11.value": True,
    "past.0.key": False,
    "past_key_values.0.0": False,
    "past_key_values.0.keys": False,
    "my_past_key_values.0.key": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_cached_tensors(name):
    assert is_past(name) == NAMES[name]


AUTO = {
    "input_ids": (torch.ones(2, 6, dtype=torch.int64), ("batch_size", "seq_len")),
    "attention_mask": (
        torch.ones(2, 11, dtype=torch.int64),
        ("batch_size", "past_seq_len + seq_len"),
    ),
    "position_ids": (torch.ones(1, 6, dtype=torch.int64), (1, "seq_len")),
    "cache_position": (torch.arange(6), ("seq_len",)),
    "features": (torch.ones(2, 6, 4), ("batch_size", "seq_len", 4)),
    "pixel_values": (torch.ones(2, 3, 4), ("batch_size", 3, 4)),
    "decoder_input_ids": (torch.ones(2, 3, dtype=torch.int64), ("batch_size", "decoder_seq_len")),
    "table": (torch.ones(7, 4), (7, 4)),
    "past_key_values.0.key": (torch.ones(2, 4, 5, 8), ("batch_size", 4, "past_seq_len", 8)),
}


def test_dynamic_sizes_are_named():
    tensors = {name: value for name, (value, _) in AUTO.items()}
    named = name_dims(tensors, "auto").dims
    assert named == {name: dims for name, (_, dims) in AUTO.items()}
    sizes = {"batch_size": 2, "seq_len": 6, "past_seq_len": 5, "decoder_seq_len": 3}
    assert read_sizes(tensors, named) == sizes


def test_three_axes_of_positions():
    tensors = {"x": torch.ones(2, 6, 4), "position_ids": torch.ones(3, 2, 6, dtype=torch.int64)}
    assert name_dims(tensors, "auto").dims["position_ids"] == (3, "batch_size", "seq_len")


def test_sizes_that_are_not_named_are_fixed():
    tensors = {"x": torch.ones(2, 6), "y": torch.ones(2)}
    assert name_dims(tensors, None).dims == {"x": (2, 6), "y": (2,)}
    assert name_dims(tensors, {"x": {1: "n"}}).dims == {"x": (2, "n"), "y": (2,)}


def test_a_copy_of_another_type_keeps_the_frequencies():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.inv_freq = nn.Buffer(torch.ones(4))

    model = nn.Sequential(nn.Linear(2, 2), Rotary())
    cache = make_cache(make_keys())
    inputs = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "past": cache}
    copy, converted = convert_model(model, inputs, torch.float16)
    assert copy is not model
    assert (copy[0].weight.dtype, model[0].weight.dtype) == (torch.float16, torch.float32)
    assert copy[1].inv_freq.dtype == torch.float32
    assert (converted["x"].dtype, converted["ids"].dtype) == (torch.float16, torch.int64)
    assert converted["past"].layers[1].keys.dtype == torch.float16
    assert cache.layers[1].keys.dtype == torch.float32
    assert convert_model(model, inputs, torch.float32)[0] is model


def test_a_model_that_cannot_be_copied_is_an_error():
    model = nn.Linear(2, 2)
    model.kept = (n for n in range(3))
    with pytest.raises(RotaryExportError, match=r"Linear can't be copied as torch.float16: TypeE"):
        convert_model(model, {}, torch.float16)


class Tables(nn.Module):
    """A rotary module whose tables have the type of its frequencies."""

    def __init__(self):
        super().__init__()
        self.inv_freq = nn.Buffer(0.1 ** torch.arange(4.0))

    def forward(self, length):
        return (torch.arange(length)[:, None] * self.inv_freq).cos()


class Attention(nn.Module):
    """Needs a query of the type of its weights."""

    def __init__(self):
        super().__init__()
        self.rotary_tables, self.last = RotaryTables(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(x * self.rotary_tables(x.shape[0]))


class RotaryTables(Tables):
    pass


def test_tables_are_rounded_where_the_model_needs_it():
    model, x = Attention().eval(), torch.randn(300, 4)
    copy, inputs = convert_model(model, {"x": x}, torch.float16)
    assert copy(**inputs).dtype == torch.float16
    assert copy.rotary_tables.inv_freq.dtype == torch.float32
    assert torch.equal(copy.rotary_tables(300), model.rotary_tables(300).half())
    assert model.rotary_tables(300).dtype == torch.float32


def test_tables_stay_float32_where_the_model_accepts_them():
    model = Attention().eval()
    model.last = nn.Identity()
    model.weight = nn.Parameter(torch.ones(2))
    copy, inputs = convert_model(model, {"x": torch.randn(3, 4)}, torch.float16)
    assert copy(**inputs).dtype == torch.float32


def test_a_model_that_runs_in_its_own_type_only_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[0].register_forward_hook(lambda module, args, output: output + torch.ones(4))
    message = "runs on its example inputs in its own type, but not as torch.float16: RuntimeError"
    with pytest.raises(RotaryExportError, match=f"Sequential {message}.*; make tensors that it"):
        convert_model(model, {"input": torch.ones(2, 4)}, torch.float16)


def test_a_complex_input_is_an_error():
    inputs = {"x": torch.ones(2), "turns": (torch.ones(2), torch.ones(2, dtype=torch.complex64))}
    with pytest.raises(RotaryExportError, match=r"input turns.1 is complex.* torch.view_as_real"):
        read_arguments(inputs)
