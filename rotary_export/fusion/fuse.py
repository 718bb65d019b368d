"""`fuse`: load, prepare, apply the rules, join, give bodies, check, and hand on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir.passes.common as passes
from onnxscript import ir

from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.fusion.check.compare import Check, compare_models
from rotary_export.fusion.check.feeds import SHAPES, Array, Shape
from rotary_export.fusion.normalize import prepare
from rotary_export.fusion.read import Model, explain, has_external, list_files, read_model
from rotary_export.fusion.rules.join import is_rotary, join_query_key
from rotary_export.fusion.rules.rewrite_rules import Findings, is_sum_of_products, make_rule_sets
from rotary_export.fusion.symbolic.rotation import looks_rotary
from rotary_export.op import spec
from rotary_export.op.onnx_function import add_functions
from rotary_export.op.onnx_schema import register_schema

LARGE = 2**26  # bytes of weights above which the check maps them from a file
_INSIDE = {"GroupQueryAttention", "Attention", "SparseAttention", "PagedAttention"}


@dataclass(frozen=True)
class Left:
    """A rotary call that was not fused.

    Attributes:
        node: Name of its node, or of its output.
        reason: Why.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class FuseResult:
    """A fused model, checked against what it was.

    Attributes:
        model: With `rotary_export::RotaryEmbedding` nodes and their bodies; where the source had
            external data, it refers to the same files.
        folder: Of the external data; None: there is none.
        sources: Files that the model was read from, which `save` never writes.
        nodes: Rotary nodes in the model; a node with a key does two calls.
        fused: How each call was written before, by the name of its output.
        left: Calls that were left, and why.
        check: What was compared, at which shapes.
    """

    model: onnx.ModelProto
    folder: Path | None
    sources: tuple[Path, ...]
    nodes: int
    fused: Mapping[str, str]
    left: tuple[Left, ...]
    check: Check

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON takes them."""
        return {
            "calls_fused": len(self.fused),
            "nodes": self.nodes,
            "calls_left": len(self.left),
            "fused": [{"output": name, "was": how} for name, how in self.fused.items()],
            "left": [asdict(left) for left in self.left],
            "compared": [
                {
                    **asdict(row.shape),
                    "runtime": row.runtime,
                    "before": row.against,
                    "output": row.output,
                    "max_abs": row.error.max_abs,
                    "ulp": row.error.max_ulp,
                    "allowed": row.allowed,
                }
                for row in self.check.comparisons
            ],
            "not_compared": self.check.skipped,
        }

    def save(self, out: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the model; it appears whole or not at all.

        Args:
            out: The file. External data goes beside it, into `<file name>.data`.
            force: Replace a file that is there.

        Returns:
            Its absolute path.

        Raises:
            RotaryExportError: It is there already, is what the model was read from, or can't be
                written.
        """
        path = Path(out).absolute()
        check_out(path, force, self.sources)
        data = path.with_name(f"{path.name}.data")
        try:
            staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            try:
                staged = staging / path.name
                if self.folder is None:
                    staged.write_bytes(self.model.SerializeToString())
                else:
                    model = ir.serde.deserialize_model(self.model)
                    ir.external_data.set_base_dir(model.graph, self.folder)
                    ir.save(model, staged, external_data=data.name)
                    if (staging / data.name).exists():
                        os.replace(staging / data.name, data)
                os.replace(staged, path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise RotaryExportError(f"{path} can't be written: {error.strerror or error}") from None
        return path


def check_out(path: Path, force: bool, sources: Sequence[Path]) -> None:
    """Refuse to replace a file that nobody asked to replace, and ever what is read.

    Raises:
        RotaryExportError: It, or its external data, is there.
    """
    for file in (path, path.with_name(f"{path.name}.data")):
        try:
            file.exists()
        except OSError as error:  # a name that is too long
            raise RotaryExportError(f"{file} can't be written: {error.strerror}") from None
        if file.is_dir():
            raise RotaryExportError(f"{file} is a folder")
        if file.exists() and any(s.exists() and file.samefile(s) for s in sources):
            raise RotaryExportError(f"{file} is read from: the input is never replaced")
        if file.exists() and not force:
            raise RotaryExportError(f"{file} exists; force=True (--force) replaces it")


def fuse(
    model: Model,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    inputs: Sequence[Mapping[str, Array]] = (),
    progress: Callable[[str], None] | None = None,
) -> FuseResult:
    """Put one fused node wherever an ONNX model applies a rotary embedding, and prove it equal.

    It finds `ai.onnx::RotaryEmbedding`, `com.microsoft::RotaryEmbedding` and what exporters write
    with Mul, Add, Slice, Concat, ...: half and interleaved layout, partial, complex. Query and key
    that share their tables become one node. The model runs before and after at three shapes.

    Args:
        model: A model, or the path of a file; neither is changed.
        shapes: (batch, new tokens, cached tokens) of each run; default: `feeds.SHAPES`.
        inputs: Inputs to run with, by name, one mapping for each of the first runs; what is not
            given is random.
        progress: Called with what is being done.

    Returns:
        The fused model and what was found; `save` writes it.

    Raises:
        RotaryExportError: The model can't be read, is of an opset that is too new or too old, its
            external data is missing, or it does not run at any shape. So too for:
        CheckFailedError: There is no rotary embedding, none could be fused, or the outputs differ.
    """
    say = progress or (lambda _: None)
    tried = SHAPES if shapes is None else _read_shapes(shapes)
    if not isinstance(inputs, Sequence) or not all(isinstance(given, Mapping) for given in inputs):
        raise RotaryExportError("inputs must be a sequence of dicts by input name")
    say("read the model")
    source = read_model(model)
    register_schema()
    with tempfile.TemporaryDirectory(prefix="rotary_export.") as temporary:
        folder = _find_folder(model, source)
        sources = list_files(model, source)
        was_inline = folder is None
        with explain(model, "is damaged"):
            if was_inline and _count_bytes(source) > LARGE:
                folder = Path(temporary)
                ir.external_data.unload_from_model(
                    source, folder, "weights", size_threshold_bytes=1024
                )
            after = source.clone()
        say("find the rotary embedding")
        with explain(model, "can't be fused"):
            findings = apply_rules(after)
            left = find_left(after, findings)
        nodes = sum(is_rotary(node) for node in after.graph.all_nodes())
        _check_found(findings, left, nodes)
        proto = ir.serde.serialize_model(after)
        add_functions(proto)
        proto.ir_version = max(proto.ir_version, source.ir_version)
        say("run before and after")
        check = compare_models(source, proto, list(findings.fused), folder, tried, inputs)
        if was_inline and folder is not None:
            proto = _load_weights(proto, folder)
    return FuseResult(
        proto, None if was_inline else folder, sources, nodes, findings.fused, tuple(left), check
    )


def _read_shapes(shapes: Sequence[tuple[int, int, int]]) -> tuple[Shape, ...]:
    for shape in shapes:
        whole = isinstance(shape, Sequence) and all(type(size) is int for size in shape)
        if not whole or len(shape) != 3 or min(shape[:2]) < 1 or shape[2] < 0:
            raise RotaryExportError(
                "shapes must be of (batch >= 1, new tokens >= 1, cached tokens >= 0), got "
                f"{shape!r}"
            )
    if not shapes:
        raise RotaryExportError("shapes must hold at least one shape")
    return tuple(Shape(*shape) for shape in shapes)


def _find_folder(model: Model, source: ir.Model) -> Path | None:
    if isinstance(model, onnx.ModelProto) or not has_external(source):
        return None
    return Path(model).absolute().parent


def _count_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)


