"""Check and time the op library's CUDA kernel: the one command for somebody with a GPU.

    python tools/gpu/gpu_check.py [--out gpu_check.json]

Needs an environment with '.[test]', built where nvcc is, and a torch and an ONNX Runtime that have
CUDA. Prints a table and writes a JSON file to be pasted into an issue. Exit codes: 0 all checks
passed, 1 one failed, 3 there is no GPU that could be checked.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from gpu_models import (
    CheckedDevice,
    Runner,
    Shape,
    build_model,
    make_inputs,
    read_placement,
    rotate_eagerly,
)
from gpu_times import SMALL_SHAPES, TIMED_SHAPES, measure

import rotary_export
from rotary_export.op import library as op_library
from rotary_export.op import spec
from rotary_export.proof.tolerances import TOLERANCES
from rotary_export.runtime.providers import CPU, CUDA, find_cuda_problem

NO_GPU = 3
BUNDLE = Path(__file__).parents[2] / "exported" / "plain"
SAME_SIZE_INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PARITY_SHAPE = Shape(2, 3, 2, 150, 64)  # 300 scattered ids take two launches.


class CheckError(Exception):
    """What a check found."""


def require(holds: bool, found: str) -> None:
    """Fail a check unless `holds`."""
    if not holds:
        raise CheckError(found)


# ---- comparisons


def count_different(got: list[torch.Tensor], want: list[torch.Tensor]) -> int:
    """Count elements whose bits differ."""
    different = 0
    for a, b in zip(got, want, strict=True):
        ints = SAME_SIZE_INTS[a.element_size()]
        different += int((a.view(ints) != b.view(ints)).sum())
    return different


def measure_ulp(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Return the largest error in ulp of the largest magnitude in its head vector."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        magnitude = b.double().abs().amax(-1, keepdim=True)
        ulp = torch.exp2(magnitude.log2().floor()) * torch.finfo(b.dtype).eps
        worst = max(worst, float(((a.double() - b.double()).abs() / ulp).max()))
    return worst


# ---- checks: each returns what it found, or raises


def check_placement(checked: CheckedDevice) -> str:
    """Our node runs on the provider, and ids from the CPU bring no copy with them."""
    inputs = make_inputs(checked, PARITY_SHAPE)
    nodes = read_placement(build_model(inputs), checked, inputs, library=True)
    require(nodes == [(spec.OP_TYPE, checked.provider)], f"ran {nodes}")
    return f"one {spec.OP_TYPE} on {checked.provider}, no copy"


def check_portable_placement(checked: CheckedDevice) -> str:
    """Without the opt-in a bundle's function body runs, all of it on the provider."""
    session = rotary_export.load(BUNDLE, providers=[checked.provider])
    opted_in = session.kernel_path.startswith("fused")
    require(opted_in == (checked.provider == CPU), f"load chose {session.kernel_path}")
    heads = [int(info.shape[1]) for info in session.graph.inputs[:2]]
    head_dim = int(session.graph.inputs[0].shape[3])
    x, key = (torch.ones(2, n, 5, head_dim, device=checked.device) for n in heads)
    ids = torch.arange(5, device=checked.device).repeat(2, 1)
    inputs = {"query": x, "key": key, "position_ids": ids}
    file = str(BUNDLE / session.graph.files["onnx"])
    nodes = read_placement(file, checked, inputs, library=False, like=("query", "key"))
    require(nodes == [("RotaryEmbedding", checked.provider)] * 2, f"ran {nodes}")
    return f"two of ONNX Runtime's RotaryEmbedding on {checked.provider}"


def check_eager(checked: CheckedDevice, types: tuple[str, str]) -> str:
    """Every form has the bits of eager PyTorch on the same device."""
    elements = cases = 0
    forms = ("prompt", "scattered", "offset", "tables")
    for form, interleaved, rotary_dim, scaled in itertools.product(
        forms, (0, 1), (0, 20, 32), (False, True)
    ):
        inputs = make_inputs(
            checked, PARITY_SHAPE, types, form=form, rotary_dim=rotary_dim, scaled=scaled
        )
        attributes = {"interleaved": interleaved, "rotary_embedding_dim": rotary_dim}
        got = Runner(build_model(inputs, **attributes), checked)(inputs)
        different = count_different(got, rotate_eagerly(inputs, bool(interleaved)))
        what = f"{form}, {attributes}, scaled={scaled}"
        require(different == 0, f"{what}: {different} elements differ from eager")
        cases += 1
        elements += sum(y.numel() for y in got)
    return f"{cases} cases, {elements:,} elements, equal to the bit"


def check_own_op(checked: CheckedDevice) -> str:
    """ONNX Runtime's own op agrees within what FMA may change."""
    inputs = make_inputs(checked, PARITY_SHAPE)
    ours = Runner(build_model(inputs), checked)(inputs)
    own = Runner(build_model(inputs, ours=False), checked, library=False)(inputs)
    ulp, limit = measure_ulp(own, ours), TOLERANCES["native"].max_ulp
    require(ulp <= limit, f"{ulp:.2f} ulp apart, at most {limit:g} expected")
    return f"at most {ulp:.2f} ulp apart (FMA; the limit is {limit:g})"


