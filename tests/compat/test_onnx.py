"""Private names of torch.onnx, onnxscript and onnx.reference, tried on a few lines."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.helper import make_node
from onnx.reference import ReferenceEvaluator
from torch import nn

from rotary_export.compat.onnx_decompositions import decompose_if_needed
from rotary_export.compat.onnx_evaluator import WideEvaluator
from rotary_export.compat.onnx_promotion import promote_without_running
from rotary_export.compat.onnx_rewriter import match_by_operator
from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.ort_binding import make_binder
from rotary_export.compat.quiet import quiet_torch


def test_translations_are_read_once_and_custom_ones_stay_in_their_registry():
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read, add = ONNXRegistry.from_torchlib, torch.ops.aten.add.Tensor
    with reuse_translations():
        first = ONNXRegistry().from_torchlib(opset_version=20)
        first.register_op(add, lambda x, y: x)
        second = ONNXRegistry().from_torchlib(opset_version=20)
        other = ONNXRegistry().from_torchlib(opset_version=18)
    assert ONNXRegistry.from_torchlib == read
    assert len(first.get_decomps(add)) == len(second.get_decomps(add)) + 1
    assert second.get_decomps(add)[0] is first.get_decomps(add)[1]
    assert (second.opset_version, other.opset_version) == (20, 18)
    expected = ONNXRegistry.from_torchlib(opset_version=20)
    assert second.functions.keys() == expected.functions.keys()


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (lambda x: x.cos() + 1, False),
        (lambda x: x.add_(1), True),
        (lambda x: x.movedim(0, 1), True),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), True),
    ],
    ids=["translated", "in place", "composite", "two graphs"],
)
def test_torch_decomposes_what_it_can_not_translate(function, needed):
    from torch.onnx._internal.exporter import _fx_passes
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    class Call(nn.Module):
        def forward(self, x):
            return function(x)

    program = torch.export.export(Call(), (torch.ones(2, 3),))
    own = _fx_passes.decompose_with_registry
    with quiet_torch(), decompose_if_needed(), reuse_translations():
        registry = ONNXRegistry.from_torchlib(opset_version=20)
        decomposed = _fx_passes.decompose_with_registry(program, registry)
    assert (decomposed is not program) == needed
    assert _fx_passes.decompose_with_registry is own


def test_only_operators_of_mixed_types_run_where_casts_are_added(monkeypatch):
    from torch.fx import Interpreter
    from torch.onnx._internal.exporter._fx_passes import insert_type_promotion_nodes
    from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

    class Mix(nn.Module):
        def forward(self, x, n):
            return (x.cos() * n).sin()

    own, run, ran = _TypePromotionInterpreter.run_node, Interpreter.call_function, []

    def count(self, target, args, options):
        ran.append(str(target))
        return run(self, target, args, options)

    monkeypatch.setattr(Interpreter, "call_function", count)
    graph = torch.export.export(Mix(), (torch.ones(3).half(), torch.ones(3))).graph_module
    with promote_without_running():
        insert_type_promotion_nodes(graph)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    expected = ["aten.cos.default", "prims.convert_element_type.default", "aten.mul.Tensor"]
    assert [str(node.target) for node in calls] == [*expected, "aten.sin.default"]
    assert calls[1].args == (calls[0],)
    assert calls[1].meta["val"].dtype == torch.float32
    assert ran == expected[1:]
    assert _TypePromotionInterpreter.run_node is own


def test_patterns_are_tried_at_their_operator_alone(monkeypatch):
    from onnxscript import ir, rewriter
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    tried = []
    own, multi_match = SimplePatternMatcher.match, SimplePatternMatcher._multi_match

    def count(self, nodes, check_removable):
        nodes = list(nodes)
        tried.append(nodes[0].op_type)
        return multi_match(self, nodes, check_removable)

    def turn(op, x):
        return op.Cos(x), op.Sin(x)

    def turn_at_once(op, x):
        return op.Turn(x, _domain="test", _outputs=2)

    monkeypatch.setattr(SimplePatternMatcher, "_multi_match", count)
    text = """<ir_version: 10, opset_import: ["": 18]> turn (float[2] x) => (float[2] y) {
        a = Neg(x)
        z = Sin(a)
        b = Cos(a)
        y = Add(b, z)
    }"""
    model = ir.from_onnx_text(text)
    with match_by_operator():
        rewriter.rewrite(model, [rewriter.pattern.RewriteRule(turn, turn_at_once)])
    assert [node.op_type for node in model.graph] == ["Neg", "Turn", "Add"]
    assert set(tried) == {"Cos"}
    assert SimplePatternMatcher.match is own


BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
LONG = np.random.default_rng(0).normal(size=(2, 3, 900)).astype(ml_dtypes.bfloat16)
ONES = np.ones(900, ml_dtypes.bfloat16)
SUMS = {
    "softmax": ("Softmax", [LONG], lambda x: torch.softmax(x, -1)),
    "mean": ("ReduceMean", [LONG, np.array([-1])], lambda x, _: x.mean(-1, keepdim=True)),
    "norm": ("LayerNormalization", [LONG, ONES], lambda x, _: F.layer_norm(x, (900,))),
    "squares": ("RMSNormalization", [LONG, ONES], lambda x, _: F.rms_norm(x, (900,), eps=1e-5)),
    "attention": (
        "Attention",
        [np.tile(LONG[:, None, :, :8], (1, 1, 300, 1))] * 3,
        F.scaled_dot_product_attention,
    ),
}


@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)
def test_onnx_reference_computes_half_types_in_float32(case):
    operator, values, compute = case
    names = [f"x{index}" for index in range(len(values))]
    (got,) = evaluate([make_node(operator, names, ["y"])], dict(zip(names, values, strict=True)))
    want = compute(*(torch.tensor(value.astype(np.float64)) for value in values)).numpy()
    assert got.dtype == ml_dtypes.bfloat16
    largest = abs(want).max()
    assert abs(got.astype(np.float64) - want).max() <= 2.0**-8 * largest
    plain = ReferenceEvaluator(make_onnx([make_node(operator, names, ["y"])], names))
    far = plain.run(None, dict(zip(names, values, strict=True)))[0].astype(np.float64)
    assert abs(far - want).max() > 2.0**-6 * largest  # else it need not be computed here


def test_onnx_reference_keeps_types():
    """Those of a cast, of several results and of lists; also in a graph inside of a node."""
    branch = onnx.helper.make_graph(
        [make_node("Softmax", ["x"], ["inside"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("inside", BFLOAT16, None)],
    )
    nodes = [
        make_node("Cast", ["x"], ["wide"], to=FLOAT),
        make_node("Cast", ["wide"], ["narrow"], to=BFLOAT16),
        make_node("LayerNormalization", ["x", "ones"], ["normed", "mean"]),
        make_node("Split", ["x"], ["left", "right"], axis=-1, num_outputs=2),
        make_node("SequenceConstruct", ["x", "x"], ["list"]),
        make_node("SequenceAt", ["list", "zero"], ["first"]),
        make_node("Less", ["x", "narrow"], ["less"]),
        make_node("ReduceMax", ["less"], ["any"], keepdims=0),
        make_node("If", ["any"], ["chosen"], then_branch=branch, else_branch=branch),
    ]
    given = {"x": LONG, "ones": ONES, "zero": np.array(0)}
    names = "wide narrow normed mean left right first less chosen".split()
    found = dict(zip(names, evaluate(nodes, given, names), strict=True))
    types = {name: value.dtype.name for name, value in found.items()}
    wanted = dict.fromkeys(names, "bfloat16") | {"wide": "float32", "mean": "float32"}
    assert types == wanted | {"less": "bool"}
    for name in ("wide", "narrow", "first"):
        assert (found[name] == LONG).all(), name
    (softmax,) = evaluate([make_node("Softmax", ["x"], ["y"])], {"x": LONG})
    assert (found["chosen"] == softmax).all()


def make_onnx(nodes, inputs, outputs=("y",)):
    def name_value(name):
        return onnx.helper.make_value_info(name, onnx.TypeProto())

    graph = onnx.helper.make_graph(
        nodes, "graph", [name_value(name) for name in inputs], [name_value(n) for n in outputs]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])


def evaluate(nodes, values, outputs=("y",)):
    return WideEvaluator(make_onnx(nodes, values, outputs)).run(None, values)


def test_a_device_is_made_once_for_all_bindings():
    from onnxruntime import InferenceSession

    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Add(x, x) }")
    opset = onnx.helper.make_opsetid("", 20)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binder = make_binder(session)
    assert len(binder.device) == 1
    x, y = np.ones(2, np.float32), np.empty(2, np.float32)
    for bind, name, array in ((binder.bind_input, "x", x), (binder.bind_output, "y", y)):
        bind(name, *binder.device, array.dtype, array.shape, array.ctypes.data)
    session.run_with_iobinding(binder.binding)
    assert y.tolist() == [2, 2]


def test_public_bindings_do_where_the_private_name_is_not_there():
    binding = SimpleNamespace(bind_input=min, bind_output=max)
    binder = make_binder(SimpleNamespace(io_binding=lambda: binding))
    assert (binder.device, binder.bind_input, binder.bind_output) == (("cpu", 0), min, max)
