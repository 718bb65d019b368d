"""Run this folder's bundle with OpenVINO.

python run.py               the example, compared with its outputs in expected/
python run.py INPUTS OUT    NAME.npy of each input is in INPUTS, of each output goes into OUT
"""

import sys

import numpy as np
import openvino as ov
from arrays import HERE, check_inputs, read_graph, run_model


class Model:
    """The bundle's main graph, compiled once for every batch and length."""

    def __init__(self, device="CPU"):
        """Read and compile what `rotary-export deploy` wrote here."""
        graph, self.inputs, self.outputs = read_graph()
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
        """Return outputs by name, for inputs by name."""
        check_inputs(self.inputs, arrays)
        feeds = {i["name"]: make_tensor(arrays[i["name"]], i["dtype"]) for i in self.inputs}
        results = self.compiled(feeds)
        outputs = {info["name"]: results[info["name"]] for info in self.outputs}
        for info in self.outputs:
            if info["dtype"] == "bfloat16":
                outputs[info["name"]] = outputs[info["name"]].view("V2")
        return outputs

    def describe(self):
        """Return the version, and how many operations are OpenVINO's own RoPE."""
        return f"OpenVINO {ov.__version__}: {len(self.ropes)} operations are its own RoPE"


def make_tensor(array, dtype):
    """Return an input as OpenVINO accepts it."""
    if dtype != "bfloat16":
        return array
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(array.shape))
    tensor.data.view(np.int16)[...] = array.view(np.int16)
    return tensor


if __name__ == "__main__":
    run_model(Model, __doc__)
