"""The tables of a traced model's rotary nodes, compared with those of its ONNX file."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_inputs, make_model
from torch import nn

import rotary_export
from rotary_export.models.prove import prove as module
from rotary_export.models.trace.traced_rotary import TracedRotary, find_tables
from rotary_export.op.torch_op import rotary_embedding
from rotary_export.proof.models.far_tables import compare_far_tables, plan_far
from rotary_export.proof.models.input_values import InputValues
from rotary_export.proof.models.plan import Plan

MOVED = {"position_ids": InputValues("position_ids")}
TRACED = {"batch_size": 2, "seq_len": 7}


def list_far(sources=MOVED, **plan):
    return [spec.name for spec in plan_far(Plan(sources, TRACED, **plan))]


def test_far_places():
    assert list_far(longest=64, last=64) == ["batch_size 1, seq_len 4, position_ids + 60"]
    assert list_far(last=64, thresholds=[16]) == [
        f"batch_size 1, seq_len 4, position_ids + {place - 4}" for place in (16, 17, 64)
    ]
    ids = {"input_ids": InputValues("ids")}
    assert list_far(ids) == ["batch_size 1, seq_len 32768"]
    assert list_far(ids, last=10**6) == ["batch_size 1, seq_len 131072"]
    assert list_far(ids, max_size={"seq_len": 50}) == ["batch_size 1, seq_len 50"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Arguments that an export compares far tables with."""
    caught = []

    def compare(*arguments):
        caught.append(arguments)
        file, *rest = arguments
        copy = folder / "copy.onnx"
        copy.write_bytes(file.read_bytes())
        caught.append((copy, *rest))
        return compare_far_tables(*arguments)

    folder = tmp_path_factory.mktemp("far")
    model = make_model("llama", num_hidden_layers=2, max_position_embeddings=8192)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "compare_far_tables", compare)
        rotary_export.export_model(model, make_inputs(model), folder / "b", formats=("onnx",))
    return caught[-1]


def test_tables_agree(compared):
    rows, left_out = compare_far_tables(*compared)
    assert {row.output for row in rows} == {"cos_cache", "sin_cache"}
    assert all(row.passed and row.case == "positions up to 8191" for row in rows)
    assert left_out == {}


@pytest.mark.parametrize("name", ["cos_cache", "sin_cache"])
def test_one_frequency_of_one_node_shows(compared, name):
    *first, compute, plan = compared

    def compute_wrong(tensors):
        tables = [dict(each) for each in compute(tensors)]
        angles = torch.arange(8188, 8192) * 10000.0 ** -(2 * 2 / 16) * (1 + 1e-4)
        wrong = tables[1][name].clone()
        wrong[0, :, 2] = angles.cos() if name == "cos_cache" else angles.sin()
        tables[1][name] = wrong
        return tables

    rows, _ = compare_far_tables(*first, compute_wrong, plan)
    assert {row.output for row in rows if not row.passed} == {name}


def test_a_scale_is_read_from_its_own_argument():
    graph = torch.fx.Graph()
    x, cos, sin, ids, scale = (graph.placeholder(name) for name in ("x", "cos", "sin", "i", "s"))
    node = graph.call_function(torch.mul, (x, cos, sin, ids, None, scale))
    found = {"cos_cache": cos, "sin_cache": sin, "scale_cache": scale}
    assert find_tables(node) == found
    assert find_tables(graph.call_function(torch.mul, (x, cos, sin, ids))) == {
        name: found[name] for name in ("cos_cache", "sin_cache")
    }


class Turns(nn.Module):
    """Rotates x (B, S, H) by angles (S, R) of its own columns, flattened and split again."""

    def forward(self, x, columns):
        angles = (columns.view(-1) / 7).view(*columns.shape)
        return rotary_embedding(x, angles.cos()[None], angles.sin()[None], num_heads=1)[0]


def test_tensors_of_other_strides_are_computed():
    x, columns = torch.randn(1, 5, 8), torch.randn(5, 4)
    traced = TracedRotary(torch.export.export(Turns(), (x, columns)), ["x", "columns"])
    assert traced.has_nodes
    assert traced.inputs == {"columns"}
    turned = torch.randn(4, 5).T  # which no view flattens
    (tables,) = traced.compute_tables({"columns": turned})
    torch.testing.assert_close(tables["cos_cache"], (turned / 7).cos()[None])