def check_bad_ids(checked: CheckedDevice) -> str:
    """A bad id is named in an error, from the CPU and from the device, and does no lasting harm."""
    inputs = make_inputs(checked, PARITY_SHAPE)
    runner = Runner(build_model(inputs), checked)
    rows = inputs["cos_cache"].shape[0]
    for device, bad in itertools.product(("cpu", checked.device), (-1, rows, 2**40)):
        ids = inputs["position_ids"].clone()
        ids[1, 5] = bad
        message = ""
        try:
            runner({**inputs, "position_ids": ids.to(device)})
        except Exception as error:  # ORT's own exceptions share no base class
            message = str(error)
        wanted = spec.bad_id_message(bad, 1, 5, rows)
        require(wanted in message, f"id {bad}, on {device}: {message or 'no error'}")
    on_device = {**inputs, "position_ids": inputs["position_ids"].to(checked.device)}
    for good in (inputs, on_device):
        different = count_different(runner(good), rotate_eagerly(inputs, False))
        require(different == 0, f"after an error {different} elements differ")
    return "the first bad id is named; later runs are right"


def check_in_place(checked: CheckedDevice) -> str:
    """Between other nodes, where ONNX Runtime may rotate in place; inputs stay as they were."""
    for rotary_dim in (0, 32):
        inputs = make_inputs(checked, PARITY_SHAPE, rotary_dim=rotary_dim)
        before = {name: value.clone() for name, value in inputs.items()}
        model = build_model(inputs, negate=True, chain=3, rotary_embedding_dim=rotary_dim)
        got = Runner(model, checked)(inputs)
        want = dict(inputs)
        for _ in range(3):
            want["X"], want["key"] = rotate_eagerly(want, False)
        different = count_different(got, [want["X"], want["key"]])
        require(different == 0, f"{different} elements differ")
        changed = [name for name in inputs if not torch.equal(inputs[name], before[name])]
        require(not changed, f"inputs were changed: {changed}")
    return "three in a row between two Neg, equal to the bit"


def check_two_streams(checked: CheckedDevice) -> str:
    """Two sessions, each on a stream of its own, at the same time."""

    def work(seed: int) -> int:
        stream = torch.cuda.Stream() if checked.device == "cuda" else None
        inputs = make_inputs(checked, PARITY_SHAPE, seed=seed)
        want = rotate_eagerly(inputs, False)
        number = stream.cuda_stream if stream is not None else None
        runner = Runner(build_model(inputs), checked, stream=number)
        return sum(count_different(runner(inputs), want) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        different = sum(pool.map(work, (1, 2)))
    require(different == 0, f"{different} elements differ")
    return "100 runs, equal to the bit"


# ---- the report


def describe_machine(checked: CheckedDevice) -> dict[str, str]:
    """Return what a reader of the report must know."""
    library = op_library.op_library_path()
    facts = {
        "rotary_export": rotary_export.__version__,
        "op library sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "provider": checked.provider,
    }
    if checked.device == "cuda":
        version = ctypes.c_int(0)
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        major, minor = torch.cuda.get_device_capability()
        facts["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
        facts["CUDA of the driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return facts


def list_checks(checked: CheckedDevice) -> dict[str, Callable[[], str]]:
    """Name every check."""
    checks: dict[str, Callable[[], str]] = {
        "node placement": lambda: check_placement(checked),
        "placement without opt-in": lambda: check_portable_placement(checked),
    }
    for types in spec.TYPE_PAIRS:
        checks[f"eager PyTorch, {' and '.join(types)}"] = lambda t=types: check_eager(checked, t)
    checks["ONNX Runtime's own op"] = lambda: check_own_op(checked)
    checks["bad ids"] = lambda: check_bad_ids(checked)
    checks["in place"] = lambda: check_in_place(checked)
    checks["two streams"] = lambda: check_two_streams(checked)
    return checks


def run_check(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """Run a check; whatever it raises is a failure that the report tells."""
    try:
        row = {"check": name, "passed": True, "found": check()}
    except Exception as error:  # ORT's own exceptions share no base class
        row = {"check": name, "passed": False, "found": f"{type(error).__name__}: {error}"}
    print(f"{'ok  ' if row['passed'] else 'FAIL'}  {name:40} {row['found']}")
    return row


def find_problem() -> str | None:
    """Return why there is no CUDA kernel to check here, or None."""
    if problem := find_cuda_problem():
        return problem
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not see a GPU"
    if CUDA not in op_library.library_providers():
        return "the op library was built without nvcc: put it on the PATH and install again"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run every check and time; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="The report.")
    # For the tests of this tool: the same checks where there is no GPU, on small shapes.
    parser.add_argument("--provider", default=CUDA, choices=(CUDA, CPU), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    checked = CheckedDevice(options.provider)
    if checked.provider == CUDA and (problem := find_problem()):
        print(f"gpu_check: no GPU to check: {problem}", file=sys.stderr)
        return NO_GPU
    machine = describe_machine(checked)
    for name, fact in machine.items():
        print(f"{name:20} {fact}")
    print()
    checks = [run_check(name, check) for name, check in list_checks(checked).items()]
    print(f"\n{'time per rotation of query and key':44} {'by':14} {'us':>10} {'GB/s':>8}")
    times = []
    for name, shape in (TIMED_SHAPES if checked.provider == CUDA else SMALL_SHAPES).items():
        for dtype in ("float32", "float16"):
            for row in measure(checked, shape, dtype):
                times.append({"case": name, "shape": vars(shape), "dtype": dtype, **row})
                speed = row["gigabytes_per_second"]
                shown = f"{row['microseconds']:10.2f} {speed or float('nan'):8.1f}"
                print(f"{name + ', ' + dtype:44} {row['by']:14} {shown}")
    report = {"machine": machine, "checks": checks, "times": times}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [row["check"] for row in checks if not row["passed"]]
    print(
        f"\n{len(checks) - len(failed)} of {len(checks)} checks passed. Please paste "
        f"{options.out.name} into an issue."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
