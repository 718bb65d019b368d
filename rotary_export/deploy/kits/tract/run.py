"""Run this folder's bundle with tract.

python run.py               the example, compared with its outputs in expected/
python run.py INPUTS OUT    NAME.npy of each input is in INPUTS, of each output goes into OUT
"""

import tract
from arrays import HERE, check_inputs, read_graph, run_model

TYPES = {"float16": "f16", "float32": "f32", "float64": "f64", "int64": "i64", "bool": "bool"}


class Model:
    """The bundle's main graph, with one plan per set of shapes."""

    def __init__(self):
        """Read what `rotary-export deploy` wrote here."""
        graph, self.inputs, self.outputs = read_graph()
        self.file = HERE / f"{graph}.inlined.onnx"
        self.plans = {}

    def plan(self, shapes):
        """Return the plan for these shapes; tract plans a whole model for known sizes only."""
        if shapes not in self.plans:
            model = tract.onnx().load(str(self.file))
            for index, (info, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
                model.set_input_fact(index, ",".join([*map(str, shape), TYPES[info["dtype"]]]))
            self.plans[shapes] = model.into_model().into_runnable()
        return self.plans[shapes]

    def __call__(self, arrays):
        """Return outputs by name, for inputs by name."""
        # tract ends the process at an id outside a table.
        check_inputs(self.inputs, arrays)
        feeds = [arrays[info["name"]] for info in self.inputs]
        results = self.plan(tuple(feed.shape for feed in feeds)).run(feeds)
        names = [info["name"] for info in self.outputs]
        return {name: value.to_numpy() for name, value in zip(names, results, strict=True)}

    def describe(self):
        """Return the version."""
        return f"tract {tract.version()}"


if __name__ == "__main__":
    run_model(Model, __doc__)
