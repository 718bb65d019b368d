"""`tools/teeth`: every fault still fits the code, so that the tool can plant it."""

import plant_faults
import pytest
from helpers.paths import ROOT

FAULTS = plant_faults.read_faults()


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_code(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.old != fault.new
    assert fault.tests
    for test in fault.tests:
        assert (ROOT / test).exists(), test
