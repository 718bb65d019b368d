"""Complex tables that a model moves before its rotary function, in every format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rotary_export import RotaryExportError, export_model, load

FREQUENCIES = 0.5 ** torch.arange(4)
ANGLES = torch.arange(48)[:, None] * FREQUENCIES


def apply_rotary_complex(x, turns):
    """Turn x, (B, S, H), by complex numbers (S, H/2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Model(nn.Module):
    """A layer, and a rotation by what a function makes of a complex table."""

    def __init__(self, move, persistent=False):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)
        self.register_buffer("table", torch.polar(torch.ones_like(ANGLES), ANGLES), persistent)
        self.move = move

    def forward(self, x, position_ids):
        return apply_rotary_complex(self.project(x), self.move(self.table, position_ids[0]))


def make_inputs(batch, length):
    ids = (torch.arange(length) + 2).expand(batch, -1).contiguous()
    return {"x": torch.randn(batch, length, 8), "position_ids": ids}


def axial(table, ids):
    """Half of the channels by the row, half by the column, as image models do."""
    first, second = table.split(2, dim=-1)
    return torch.cat((first[ids // 4], second[ids % 4]), -1)


MOVES = {
    "index": lambda table, ids: table[ids],
    "axial": axial,
    "expanded": lambda table, ids: table[ids, None].expand(-1, 2, -1)[:, -1],
    "rolled": lambda table, ids: table.roll(1, -1)[ids].roll(-1, -1),
    "computed": lambda table, ids: torch.exp(1j * torch.outer(ids, FREQUENCIES)),
    "scaled": lambda table, ids: (table[ids] * 2 / 4 + table[ids] / 2).conj().resolve_conj(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_moved_table(tmp_path, move):
    model = Model(move).eval()
    bundle = export_model(model, make_inputs(2, 6), tmp_path / "b")
    assert bundle.manifest.graphs["model"].rotary_nodes == 1
    other = make_inputs(3, 11)
    with torch.no_grad():
        want = model(**other)
    sessions = [
        load(bundle, "model"),
        load(bundle, "model", use_op_library=False),
        load(bundle, "model", runtime="torchscript", allow_code=True),
        load(bundle, "model", runtime="program", allow_code=True),
    ]
    for session in sessions:
        got = torch.as_tensor(session(**other)["output"])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


class Counted(nn.Module):
    """Gathers from a table by its own count: the table has an end."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.polar(torch.ones_like(ANGLES), ANGLES))

    def forward(self, x):
        return apply_rotary_complex(x, self.table[torch.arange(x.shape[1])])


def test_tables_are_compared_up_to_their_end(tmp_path):
    bundle = export_model(Counted(), {"x": torch.randn(2, 6, 8)}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 48}
    far = {row.case for row in bundle.report.rows if row.case.startswith("positions up to")}
    assert far == {"positions up to 47"}


class FromPosition(Counted):
    """Slices its table at a position that is an input, as decoders of Meta do."""

    def forward(self, x, start):
        return apply_rotary_complex(x, self.table[start : start + x.shape[1]])


def test_a_slice_at_a_position_that_is_an_input(tmp_path):
    """Longer inputs than the table has rows are refused by the model, and are no case."""
    inputs = {"x": torch.randn(2, 6, 8), "start": torch.tensor(3)}
    bundle = export_model(FromPosition(), inputs, tmp_path / "b", formats=["onnx"])
    other = {"x": torch.randn(3, 11, 8), "start": torch.tensor(37)}
    got = torch.as_tensor(load(bundle, "model")(**other)["output"])
    torch.testing.assert_close(got, FromPosition()(**other), rtol=0, atol=1e-5)


class Inline(nn.Module):
    """Complex numbers without a function; the heads of its attention are joined by a view."""

    def forward(self, x):
        turns = torch.polar(torch.ones_like(ANGLES), ANGLES)[: x.shape[1]]
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * turns
        turned = torch.view_as_real(pairs).flatten(-2)
        attended = nn.functional.scaled_dot_product_attention(turned, turned, heads)
        return attended.transpose(1, 2).flatten(2)


def test_an_inline_rotation_in_front_of_a_view(tmp_path):
    bundle = export_model(Inline(), {"x": torch.randn(2, 6, 16)}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].rotary_nodes == 1
    x = torch.randn(3, 11, 16)
    for options in ({}, {"use_op_library": False}):
        got = torch.as_tensor(load(bundle, "model", **options)(x=x)["output"])
        torch.testing.assert_close(got, Inline()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("formats", [["onnx"], ["torchscript", "program"]])
def test_a_complex_input_is_refused(tmp_path, formats):
    inputs = {"x": torch.randn(2, 6, 8), "turns": torch.polar(torch.ones(6, 4), ANGLES[:6])}

    class Given(nn.Module):
        def forward(self, x, turns):
            return apply_rotary_complex(x, turns)

    with pytest.raises(RotaryExportError, match=r"input turns is complex.* torch.view_as_real"):
        export_model(Given(), inputs, tmp_path / "b", formats=formats)
