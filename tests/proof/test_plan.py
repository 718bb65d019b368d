"""Which cases a model is proven with."""

from __future__ import annotations

from rotary_export.proof.models.input_values import InputValues
from rotary_export.proof.models.plan import Plan, list_unreached, plan_cases

TRACED = {"batch_size": 2, "seq_len": 7}
MOVED = {"input_ids": InputValues("ids"), "position_ids": InputValues("position_ids")}


def list_names(sources=None, traced=TRACED, **plan):
    return [spec.name for spec in plan_cases(Plan(sources or MOVED, traced, **plan))]


def list_lengths(**plan):
    specs = plan_cases(Plan({"x": InputValues("values")}, TRACED, **plan))
    return sorted(spec.length for spec in specs)


def test_long_sequences_where_the_model_accepts_them():
    assert list_lengths()[-2:] == [1000, 3000]
    assert list_lengths(longest=2048, last=2048)[-2:] == [1000, 2048]
    assert list_lengths(longest=100, last=100)[-1] == 100
    assert list_lengths(max_size={"seq_len": 50})[-1] == 50


def test_one_more_token_after_a_long_prompt():
    traced = TRACED | {"past_seq_len": 5}
    assert "batch_size 1, seq_len 1, past_seq_len 999" in list_names(traced=traced)


def test_positions_are_moved_to_the_last_one():
    names = list_names(longest=8192, last=8192)
    assert "batch_size 3, seq_len 11, position_ids + 100" in names
    assert "batch_size 3, seq_len 11, position_ids + 8181" in names
    counted = {"position_ids": InputValues("counted")}
    assert not any("position_ids" in name for name in list_names(counted))


def test_positions_jump_where_there_is_a_mask():
    masked = MOVED | {"mask": InputValues("mask")}
    assert "batch_size 3, seq_len 11, position_ids with a jump" in list_names(masked)
    assert not any("jump" in name for name in list_names())


def test_positions_of_an_image_where_there_are_axes():
    axes = {"position_ids": InputValues("position_ids", value=3)}
    assert "batch_size 3, seq_len 13, position_ids of an image" in list_names(axes, quick=True)
    assert not any("image" in name for name in list_names())


def test_padding_at_both_sides():
    masked = {"mask": InputValues("mask")}
    assert sum("padded" in name for name in list_names(masked)) == 2


def test_a_quick_plan_has_no_far_or_long_case():
    names = list_names(longest=8192, last=8192, quick=True)
    assert len(names) == 4
    assert not any("+" in name or "1000" in name for name in names)


def test_what_the_model_may_refuse_is_optional():
    specs = plan_cases(Plan(MOVED, TRACED, longest=8192, last=8192))
    assert {spec.name for spec in specs if spec.optional} == {
        "batch_size 3, seq_len 11, position_ids + 100",
        "batch_size 3, seq_len 11, position_ids + 8181",
        "batch_size 1, seq_len 1000",
        "batch_size 1, seq_len 3000",
    }


def test_a_seed_draws_every_case_anew():
    first, second = (plan_cases(Plan(MOVED, TRACED, seed=seed)) for seed in (0, 1))
    assert [spec.name for spec in first] == [spec.name for spec in second]
    assert all(a.seed != b.seed for a, b in zip(first, second, strict=True))


def test_thresholds_that_no_case_reaches_are_listed():
    ids = {"x": InputValues("values")}
    fixed = Plan(ids, TRACED, thresholds=[32, 4096, 8192])
    assert [*list_unreached(fixed)] == ["lengths > 8192, where its angles change"]
    assert list_unreached(Plan(MOVED, TRACED, thresholds=[32, 8192])) == {}
    lengths = [spec.length for spec in plan_cases(fixed)]
    assert {32, 33, 37, 4096, 4097} < set(lengths)
    quick = Plan(ids, TRACED, thresholds=[32, 4096], quick=True)
    assert [*list_unreached(quick)] == ["lengths > 4096, where its angles change"]
    assert max(spec.length for spec in plan_cases(quick)) == 37


def test_no_size_is_smaller_than_it_may_be():
    specs = plan_cases(Plan(MOVED, TRACED, min_size={"seq_len": 6}))
    assert min(spec.length for spec in specs) == 6
    assert min(spec.sizes["batch_size"] for spec in specs) == 1


def test_no_two_cases_have_one_name():
    for traced in ({"rows": 4, "columns": 5}, TRACED, {"batch_size": 2, "rows": 3}):
        names = list_names(traced=traced)
        assert len(names) == len(set(names))
