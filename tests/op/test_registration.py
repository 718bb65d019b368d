"""`import rotary_export.op` registers the torch op beside torch, and never imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROTATE = """
x, table = torch.ones(1, 1, 1, 4), torch.ones(1, 2)
y, _ = torch.ops.rotary_export.rotary_embedding(x, table, table, torch.tensor([[0]]))
print(y.flatten().tolist())
"""
ROTATED = "[0.0, 0.0, 2.0, 2.0]"
OLD_TORCH = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].library = types.ModuleType("torch.library")
"""
PROGRAMS = {
    "after-torch": ("import torch, rotary_export.op" + ROTATE, ROTATED),
    "torch-op-after-runtime": (
        "import rotary_export.runtime, torch, rotary_export.op.torch_op" + ROTATE,
        ROTATED,
    ),
    "without-torch": ("import sys, rotary_export.op; print('torch' in sys.modules)", "False"),
    "beside-an-old-torch": (
        OLD_TORCH + "import rotary_export.op; print('rotary_export.op.torch_op' in sys.modules)",
        "False",
    ),
}


@pytest.mark.parametrize(("program", "printed"), PROGRAMS.values(), ids=PROGRAMS)
def test_importing_the_op_registers_it_in_torch_but_never_imports_torch(program, printed):
    command = [sys.executable, "-P", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == printed


def test_onnx_reference_can_be_imported_after_the_schema_is_registered():
    program = (
        "from rotary_export.op.onnx_schema import register_schema; register_schema(); "
        "import onnx.reference; print(onnx.defs.has('RotaryEmbedding', 'rotary_export'))"
    )
    command = [sys.executable, "-P", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "True"
