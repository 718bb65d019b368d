"""The op for the ONNX reference evaluator: several signatures, errors, special values."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers.cases import Case
from helpers.function_bodies import from_numpy, make_model, make_with_bodies, to_numpy
from helpers.oracles import assert_same_bits
from onnx.reference import ReferenceEvaluator

from rotary_export.errors import RotaryExportError
from rotary_export.op.onnx_reference import RotaryEmbedding


def run(case: Case, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    evaluator = ReferenceEvaluator(make_model(case), new_ops=[RotaryEmbedding])
    outputs = evaluator.run(None, {name: to_numpy(x) for name, x in inputs.items()})
    return [from_numpy(y) for y in outputs]


def test_it_replaces_the_bodies_of_several_signatures():
    cases = [Case(kv_heads=2), Case(interleaved=True, kv_heads=2), Case(ids="offset")]
    model = make_with_bodies(*cases)
    assert len(model.functions) == 3
    inputs = [case.make_inputs(seed) for seed, case in enumerate(cases)]
    feeds = {f"n{i}_{k}": to_numpy(x) for i, given in enumerate(inputs) for k, x in given.items()}
    outputs = iter(ReferenceEvaluator(model, new_ops=[RotaryEmbedding]).run(None, feeds))
    for case, given in zip(cases, inputs, strict=True):
        for want in case.compute_eager(given):
            assert_same_bits(from_numpy(next(outputs)), want)


BAD_IDS = {
    "negative": ("per-batch", [[0, 1, 2, 3, 4], [0, -1, 99, 0, 0]], (-1, 1, 1)),
    "large": ("shared", [[0, 1, 9, 3, 4]], (9, 0, 2)),
    "offset": ("offset", [6], (9, 0, 3)),
}


@pytest.mark.parametrize(("ids", "values", "bad"), BAD_IDS.values(), ids=BAD_IDS)
def test_an_id_outside_the_tables_is_refused_with_spec_s_message(ids, values, bad):
    case = Case(ids=ids)
    inputs = case.make_inputs() | {"position_ids": torch.tensor(values)}
    message = "position_ids must be in [0, 9), got {} at batch {}, row {}".format(*bad)
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        run(case, inputs)


def test_shapes_are_checked_with_spec_s_message():
    inputs = Case().make_inputs() | {"sin_cache": torch.zeros(9, 3)}
    message = "sin_cache must have the shape of cos_cache, got (9, 3) and (9, 4)"
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        run(Case(), inputs)


def test_no_batch_has_no_bad_position():
    inputs = Case(batch=0, ids="offset").make_inputs() | {"position_ids": torch.tensor([-1])}
    assert run(Case(batch=0, ids="offset"), inputs)[0].shape == (0, 3, 5, 8)


def test_nan_and_infinity_pass():
    inputs = Case(rotary_dim=4).make_inputs()
    inputs["X"].view(-1)[:3] = torch.tensor([np.nan, np.inf, -np.inf])
    with np.errstate(invalid="ignore"):
        (y,) = run(Case(rotary_dim=4), inputs)
    assert y.isnan().any()
    assert_same_bits(y, Case(rotary_dim=4).compute_eager(inputs)[0])
