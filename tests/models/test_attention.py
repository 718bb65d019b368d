"""Attention in every form that torch broadcasts, as ONNX, at sizes that were not traced."""

import pytest
import torch
from helpers.traced_onnx import Function, count, run, trace, write
from torch.nn.functional import scaled_dot_product_attention

from rotary_export.models.trace.adapt.adapt_program import adapt_program

H = 8
# Sizes by name: traced, and others.
TRACED = {"b": 2, "s": 5, "t": 7, "g": 3}
OTHERS = ({"b": 3, "s": 4, "t": 11, "g": 2}, {"b": 1, "s": 1, "t": 1, "g": 1})


def make(dims, sizes, kind="float"):
    shape = [sizes.get(dim, dim) for dim in dims]
    if kind == "bool":
        mask = torch.rand(shape) < 0.6
        mask[..., :1] = True
        return mask
    return torch.randn(shape)


def check(function, dims, kinds, opset=23):
    """Compare the ONNX model with torch at other sizes; return it."""

    def make_all(sizes):
        return [make(each, sizes, kind) for each, kind in zip(dims, kinds, strict=True)]

    program = adapt_program(trace(Function(function), make_all(TRACED), dims), opset)
    model = write(program, opset)
    for sizes in OTHERS:
        tensors = make_all(sizes)
        (got,) = run(model, tensors)
        want = function(*tensors)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    return model


# By the axes of the mask: whether it must be expanded.
MASKS = {
    ("b", 1, 1, "t"): True,
    ("b", 4, 1, "t"): True,
    (1, 1, 1, "t"): True,
    ("b", 1, "s", 1): True,
    (1, "t"): True,
    (1, 1, "t"): True,
    (1, 1, 1, 1): True,
    ("b", 1, "s", "t"): False,
    ("b", 4, "s", "t"): False,
    (1, 4, "s", "t"): False,
    (1, 1, "s", "t"): False,
    (4, "s", "t"): False,
    ("s", "t"): False,
}


@pytest.mark.parametrize("mask", MASKS, ids=lambda dims: "-".join(map(str, dims)))
def test_a_mask_is_expanded_where_onnx_runtime_does_not_broadcast_it(mask):
    kind = "float" if 1 in mask[1:] else "bool"
    query, key = ("b", 4, "s", H), ("b", 4, "t", H)
    model = check(scaled_dot_product_attention, [query, key, key, mask], ["float"] * 3 + [kind])
    assert count(model, "Attention") == 1
    assert (count(model, "Expand") > 0) == MASKS[mask]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("opset", [18, 23, 25])
def test_a_mask_at_other_opsets(opset, kind):
    dims = [("b", 4, "s", H), ("b", 4, "t", H), ("b", 4, "t", H), ("b", 1, 1, "t")]
    check(scaled_dot_product_attention, dims, ["float"] * 3 + [kind], opset)


def attend_grouped(query, key, value, mask=None):
    return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


