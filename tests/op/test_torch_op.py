"""The torch op: eager, differentiated, traced, exported and compiled."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import (
    EDGES,
    FIELDS,
    FORMS,
    PAIRWISE,
    TYPE_PAIRS,
    Case,
    check_each,
    pick_pairwise,
    sweep,
)
from helpers.oracles import assert_same_bits
from helpers.torch_calls import OP, order, run
from torch import Tensor, nn

from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import RotaryExportError
from rotary_export.op import cpu_kernel, spec
from rotary_export.op.torch_op import rotary_embedding, rotary_embedding_aten

SOME = PAIRWISE + EDGES
DOUBLES = pick_pairwise([case for case in FORMS if case.types == ("float64", "float64")])
REPEATED_IDS = Case(("float64", "float64"), heads=1, seq_len=6, rows=4, kv_heads=1, scaled=True)
# torch.export specialises sizes 0 and 1 to constants; a table of one row has no other strides.
SIZED = [case for case in SOME if case.batch > 1 and case.seq_len > 1]
# An export takes a second, whatever the types: each type pair occurs, pairs of the other fields do.
EXPORTED = [
    replace(case, types=TYPE_PAIRS[index % len(TYPE_PAIRS)])
    for index, case in enumerate(pick_pairwise(FORMS, FIELDS[1:]))
] + [case for case in EDGES if case.edge == "odd-sizes"]


class Call(nn.Module):
    """The op with the inputs that a case has."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.names = list(case.make_inputs())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = order(dict(zip(self.names, given, strict=True)))
        outputs = rotary_embedding(*inputs, **self.case.torch_options)
        return outputs[: 2 if self.case.kv_heads else 1]


def resize(case: Case, batch: int, seq_len: int) -> Case:
    return replace(case, batch=batch, seq_len=seq_len, rows=max(case.rows, seq_len))


# ---- eager


def test_vmap_is_silent_and_equals_one_call_each(capfd):
    """torch warns of an operator without a rule of its own, on the file descriptor."""
    x, key = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 2, 5, 8)
    cos, sin = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    got = torch.vmap(lambda a, b: OP(a, cos, sin, None, b, interleaved=True), in_dims=(1, 0))(
        x.transpose(0, 1), key
    )
    want = [OP(a, cos, sin, None, b, interleaved=True) for a, b in zip(x, key, strict=True)]
    for index in (0, 1):
        assert_same_bits(got[index], torch.stack([each[index] for each in want]))
    (alone,) = torch.vmap(lambda a: OP(a, cos, sin)[:1])(x)
    assert_same_bits(alone, torch.stack([OP(a, cos, sin)[0] for a in x]))
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("cases", [PAIRWISE, EDGES], ids=["pairwise", "edges"])
def test_outputs_are_contiguous_memory_of_their_own(cases):
    def check(case: Case) -> None:
        inputs = case.make_inputs()
        for got in run(case, inputs):
            assert got.is_contiguous()
            for name, value in inputs.items():
                assert got.data_ptr() != value.data_ptr() or not got.numel(), name

    check_each(cases, check)


@sweep(SIZED)
def test_inputs_need_not_be_contiguous(case):
    inputs = case.make_inputs()
    want = run(case, inputs)
    strided = {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in inputs.items()}
    assert any(not value.is_contiguous() for value in strided.values())
    gaps = {k: torch.stack((v, v), -1).flatten(-2)[..., ::2] for k, v in inputs.items()}
    for given in (strided, gaps):
        for got, value in zip(run(case, given), want, strict=True):
            assert_same_bits(got, value)
            assert got.is_contiguous()


def test_channels_last_comes_back_contiguous_like_the_fake():
    case = Case(rotary_dim=4)
    inputs = case.make_inputs()
    inputs["X"] = inputs["X"].to(memory_format=torch.channels_last)
    torch.library.opcheck(OP, order(inputs), case.torch_options)
    assert run(case, inputs)[0].is_contiguous()


