"""How each operator on complex tensors is computed from pairs of real ones, (..., 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.fx import Node

from rotary_export.compat.programs import bind_arguments, get_name
from rotary_export.models.trace.adapt import pair_moves as moves
from rotary_export.models.trace.adapt.graph_edit import ATEN
from rotary_export.models.trace.adapt.pair_editor import PairEditor, Part, is_complex, is_tensor

Rule = Callable[[PairEditor, Node], Node | None]


def combine(edit: PairEditor, node: Node) -> Node:
    """Add or subtract."""
    values, _ = bind_arguments(node)
    first, second = values["self"], values["other"]
    alpha = {"alpha": values["alpha"]}
    if is_tensor(second):
        return edit.emit(node.target, edit.pair(first), edit.pair(second), **alpha)
    parts = zip(edit.split_pair(edit.pair(first)), edit.split(second), strict=True)
    return edit.join(*(edit.emit(node.target, part, added or 0, **alpha) for part, added in parts))


def multiply(edit: PairEditor, node: Node) -> Node:
    """Multiply elements."""
    values, _ = bind_arguments(node)
    a, b = values["self"], values["other"]
    for x, y in ((a, b), (b, a)):
        if x in edit.pairs and y not in edit.pairs and not isinstance(y, complex):
            return edit.emit(ATEN.mul.Tensor, edit.pairs[x], edit.lift(y))
    return edit.join(*multiply_parts(edit, ATEN.mul.Tensor, edit.split(a), edit.split(b)))


def multiply_matrices(edit: PairEditor, node: Node) -> Node:
    """Multiply matrices, real or complex."""
    first, second = list(bind_arguments(node)[0].values())[:2]
    return edit.join(*multiply_parts(edit, node.target, edit.split(first), edit.split(second)))


def multiply_parts(
    edit: PairEditor, product: Any, a: tuple[Part, Part], b: tuple[Part, Part]
) -> tuple[Part, Part]:
    """Return the parts of a product."""

    def times(x: Part, y: Part) -> Part:
        if x is None or y is None:
            return None
        return edit.emit(product, *((x, y) if isinstance(x, Node) else (y, x)))

    def add(target: Any, x: Part, y: Part) -> Part:
        if y is None:
            return x
        if x is None:
            return edit.emit(ATEN.neg.default, y) if target == ATEN.sub.Tensor else y
        return edit.emit(target, x, y)

    (ar, ai), (br, bi) = a, b
    return (
        add(ATEN.sub.Tensor, times(ar, br), times(ai, bi)),
        add(ATEN.add.Tensor, times(ar, bi), times(ai, br)),
    )


def divide(edit: PairEditor, node: Node) -> Node:
    """Divide elements, by real or complex numbers."""
    values, _ = bind_arguments(node)
    a, b = values["self"], values["other"]
    if b not in edit.pairs and not isinstance(b, complex):
        return edit.emit(ATEN.div.Tensor, edit.pairs[a], edit.lift(b))
    if isinstance(b, complex):
        inverse: tuple[Part, Part] = ((1 / b).real, (1 / b).imag)
    else:
        inverse = invert_parts(edit, b)
    return edit.join(*multiply_parts(edit, ATEN.mul.Tensor, edit.split(a), inverse))


def invert_parts(edit: PairEditor, value: Node) -> tuple[Node, Node]:
    """Return the parts of 1 / z: conj(z) / |z|^2."""
    real, imaginary = edit.split(value)
    squares = [edit.emit(ATEN.mul.Tensor, part, part) for part in (real, imaginary)]
    norm = edit.emit(ATEN.add.Tensor, *squares)
    negative = edit.emit(ATEN.neg.default, imaginary)
    return edit.emit(ATEN.div.Tensor, real, norm), edit.emit(ATEN.div.Tensor, negative, norm)


def invert(edit: PairEditor, node: Node) -> Node:
    """Return 1 / z."""
    return edit.join(*invert_parts(edit, node.args[0]))  # type: ignore[arg-type]


def conjugate(edit: PairEditor, node: Node) -> Node:
    """Negate the imaginary part."""
    real, imaginary = edit.split(node.args[0])
    return edit.join(real, edit.emit(ATEN.neg.default, imaginary))


def measure(edit: PairEditor, value: Any) -> Node:
    """Return |z|."""
    squares = [edit.emit(ATEN.mul.Tensor, part, part) for part in edit.split(value)]
    return edit.emit(ATEN.sqrt.default, edit.emit(ATEN.add.Tensor, *squares))


def find_angle(edit: PairEditor, value: Any) -> Node:
    """Return the angle of z."""
    real, imaginary = edit.split(value)
    return edit.emit(ATEN.atan2.default, imaginary, real)


def make_polar(edit: PairEditor, length: Any, angle: Node) -> Node:
    """Return length * (cos(angle), sin(angle))."""
    turns = [edit.emit(turn, angle) for turn in (ATEN.cos.default, ATEN.sin.default)]
    return edit.join(*(edit.emit(ATEN.mul.Tensor, turn, length) for turn in turns))


def assemble(edit: PairEditor, node: Node) -> Node:
    """Make complex numbers of two parts, which are broadcast."""
    parts = node.args
    both = edit.emit(ATEN.add.Tensor, *parts)
    return edit.join(*(edit.emit(ATEN.expand_as.default, part, both) for part in parts))


def exponentiate(edit: PairEditor, node: Node) -> Node:
    """Return exp(z)."""
    real, imaginary = edit.split(node.args[0])
    return make_polar(edit, edit.emit(ATEN.exp.default, real), imaginary)


def raise_power(edit: PairEditor, node: Node) -> Node:
    """Return z ** n of a number n."""
    value, exponent = node.args[:2]
    if value not in edit.pairs or not isinstance(exponent, (int, float)):
        raise TypeError(f"the exponent must be a real number, got {exponent}")
    length = edit.emit(ATEN.pow.Tensor_Scalar, measure(edit, value), exponent)
    return make_polar(edit, length, edit.emit(ATEN.mul.Tensor, find_angle(edit, value), exponent))


def convert(edit: PairEditor, node: Node) -> Node:
    """Convert to another type: of complex numbers, from real ones, or to real ones."""
    if is_complex(node):
        value = edit.pair(node.args[0])  # type: ignore[arg-type]
    else:
        value = edit.split(node.args[0])[0]
    return edit.emit(ATEN.to.dtype, value, node.meta["val"].dtype.to_real())


def fill(edit: PairEditor, node: Node) -> Node:
    """Make a tensor of one number, of a given shape or of another tensor's."""
    values, _ = bind_arguments(node)
    name = get_name(node.target).removeprefix("aten::").removesuffix("_like")
    number = complex(values.get("fill_value", values.get("s", name == "ones")))
    dtype = node.meta["val"].dtype.to_real() if is_complex(node) else node.meta["val"].dtype

    def make(part: float) -> Node:
        if "self" in values:
            like = edit.split(values["self"])[0]
            return edit.emit(ATEN.full_like.default, like, part, dtype=dtype)
        return edit.emit(ATEN.full.default, values.get("size", []), part, dtype=dtype)

    return (
        edit.join(make(number.real), make(number.imag)) if is_complex(node) else make(number.real)
    )


