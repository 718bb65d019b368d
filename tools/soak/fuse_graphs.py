"""Change graphs with rotary embeddings at random, and let `fuse` judge them.

    python tools/soak/fuse_graphs.py --count 20000 --json tools/results/fuse_graphs.json

A graph is a rotation as some exporter writes it, in which nodes are changed: other operators,
inputs, attributes, constants, types, added and removed nodes. The property: `fuse` refuses with one
RotaryExportError, or the fused graph returns what the graph returned, under ONNX Runtime, on inputs
that `fuse` has not seen. A graph follows from the seed and its number: `--first NUMBER --count 1`
repeats it.
"""

from __future__ import annotations

import functools
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
from helpers.fuse_graphs import (
    Graph,
    H,
    add_products,
    add_query_key,
    half,
    make_feeds,
    rotate_both,
    rotate_half,
    rotate_pairs,
    run,
    turn_by_signs,
    write_tables,
)
from workers import run_command, try_all

KINDS = ("unequal", "tracebacks")
SHAPES = ((1, 5), (2, 1), (3, 7))  # batch, length; `fuse` tries others
TOLERANCE = 2e-5  # of the largest magnitude: a rotation of float32 in another order of sums
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow")
UNARY = ("Neg", "Identity", "Abs", "Cos", "Sin", "Tanh", "Relu", "Floor", "Reciprocal", "Sqrt")


# ---- graphs


def split_half(g: Graph) -> None:
    cos, sin = write_tables(g)
    for x in add_query_key(g):
        g.output(add_products(g, x, cos, rotate_half(g, x, cut="split"), sin), f"{x}_out")