Q = ("b", 4, "s", H)
# query, key, value, and whether groups are asked for.
HEADS = {
    "one-head-for-all": (Q, ("b", 1, "t", H), ("b", 1, "t", H), False),
    "one-key-many-values": (Q, ("b", 1, "t", H), ("b", 4, "t", H), False),
    "many-keys-one-value": (Q, ("b", 4, "t", H), ("b", 1, "t", H), False),
    "one-query-many-keys": (("b", 1, "s", H), ("b", 4, "t", H), ("b", 4, "t", H), False),
    "groups": (Q, ("b", 2, "t", H), ("b", 2, "t", H), True),
    "one-group": (Q, ("b", 1, "t", H), ("b", 1, "t", H), True),
    "groups-of-one": (Q, ("b", 4, "t", H), ("b", 4, "t", H), True),
    "other-groups-of-values": (Q, ("b", 2, "t", H), ("b", 4, "t", H), True),
    "one-batch-row": (Q, (1, 4, "t", H), (1, 4, "t", H), False),
    "one-query-row": ((1, 4, "s", H), ("b", 4, "t", H), ("b", 4, "t", H), False),
    "another-width": (Q, ("b", 4, "t", H), ("b", 4, "t", 6), False),
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_heads_and_rows_that_are_shared(case, opset):
    *dims, grouped = case
    function = attend_grouped if grouped else scaled_dot_product_attention
    model = check(function, [*dims, ("b", 1, 1, "t")], ["float"] * 3 + ["bool"], opset)
    assert count(model, "Attention") == (opset >= 23)


# Leading axes of query, key and value; of the mask.
RANKS = {
    "two": ((), (1,)),
    "three": (("b",), ("b", 1)),
    "three-heads": ((4,), (4, "s")),
    "five": (("g", "b", 4), ("g", "b", 1, "s")),
    "five-few": (("g", "b", 4), ("b", 1, 1)),
    "five-one": (("g", "b", 4), (1, "b", 4, 1)),
    "six": ((2, "g", "b", 4), (1, 1, 1, 1, "s")),
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("case", RANKS.values(), ids=RANKS)
def test_tensors_of_other_ranks(case, opset):
    leading, mask = case
    query, key = (*leading, "s", H), (*leading, "t", H)
    dims = [query, key, key, (*mask, "t")]
    check(scaled_dot_product_attention, dims, ["float"] * len(dims), opset)


def test_a_causal_call_with_a_scale_stays_as_it_is():
    def attend(query, key, value):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)

    model = check(attend, [Q, ("b", 4, "t", H), ("b", 4, "t", H)], ["float"] * 3)
    assert count(model, "Expand") == 0


def test_a_mask_in_front_of_a_cache():
    """Past and new tokens: the mask's keys are a sum of sizes."""

    def attend(query, past, mask):
        key = torch.cat((past, query), 2)
        return scaled_dot_product_attention(query, key, key, mask[:, None, None].bool())

    sizes = {"b": 2, "s": 3, "p": 5, "p + s": 8}
    dims = [("b", 2, "s", H), ("b", 2, "p", H), ("b", "p + s")]
    module = Function(attend)
    tensors = [make(each, sizes) for each in dims[:2]] + [torch.ones(2, 8)]
    model = write(adapt_program(trace(module, tensors, dims), 23))
    for b, s, p in ((3, 1, 9), (1, 4, 0)):
        mask = (torch.arange(p + s) < p + s - torch.arange(b)[:, None]).float()
        tensors = [torch.randn(b, 2, s, H), torch.randn(b, 2, p, H), mask]
        torch.testing.assert_close(run(model, tensors)[0], attend(*tensors), rtol=0, atol=1e-5)


def test_the_program_itself_is_not_changed():
    dims = [("b", 4, "s", H), ("b", 1, "s", H)]

    def attend(query, key):
        return scaled_dot_product_attention(query, key, key)

    program = trace(Function(attend), [make(each, TRACED) for each in dims], dims)
    before = str(program.graph)
    assert adapt_program(program, 23) is not program
    assert str(program.graph) == before


def test_a_number_minus_an_integer_tensor():
    """torch.onnx itself fails there; masks are often computed so."""
    dims = [("b", "s")]
    function = Function(lambda mask: (1.0 - mask) * -1e4)
    program = trace(function, [torch.ones(2, 5, dtype=torch.int64)], dims)
    model = write(adapt_program(program, 23))
    mask = torch.randint(0, 2, (3, 7))
    assert torch.equal(run(model, [mask])[0], (1.0 - mask) * -1e4)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_smallest_float64_stays_finite(opset):
    def hide(x, mask):
        return (x * 0.5).masked_fill(mask == 0.0, torch.finfo(torch.float64).min).softmax(-1)

    x, mask = torch.randn(3, 5, dtype=torch.float64), torch.ones(3, 5)
    mask[0], mask[1, 2:] = 0.0, 0.0
    dims = [("b", "s"), ("b", "s")]
    model = write(adapt_program(trace(Function(hide), [x[:2], mask[:2]], dims), opset), opset)
    (got,) = run(model, [x, mask])
    torch.testing.assert_close(got, hide(x, mask), rtol=0, atol=1e-12)
