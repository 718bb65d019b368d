"""Which machines run a compiled graph (`.aoti.pt2`)."""

from __future__ import annotations

import platform
from collections.abc import Mapping

# AVX2, whatever the exporting machine has: the op is bound by memory, and what every server has
# runs everywhere.
COMPILED_FOR = {"system": "Linux", "machine": "x86_64", "instruction_set": "AVX2"}
_INSTRUCTION_SETS = ("DEFAULT", "AVX2", "AVX512")  # torch's names; each includes those before it


def find_refusal(needs: Mapping[str, str]) -> str | None:
    """Compare this machine with what compiled graphs need.

    Args:
        needs: A manifest's `compiled_for`.

    Returns:
        Why they can't run here, or None.
    """
    import torch

    has = torch.backends.cpu.get_cpu_capability()  # ATEN_CPU_CAPABILITY lowers it
    rank = _INSTRUCTION_SETS.index(has) if has in _INSTRUCTION_SETS else 0
    system, machine, runs = platform.system(), platform.machine(), _INSTRUCTION_SETS[: rank + 1]
    same_kind = (needs["system"], needs["machine"]) == (system, machine)
    if same_kind and needs["instruction_set"] in runs:
        return None
    return (
        f"it needs {needs['system']} {needs['machine']} with {needs['instruction_set']}, "
        f"this is {system} {machine} with {has}"
    )
