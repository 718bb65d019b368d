"""Each private name of another package, tried on a few lines: a new release shows what it moved."""

import logging
import warnings
from collections import OrderedDict

import onnx
import pytest
import sympy
import torch
from onnxscript import ir
from onnxscript.rewriter.pattern import RewriteRuleSet
from torch import nn

from rotary_export.compat import archives, inductor, modules, programs, pytree, script, sizes
from rotary_export.compat import transformers as transformers_names
from rotary_export.compat import x_transformers as x_transformers_names
from rotary_export.compat.dispatch import DispatchMode, is_in_place
from rotary_export.compat.einx import broadcast_with_symbols
from rotary_export.compat.export_dims import GivenDim, read_dim
from rotary_export.compat.onnx_rewriter import list_norm_rules
from rotary_export.compat.quiet import quiet_loaders, quiet_torch


class Halve(nn.Module):
    """Takes another branch for long inputs, and a minimum of two sizes."""

    def forward(self, x, y):
        if x.shape[0] > 10:
            return x * 2
        return x[: min(x.shape[0], y.shape[0])] / 2


@pytest.fixture(scope="module")
def program():
    x, y = torch.ones(4, 3), torch.ones(5, 3)
    auto = torch.export.Dim.AUTO
    return torch.export.export(Halve(), (x, y), dynamic_shapes=({0: auto}, {0: auto}))


@pytest.fixture(scope="module")
def inputs(program):
    return [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]


def test_loggers_that_are_silenced_are_those_of_torch():
    for name in ("torch.onnx", "torch._export.serde.serialize"):
        __import__(name)
        with quiet_torch(), quiet_loaders(), warnings.catch_warnings():
            assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_an_archive_is_listed_and_its_program_loaded(program, tmp_path):
    file = tmp_path / "halve.pt2"
    torch.export.save(program, file)
    names, read = archives.open_archive(file)
    assert "models/model.json" in names
    assert read("archive_format") == b"pt2"
    x, y = torch.ones(7, 3), torch.ones(5, 3)
    assert torch.equal(archives.load_program(file).module()(x, y), Halve()(x, y))


def test_operators_in_place():
    aten = torch.ops.aten
    found = [is_in_place(each) for each in (aten.add_.Tensor, aten.add.out, aten.add.Tensor)]
    assert found == [True, True, False]


def test_a_dispatch_mode_sees_every_operator():
    seen = []

    class Mode(DispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, function.is_view))
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).unsqueeze(0).add(1)
    assert seen[1:] == [
        (torch.ops.aten.unsqueeze.default, True),
        (torch.ops.aten.add.Tensor, False),
    ]


def test_pytree_flattens_and_unflattens():
    value = {"a": [1, (2, None)], "b": OrderedDict(c=3)}
    leaves, structure = pytree.flatten(value)
    assert pytree.unflatten(leaves, structure) == value
    assert pytree.list_leaves(value) == leaves == [1, 2, None, 3]
    assert pytree.map_leaves(str, [1, {"x": 2}]) == ["1", {"x": "2"}]
    paths, _ = pytree.flatten_with_path(value)
    assert [str(path[0]) for path, _ in paths] == ["['a']", "['a']", "['a']", "['b']"]


def test_guards_of_a_trace_name_their_line(inputs):
    environment = sizes.Environment.find(inputs)
    assert environment is not None
    symbol = sizes.get_expression(inputs[0].shape[0])
    guards = [g for g in environment.list_guards() if "test_compat.py" in g.location]
    assert guards
    holds = sizes.compile_condition(environment.simplify(guards[0].expression), [symbol])
    assert holds(10)
    assert not holds(11)
    assert environment.get_traced_sizes()[symbol] == 4


def test_a_program_without_fake_tensors_has_no_environment():
    assert sizes.Environment.find([torch.ones(2)]) is None


def test_a_condition_that_divides_by_zero_does_not_hold():
    size = sympy.Symbol("size", integer=True)
    holds = sizes.compile_condition(sympy.Eq(sympy.Mod(12, size), 0), [size])
    assert holds(3)
    assert not holds(5)
    assert not holds(0)


