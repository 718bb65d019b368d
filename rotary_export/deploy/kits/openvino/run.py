"""Run this folder's bundle with OpenVINO.

python run.py               the example, compared with what PyTorch computed
python run.py INPUTS OUT    NAME.npy of each input is in INPUTS, of each output goes into OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from arrays import check_inputs, compare, read_arrays, write_arrays

HERE = Path(__file__).resolve().parent


class Model:
    """The bundle's main graph, compiled once for every batch and length."""

    def __init__(self, device="CPU"):
        """Read and compile what `rotary-export deploy` wrote here."""
        graph = json.loads((HERE / "kit.json").read_text())["graph"]
        info = json.loads((HERE / "bundle" / "manifest.json").read_text())["graphs"][graph]
        self.inputs, self.outputs = info["inputs"], info["outputs"]
        # Without the hint, a processor with bfloat16 instructions computes float32 in bfloat16.
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = ov.Core().compile_model(HERE / f"{graph}.inlined.onnx", device, options)
        nodes = self.compiled.get_runtime_model().get_ordered_ops()
        self.ropes = [n for n in nodes if n.get_rt_info()["layerType"].value == "RoPE"]
        for node in self.ropes:
            x, cos = (node.input(index).get_partial_shape()[0] for index in (0, 1))
            if x == ov.Dimension(1) != cos:
                sys.exit(
                    f"OpenVINO would give every row of {node.friendly_name} the first row's "
                    f"positions: it fuses an input of batch {x} with tables of batch {cos}"
                )

    def __call__(self, arrays):
        """Return outputs by name."""
        check_inputs(self.inputs, arrays)
        feeds = {i["name"]: make_tensor(arrays[i["name"]], i["dtype"]) for i in self.inputs}
        results = self.compiled(feeds)
        outputs = {info["name"]: results[info["name"]] for info in self.outputs}
        for info in self.outputs:
            if info["dtype"] == "bfloat16":
                outputs[info["name"]] = outputs[info["name"]].view("V2")
        return outputs


def make_tensor(array, dtype):
    """Return an input as OpenVINO takes it."""
    if dtype != "bfloat16":
        return array
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(array.shape))
    tensor.data.view(np.int16)[...] = array.view(np.int16)
    return tensor


def main():
    """Run the example, or what is asked for."""
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    model = Model()
    print(f"OpenVINO {ov.__version__}: {len(model.ropes)} operations are its own RoPE")
    inputs, *out = sys.argv[1:] or [HERE / "example"]
    outputs = model(read_arrays(inputs, model.inputs))
    if out:
        write_arrays(out[0], outputs)
    else:
        compare(model.outputs, outputs, read_arrays(HERE / "example/expected", model.outputs))


if __name__ == "__main__":
    main()
