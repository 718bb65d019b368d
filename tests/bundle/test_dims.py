"""Names of sizes, their sums and multiples."""

import pytest

from rotary_export.bundle.dims import compute_dim, list_names, read_terms, solve_dim

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
