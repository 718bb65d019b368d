"""Parts of a traced model: what computes the tables of its rotary nodes, and these nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from rotary_export.compat.quiet import quiet_torch
from rotary_export.models.trace.float32_tables import HALF_TYPES
from rotary_export.proof.models.far_tables import TABLES, Tables

_TURNS = ("cos", "sin", "polar")


class TracedRotary:
    """Runs parts of a traced model in PyTorch.

    Args:
        program: As `trace_program` made it.
        names: Of the inputs, in order.

    Attributes:
        inputs: Names of the inputs that the tables depend on.
        has_nodes: Whether the program has rotary nodes.
    """

    def __init__(self, program: Any, names: Sequence[str]) -> None:
        op = torch.ops.rotary_export.rotary_embedding.default
        self._program = program
        self._rotary = [node for node in program.graph.nodes if node.target == op]
        self.has_nodes = bool(self._rotary)
        self._tables = [find_tables(node) for node in self._rotary]
        wanted = [node for tables in self._tables for node in tables.values()]
        self._nodes = list_ancestors(program.graph, wanted)
        self._names = dict(zip(program.graph_signature.user_inputs, names, strict=True))
        self.inputs = {self._names[n.name] for n in self._nodes if n.name in self._names}

    def compute_tables(self, tensors: Mapping[str, Tensor]) -> list[Tables]:
        """Return the tables of each rotary node, in the order of the trace.

        Args:
            tensors: By name of the input; of those in `inputs`.
        """
        values = self._run(self._nodes, tensors)
        return [{name: values[node] for name, node in tables.items()} for tables in self._tables]

    def compute_calls(self, tensors: Mapping[str, Tensor]) -> list[tuple[list[Any], list[Any]]]:
        """Return what each rotary node rotates, query and key, and its results.

        Args:
            tensors: By name of the input; all of them.
        """
        values = self._run(list_ancestors(self._program.graph, self._rotary), tensors)
        calls = []
        for node in self._rotary:
            key = node.kwargs.get("key", node.args[4] if len(node.args) > 4 else None)
            xs = [values[x] for x in (node.args[0], key) if isinstance(x, Node)]
            calls.append((xs, list(values[node])[: len(xs)]))
        return calls

    def _run(self, nodes: Sequence[Node], tensors: Mapping[str, Tensor]) -> dict[Node, Any]:
        """Compute some nodes, given all that they depend on."""
        constants = _read_constants(self._program)
        values: dict[Node, Any] = {}
        for node in nodes:
            if node.op == "placeholder":
                own = self._names.get(node.name)
                values[node] = constants[node.name] if own is None else tensors[own]
            elif node.op == "get_attr":
                values[node] = _get_attribute(self._program.graph_module, str(node.target))
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                # What was decomposed has views where the traced tensor was contiguous.
                view = torch.ops.aten.view.default
                target: Any = torch.reshape if node.target == view else node.target
                # A power of a negative number, where the model takes another branch, is complex.
                with torch.no_grad(), quiet_torch():
                    values[node] = target(*args, **kwargs)
        return values

    def find_half_angles(self) -> str | None:
        """Find where an angle is computed in a half type; None: nowhere.

        Returns:
            The type and the line of the model, "float16, at FILE:LINE".
        """
        for node in _list_turns(self._program.graph_module, self._nodes):
            dtype = _find_half(node)
            if dtype is not None:
                return f"{str(dtype).removeprefix('torch.')}{_locate(node)}"
        return None


def find_tables(node: Node) -> dict[str, Node]:
    """Return the tables of a rotary node, by name."""
    given = dict(enumerate(node.args))
    found = {name: node.kwargs.get(name, given.get(at)) for name, at in TABLES.items()}
    return {name: value for name, value in found.items() if isinstance(value, Node)}


def list_ancestors(graph: Graph, wanted: Iterable[Node]) -> list[Node]:
    """Return the nodes that some nodes depend on, and these, in order."""
    needed: set[Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return [node for node in graph.nodes if node in needed]


def _read_constants(program: Any) -> dict[str, Any]:
    """Return weights, buffers and constants by the name of their placeholder."""
    signature = program.graph_signature
    kept = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored = {**program.constants, **program.state_dict}
    return {name: stored[key].detach() for name, key in kept.items() if key in stored}


def _get_attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _list_turns(module: GraphModule, nodes: Iterable[Node]) -> Iterator[Node]:
    """Yield the nodes that compute cosines and sines, those of submodules included."""
    for node in nodes:
        if node.op == "get_attr":
            inner = _get_attribute(module, str(node.target))
            if isinstance(inner, GraphModule):
                yield from _list_turns(inner, inner.graph.nodes)
        elif getattr(node.target, "__name__", "").split(".")[0] in _TURNS:
            yield node


def _find_half(turn: Node) -> torch.dtype | None:
    """Return the half type in which the angles of a cosine are computed, if there is one."""
    nodes = list_ancestors(turn.graph, turn.all_input_nodes)
    moving: set[Node] = set()  # not a constant
    for node in nodes:
        computed = node.op not in ("placeholder", "get_attr")
        if any(source in moving for source in node.all_input_nodes) or _is_source(node):
            moving.add(node)
            value = node.meta.get("val")
            if computed and isinstance(value, Tensor) and value.dtype in HALF_TYPES:
                return value.dtype
    return None


def _is_source(node: Node) -> bool:
    """Return whether a node makes positions: an input of the graph, or a range."""
    if node.op == "placeholder":
        return not node.name.startswith(("p_", "b_", "c_"))
    return getattr(node.target, "__name__", "").startswith(("arange", "linspace"))


def _locate(node: Node) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]]
    if not own:
        return ""
    file, line = own[-1]
    return f", at {file.rpartition('site-packages/')[2]}:{line}"
