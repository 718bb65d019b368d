"""Complex numbers as pairs of reals: every operator, at sizes that were not traced."""

import pytest
import torch
from helpers.traced_onnx import Function, run, trace, write
from torch.nn import functional

from rotary_export.errors import RotaryExportError
from rotary_export.models.trace.adapt.adapt_program import adapt_program
from rotary_export.models.trace.adapt.complex_pairs import pair_complex
from rotary_export.models.trace.adapt.pair_editor import is_complex

torch.manual_seed(0)
ANGLES = torch.randn(16, 6)
TABLE = torch.polar(1 + torch.rand(16, 6), ANGLES)


def rows(x):
    return torch.arange(x.shape[1])


def autocast(x, z):
    with torch.autocast("cpu", enabled=False):
        return (z * z.conj().resolve_conj())[: x.shape[1]]


def assign(x, z):
    out = torch.zeros(16, 8, dtype=torch.complex64)
    out[:, 1:-1] = z
    out[..., -1] *= 2j
    return out[rows(x)]


def shuffle(x, z):
    return z.roll(3, 0).flip(-1).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


MOVES = {
    "index": lambda x, z: z[rows(x)],
    "index-two": lambda x, z: z[rows(x)[:, None], torch.tensor([0, 3])],
    "index-last": lambda x, z: z[..., torch.tensor([5, 0, 1])],
    "index-select": lambda x, z: z.index_select(-1, torch.tensor([2, 2, 0])),
    "slice": lambda x, z: z[: x.shape[1], ::2],
    "slice-end": lambda x, z: z[-5:, :-1],
    "select": lambda x, z: z[: x.shape[1]].select(-1, -2),
    "split": lambda x, z: torch.cat(z.split([1, 5], -1)[::-1], -1)[: x.shape[1]],
    "split-size": lambda x, z: torch.cat(z.split(4, dim=-1)[::-1], 1),
    "chunk": lambda x, z: torch.stack(z.chunk(2, -1), -1)[: x.shape[1]],
    "tensor-split": lambda x, z: torch.cat(z.tensor_split(4, -1)[1:], -1),
    "unbind": lambda x, z: torch.stack(z.unbind(-1)[2:], 0),
    "cat-real": lambda x, z: torch.cat((z, ANGLES.to(z.device)), dim=-1),
    "expand": lambda x, z: z[: x.shape[1], None].expand(-1, x.shape[0], -1),
    "expand-as": lambda x, z: z[0].expand_as(z[: x.shape[1]]),
    "repeat": lambda x, z: z[: x.shape[1]].repeat(2, 1, x.shape[0]),
    "tile": lambda x, z: z[: x.shape[1]].tile(2),
    "tile-more": lambda x, z: z.tile(2, 1, 3),
    "repeat-interleave": lambda x, z: z.repeat_interleave(2, dim=-1)[: x.shape[1]],
    "repeat-interleave-all": lambda x, z: z[: x.shape[1]].repeat_interleave(2),
    "unsqueeze": lambda x, z: z[: x.shape[1]].unsqueeze(-1).unsqueeze(0).unsqueeze(-3),
    "squeeze": lambda x, z: z[: x.shape[1], :1].squeeze(-1),
    "squeeze-all": lambda x, z: z[: x.shape[1], None, :1].squeeze(),
    "transpose": lambda x, z: z[: x.shape[1]].transpose(-1, -2),
    "permute": lambda x, z: z[: x.shape[1], None].permute(-1, 0, -2),
    "movedim": lambda x, z: z[: x.shape[1], None].movedim(-1, 0),
    "swapaxes": lambda x, z: z.unflatten(0, (4, 4)).swapaxes(-1, 0),
    "mT": lambda x, z: z[: x.shape[1]].mT,
    "t": lambda x, z: z[: x.shape[1]].t(),
    "T": lambda x, z: z.T,
    "mH": lambda x, z: z.mH.resolve_conj(),
    "roll": lambda x, z: z.roll((1, -2), (-1, 0))[: x.shape[1]],
    "roll-all": lambda x, z: z[: x.shape[1]].roll(3),
    "flip": lambda x, z: z[: x.shape[1]].flip(-1).flip(0),
    "reshape": lambda x, z: z[: x.shape[1]].reshape(-1, 2, 3),
    "view": lambda x, z: z.view(4, 4, -1)[: x.shape[0]],
    "flatten": lambda x, z: z[: x.shape[1]].flatten(),
    "unflatten": lambda x, z: z[: x.shape[1]].unflatten(-1, (3, -1)),
    "narrow": lambda x, z: z.narrow(-1, 2, 3)[: x.shape[1]],
    "gather": lambda x, z: z.gather(-1, torch.tensor([[0, 5]]).expand(16, 2)),
    "take-along": lambda x, z: z.take_along_dim(torch.tensor([[1, 1, 4]]), dim=-1),
    "embedding": lambda x, z: functional.embedding(rows(x)[None], z),
    "pad": lambda x, z: functional.pad(z[: x.shape[1]], (1, 2)),
    "pad-value": lambda x, z: functional.pad(z[: x.shape[1]], (0, 0, 1, 0), value=1.0),
    "assign": assign,
    "where": lambda x, z: torch.where(ANGLES > 0, z, z.conj().resolve_conj()),
    "where-number": lambda x, z: torch.where(ANGLES > 0, z, 1.0),
    "masked-fill": lambda x, z: z.masked_fill(ANGLES > 0, 1.0),
    "masked-fill-complex": lambda x, z: z.masked_fill(rows(x)[:, None, None] > 2, 2 - 1j),
    "shuffle": shuffle,
}
ARITHMETIC = {
    "multiply": lambda x, z: z[: x.shape[1], None] * z,
    "multiply-real": lambda x, z: z[: x.shape[1]] * x[..., None],
    "multiply-real-first": lambda x, z: ANGLES * z,
    "multiply-number": lambda x, z: 3 * z[: x.shape[1]],
    "multiply-complex": lambda x, z: (1 + 2j) * z[: x.shape[1]],
    "square": lambda x, z: z.square()[: x.shape[1]],
    "divide": lambda x, z: z[: x.shape[1]] / z[1],
    "divide-real": lambda x, z: z[: x.shape[1]] / (2 + x[..., None].abs()),
    "divide-number": lambda x, z: z[: x.shape[1]] / 4 / (1 - 1j),
    "divide-a-number": lambda x, z: 1 / z[: x.shape[1]],
    "add": lambda x, z: z[: x.shape[1]] + z[0],
    "add-real": lambda x, z: x[..., None] + z[: x.shape[1]],
    "add-number": lambda x, z: z[: x.shape[1]] + 1 - 2j,
    "subtract": lambda x, z: z[: x.shape[1]] - x[..., None],
    "subtract-scaled": lambda x, z: torch.sub(z, z.flip(0), alpha=2)[: x.shape[1]],
    "size": lambda x, z: (z[: x.shape[1]] + x.shape[0]) * x.shape[1] - x.shape[0],
    "negate": lambda x, z: -z[: x.shape[1]],
    "conjugate": lambda x, z: z[: x.shape[1]].conj().resolve_conj(),
    "absolute": lambda x, z: z[: x.shape[1]].abs(),
    "angle": lambda x, z: z[: x.shape[1]].angle(),
    "parts": lambda x, z: torch.cat((z.real, z.imag), -1)[: x.shape[1]],
    "exponential": lambda x, z: torch.exp(1j * torch.outer(rows(x), ANGLES[0])),
    "exponential-of-both": lambda x, z: z[: x.shape[1]].exp(),
    "power": lambda x, z: z[: x.shape[1]] ** 2,
    "polar": lambda x, z: torch.polar(torch.ones_like(x), x)[..., None] * z[: x.shape[1]],
    "complex": lambda x, z: torch.complex(x, x.flip(-1)),
    "complex-broadcast": lambda x, z: torch.complex(x[:, None], x[:1, :1]),
    "view-as-complex": lambda x, z: torch.view_as_complex(torch.stack((x, x + 1), -1)),
    "view-dtype": lambda x, z: z.view(torch.float32)[: x.shape[1]],
    "view-dtype-back": lambda x, z: torch.stack((x, -x), -1).view(torch.complex64),
    "convert": lambda x, z: x.to(torch.complex64)[..., None] + z[: x.shape[1]],
    "convert-double": lambda x, z: z.to(torch.complex128)[: x.shape[1]] * x[..., None].double(),
    "sum": lambda x, z: z[: x.shape[1]].sum(-1),
    "sum-kept": lambda x, z: z[: x.shape[1]].sum((-1, 0), keepdim=True),
    "sum-all": lambda x, z: z[: x.shape[1]].sum(),
    "mean": lambda x, z: z[: x.shape[1]].mean(-1),
    "cumulative": lambda x, z: z[: x.shape[1]].cumsum(-1),
    "matrices": lambda x, z: z[: x.shape[1]] @ z.mT,
    "matrices-real": lambda x, z: z[: x.shape[1]] @ ANGLES.mT.to(torch.complex64),
    "einsum": lambda x, z: torch.einsum("sd,td->st", z[: x.shape[1]], z),
    "zeros": lambda x, z: z.new_zeros(x.shape[1], 6) + torch.zeros_like(z[: x.shape[1]]),
    "ones": lambda x, z: torch.ones(x.shape[1], 6, dtype=z.dtype) * torch.ones_like(z[0]),
    "full": lambda x, z: torch.full((x.shape[1], 2), 1 - 2j) + torch.full_like(z[0, :2], 3j),
    "equal": lambda x, z: (z[: x.shape[1]] == z[0]).float() + (z[0] != z[: x.shape[1]]).float(),
    "autocast": autocast,
}
CASES = MOVES | ARITHMETIC


