"""The library in a process where only ONNX Runtime loads it, and unloads it with its last session.

What a registration allocates can't be freed, as ONNX Runtime does not report when its sessions
end. So the library stays in memory, and registers its ops once.
"""

from __future__ import annotations

import subprocess
import sys

from helpers.paths import EXPORTED

from rotary_export.op import library as op_library

LIBRARY = op_library.op_library_path()
WARM, SESSIONS = 60, 300
KIB = 0.5  # of a session: less than the smallest page; a registration is 4 KiB
LOOP = """
import sys
import onnxruntime as ort

def read(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

def open_session():
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.register_custom_ops_library(sys.argv[2])
    ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

for _ in range(int(sys.argv[3])):
    open_session()
before = read("VmRSS")
for _ in range(int(sys.argv[4])):
    open_session()
with open("/proc/self/maps") as file:
    files = {line.split()[-1] for line in file}
print(read("VmRSS") - before, sys.argv[2] in files)
"""


def test_sessions_that_come_and_go_leave_nothing():
    graph = EXPORTED / "plain" / "rotate.onnx"
    arguments = map(str, (graph, LIBRARY.resolve(), WARM, SESSIONS))
    command = [sys.executable, "-c", LOOP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, is_loaded = done.stdout.split()
    assert is_loaded == "True"
    assert int(grown) / SESSIONS < KIB
