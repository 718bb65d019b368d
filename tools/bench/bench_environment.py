"""Import this before torch: OpenMP's idle threads sleep, as ONNX Runtime's do here.

As they are, they spin for some milliseconds after each of torch's operators, on the cores that the
threads of the next session need.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
