"""Ask a server of this kit over HTTP and gRPC for the example, and compare.

python client.py [--http 127.0.0.1:8080] [--grpc 127.0.0.1:8081]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http

KIT = Path(__file__).parent
# Of the largest magnitude, by the bundle's dtype; `rotate` in float32 is equal to the bit where the
# server has the op library.
ALLOWED = {"float16": 2**-5, "bfloat16": 2**-2, "float32": 2**-15, "float64": 2**-40}


def read_arrays(folder, tensors):
    """Read one array for each tensor of the server's metadata, in the datatype it names."""
    arrays = {}
    for tensor in tensors:
        array = np.load(folder / f"{tensor['name']}.npy")
        if array.dtype == np.dtype("V2"):  # bfloat16, which is FP32 on the wire
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        arrays[tensor["name"]] = array
    return arrays


def ask(module, client, model, inputs, outputs):
    """Run the model once; HTTP carries JSON here, no binary tensors."""
    json_only = {"binary_data": False} if module is tritonclient.http else {}
    tensors = []
    for tensor in model["inputs"]:
        array = inputs[tensor["name"]]
        tensors.append(module.InferInput(tensor["name"], array.shape, tensor["datatype"]))
        tensors[-1].set_data_from_numpy(array, **json_only)
    wanted = [module.InferRequestedOutput(name, **json_only) for name in outputs]
    answer = client.infer(model["name"], tensors, outputs=wanted)
    return {name: answer.as_numpy(name) for name in outputs}


def main():
    """Compare the server's answers with example/expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="127.0.0.1:8080")
    parser.add_argument("--grpc", default="127.0.0.1:8081")
    arguments = parser.parse_args()
    name = json.loads((KIT / "model-settings.json").read_text())["name"]
    allowed = ALLOWED[json.loads((KIT / "bundle" / "manifest.json").read_text())["dtype"]]
    clients = {
        tritonclient.http: tritonclient.http.InferenceServerClient(arguments.http),
        tritonclient.grpc: tritonclient.grpc.InferenceServerClient(arguments.grpc),
    }
    model = clients[tritonclient.http].get_model_metadata(name)
    inputs = read_arrays(KIT / "example", model["inputs"])
    expected = read_arrays(KIT / "example" / "expected", model["outputs"])
    for module, client in clients.items():
        for output, got in ask(module, client, model, inputs, list(expected)).items():
            want = expected[output]
            worst = float(np.abs(got.astype(np.float64) - want).max())
            exact = " (equal to the bit)" if got.tobytes() == want.tobytes() else ""
            print(f"{module.__name__}: {output} {got.shape}, largest error {worst:.3g}{exact}")
            if got.shape != want.shape or worst > allowed * np.abs(want).max():
                raise SystemExit(f"{output} is not what was expected")


if __name__ == "__main__":
    main()