def _load_weights(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    return ir.serde.serialize_model(ir.external_data.load_to_model(model))


def apply_rules(model: ir.Model) -> Findings:
    """Fuse what the rules find, in place."""
    prepare(model)
    findings = Findings()
    for rules in make_rule_sets(findings):
        rules.apply_to_model(model)
        passes.TopologicalSortPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    join_query_key(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    model.graph.opset_imports.setdefault(spec.DOMAIN, spec.OP_VERSION)
    return findings


def find_left(model: ir.Model, findings: Findings) -> list[Left]:
    """List the rotary calls that no rule took, with the reasons."""
    left: dict[Any, Left] = {}
    for node in model.graph.all_nodes():
        name = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
        out = node.outputs[0].name or "" if node.outputs else ""
        kind = f"{node.domain or 'ai.onnx'}::{node.op_type}"
        if node.op_type == "MRotaryEmbedding":
            left[node] = Left(name, f"{kind} takes its tables from three rows of ids")
        elif node.op_type == "RotaryEmbedding" and not is_rotary(node):
            left[node] = Left(name, findings.refused.get(out, f"{kind} is not known"))
        elif node.op_type in _INSIDE and node.domain:
            flag = node.attributes.get("do_rotary")
            if flag is not None and flag.as_int():
                left[node] = Left(name, f"{kind} rotates inside: it keeps its own kernel")
        elif is_sum_of_products(node):
            call = looks_rotary(node)
            if call is not None and (call not in left or not left[call].reason):
                left[call] = Left(name, _find_reason(node.outputs[0], findings))
    return list(left.values())


def _find_reason(value: ir.Value, findings: Findings, depth: int = 5) -> str:
    """Find why a call was refused: at its sum, or at what joins its channels below."""
    reason = findings.refused.get(value.name or "", "")
    if reason or not depth:
        return reason
    for user in value.consumers():
        if user.op_type in ("Concat", "Reshape", "Unsqueeze", "Cast"):
            reason = reason or _find_reason(user.outputs[0], findings, depth - 1)
    return reason


def _check_found(findings: Findings, left: list[Left], nodes: int) -> None:
    if findings.fused:
        return
    if nodes and not left:
        raise CheckFailedError(f"the model is fused already: {nodes} node{'s' * (nodes > 1)}")
    if not left:
        raise CheckFailedError("the model has no rotary embedding that fuse knows, none was fused")
    raise CheckFailedError(
        f"none of the {len(left)} rotary calls could be fused: "
        f"{left[0].node}: {left[0].reason or 'it is no rotation'}"
    )
