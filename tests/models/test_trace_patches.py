"""What is replaced while a model is traced, and the lengths that its configs contain."""

import types

import pytest
import torch
from torch import nn

from rotary_export.models.configs import find_last_position, find_length_thresholds
from rotary_export.models.trace.trace_patches import patch_for_tracing


class RotaryTable(nn.Module):
    """Has a cache, as in rotary-embedding-torch, and measures a tensor by `len`."""

    def __init__(self):
        super().__init__()
        self.cache_if_possible = True

    def forward(self, x):
        return len(x)


class Spaced(nn.Module):
    """Numbers that depend on a size, which a trace would make constant."""

    def forward(self, x):
        steps = x.shape[1]
        return torch.linspace(-1, 2, steps) * max(1.0, steps / 8) + min(steps / 3, 2.0, 9)


def test_spaces_and_maxima_follow_the_size():
    kept = torch.linspace, max, min
    example, dims = (torch.ones(2, 7),), ({1: torch.export.Dim.AUTO},)
    with patch_for_tracing(Spaced()):
        program = torch.export.export(Spaced(), example, dynamic_shapes=dims).module()
        assert (max(3, 4.5), min([2, 1]), max((), default=5)) == (4.5, 1, 5)
    assert (torch.linspace, max, min) == kept
    for steps in (2, 3, 8, 9, 100):
        x = torch.ones(2, steps)
        torch.testing.assert_close(program(x), Spaced()(x), rtol=0, atol=2e-6)


def test_caches_are_off_and_lengths_are_sizes():
    model = nn.Sequential(RotaryTable())

    def run_and_fail():
        with patch_for_tracing(model):
            assert model[0].cache_if_possible is False
            assert globals()["len"] is not len_of_python
            assert model(torch.ones(3, 2)) == 3
            assert len([1, 2]) == 2
            raise RuntimeError("stop")

    len_of_python = len
    with pytest.raises(RuntimeError, match="stop"):
        run_and_fail()
    assert model[0].cache_if_possible is True
    assert "len" not in globals()


def test_len_of_a_tensor_can_be_traced():
    with patch_for_tracing(model := nn.Sequential(RotaryTable())):
        program = torch.export.export(
            model, (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
    assert program.module()(torch.ones(5, 2)) == 5


def test_experts_are_batched():
    model = nn.Identity()
    model.config = types.SimpleNamespace(_experts_implementation_internal="grouped_mm")
    with patch_for_tracing(model):
        assert model.config._experts_implementation_internal == "batched_mm"
    assert model.config._experts_implementation_internal == "grouped_mm"


def make_model(**fields):
    model = nn.Identity()
    model.config = types.SimpleNamespace(**fields)
    return model


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LENGTHS = {
    "none": ({}, [], None),
    "positions": ({"max_position_embeddings": 64}, [], 64),
    "n_positions": ({"n_positions": 32, "max_position_embeddings": 64}, [], 32),
    "plain rope": (
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}},
        [],
        64,
    ),
    "longrope": ({"max_position_embeddings": 64, "rope_parameters": LONGROPE}, [16], 64),
    "dynamic": ({"max_position_embeddings": 64, "rope_scaling": DYNAMIC}, [64], 64),
    "old key": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic"}},
        [64],
        64,
    ),
    "by layer type": (
        {"max_position_embeddings": 64, "rope_parameters": {"full": LONGROPE, "local": DYNAMIC}},
        [16, 64],
        64,
    ),
    "not a number": ({"max_position_embeddings": "many"}, [], None),
}


@pytest.mark.parametrize("case", LENGTHS.values(), ids=LENGTHS)
def test_lengths_of_a_config(case):
    fields, thresholds, last = case
    model = make_model(**fields)
    assert find_length_thresholds(model) == thresholds
    assert find_last_position(model) == last


def test_a_config_inside_another_counts():
    inner = types.SimpleNamespace(max_position_embeddings=24, rope_parameters=DYNAMIC)
    assert find_length_thresholds(make_model(text_config=inner)) == [24]


def test_a_config_of_a_submodule_counts():
    assert find_last_position(nn.Sequential(make_model(n_positions=9))) == 9
