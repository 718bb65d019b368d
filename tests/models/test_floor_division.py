"""Floor division of sizes in ONNX: as in Python, also below 0."""

import operator

import onnxruntime
import pytest
import torch
from torch import nn

from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch
from rotary_export.models.trace.adapt.floor_division import translate_floor_division

# name: a function of a size, whether the dividend may be negative
DIVISIONS = {
    "rounded up": (lambda n: -(-n // 4), True),
    "a difference": (lambda n: (3 - n) // 4, True),
    "a negative divisor": (lambda n: 2 * n // -3, True),
    "a negative factor": (lambda n: (-2 * n + 1) // 4, True),
    "a negative quotient": (lambda n: (-n // 2) // 3, True),
    "rounded up by adding": (lambda n: (n + 3) // 4, False),
    "twice": (lambda n: n // 2 // 3, False),
}


class Divide(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x[0] * self.function(x.shape[0])


@pytest.mark.parametrize("case", DIVISIONS.values(), ids=DIVISIONS)
def test_floor_division_is_that_of_python(case):
    function, may_be_negative = case
    with quiet_torch(), reuse_translations():
        exported = torch.onnx.export(
            Divide(function),
            (torch.ones(7),),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            custom_translation_table={operator.floordiv: translate_floor_division},
            optimize=False,
            verbose=False,
        )
    assert ("Mod" in {node.op_type for node in exported.model.graph}) == may_be_negative
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    for size in (2, 3, 4, 5, 8, 9, 11, 12, 30):
        (got,) = session.run(None, {"x": torch.ones(size).numpy()})
        assert got == function(size)