@pytest.mark.parametrize("name", ["Y", "key_out"])
def test_an_offset_is_the_position_of_row_0(name):
    index = spec.OUTPUTS.index(name)
    case = Case(ids="offset", kv_heads=2, scaled=True)
    inputs = case.make_inputs()
    inputs["position_ids"] = torch.tensor([3])
    shared = inputs | {"position_ids": torch.arange(3, 8)[None]}
    each = inputs | {"position_ids": torch.arange(3, 8).repeat(2, 1)}
    for other in (shared, each):
        assert_same_bits(run(case, inputs)[index], run(case, other)[index])


# ---- gradients


@sweep(SOME)
def test_opcheck(case):
    with_grad = SOME.index(case) % 2
    inputs = case.make_inputs()
    for name in ("X", "key"):
        if with_grad and name in inputs:
            inputs[name].requires_grad_()
    torch.library.opcheck(OP, order(inputs), case.torch_options)


@sweep([*DOUBLES, REPEATED_IDS])
def test_gradcheck(case):
    inputs = case.make_inputs()
    names = [name for name in ("X", "key") if name in inputs]
    given = [inputs[name].requires_grad_() for name in names]

    def call(*args: Tensor) -> list[Tensor]:
        return run(case, inputs | dict(zip(names, args, strict=True)))

    assert torch.autograd.gradcheck(call, given, fast_mode=len(inputs["X"]) > 2)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


def test_the_gradient_of_one_output_alone():
    case = Case(kv_heads=2)
    inputs = case.make_inputs()
    x, key = inputs["X"].requires_grad_(), inputs["key"].requires_grad_()
    y, key_out = run(case, inputs)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert grad.shape == x.shape
    assert not torch.autograd.grad(y.sum(), key, retain_graph=True)[0].any()
    assert torch.autograd.grad(key_out.sum(), key)[0].any()


@pytest.mark.parametrize("name", ["cos_cache", "sin_cache", "scale_cache"])
def test_a_table_that_requires_a_gradient_is_refused(name):
    inputs = Case(scaled=True).make_inputs()
    inputs[name].requires_grad_()
    message = f"{name} requires a gradient; the op has gradients for X and key only"
    with pytest.raises(RotaryExportError, match=f"^{message}$"):
        OP(*order(inputs))


# ---- errors

T = torch.zeros
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "x-type": (
        {"X": T(2, 3, 5, 8, dtype=torch.int32)},
        "X must be float32, float16, bfloat16 or float64, got int32",
    ),
    "cos-type": (
        {"cos_cache": T(9, 4).half()},
        "cos_cache must be float32 with X float32, got float16",
    ),
    "cos-type-of-half": (
        {"X": T(2, 3, 5, 8).half(), "cos_cache": T(9, 4).double()},
        "cos_cache must be float16 or float32 with X float16, got float64",
    ),
    "sin-type": (
        {"sin_cache": T(9, 4).double()},
        "sin_cache must have the type of cos_cache, got float64 and float32",
    ),
    "scale-type": (
        {"scale_cache": T(9, 4).half()},
        "scale_cache must have the type of cos_cache, got float16 and float32",
    ),
    "key-type": ({"key": T(2, 2, 5, 8).half()}, "key must be float32 with X float32, got float16"),
    "ids-type": (
        {"position_ids": T(2, 5, dtype=torch.int32)},
        "position_ids must be int64, got int32",
    ),
    "negative-id": (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, -1, 99, 0, 0]])},
        "position_ids must be in [0, 9), got -1 at batch 1, row 1",
    ),
    "large-id": (
        {"position_ids": torch.tensor([[0, 1, 9, 3, 4]])},
        "position_ids must be in [0, 9), got 9 at batch 0, row 2",
    ),
    "offset": (
        {"position_ids": torch.tensor([6])},
        "position_ids must be in [0, 9), got 9 at batch 0, row 3",
    ),
    "largest-offset": (
        {"position_ids": torch.tensor([2**63 - 1])},
        f"position_ids must be in [0, 9), got {2**63 - 1} at batch 0, row 0",
    ),
}


