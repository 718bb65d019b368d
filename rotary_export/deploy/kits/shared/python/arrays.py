"""Arrays in `.npy` files, checked before a runtime sees them, and the command line of a kit.

bfloat16 has items of two bytes.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
# Of a difference from what is expected, relative to the largest magnitude of an output.
LIMITS = {"float64": 1e-12, "float32": 3e-5, "float16": 3e-2, "bfloat16": 1e-2}


def read_arrays(folder, infos):
    """Return an array per input or output of the manifest, by name."""
    arrays = {}
    for info in infos:
        file = Path(folder) / f"{info['name']}.npy"
        try:
            arrays[info["name"]] = np.load(file)
        except (OSError, ValueError) as error:
            sys.exit(f"{file} can't be read: {error}")
    return arrays


def write_arrays(folder, arrays):
    """Write `NAME.npy` of each array."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(Path(folder) / f"{name}.npy", array)


def read_graph():
    """Return the name of the bundle's main graph, and the manifest's inputs and outputs of it."""
    name = json.loads((HERE / "kit.json").read_text())["graph"]
    info = json.loads((HERE / "bundle" / "manifest.json").read_text())["graphs"][name]
    return name, info["inputs"], info["outputs"]


def check_inputs(infos, arrays):
    """Refuse a wrong type, a wrong shape, and ids outside the tables."""
    sizes = {}
    for info in infos:
        name, array = info["name"], arrays[info["name"]]
        dtype = "V2" if info["dtype"] == "bfloat16" else info["dtype"]
        if array.dtype != dtype:
            sys.exit(f"{name} must be {info['dtype']}, got {array.dtype}")
        if not _fits(info["shape"], array.shape, sizes):
            wanted = ", ".join(map(str, info["shape"]))
            known = "".join(f", {dim}={size}" for dim, size in sizes.items())
            sys.exit(f"{name} must have shape ({wanted}){known}, got {array.shape}")
        if info["limits"]:
            _check_limits(name, info["limits"], array)


def _fits(wanted, shape, sizes):
    """Whether a shape is legal; a dimension's name is the same size wherever it occurs."""
    if len(wanted) != len(shape):
        return False
    for dim, size in zip(wanted, shape, strict=True):
        if isinstance(dim, str) and " + " not in dim:
            *factors, dim = dim.split(" * ")  # "8 * height"
            factor = int(factors[0]) if factors else 1
            dim = factor * sizes.setdefault(dim, size // factor)
        if isinstance(dim, int) and dim != size:
            return False
    return True


def _check_limits(name, limits, array):
    low, high = limits
    bad = np.argwhere((array < low) | (array > high))
    if not len(bad):
        return
    index = tuple(bad[0].tolist())
    where = f" at batch {index[-2]}, row {index[-1]}" if len(index) > 1 else ""
    sys.exit(f"{name} must be in [{low}, {high + 1}), got {array[index]}{where}")


def widen(array):
    """Return an array as float64."""
    if array.dtype != "V2":
        return array.astype(np.float64)
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def name_expected():
    """Return what computed `example/expected`."""
    known = json.loads((HERE / "kit.json").read_text())["expected_by"]
    return "ONNX Runtime" if known == "onnxruntime" else "PyTorch"


def compare(infos, got, expected):
    """Print the difference of each output from what is expected; stop if it is too large."""
    reference = name_expected()
    for info in infos:
        left, right = widen(got[info["name"]]), widen(expected[info["name"]])
        if left.shape != right.shape:
            sys.exit(f"{info['name']} has shape {left.shape}, {reference}'s {right.shape}")
        error = np.abs(left - right).max(initial=0)
        print(f"{info['name']} {left.shape}: largest difference from {reference} {error:.2g}")
        if not error <= LIMITS.get(info["dtype"], 0) * np.abs(right).max(initial=0):
            sys.exit(f"{info['name']} differs from what {reference} computed")


def run_model(make_model, usage):
    """Run the example and compare, or run INPUTS into OUT: the command line of a kit."""
    if len(sys.argv) not in (1, 3):
        sys.exit(usage)
    model = make_model()
    print(model.describe())
    inputs, *out = sys.argv[1:] or [HERE / "example"]
    outputs = model(read_arrays(inputs, model.inputs))
    if out:
        write_arrays(out[0], outputs)
    else:
        compare(model.outputs, outputs, read_arrays(HERE / "example/expected", model.outputs))