def compare(edit: PairEditor, node: Node) -> Node:
    """Compare both parts."""
    a, b = (edit.pair(value) for value in node.args)  # type: ignore[arg-type]
    reduce = ATEN.all.dim if get_name(node.target) == "aten::eq" else ATEN.any.dim
    return edit.emit(reduce, edit.emit(node.target, a, b), -1)


def _drop(edit: PairEditor, node: Node) -> None:
    """Drop a check of types."""


def _first(edit: PairEditor, node: Node) -> Node:
    """Return the pairs of the first argument."""
    return edit.pairs[node.args[0]]  # type: ignore[index]


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "cat cumsum diagonal expand flip index_select select select_scatter slice slice_scatter "
        "split split_with_sizes split_copy squeeze stack transpose transpose_copy unbind unsqueeze "
        "_unsafe_view".split(),
        moves.move,
    ),
    **dict.fromkeys(
        "alias clone copy detach index index_put lift_fresh_copy neg".split(), PairEditor.call
    ),
    "permute": moves.permute,
    "t": moves.transpose,
    "roll": moves.roll,
    "repeat": lambda edit, node: edit.call(node, repeats=[*node.args[1], 1]),  # type: ignore[misc]
    "gather": moves.gather,
    "embedding": moves.embed,
    "pad": moves.pad,
    "constant_pad_nd": moves.pad,
    "sum": moves.reduce,
    "mean": moves.reduce,
    "add": combine,
    "sub": combine,
    "mul": multiply,
    "div": divide,
    "reciprocal": invert,
    **dict.fromkeys("mm bmm mv dot matmul".split(), multiply_matrices),
    **dict.fromkeys("_conj _conj_physical conj_physical".split(), conjugate),
    **dict.fromkeys("resolve_conj resolve_neg view_as_real".split(), _first),
    "abs": lambda edit, node: measure(edit, node.args[0]),
    "angle": lambda edit, node: find_angle(edit, node.args[0]),
    "exp": exponentiate,
    "pow": raise_power,
    "polar": lambda edit, node: make_polar(edit, *node.args),  # type: ignore[arg-type]
    "complex": assemble,
    "view_as_complex": lambda edit, node: cast(Node, node.args[0]),
    "real": lambda edit, node: edit.split(node.args[0])[0],
    "imag": lambda edit, node: edit.split(node.args[0])[1],
    "view": moves.view_as,
    "_to_copy": convert,
    **dict.fromkeys(
        "zeros ones full empty scalar_tensor zeros_like ones_like full_like empty_like".split(),
        fill,
    ),
    "where": moves.choose,
    "masked_fill": moves.mask_fill,
    "eq": compare,
    "ne": compare,
    "sym_size": moves.read_size,
    "sym_numel": moves.read_size,
    "sym_storage_offset": moves.read_size,  # of a slice at a position that is an input
    "_assert_tensor_metadata": _drop,
}