def test_minima_of_sizes_are_found(program):
    bounds = sizes.list_bounds(program)
    assert bounds
    assert not any(sizes.is_maximum(bound) for bound in bounds)


def test_constants_and_ranges_of_sizes(program, inputs):
    size = inputs[0].shape[0]
    assert sizes.get_constant(size) is None
    assert sizes.get_constant(inputs[0].shape[1]) == 3
    lower = sizes.get_lower_bound(program, size)
    assert lower is not None
    sizes.set_lower_bound(program, size, lower + 1)
    assert sizes.get_lower_bound(program, size) == lower + 1
    sizes.set_lower_bound(program, size, lower)


def test_a_copy_of_a_program_has_a_graph_and_constants_of_its_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("kept", torch.ones(3))
            self.register_buffer("other", torch.ones(3), persistent=False)

        def forward(self, x):
            return x * self.weight + self.kept + self.other

    own = torch.export.export(Scale(), (torch.ones(3),))
    copy = programs.copy_program(own, {"other": torch.full((3,), 5.0)})
    (add,) = [node for node in copy.graph.nodes if node.name == "add_1"]
    add.target = torch.ops.aten.sub.Tensor
    copy.graph_module.recompile()
    assert own.module()(torch.ones(3)).tolist() == [3.0] * 3
    assert copy.module()(torch.ones(3)).tolist() == [-3.0] * 3
    assert copy.state_dict["weight"] is own.state_dict["weight"]


def test_the_arguments_of_a_call_have_names_and_defaults(program):
    assert programs.get_fake_mode(program) is not None
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.cumsum.default, (graph.placeholder("x"), 1))
    values, keywords = programs.bind_arguments(node)
    assert values == {"self": node.args[0], "dim": 1, "dtype": None}
    assert keywords == {"dtype"}
    assert programs.get_name(node.target) == "aten::cumsum"
    assert programs.get_name(len) == ""


def test_inductor_compiles_packages_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert inductor.get_compiler()
    assert inductor.get_cache_folder() == str(tmp_path / "cache")
    example = (torch.ones(3),)
    module = torch.export.export(nn.ReLU(), example).module()
    options = {"aot_inductor.package": True, "aot_inductor.precompile_headers": False}
    with quiet_torch():
        files = inductor.compile_module(module, example, options)
    inductor.write_package(tmp_path / "relu.pt2", files)
    (y,) = inductor.load_package(tmp_path / "relu.pt2")(torch.tensor([-1.0, 0.0, 2.0]))
    assert y.tolist() == [0.0, 0.0, 2.0]


def test_a_module_keeps_its_buffers_in_a_registry():
    module = nn.BatchNorm1d(2)
    assert modules.get_buffers(module).keys() == dict(module.named_buffers()).keys()
    modules.get_buffers(module)["running_mean"] = torch.full((2,), 7.0)
    assert module.running_mean.tolist() == [7.0, 7.0]
    assert modules.ATTRIBUTES_OF_TORCH >= {"training", "_buffers", "_modules", "_parameters"}
    module.extra = 1
    assert vars(module).keys() - modules.ATTRIBUTES_OF_TORCH >= {"extra"}


def test_transformers_names_the_class_of_a_config():
    import transformers

    assert transformers_names.has_causal_lm(transformers, transformers.LlamaConfig())
    assert not transformers_names.has_causal_lm(transformers, transformers.CLIPTextConfig())


def test_experts_are_told_which_product_to_use():
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        vocab_size=8,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    for kind in (transformers_names.GROUPED, transformers_names.BATCHED):
        model.set_experts_implementation(kind)
        assert getattr(model.config, transformers_names.EXPERTS) == kind


def test_a_cache_of_x_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import x_transformers  # noqa: F401
    layers = [(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))] * 2
    cache = x_transformers_names.make_layer_cache(layers)
    assert x_transformers_names.is_layer_cache(cache)
    assert not x_transformers_names.is_layer_cache(layers)
    assert cache.cache_length == 3
    found = x_transformers_names.list_layers(cache)
    assert [key is layers[0][0] for key, _ in found] == [True, True]


