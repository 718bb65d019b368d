"""The smallest size and the multiple that a model accepts."""

import pytest

from rotary_export.models.trace.legal_sizes import LegalSize, find_legal_sizes

LEGAL = {
    "all": (lambda n: n >= 1, None),
    "at-least": (lambda n: n >= 31, LegalSize(31, 1)),
    "multiple": (lambda n: n % 8 == 0, LegalSize(8, 8)),
    "both": (lambda n: n % 8 == 0 and n >= 40, LegalSize(40, 8)),
    "odd-multiple": (lambda n: n % 3 == 0, LegalSize(3, 3)),
    "one": (lambda n: n == 96, None),
    "at-most": (lambda n: n <= 96, None),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal_sizes(case):
    holds, expected = LEGAL[case]
    found = find_legal_sizes(lambda sizes: holds(sizes["n"]), {"b": 2, "n": 96}, ["n"])
    assert found == ({"n": expected} if expected else {})


def test_the_other_sizes_stay():
    tried = []
    find_legal_sizes(lambda sizes: not tried.append(sizes), {"a": 4, "b": 6}, ["a", "b"])
    assert {sizes["b"] for sizes in tried if sizes["a"] != 4} == {6}
    assert {sizes["a"] for sizes in tried if sizes["b"] != 6} == {4}
