"""Names of sizes, their sums and multiples."""

import pytest

from rotary_export.bundle.dims import (
    bound_dim,
    compute_dim,
    is_encoder_past,
    is_past,
    is_present,
    list_names,
    read_bounded,
    read_terms,
    solve_dim,
    solve_sum,
)

TERMS = {
    "n": [(1, "n")],
    "past + n": [(1, "past"), (1, "n")],
    "8 * n": [(8, "n")],
    "4 * n + past + 3": [(4, "n"), (1, "past"), (3, "")],
    "output.1": [(1, "output.1")],
}


@pytest.mark.parametrize("dim", TERMS)
def test_terms(dim):
    assert read_terms(dim) == TERMS[dim]


def test_names_each_once():
    assert list_names(("b", 3, "8 * n + past", "n", "2 + n")) == ["b", "n", "past"]


def test_a_size_is_the_sum_of_its_terms():
    assert compute_dim("4 * n + past + 3", {"n": 5, "past": 2}) == 25
    with pytest.raises(KeyError):
        compute_dim("n + m", {"n": 1})


def test_a_name_follows_from_a_size():
    assert solve_dim("8 * n", 24) == ("n", 3)
    assert solve_dim("8 * n", 25) is None
    assert solve_dim("8 * n + 1", 25) == ("n", 3)
    assert solve_dim("8 * n + 1", 0) is None
    assert solve_dim("n + m", 3) is None
    assert solve_dim("n", 0) == ("n", 0)


def test_a_bounded_size():
    dim = bound_dim("past", 7)
    assert dim == "min(past, 7)"
    assert read_bounded(dim) == ("past", 7)
    assert read_bounded("past + n") is None
    assert list_names([dim, "past + n"]) == ["past", "n"]
    assert [compute_dim(dim, {"past": past}) for past in (0, 6, 7, 8)] == [0, 6, 7, 7]
    assert solve_dim(dim, 6) == ("past", 6)
    assert solve_dim(dim, 7) is None  # 7 or more


def test_the_unknown_term_of_a_sum():
    sizes = {"n": 3}
    assert solve_sum("past + n", 10, sizes)
    assert sizes == {"n": 3, "past": 7}
    assert solve_sum("past + n", 10, sizes)
    assert not solve_sum("past + n", 9, sizes)
    assert not solve_sum("past + n", 2, {"n": 3})
    assert not solve_sum("a + b", 2, {})
    assert not solve_sum("8 * a + n", 19, {"n": 3})
    assert solve_sum("min(past, 7)", 7, sizes)
    assert not solve_sum("min(past, 7)", 6, sizes)


def test_names_of_caches():
    own = ["past_key_values.0.key", "past_key_values.11.decoder.value"]
    encoder = "past_key_values.0.encoder.key"
    assert [is_past(name) for name in (*own, encoder)] == [True, True, False]
    assert [is_encoder_past(name) for name in (*own, encoder)] == [False, False, True]
    assert all(is_present(name.replace("past_key_values", "present")) for name in (*own, encoder))
    assert not is_past("past_key_values.0.other.key")
