"""Run this folder's bundle with tract.

python run.py               the example, compared with what PyTorch computed
python run.py INPUTS OUT    NAME.npy of each input is in INPUTS, of each output goes into OUT
"""

import json
import sys
from pathlib import Path

import tract
from arrays import check_inputs, compare, read_arrays, write_arrays

HERE = Path(__file__).resolve().parent
TYPES = {"float16": "f16", "float32": "f32", "float64": "f64", "int64": "i64", "bool": "bool"}


class Model:
    """The bundle's main graph, with a plan for each set of shapes that was asked for."""

    def __init__(self):
        """Read what `rotary-export deploy` wrote here."""
        graph = json.loads((HERE / "kit.json").read_text())["graph"]
        info = json.loads((HERE / "bundle" / "manifest.json").read_text())["graphs"][graph]
        self.inputs, self.outputs = info["inputs"], info["outputs"]
        self.file = HERE / f"{graph}.inlined.onnx"
        self.plans = {}

    def plan(self, shapes):
        """Return what runs these shapes; tract plans a whole model for known sizes only."""
        if shapes not in self.plans:
            model = tract.onnx().load(str(self.file))
            for index, (info, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
                model.set_input_fact(index, ",".join([*map(str, shape), TYPES[info["dtype"]]]))
            self.plans[shapes] = model.into_model().into_runnable()
        return self.plans[shapes]

    def __call__(self, arrays):
        """Return outputs by name."""
        # tract ends the process at an id that is out of a table.
        check_inputs(self.inputs, arrays)
        feeds = [arrays[info["name"]] for info in self.inputs]
        results = self.plan(tuple(feed.shape for feed in feeds)).run(feeds)
        names = [info["name"] for info in self.outputs]
        return {name: value.to_numpy() for name, value in zip(names, results, strict=True)}


def main():
    """Run the example, or what is asked for."""
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    model = Model()
    print(f"tract {tract.version()}")
    inputs, *out = sys.argv[1:] or [HERE / "example"]
    outputs = model(read_arrays(inputs, model.inputs))
    if out:
        write_arrays(out[0], outputs)
    else:
        compare(model.outputs, outputs, read_arrays(HERE / "example/expected", model.outputs))


if __name__ == "__main__":
    main()
