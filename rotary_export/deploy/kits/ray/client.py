"""Ask the server for the example over gRPC, and compare with its outputs in expected/.

python client.py [127.0.0.1:8081]
"""

import json
import sys
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

KIT = Path(__file__).parent
# Of the largest magnitude, by the bundle's dtype; `rotate` in float32 is equal to the bit where the
# server has the op library.
ALLOWED = {"float16": 2**-5, "bfloat16": 2**-2, "float32": 2**-15, "float64": 2**-40}


def read(path):
    """Read an array; bfloat16 is FP32 on the wire."""
    array = np.load(path)
    if array.dtype == np.dtype("V2"):
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


client = InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8081")
manifest = json.loads((KIT / "bundle" / "manifest.json").read_text())
model = client.get_model_metadata(manifest["name"])
inputs = []
for tensor in model.inputs:
    array = read(KIT / "example" / f"{tensor.name}.npy")
    inputs.append(InferInput(tensor.name, array.shape, tensor.datatype))
    inputs[-1].set_data_from_numpy(array)
answer = client.infer(model.name, inputs)
for tensor in model.outputs:
    want = read(KIT / "example" / "expected" / f"{tensor.name}.npy")
    got = answer.as_numpy(tensor.name)
    worst = float(np.abs(got.astype(np.float64) - want).max())
    exact = " (equal to the bit)" if got.tobytes() == want.tobytes() else ""
    print(f"{tensor.name} {got.shape}, largest error {worst:.3g}{exact}")
    if got.shape != want.shape or worst > ALLOWED[manifest["dtype"]] * np.abs(want).max():
        raise SystemExit(f"{tensor.name} is not what was expected")