@pytest.fixture(params=["kernel", "aten"])
def computed_by(request, monkeypatch):
    """Run a test with the op library, and without it."""
    if request.param == "aten":
        monkeypatch.setattr(cpu_kernel, "_find_library", lambda: None)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused(bad, message):
    with pytest.raises(RotaryExportError, match=f"^{re.escape(message)}$"):
        OP(*order(Case().make_inputs() | bad))


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        ({"X": T(2, 5, 24)}, {}),
        ({"X": T(2, 3, 5, 8)}, {"rotary_dim": 3}),
        ({"cos_cache": T(9, 3)}, {}),
        ({"position_ids": T(5, dtype=torch.int64)}, {}),
        ({"key": T(2, 2, 4, 8)}, {}),
        ({"X": T(2, 5, 24), "key": T(2, 5, 8)}, {"num_heads": 3}),
        ({"scale_cache": T(8, 4)}, {}),
    ],
    ids=["heads", "rotary-dim", "cos", "ids", "key", "kv-heads", "scale"],
)
def test_bad_shapes_are_refused_with_spec_s_message(bad, options):
    given = order(Case().make_inputs() | bad)
    attributes = {"rotary_embedding_dim" if k == "rotary_dim" else k: v for k, v in options.items()}
    with pytest.raises(RotaryExportError) as stated:
        spec.check_inputs([spec.shape_of(t) for t in given], **attributes)
    with pytest.raises(RotaryExportError, match=f"^{re.escape(str(stated.value))}$"):
        OP(*given, **options)


@pytest.mark.usefixtures("computed_by")
def test_no_batch_has_no_bad_position():
    inputs = Case(batch=0, ids="offset", kv_heads=1).make_inputs()
    inputs["position_ids"] = torch.tensor([-1])
    y, key_out = OP(*order(inputs))
    assert y.shape == inputs["X"].shape
    assert key_out.shape == inputs["key"].shape


# ---- graphs


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@sweep(SOME)
def test_traced_is_aten_only_with_the_same_bits_at_other_sizes(case):
    traced_case = resize(case, batch=2, seq_len=3)
    given = tuple(traced_case.make_inputs(1).values())
    traced = torch.jit.trace(Call(traced_case), given, check_trace=False)
    kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds == {"aten", "prim"}
    inputs = case.make_inputs(2)
    for got, want in zip(traced(*inputs.values()), run(case, inputs), strict=True):
        assert_same_bits(got, want)


def count_calls(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@sweep(EXPORTED)
def test_exported_keeps_one_node_and_decomposes_to_aten(case):
    inputs = case.make_inputs()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")

    def name_axes(name: str, value: Tensor) -> dict[int, Any]:
        if name in ("X", "key"):
            return {0: batch, 1 if case.flat else 2: length}
        if name == "position_ids":
            return {"per-batch": {0: batch, 1: length}, "shared": {1: length}}.get(case.ids, {})
        named = {"tables-per-batch": {0: batch, 1: length}, "tables-shared": {1: length}}
        return named.get(case.ids, {})

    axes = tuple(name_axes(*item) for item in inputs.items())
    with quiet_torch():  # torch warns about its own code
        program = torch.export.export(
            Call(case), tuple(inputs.values()), dynamic_shapes={"given": axes}, strict=False
        )
        aten = program.run_decompositions({OP.default: rotary_embedding_aten})
    assert count_calls(program).count("rotary_export.rotary_embedding.default") == 1
    assert all(target.startswith(("aten.", "<built-in")) for target in count_calls(aten))
    other = resize(case, batch=3, seq_len=4)
    inputs = other.make_inputs(2)
    for exported in (program, aten):
        with quiet_torch():
            module = exported.module()
        for got, want in zip(module(*inputs.values()), run(other, inputs), strict=True):
            assert_same_bits(got, want)


@sweep([case for case in EDGES if case.edge in ("decode", "odd-sizes")])
def test_compiles_whole(case):
    torch.compiler.reset()
    inputs = case.make_inputs()
    inputs["X"].requires_grad_()
    compiled = torch.compile(Call(case), backend="aot_eager", fullgraph=True)
    outputs, want = compiled(*inputs.values()), run(case, inputs)
    for got, value in zip(outputs, want, strict=True):
        assert_same_bits(got, value)
    (grad,) = torch.autograd.grad(outputs[0].sum(), inputs["X"])
    assert_same_bits(grad, torch.autograd.grad(want[0].sum(), inputs["X"])[0])