def by_parts(g: Graph) -> None:
    cos, sin = write_tables(g, "none")
    for x in add_query_key(g):
        a, b = g.op("Split", x, g.ints(H // 2, H // 2), n=2, axis=-1)
        first = add_products(g, a, cos, b, sin, "Sub")
        g.output(g.join(first, add_products(g, b, cos, a, sin)), f"{x}_out")


def pairs(g: Graph) -> None:
    rotate_both(g, *write_tables(g, "repeat"), rotate_pairs)


def partial(g: Graph) -> None:
    cos, sin = write_tables(g, half=2)
    for x in add_query_key(g):
        head, tail = g.cut(x, 0, 4), g.cut(x, 4, 2**63 - 1)
        turned = add_products(g, head, cos, rotate_half(g, head, 4), sin)
        g.output(g.join(turned, tail), f"{x}_out")


def stored(g: Graph) -> None:
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, H // 2)).astype("f")
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    wide = np.tile(angles, 2)
    rows = [g.op("Gather", g.const(f(wide)), ids, axis=0) for f in (np.cos, np.sin)]
    rotate_both(g, *(g.unsqueeze(table, 1) for table in rows))


def onnx_node(g: Graph) -> None:
    g.opset = 23
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, H // 2)).astype("f")
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    tables = [g.const(f(angles)) for f in (np.cos, np.sin)]
    for x in add_query_key(g):
        g.output(g.op("RotaryEmbedding", x, *tables, ids), f"{x}_out")


def microsoft_node(g: Graph) -> None:
    angles = np.outer(np.arange(40), 10000.0 ** -np.linspace(0, 0.9, H // 2)).astype("f")
    ids = g.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    tables = [g.const(f(angles)) for f in (np.cos, np.sin)]
    for x in add_query_key(g):
        rotated = g.op("RotaryEmbedding", x, ids, *tables, domain="com.microsoft")
        g.output(rotated, f"{x}_out")


def scaled(g: Graph) -> None:
    rotate_both(g, *write_tables(g, factor=1.25))


def signed(g: Graph) -> None:
    rotate_both(g, *write_tables(g), turn_by_signs(*[-1] * (H // 2), *[1] * (H // 2)))


WRITERS: tuple[Callable[[Graph], None], ...] = (
    half, split_half, by_parts, pairs, partial, stored, onnx_node, microsoft_node, scaled, signed,
)  # fmt: skip


# ---- changes


def change(draw: random.Random, model: ModelProto) -> None:
    """Change one thing in a graph, in place; what is left may be invalid."""
    graph = model.graph
    node = draw.choice(graph.node)
    how = draw.randrange(10)
    if how == 0 and node.op_type in (*BINARY, *UNARY):
        node.op_type = draw.choice(BINARY if node.op_type in BINARY else UNARY)
    elif how == 1 and len(node.input) > 1:
        order = [*node.input]
        draw.shuffle(order)
        node.input[:] = order
    elif how == 2 and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(_list_values(graph, node))
    elif how in (3, 4):
        _change_constant(draw, graph)
    elif how == 5 and node.attribute:
        attribute = draw.choice(node.attribute)
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i = draw.choice((-3, -2, -1, 0, 1, 2, 3, attribute.i + 1))
    elif how == 6:  # a node between two others
        index = draw.randrange(len(node.output))
        name, kept = node.output[index], f"{node.output[index]}_kept{len(graph.node)}"
        node.output[index] = kept
        at = [*graph.node].index(node) + 1
        if draw.random() < 0.5:
            added = helper.make_node(draw.choice(UNARY), [kept], [name])
        else:
            other = draw.choice([t.name for t in graph.initializer] or [kept])
            added = helper.make_node(draw.choice(BINARY), [kept, other], [name])
        graph.node.insert(at, added)
    elif how == 7:  # a value that is used elsewhere, too
        name = draw.choice(_list_values(graph, node))
        graph.node.append(helper.make_node("Identity", [name], [f"seen{len(graph.node)}"]))
        graph.output.append(helper.make_empty_tensor_value_info(graph.node[-1].output[0]))
    elif how == 8 and node.input:  # an input passed on
        node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    else:
        value = draw.choice(graph.input)
        dims = value.type.tensor_type.shape.dim
        dim = draw.choice(dims)
        if dim.HasField("dim_param"):
            dim.dim_param = draw.choice(("batch", "seq", "other"))
        else:
            dim.dim_value = draw.choice((1, 2, 4, H, 2 * H))


def _list_values(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[str]:
    """List the values that are computed before a node."""
    names = [tensor.name for tensor in graph.initializer] + [value.name for value in graph.input]
    for other in graph.node:
        if other is node or other == node:
            break
        names += other.output
    return names


def _change_constant(draw: random.Random, graph: onnx.GraphProto) -> None:
    tensor = draw.choice(graph.initializer)
    array = numpy_helper.to_array(tensor).copy()
    flat = array.reshape(-1)
    at = draw.randrange(flat.size)
    if array.dtype.kind == "i":
        flat[at] = draw.choice((-1, 0, 1, 2, 3, 4, H, int(flat[at]) + 1, int(flat[at]) - 1))
    elif draw.random() < 0.5:
        flat[at] = draw.choice((0.0, 1.0, -1.0, 2.0, float(flat[at]) * 1.001, -float(flat[at])))
    else:
        array = array * np.float32(draw.choice((-1.0, 0.5, 1.0001)))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def make_graph(seed: int, number: int) -> tuple[str, ModelProto]:
    """Make a graph: the name of its writer, and the model."""
    draw = random.Random(f"{seed}-{number}")
    write = draw.choice(WRITERS)
    g = Graph(draw.choice((18, 20, 23)))
    write(g)
    model = g.model()
    for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3))):
        change(draw, model)
    return write.__name__, model


# ---- the property


def try_graph(
    seed: int, number: int, report: Callable[[str], None]
) -> tuple[Counter[str], dict[str, list[str]]]:
    """Fuse one graph, and compare; returns counts and findings."""
    import rotary_export
    from rotary_export.errors import CheckFailedError, RotaryExportError
    from rotary_export.fusion.result import NothingFusedError

    name, model = make_graph(seed, number)
    place = f"{number}: {name}"
    report(place)
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    try:
        fused = rotary_export.fuse(model, shapes=[(2, 3, 0)]).model
    except NothingFusedError:
        return Counter(["nothing to fuse"]), found
    except CheckFailedError as error:
        what = "unequal, as fuse found out" if "differ" in str(error) else "refused"
        return Counter([what]), found
    except RotaryExportError:
        return Counter(["refused"]), found
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        found["tracebacks"].append(f"{place}: {type(error).__name__} at {where}: {error}"[:300])
        return Counter(["tracebacks"]), found
    compared = False
    for batch, length in SHAPES:
        feeds = _fit(model, make_feeds(batch, length))
        try:
            before = run(model, feeds)
        except Exception:  # it does not run at this shape
            continue
        compared = True
        problem = _compare(before, fused, feeds)
        if problem:
            found["unequal"].append(f"{place}: at batch {batch}, length {length}: {problem}")
            return Counter(["unequal"]), found
    return Counter(["fused, equal" if compared else "fused, runs at no other shape"]), found


def _fit(model: ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs in the sizes that a graph fixes."""
    fitted = {}
    for value in model.graph.input:
        array = feeds[value.name]
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                array = array.take(np.arange(dim.dim_value) % array.shape[axis], axis)
        fitted[value.name] = array
    return fitted


def _compare(before: list[Any], fused: ModelProto, feeds: dict[str, np.ndarray]) -> str:
    """Return what differs; "": nothing."""
    try:
        after = run(fused, feeds)
    except Exception as error:
        return f"the fused graph fails: {' '.join(str(error).split())[:150]}"
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"output {index} is {new.dtype}{new.shape}, not {old.dtype}{old.shape}"
        with np.errstate(all="ignore"):
            wide = old.astype(np.float64), new.astype(np.float64)
            same = (wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1]))
            largest = np.abs(wide[0][np.isfinite(wide[0])]).max(initial=1.0)
            far = ~same & ~(np.abs(wide[0] - wide[1]) <= TOLERANCE * largest)
        if far.any():
            at = tuple(int(i) for i in np.argwhere(far)[0])
            return f"output {index} is {wide[1][at]:.9g} at {at}, not {wide[0][at]:.9g}"
    return ""


def soak(first: int, count: int, seed: int, jobs: int, seconds: float) -> dict[str, Any]:
    """Try graphs; return the counts and what was found, as the JSON has it."""
    started = time.monotonic()
    numbers = range(first, first + count)
    found = try_all(functools.partial(try_graph, seed), numbers, jobs, seconds)
    return {
        "seed": seed,
        "first": first,
        "graphs": found.done,
        "outcomes": dict(sorted(found.counts.items())),
        **{kind: [] for kind in KINDS},
        **found.findings,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    sys.exit(run_command(__doc__ or "", 20000, KINDS, soak))
