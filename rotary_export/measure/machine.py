"""What a measurement was made on: processor, caches, versions, instruction set."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library
from rotary_export.package import find_versions

PACKAGES = ("rotary_export", "onnxruntime", "onnxruntime-gpu", "torch", "numpy")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe_machine() -> dict[str, object]:
    """Return facts by name, for JSON; nothing that names the machine or its user."""
    return {
        "processor": _read_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": read_caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": find_versions(PACKAGES),
        "instruction set": _find_instruction_set(),
    }


def read_caches() -> dict[str, str]:
    """Return the sizes of one core's data caches, by level; empty if Linux lists none."""
    sizes = {}
    for folder in sorted(_CACHES.glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            sizes[f"L{(folder / 'level').read_text().strip()}"] = (
                (folder / "size").read_text().strip()
            )
    return sizes


def _read_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = dict(part.partition(":")[::2] for part in lines)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    name = facts.get("model name", platform.processor() or platform.machine())
    family = [facts[key] for key in ("cpu family", "model", "stepping") if key in facts]
    return f"{name} (family, model, stepping: {', '.join(family)})" if family else name


def _find_instruction_set() -> str:
    try:
        return op_library.instruction_set()
    except RotaryExportError:
        return "no op library"
