"""Arrays in `.npy` files, checked before a runtime sees them. bfloat16 has items of two bytes."""

import sys
from pathlib import Path

import numpy as np

# Of a difference from PyTorch, relative to the largest magnitude of an output.
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


def check_inputs(infos, arrays):
    """Refuse a wrong type, a wrong shape, and ids that are out of the tables."""
    sizes = {}
    for info in infos:
        name, array, wanted = info["name"], arrays[info["name"]], info["shape"]
        dtype = "V2" if info["dtype"] == "bfloat16" else info["dtype"]
        if array.dtype != dtype:
            sys.exit(f"{name} must be {info['dtype']}, got {array.dtype}")
        if array.ndim != len(wanted):
            sys.exit(f"{name} must have shape {wanted}, got {list(array.shape)}")
        for dim, size in zip(wanted, array.shape, strict=True):
            if isinstance(dim, str) and " + " not in dim:  # a name: one size wherever it stands
                dim = sizes.setdefault(dim, size)
            if isinstance(dim, int) and dim != size:
                sys.exit(
                    f"{name} must have shape {wanted}, got {list(array.shape)}, where "
                    f"{', '.join(f'{key} is {value}' for key, value in sizes.items())}"
                )
        if info["limits"]:
            low, high = info["limits"]
            bad = array[(array < low) | (array > high)]
            if bad.size:
                sys.exit(f"{name} must be in [{low}, {high}], got {bad[0]}")


def widen(array):
    """Return an array as float64."""
    if array.dtype != "V2":
        return array.astype(np.float64)
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def compare(infos, got, expected):
    """Print how far outputs are from what PyTorch computed; stop if that is too far."""
    for info in infos:
        left, right = widen(got[info["name"]]), widen(expected[info["name"]])
        if left.shape != right.shape:
            sys.exit(f"{info['name']} has shape {left.shape}, PyTorch's {right.shape}")
        error = np.abs(left - right).max(initial=0)
        print(f"{info['name']} {left.shape}: largest difference from PyTorch {error:.2g}")
        if not error <= LIMITS.get(info["dtype"], 0) * np.abs(right).max(initial=0):
            sys.exit(f"{info['name']} is not what PyTorch computed")