def test_dimensions_of_torch_export():
    size = torch.export.Dim("n", min=3, max=9)
    assert read_dim(size) == GivenDim("n", 3, 9)
    assert read_dim(8 * size) == GivenDim("8 * n", 3, 9)
    assert read_dim(torch.export.Dim("m")) == GivenDim("m", 0, None)
    assert read_dim(torch.export.Dim.STATIC) == GivenDim(is_fixed=True)
    assert read_dim(torch.export.Dim.DYNAMIC(min=4)) == GivenDim(smallest=4)
    assert read_dim("n") is None


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch 2.14
def test_compiled_functions_have_a_source_and_a_name_and_can_be_redirected():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        compiled = torch.jit.script(double)
    assert isinstance(compiled, script.ScriptFunction)
    assert script.get_source(compiled) is double
    assert script.get_name(compiled) == "double"
    x = torch.ones(2)
    with script.redirect_scripts({id(compiled): lambda run, args, kwargs: 3 * run(*args)}):
        assert torch.equal(compiled(x), 6 * x)
    assert torch.equal(compiled(x), 2 * x)


EINX = {
    "where": ("b n, b n d, -> b n d", lambda: (torch.rand(2, 3) > 0.5, torch.randn(2, 3, 4), 0.0)),
    "add": ("b n d, n -> b n d", lambda: (torch.randn(2, 3, 4), torch.randn(3))),
    "subtract": ("j, i -> 1 1 i j", lambda: (torch.randn(4), torch.randn(3))),
    "multiply": (
        "b n h, b h n d -> b h n d",
        lambda: (torch.randn(2, 3, 5), torch.randn(2, 5, 3, 4)),
    ),
    "less": ("i, j -> i j", lambda: (torch.randn(4), torch.randn(3))),
}


@pytest.mark.parametrize("name", EINX)
def test_elementwise_functions_of_einx(name):
    import einx

    pattern, make = EINX[name]
    operands = make()
    want, original = getattr(einx, name)(pattern, *operands), getattr(einx, name)
    with broadcast_with_symbols():
        ours = getattr(einx, name)
        assert ours is not original
        assert torch.equal(ours(pattern, *operands), want)
    assert getattr(einx, name) is original


@pytest.mark.parametrize("pattern", ["b n d, s d -> (b s) n d", "... j, ... i -> ... i j"])
def test_other_patterns_go_to_einx(pattern):
    import einx

    operands = torch.randn(2, 3, 4), torch.randn(2, 4) if "(" in pattern else torch.randn(2, 3, 5)
    want = einx.add(pattern, *operands)
    with broadcast_with_symbols():
        assert torch.equal(einx.add(pattern, *operands), want)


def test_sizes_stay_symbols_in_einx():
    import einx

    class Masked(nn.Module):
        def forward(self, x, mask):
            return einx.where("b n, b n d, -> b n d", mask, x, 0.0)

    size = torch.export.Dim.DYNAMIC
    inputs = torch.randn(3, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    with broadcast_with_symbols():
        program = torch.export.export(
            Masked(), inputs, dynamic_shapes=({0: size, 1: size}, {0: size, 1: size})
        )
    assert program.module()(torch.ones(6, 7, 5), torch.zeros(6, 7) > 1).sum() == 0


def test_onnxscript_writes_a_norm_as_one_node():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    norm (float[B,8] x, float[8] weight) => (float[B,8] y)
    < float two = {2.0}, float epsilon = {1e-6}, int64[1] axes = {-1} > {
        square = Pow(x, two)
        mean = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(square, axes)
        sum = Add(mean, epsilon)
        root = Sqrt(sum)
        scale = Reciprocal(root)
        normal = Mul(x, scale)
        y = Mul(weight, normal)
    }
    """
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    RewriteRuleSet(list_norm_rules()).apply_to_model(model)
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
