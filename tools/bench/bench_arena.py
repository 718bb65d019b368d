"""How much memory ONNX Runtime takes for the op between two others, for tools/bench/bench.py.

Run as a script it is the process that is measured: its peak memory is its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench_graphs import OURS, BenchCase, make_runner

CASE = BenchCase(batch_size=32, seq_len=128)  # 80 MB of query and key, small tables
MODES = {"without": {"chain": 0}, "in place": {}, "out of place": {"tapped": True}}


def count_buffers(mode: str) -> float:
    """Return how many times the size of query and key the op adds to the peak memory.

    Args:
        mode: "in place", or "out of place" where something else reads its inputs too.
    """
    size = CASE.elements * 4
    return (_measure(mode) - _measure("without")) / size


def _measure(mode: str) -> int:
    command = [sys.executable, __file__, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Run one graph and print the peak memory of this process, in bytes."""
    graph = {"negate": True, "sum_outputs": True} | MODES[sys.argv[1]]
    make_runner(CASE, OURS, **graph)()
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    main()
