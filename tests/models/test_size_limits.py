"""Conditions on sizes become limits, sizes to verify, or refusals."""

import numpy as np
import pytest

from rotary_export.bundle.dims import TOTAL
from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.models.trace.guards import Condition
from rotary_export.models.trace.size_limits import (
    OtherBranchError,
    SizeConstraints,
    find_size_constraints,
)
from rotary_export.runtime.session import check_session_inputs


def find(*conditions, **max_run_size):
    """Find the limits of functions of s (seq_len) and b (batch_size), and the sizes to verify."""
    names = {"s": "seq_len", "b": "batch_size", "p": "past_seq_len"}
    made = [
        Condition(tuple(names[v] for v in f.__code__.co_varnames), f, f"it, line {line}")
        for line, f in enumerate(conditions)
    ]
    constraints = find_size_constraints(made, max_run_size)
    return constraints.max_size, constraints.sizes_to_verify


def at(*sizes):
    return [{"seq_len": size} for size in sizes]


CONDITIONS = {
    "always": ([lambda s: s >= 2], {}, []),
    "up-to": ([lambda s: s <= 40], {"seq_len": 40}, []),
    "up-to-far": ([lambda s: s <= 50000], {"seq_len": 50000}, []),
    "the-smaller-limit": ([lambda s: s <= 40, lambda s: s < 30], {"seq_len": 29}, []),
    "but-at-one": ([lambda s: s != 37], {}, at(37)),
    "but-at-multiples": ([lambda s: s % 256 > 0], {}, at(256, 512)),
    "but-at-many": ([lambda s: s % 4 > 0], {}, at(4, 8, 128)),
    "multiples-in-limits": (
        [lambda s: s % 256 > 0, lambda s: s <= 300],
        {"seq_len": 300},
        at(256),
    ),
    "but-at-many-up-to": ([lambda s: s <= 64, lambda s: s % 4 > 0], {"seq_len": 64}, at(4, 8, 64)),
    "but-in-a-range": ([lambda s: s // 10 != 3], {}, at(30, 39)),
    "from-the-middle": ([lambda s: s >= 30], {}, at(2, 29)),
    "too-long-to-verify": ([lambda s: (s + 255) // 256 != 8], {"seq_len": 1792}, []),
    "no-power-of-two": ([lambda s: s % 3000 > 0], {"seq_len": 2999}, []),
    "two-sizes": ([lambda s: s != 37, lambda b: b != 2], {}, [*at(37), {"batch_size": 2}]),
    "of-both": (
        [lambda b, s: b * s <= 100],
        {},
        [{"batch_size": 2, "seq_len": 51}, {"batch_size": 8, "seq_len": 64}],
    ),
    "of-both-in-limits": ([lambda b, s: b * s < 100, lambda s: s <= 2, lambda b: b < 9],
                          {"seq_len": 2, "batch_size": 8}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CONDITIONS.values(), ids=CONDITIONS)
def test_limits_and_sizes_to_verify(case):
    conditions, limits, sizes = case
    assert find(*conditions) == (limits, sizes)


def test_no_size_is_larger_than_the_model_accepts():
    assert find(lambda s: s != 37, seq_len=36) == ({"seq_len": 36}, [])
    assert find(lambda s: s != 37, seq_len=37) == ({}, at(37))
    _, sizes = find(lambda p, s: p + s < 30, **{TOTAL: 34})
    assert all(30 <= each["past_seq_len"] + each["seq_len"] <= 34 for each in sizes)
    assert sizes


def test_what_fails_only_at_large_sizes_is_unverified():
    condition = Condition(("batch_size", "seq_len"), lambda b, s: b * s < 10**6, "b * s < 10**6")
    constraints = find_size_constraints([condition], {})
    assert (constraints.sizes_to_verify, constraints.unverified) == ([], ["b * s < 10**6"])


RARE = {"one": lambda s: s == 7, "a-third": lambda s: s % 3 == 1, "none": lambda s: s < 2}


@pytest.mark.parametrize("condition", RARE.values(), ids=RARE)
def test_a_condition_that_rarely_holds_is_refused(condition):
    words = r"the traced branch only where it, line 0; give seq_len a fixed size"
    with pytest.raises(RotaryExportError, match=words):
        find(condition)


def find_branch(condition, example, traced):
    """Return where to trace instead, and the message."""
    made = Condition(("seq_len",), condition, "it, line 3")
    with pytest.raises(OtherBranchError) as caught:
        find_size_constraints([made], {}, None, None, {"seq_len": example}, {"seq_len": traced})
    return caught.value.sizes, str(caught.value)


def test_a_branch_of_few_sizes_is_traced_elsewhere():
    assert find_branch(lambda s: s % 4 == 0, 8, 8)[0] == {"seq_len": 9}
    assert find_branch(lambda s: s == 7, 16, 7)[0] == {"seq_len": 8}
    assert find_branch(lambda s: s < 2, 1, 1)[0] == {"seq_len": 2}


def test_a_branch_that_excludes_the_example_is_traced_at_the_example():
    sizes, message = find_branch(lambda s: s <= 8, 16, 7)
    assert sizes == {"seq_len": 16}
    assert message == (
        "the model takes the traced branch only where it, line 3: that limits seq_len to 8, and "
        "the example has 16; give seq_len a fixed size with dynamic_shapes, or change the model "
        "there"
    )


def test_bounds_become_limits_only_when_tightened():
    maximum = Condition(("seq_len",), lambda s: s <= 31, "Eq(Max(1, s - 30), 1)", is_guard=False)
    constraints = find_size_constraints([maximum], {})
    assert constraints.max_size == {}
    assert constraints.bounds == {"seq_len": (31, maximum.text)}
    assert constraints.sizes_to_verify == at(32, 128, 1024)
    assert not constraints.tighten({"seq_len": 32})
    assert constraints.tighten({"seq_len": 31})
    assert constraints.max_size == {"seq_len": 31}
    assert constraints.mismatched == [maximum.text]
    assert (constraints.sizes_to_verify, constraints.conditions) == ([], [])
    assert not constraints.tighten({})


def test_a_branch_of_small_sizes_becomes_a_limit_where_it_differs():
    branch = Condition(("seq_len",), lambda s: s > 8, "seq_len > 8, at file:3")
    constraints = find_size_constraints([branch], {}, example={"seq_len": 12})
    assert (constraints.max_size, constraints.min_size) == ({}, {})
    assert constraints.lower_bounds == {"seq_len": (9, branch.text)}
    assert constraints.sizes_to_verify == at(2, 8)
    assert not constraints.tighten({"seq_len": 12}, {"seq_len": 9})
    assert not constraints.tighten({"seq_len": 8}, {"seq_len": 8})
    assert constraints.tighten({"seq_len": 12}, {"seq_len": 8})
    assert constraints.min_size == {"seq_len": 9}
    assert constraints.reasons == {"seq_len >= 9": branch.text}
    assert (constraints.sizes_to_verify, constraints.conditions) == ([], [])
    assert not constraints.tighten({"seq_len": 12}, {"seq_len": 8})


def test_the_reason_is_that_of_the_lowest_limit():
    constraints = SizeConstraints()
    for size, condition in ((31, "a"), (40, "b"), (8, "c")):
        constraints.limit("seq_len", size, condition)
    assert constraints.reasons == {"seq_len <= 8": "c"}


def test_tightening_keeps_the_sizes_up_to_the_bound():
    constraints = SizeConstraints(bounds={"seq_len": (31, "b")})
    constraints.add("a", at(31))
    constraints.add("b", at(31, 32))
    assert constraints.tighten({})
    assert constraints.sizes_to_verify == at(31)
    assert constraints.conditions == ["a"]


def test_a_limit_is_the_largest_legal_size():
    info = TensorInfo("x", "float32", ("batch_size", "seq_len"))
    graph = GraphInfo((info,), (), {}, max_size={"seq_len": 8})
    sizes = check_session_inputs("model", graph, {"x": np.zeros((9, 8), np.float32)})
    assert sizes == {"batch_size": 9, "seq_len": 8}
    with pytest.raises(RotaryExportError, match="seq_len must be <= 8, got 9"):
        check_session_inputs("model", graph, {"x": np.zeros((9, 9), np.float32)})
