"""Rotated tensors of any number of dimensions, wider results, and factors after the rotation."""

import pytest
import torch
from helpers import rotary_styles as styles
from torch import nn
from torch.utils import _pytree as pytree

from rotary_export.models.find.axes import derive_axes, flatten_table, from_op, to_op
from rotary_export.models.find.calls import RecordedCall
from rotary_export.models.find.candidates import Candidate
from rotary_export.models.find.lowering import compute_tables, rotate_call, rotate_slots
from rotary_export.models.find.probe import NotReplacedError, find_lowering
from rotary_export.models.find.redirect import OwnFunction, Place
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import find_replacement

H = 16


def record(function, *args):
    leaves, tree = pytree.tree_flatten((args, {}, {}))
    own = OwnFunction(function, function, {})
    output, output_tree = pytree.tree_flatten(function(*args))
    return RecordedCall(
        Candidate("it", Place(function, None)), own, leaves, tree, output, output_tree
    )


def find_and_compare(function, *args):
    """Find the lowering of a call, and compare it with the function; return it."""
    call = record(function, *args)
    lowering = find_lowering(call)
    tables = compute_tables(call.own, call.leaves, call.tree, lowering)
    xs = [call.leaves[slot.source] for slot in lowering.slots]
    for y, slot in zip(
        rotate_call(xs, tables, lowering, rotate_slots), lowering.slots, strict=True
    ):
        want = call.output[slot.result]
        assert y.dtype == want.dtype
        rounding = 4 * torch.finfo(want.dtype).eps
        torch.testing.assert_close(y, want, rtol=rounding, atol=rounding * float(want.abs().max()))
    return lowering


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def angles_of(*sizes, half=H // 2):
    """Angles (*sizes, H) of positions that differ along each axis, tiled for halves."""
    position = sum(
        (3**axis * torch.arange(size)).reshape(-1, *[1] * (len(sizes) - axis - 1))
        for axis, size in enumerate(sizes)
    )
    angles = position[..., None] * 0.3 ** torch.arange(half)
    return torch.cat((angles, angles), -1)


def turn(x, angles):
    """Rotate halves by angles that broadcast with x."""
    return x * angles.cos() + styles.half_turn(x) * angles.sin()


def turn_leading(x, angles):
    """Rotate leading channels; the others are joined as they are."""
    width = angles.shape[-1]
    return torch.cat((turn(x[..., :width], angles), x[..., width:]), -1)


SMALL = angles_of(3, 4, 5, half=3)
VIDEO = angles_of(3, 4, 5)  # frames, rows, columns
MANY_AXES = {
    "video without heads": (turn, rand(2, 3, 4, 5, H), VIDEO, "BSSSH"),
    "video of part of the channels": (turn_leading, rand(2, 3, 4, 5, H), SMALL, "BSSSH"),
    "video, heads first": (turn, rand(2, 6, 3, 4, 5, H), VIDEO, "BNSSSH"),
    "video, heads last": (turn, rand(2, 3, 4, 5, 6, H), VIDEO[..., None, :], "BSSSNH"),
    "frames, heads between": (turn, rand(2, 3, 6, 4, H), angles_of(3, 4)[:, None], "BSNSH"),
    "image without heads": (turn, rand(2, 4, 5, H), angles_of(4, 5), "BSSH"),
    "image without a batch": (turn, rand(4, 5, H), angles_of(4, 5), "BSH"),
    "tokens alone": (turn, rand(7, H), angles_of(7), "SH"),
    "sequence first": (turn, rand(7, 2, 6, H), angles_of(7)[:, None, None], "SBNH"),
    "sequence first, part": (
        turn_leading, rand(7, 2, 6, H), angles_of(7, half=3)[:, None, None], "SBNH"
    ),
    "rows differ": (turn, rand(2, 3, 4, 6, H), angles_of(2, 3, 4)[..., None, :], "SSSBH"),
    "angles of each head": (turn, rand(2, 6, 7, H), angles_of(6, 7), "BSSH"),
    "many axes": (turn, rand(2, 3, 2, 2, 5, H), angles_of(5), "BNNNSH"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANY_AXES.values(), ids=MANY_AXES.keys())
def test_tensors_of_any_number_of_dimensions(case):
    function, x, angles, axes = case
    assert find_and_compare(function, x, angles).axes == axes


def split_and(turn_heads, heads):
    """Return a function that splits the last dimension in heads, turns them, and merges them."""

    def split(x, *tables):
        return turn_heads(x.unflatten(-1, (heads, -1)), *tables).flatten(-2)

    return split


def turn_both(q, k, angles):
    """Rotate query and key, which split their heads inside."""
    return split_and(turn, 6)(q, angles), split_and(turn, 6)(k, angles)


def turn_with_factor(x, angles):
    """Rotate halves, the second ones of twice the length."""
    return turn(x, angles) * torch.tensor([1.0, 2.0]).repeat_interleave(H // 2)


PACKED = 6 * H
HEADS_INSIDE = {
    "after the sequence": (
        split_and(turn, 6), rand(2, 7, PACKED), angles_of(7)[:, None],
        "half, channels 0 to 16, BS(NH)"
    ),
    "sequence first": (
        split_and(turn, 6), rand(7, 2, PACKED), angles_of(7)[:, None, None],
        "half, channels 0 to 16, SB(NH)"
    ),
    "a part of each head": (
        split_and(turn_leading, 6), rand(2, 7, PACKED),
        angles_of(7, half=3)[:, None].expand(2, 7, 6, 6),
        "half, channels 0 to 6, BS(NH)",
    ),
    "frames and rows": (
        split_and(turn, 6), rand(2, 3, 4, PACKED), angles_of(3, 4)[:, :, None],
        "half, channels 0 to 16, BSS(NH)"
    ),
    "times a factor": (
        split_and(turn_with_factor, 6), rand(2, 7, PACKED), angles_of(7)[:, None],
        "half, channels 0 to 16, BS(NH), times a factor of each channel",
    ),
    "rows differ": (
        split_and(turn, 6), rand(2, 7, PACKED), angles_of(2, 7)[:, :, None],
        "half, channels 0 to 16, BS(NH)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS_INSIDE.values(), ids=HEADS_INSIDE.keys())
def test_heads_that_the_function_splits(case):
    function, x, angles, found = case
    assert str(find_and_compare(function, x, angles)) == found


def test_query_and_key_that_split_their_heads_are_one_node():
    found = find_and_compare(
        turn_both, rand(2, 7, PACKED), rand(2, 7, PACKED), angles_of(7)[:, None]
    )
    assert (found.axes, found.head_dim, found.joined) == ("BSNH", H, True)


def test_heads_that_turn_unlike_are_not_split():
    angles = angles_of(7)[:, None] * torch.tensor([1, 1, 1, 1, 1, 2.0])[:, None]
    with pytest.raises(NotReplacedError, match="in no layout"):
        find_lowering(record(split_and(turn, 6), rand(2, 7, PACKED), angles))


def test_query_and_key_of_other_heads_are_one_node():
    def turn_both(q, k, angles):
        return turn(q, angles), turn(k, angles)

    found = find_and_compare(turn_both, rand(2, 6, 3, 4, H), rand(2, 2, 3, 4, H), angles_of(3, 4))
    assert (found.axes, found.joined) == ("BNSSH", True)


@pytest.mark.parametrize(
    "axes", ["BSSSH", "BNSSH", "BSSNH", "SBNH", "BSNSH", "SH", "SSNH", "BNNSH"]
)
def test_dimensions_come_back(axes):
    sizes = [2, 3, 4, 5, 6][: len(axes) - 1]
    x = torch.arange(1.0, 1.0 + 8 * torch.tensor(sizes).prod()).reshape(*sizes, 8)
    assert torch.equal(from_op(to_op(x, axes), x, axes), x)
    table = flatten_table(x, axes)
    rows = [size for name, size in zip(axes, sizes, strict=False) if name == "S"]
    assert table.shape == (
        2 if axes[0] == "B" else table.shape[0],
        int(torch.tensor(rows).prod()),
        8,
    )


def test_dimensions_are_named_by_where_the_rotation_differs():
    assert derive_axes([False, True, True]) == "BSSH"
    assert derive_axes([False, False, True, False]) == "BNSNH"
    assert derive_axes([True, False]) == "SBH"


HALF = rand(2, 6, 7, H).half()
TABLES = angles_of(7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_result_as_wide_as_the_tables(dtype):
    x, angles = HALF.to(dtype), TABLES.double() if dtype == torch.float32 else TABLES
    found = find_and_compare(turn, x, angles)
    assert [slot.promoted for slot in found.slots] == [True]
    assert (
        not find_and_compare(lambda x, angles: turn(x, angles).to(x.dtype), x, angles)
        .slots[0]
        .promoted
    )


class Promotes(nn.Module):
    def forward(self, x, angles):
        return apply_rotary(x, angles).to(x.dtype)


def apply_rotary(x, angles):
    return turn(x, angles)


def test_a_wider_result_is_rounded_where_the_model_does():
    model = Promotes()
    found = find_replacement(model, lambda: model(HALF, TABLES))
    assert found.fused == 1
    want = model(HALF, TABLES)
    with replace_calls(found) as counts:
        assert torch.equal(model(HALF, TABLES), want)
    assert sum(counts.values()) == 1
    with replace_calls(found, check=True):
        assert torch.equal(model(HALF, TABLES), want)


def test_a_wider_result_under_autocast():
    model = Promotes()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(HALF.bfloat16(), TABLES)

    found = find_replacement(model, run)
    assert found.fused == 1
    want = run()
    with replace_calls(found):
        assert torch.equal(run(), want)


PAIRS = TABLES[:, : H // 2].repeat_interleave(2, -1)
SCALE = 1.1 ** torch.linspace(-3, 3, 7 * H).reshape(7, H)  # differs everywhere


def turn_pairs(x, angles):
    return x * angles.cos() + styles.pair_turn(x) * angles.sin()


def deinterleave(x, angles):
    turned = turn_pairs(x, angles)
    return torch.cat((turned[..., 0::2], turned[..., 1::2]), -1)


FACTORS = {
    "interleaved": (lambda x, angles, f: turn_pairs(x, angles) * f, HALF.float(), PAIRS, SCALE),
    "half": (lambda x, angles, f: turn(x, angles) * f, HALF.float(), TABLES, SCALE),
    "deinterleaved": (lambda x, angles, f: deinterleave(x, angles) * f, HALF.float(), PAIRS, SCALE),
    "divided": (lambda x, angles, f: turn(x, angles) / f, HALF.float(), TABLES, SCALE),
    "negative": (lambda x, angles, f: turn(x, angles) * f, HALF.float(), TABLES, SCALE - 1.03),
    "all channels, some rotated": (
        lambda x, angles, f: turn_leading(x, angles) * f, HALF.float(), angles_of(7, half=3), SCALE
    ),
    "once per channel": (lambda x, angles, f: turn(x, angles) * f, HALF.float(), TABLES, SCALE[0]),
    "half precision": (lambda x, angles, f: (turn(x, angles) * f).to(x.dtype), HALF, TABLES, SCALE),
    "wider result": (lambda x, angles, f: turn(x, angles) * f, HALF, TABLES, SCALE),
    "video": (lambda x, angles, f: turn(x, angles) * f, rand(2, 3, 4, 5, H), VIDEO, SCALE[:5]),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS.keys())
def test_a_factor_of_each_channel_after_the_rotation(case):
    found = find_and_compare(*case)
    assert found.has_factor
    assert str(found).endswith(", times a factor of each channel")


def test_query_and_key_with_factors_of_their_own():
    def turn_both(q, k, angles, scale):
        return turn_pairs(q, angles) * scale, turn_pairs(k, angles) / scale

    found = find_and_compare(turn_both, HALF.float(), HALF.float() + 1, PAIRS, SCALE)
    assert (found.has_factor, found.joined) == (True, False)


def test_an_equal_factor_in_a_pair_is_part_of_the_tables():
    tiled = torch.cat((SCALE[:, : H // 2],) * 2, -1)
    found = find_and_compare(lambda x, angles, f: turn(x, angles) * f, HALF.float(), TABLES, tiled)
    assert not found.has_factor


NO_ROTATIONS = {
    "a factor alone": (lambda x, f: x * f, HALF.float(), SCALE),
    "a factor of pairs alone": (lambda x, f: x * f, HALF.float(), SCALE[:, :8].repeat(1, 2)),
    "the same turn everywhere": (lambda x, f: turn(x, TABLES[3]) * f, HALF.float(), SCALE[0]),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_ROTATIONS.values(), ids=NO_ROTATIONS.keys())
def test_a_factor_without_a_rotary_embedding(case):
    assert find_lowering(record(*case)) is None


def test_a_factor_of_zero_is_not_replaced():
    with pytest.raises(NotReplacedError, match="in no layout does the op equal it"):
        find_lowering(record(lambda x, f: turn(x, TABLES) * f, HALF.float(), SCALE * (SCALE > 0.9)))
