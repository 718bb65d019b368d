"""`tools/teeth/proof_teeth.py`: faults that count are refused, others are listed; models stay."""

import copy

import pytest
import torch
from fault_trials import COUNTS, Proof
from proof_teeth import make_row, try_fault, write_rows
from teeth_report import describe, summarize, tabulate_sizes, tabulate_verdicts
from teeth_subjects import SUBJECTS, TRAINED, make_subject
from trace_faults import FAULTS

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def subject():
    return make_subject("llama", "sharp", None)


@pytest.fixture(scope="module")
def proof(subject):
    return Proof(*subject, ("program",))


def test_names_are_unique_and_models_exist():
    assert len(BY_NAME) == len(FAULTS) >= 20
    assert {fault.subject for fault in FAULTS} == set(SUBJECTS) >= set(TRAINED)


def test_sizes_fall():
    for fault in FAULTS:
        assert list(fault.sizes) == sorted(fault.sizes, reverse=True), fault.name


def test_a_fault_that_counts_is_refused_and_the_model_is_unchanged(subject, proof):
    model, _ = subject
    state = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    fault = BY_NAME["base scaled"]
    trials = try_fault(proof, fault, rungs=2)
    assert trials[0].effect.counts
    assert trials[0].effect.outputs > COUNTS
    assert "not equal to eager" in trials[0].refusal
    assert [trial.size for trial in trials] == [1.02, 1.005]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    row = make_row(fault, "sharp", trials)
    assert describe(row) == "refused"
    assert tabulate_sizes([row])[1] == [("base scaled", "", f"x {row['smallest']:g}", "")]


def test_a_fault_without_effect_is_listed(proof, tmp_path):
    fault = BY_NAME["all positions + 1"]
    (trial,) = try_fault(proof, fault)
    assert not trial.effect.counts
    assert trial.effect.outputs < 1
    row = make_row(fault, "sharp", [trial])
    assert describe(row).startswith("no effect (")
    assert summarize([row]) == "0 of 0 faults that count are refused."
    write_rows(tmp_path / "teeth.json", [row])
    write_rows(tmp_path / "teeth.json", [row | {"weights": "default"}])
    assert (tmp_path / "teeth.json").read_text(encoding="utf-8").count(fault.name) == 2


def test_an_accepted_fault_that_counts_is_named():
    row = {"fault": "a", "weights": "default", "size": None, "counts": True, "refused": False}
    assert tabulate_verdicts([row])[1] == [("a", "", "ACCEPTED", "", "")]
    assert summarize([row]) == "0 of 1 faults that count are refused."