def as_real(value):
    return torch.view_as_real(value) if value.is_complex() else value


def call(function):
    return lambda x, z: as_real(function(x, z))


def make(function):
    return Function(function, table=TABLE)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_on_pairs(name):
    module = make(call(CASES[name]))
    program = pair_complex(trace(module, [torch.randn(2, 5)], [("b", "s")]))
    assert not any(is_complex(node) for node in program.graph.nodes)
    for shape in ((2, 5), (3, 7), (1, 3)):
        x = torch.randn(shape)
        got, want = program.module()(x), module(x)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


GROUPS = {f"{n}-on": list(CASES)[n : n + 16] for n in range(0, len(CASES), 16)}


@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_pairs_as_onnx(names):
    module = make(lambda x, z: tuple(as_real(CASES[name](x, z)) for name in names))
    model = write(pair_complex(trace(module, [torch.randn(2, 5)], [("b", "s")])))
    x = torch.randn(3, 7)
    for name, got, want in zip(names, run(model, [x]), module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def test_a_complex_parameter_and_a_constant():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(TABLE)
            self.constant = TABLE.flip(0)
            self.register_buffer("kept", TABLE.roll(1, 0))

        def forward(self, *tensors):
            (x,) = tensors
            z = (self.weight + self.constant.conj() * self.kept)[: x.shape[1]]
            return torch.view_as_real(z) * x[..., None, None]

    module, x = Model(), torch.randn(3, 7)
    model = write(pair_complex(trace(module, [torch.randn(2, 5)], [("b", "s")])))
    torch.testing.assert_close(run(model, [x])[0], module(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_program_itself_is_not_changed():
    program = trace(make(call(CASES["index"])), [torch.randn(2, 5)], [("b", "s")])
    before = str(program.graph)
    assert pair_complex(program) is not program
    assert str(program.graph) == before
    assert [value.is_complex() for value in program.constants.values()] == [True]


def test_a_program_of_real_numbers_stays_as_it_is():
    program = trace(make(lambda x, z: x * 2), [torch.randn(2, 5)], [("b", "s")])
    assert pair_complex(program) is program


def test_an_operator_without_a_rule_is_left_to_torch():
    """torch.onnx has Fourier transforms of its own."""
    module = make(lambda x, z: torch.fft.irfft(torch.fft.rfft(x) * 2, n=5) + z.real.sum())
    program = trace(module, [torch.randn(2, 5)], [("b", 5)])
    assert pair_complex(program) is program


def test_a_complex_output_is_refused():
    program = trace(make(lambda x, z: z[: x.shape[1]]), [torch.randn(2, 5)], [("b", "s")])
    with pytest.raises(RotaryExportError, match=r"output \w+ of the model is complex; use torch"):
        pair_complex(program)


def test_a_form_without_a_rule_is_an_error_with_its_line():
    program = trace(make(lambda x, z: (z**z).real * x.sum()), [torch.randn(2, 5)], [("b", "s")])
    message = r"aten::pow of complex numbers .* \(at .*\.py:\d+, \w+\); compute with"
    with pytest.raises(RotaryExportError, match=message):
        pair_complex(program)


def test_pairs_in_front_of_attention():
    def attend(x, z):
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * z[rows(x)])
        heads = turned.flatten(-2)[:, None]
        return functional.scaled_dot_product_attention(heads, heads, heads, x[:1, None, :1, 0] < 9)

    program = trace(make(attend), [torch.randn(2, 5, 12)], [("b", "s", 12)])
    x = torch.randn(3, 7, 12)
    got = run(write(adapt_program(program, 23)), [x])[0]
    torch.testing.assert_close(got, attend(x, TABLE), rtol=1e-5, atol=1e-5)
