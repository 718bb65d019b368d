"""Exports of models that depend on sizes: limits, sizes that are verified, refusals."""

import types

import pytest
import torch
from helpers.tiny_modules import X, rope_of
from torch import nn

from rotary_export import export_model, load, verify
from rotary_export.errors import CheckFailedError, RotaryExportError, UsageWarning


def warns_of_limit():
    return pytest.warns(UsageWarning, match=r"^\w+ <= \d+ in this graph: the model itself accepts")


def at(*sizes):
    return [{"seq_len": size} for size in sizes]


class Model(nn.Module):
    """A rotation, and something that depends on sizes."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(rope_of(x), *x.shape[:2])


def pad_to(y, multiple, added):
    length = y.shape[1]
    if -length % multiple > 0:
        return nn.functional.pad(y, (0, 0, 0, -length % multiple))[:, :length]
    return y + added


def test_another_branch_of_the_same_values_is_verified(tmp_path):
    model = Model(lambda y, b, n: pad_to(y, 4, 0.0))
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.config["sizes_to_verify"] == at(4, 8, 128)
    shapes = {"batch_size 3, seq_len 4", "batch_size 3, seq_len 8", "batch_size 3, seq_len 128"}
    assert shapes <= set(bundle.report.shapes["model"])
    assert shapes <= set(verify(bundle.path).shapes["model"])
    x = torch.randn(1, 12, 16)
    torch.testing.assert_close(
        torch.as_tensor(load(bundle, "model")(x=x)["output"]), rope_of(x), rtol=0, atol=1e-5
    )


def sum_windows(y, b, n):
    """Sum windows of 8: padded, and each with the one before it, where there are several."""
    added = -n % 8
    y = nn.functional.pad(y, (0, 0, 0, added)) if added else y
    windows = y.unflatten(1, (-1, 8))
    if n > 8:
        before = nn.functional.pad(windows, (0, 0, 0, 0, 1, 0))[:, :-1]
        windows = windows + before
    return windows.flatten(1, 2)[:, :n]


# The first trace covers too little: few sizes are a multiple; 7 is one window.
@pytest.mark.parametrize("name", ["x", "input_ids"])
def test_a_branch_that_covers_the_example_is_traced(tmp_path, name):
    class Windows(nn.Module):
        def forward(self, **inputs):
            x = inputs[name]
            x = x if name == "x" else nn.functional.one_hot(x, 16).float()
            return sum_windows(rope_of(x), *x.shape[:2])

    example = torch.randn(2, 16, 16) if name == "x" else torch.arange(32).reshape(2, 16) % 16
    bundle = export_model(Windows(), {name: example}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {}
    assert bundle.manifest.config["traced_sizes"]["seq_len"] == 17
    session = load(bundle, "model")
    for size in (5, 8, 24, 39):
        value = (
            torch.randn(3, size, 16) if name == "x" else torch.arange(3 * size).reshape(3, -1) % 16
        )
        want = Windows()(**{name: value})
        torch.testing.assert_close(session(**{name: value})["output"], want, rtol=0, atol=1e-5)


def bounded(y, b, n):
    return y * max(1, n - 30)


# Of other values at some sizes.
WRONG = {
    "at-multiples": lambda y, b, n: pad_to(y, 4, 1.0),
    "at-one": lambda y, b, n: y * 2 if n == 37 else y,
    "at-one-token": lambda y, b, n: y * 2 if b * n == 1 else y,
    "of-both": lambda y, b, n: y * 2 if b * n > 200 else y,
    "of-their-sum": lambda y, b, n: y * 2 if b + n > 90 else y,
}


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_another_branch_of_other_values_is_refused(tmp_path, function):
    with pytest.raises(CheckFailedError, match="not equal to eager") as caught:
        export_model(
            Model(function), {"x": torch.randn(2, 41, 16)}, tmp_path / "b", formats=["onnx"]
        )
    is_assumed = function is WRONG["at-one-token"]  # torch.export assumes that no size is 1
    assert is_assumed or "test_size_limits.py, line" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_both_sides_of_a_maximum_are_verified(tmp_path):
    bundle = export_model(Model(bounded), {"x": X}, tmp_path / "b", formats=["onnx", "program"])
    assert bundle.manifest.graphs["model"].max_size == {}
    assert {f"batch_size 3, seq_len {size}" for size in (32, 128)} < set(
        bundle.report.shapes["model"]
    )
    # TorchScript keeps the branch that was traced.
    with warns_of_limit():
        bundle = export_model(Model(bounded), {"x": X}, tmp_path / "c", formats=["torchscript"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 31}
    (sizes,) = bundle.report.unverified
    assert sizes.startswith("sizes other than max(1, seq_len - 30) == ")
    assert bundle.manifest.parity["unverified"] == {sizes: "not equal: a limit"}


def test_a_branch_past_the_models_own_length_is_a_limit(tmp_path):
    config = types.SimpleNamespace(max_position_embeddings=32)
    model = Model(WRONG["at-one"], config=config)
    with warns_of_limit():
        bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 36}


class Second(nn.Module):
    """Has a condition on the second input's size."""

    def forward(self, x, y):
        return rope_of(x) * (2 if y.shape[1] > 40 else 1) + y


def test_a_condition_on_another_input_is_a_limit(tmp_path):
    with warns_of_limit():
        bundle = export_model(Second(), {"x": X, "y": X}, tmp_path / "b", formats=["onnx"])
    assert bundle.manifest.graphs["model"].max_size == {"seq_len": 40}


def test_the_limit_of_a_size_with_another_name(tmp_path):
    model = Model(lambda y, b, n: y * (2 if b > 7 else 1))
    shapes = {"x": {0: "rows", 1: "length"}}
    with warns_of_limit():
        bundle = export_model(
            model, {"x": X}, tmp_path / "b", formats=["onnx"], dynamic_shapes=shapes
        )
    assert bundle.manifest.graphs["model"].max_size == {"rows": 7}
    assert "rows 1, length 1" in bundle.report.shapes["model"]


class Growing(nn.Module):
    """Keeps tables, and makes them anew for longer inputs."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        length = x.shape[1]
        if self.kept.get("length", 0) < length:
            self.kept["length"], self.kept["x"] = length, torch.ones(length, 1)
        return rope_of(x) * self.kept["x"][:length]


def test_tables_that_a_model_keeps_are_no_limit(tmp_path):
    model = Growing({})
    bundle = export_model(model, {"x": X}, tmp_path / "b")
    assert model.kept == {}
    assert bundle.manifest.graphs["model"].max_size == {}
    assert "batch_size 1, seq_len 17" in bundle.report.shapes["model"]


def rotary_of(x, length):
    return rope_of(x) if length else x


class Given(nn.Module):
    """Passes a size to its rotary function."""

    def forward(self, x):
        return rotary_of(x, x.shape[1])


def test_a_function_with_a_size_argument_is_fused(tmp_path):
    bundle = export_model(Given(), {"x": X}, tmp_path / "b")
    assert bundle.manifest.graphs["model"].rotary_nodes == 1


class Learned(nn.Module):
    """Adds learned positions of 32 rows, found in one of several ways."""

    def __init__(self, find):
        super().__init__()
        self.rows, self.find = nn.Embedding(32, 16), find

    def forward(self, x, positions=None):
        return rope_of(x) + self.find(self.rows, x.shape[1], positions)


LOOKUPS = {
    "embedding": (lambda rows, n, _: rows(torch.arange(n)), 32),
    "offset": (lambda rows, n, _: rows(torch.arange(n)[None].expand(1, -1) + 2), 30),
    "later start": (lambda rows, n, _: rows(torch.arange(1, n + 1, dtype=torch.int32)), 31),
    "index": (lambda rows, n, _: rows.weight[torch.arange(n)], 32),
    "index_select": (lambda rows, n, _: rows.weight.index_select(0, torch.arange(n)), 32),
    "slice": (lambda rows, n, _: rows.weight[:n], 32),
    "clamped": (lambda rows, n, _: rows(torch.arange(n).clamp(max=31)), None),
}


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS)
def test_the_rows_of_learned_positions_are_a_limit(tmp_path, case):
    find, longest = case
    model = Learned(find)
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx"], quick=True)
    wanted = {} if longest is None else {"seq_len": longest}
    assert bundle.manifest.graphs["model"].max_size == wanted
    x = torch.randn(1, longest or 50, 16)
    session = load(bundle, "model")
    torch.testing.assert_close(session(x=x)["output"], model(x).detach(), rtol=0, atol=1e-5)
    if longest is not None:
        with pytest.raises(RotaryExportError, match=f"seq_len must be <= {longest}, "):
            session(x=torch.randn(1, longest + 1, 16))


def test_the_rows_of_learned_positions_are_limits_of_an_input(tmp_path):
    model = Learned(lambda rows, _, positions: rows(positions[..., None].long())[..., 0, :])
    example = {"x": X, "positions": torch.arange(6, dtype=torch.int32).repeat(2, 1)}
    bundle = export_model(model, example, tmp_path / "b", formats=["onnx"], quick=True)
    info = bundle.manifest.graphs["model"]
    assert ([each.limits for each in info.inputs], info.max_size) == ([None, (0, 31)], {})
    with pytest.raises(RotaryExportError, match=r"positions.*\b31\b.*got 32"):
        load(bundle, "model")(x=X, positions=example["positions"] + 27)


def stretch(y, by):
    """Rotate by positions that are divided by a number."""
    angle = torch.arange(y.shape[1])[:, None] / by * 0.5 ** torch.arange(8)
    return rotate_by(y, torch.cat((angle, angle), -1))


def rotate_by(x, angle):
    return x * angle.cos() + torch.cat((-x[..., 8:], x[..., :8]), -1) * angle.sin()


MAXIMA = {
    "max": lambda y, b, n: stretch(y, max(1.0, n / 8)),
    "min": lambda y, b, n: stretch(y, 1 / min(1.0, 8 / n, 9 / n)),
    "of whole numbers": lambda y, b, n: stretch(y, max(8, n, 9)),
}


@pytest.mark.parametrize("function", MAXIMA.values(), ids=MAXIMA)
def test_a_maximum_of_a_quotient_is_one_in_the_graph(tmp_path, function):
    model = Model(function)
    bundle = export_model(model, {"x": X}, tmp_path / "b", formats=["onnx", "program"], quick=True)
    assert bundle.manifest.graphs["model"].max_size == {}
    for size in (1, 8, 9, 50):
        x = torch.randn(1, size, 16)
        for runtime in ("onnxruntime", "program"):
            got = torch.as_tensor(load(bundle, "model", runtime, allow_code=True)(x=x)["output"])
            torch.testing.assert_close(got, model(x), rtol=0, atol=1e-4)


def test_a_limit_that_the_model_does_not_have_is_said(tmp_path):
    """TorchScript keeps one argument of a maximum."""
    with pytest.warns(
        UsageWarning, match=r"^seq_len <= 8 in this graph: .* accepts 9, .*limits.py"
    ):
        bundle = export_model(
            Model(MAXIMA["max"]), {"x": X}, tmp_path / "b", formats=["torchscript"], quick=True
        )
    manifest = bundle.manifest
    assert manifest.graphs["model"].max_size == {"seq_len": 8}
    (reason,) = manifest.config["limits"].items()
    assert reason[0] == "seq_len <= 8"
    assert reason[1].startswith("max(1, seq_len / 8) == 1 (at ")
    assert any("seq_len <= 8 in this graph" in note for note in manifest.parity["notes"])


def grow_base(y, b, n):
    """As dynamic NTK: longer sequences have another base."""
    base = 100.0 * (4.0 * n / 8 - 3.0) ** (8 / 6) if n > 8 else 100.0
    angle = torch.arange(n)[:, None] / base ** (torch.arange(8) / 8)
    return rotate_by(y, torch.cat((angle, angle), -1))


BRANCHES = {
    "from a length on": (grow_base, 12, 9, 8),
    "up to a length": (grow_base, 6, 8, 9),
    "of the example, not of the trace": (lambda y, b, n: y * (2 if n > 8 else 1), 16, 9, 8),
    "in the middle": (lambda y, b, n: y * (2 if n > 23 else 1) if n < 30 else y, 41, 30, 29),
}


@pytest.mark.parametrize("case", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_by_length_is_a_limit_on_its_side(tmp_path, case):
    function, length, legal, other = case
    model, word = Model(function), "<=" if legal < other else ">="
    with pytest.warns(UsageWarning, match=f"^seq_len {word} {legal} in this graph: .*{other}, but"):
        bundle = export_model(
            model, {"x": torch.randn(2, length, 16)}, tmp_path / "b", formats=["onnx"], quick=True
        )
    assert list(bundle.manifest.config["limits"]) == [f"seq_len {word} {legal}"]
    session, x = load(bundle, "model"), torch.randn(1, legal, 16)
    torch.testing.assert_close(session(x=x)["output"], model(x), rtol=0, atol=1e-5)
    with pytest.raises(RotaryExportError, match=f"seq_len must be {word} {legal}, got {other}"):
        session(x=torch.randn(1, other, 16))
    assert verify(bundle.path).passed


class Stem(nn.Module):
    """A convolution of 5 samples, or of patches of 4."""

    def __init__(self, size, stride, whole=False):
        super().__init__()
        self.conv = nn.Conv1d(1, 16, size, stride=stride)
        self.whole = whole

    def forward(self, wave):
        if self.whole and wave.shape[1] % 4:
            raise ValueError(f"whole patches of 4, got {wave.shape[1]}")
        return rope_of(self.conv(wave[:, None]).transpose(1, 2))


WAVE = {"wave": torch.randn(2, 40)}


def test_a_smallest_size_is_found(tmp_path):
    shapes = {"wave": {0: "rows", 1: "samples"}}
    bundle = export_model(Stem(5, 2), WAVE, tmp_path / "b", dynamic_shapes=shapes)
    assert bundle.manifest.graphs["model"].min_size == {"samples": 5}
    assert "rows 1, samples 5" in bundle.report.shapes["model"]
    assert verify(bundle.path).passed
    session = load(bundle, "model")
    assert session(wave=torch.randn(1, 5))["output"].shape == (1, 1, 16)
    with pytest.raises(RotaryExportError, match="samples must be >= 5, got 4"):
        session(wave=torch.randn(1, 4))


def test_a_multiple_is_found(tmp_path):
    model, shapes = Stem(4, 4, whole=True), {"wave": {0: "rows", 1: "samples"}}
    bundle = export_model(model, WAVE, tmp_path / "b", dynamic_shapes=shapes)
    graph = bundle.manifest.graphs["model"]
    assert graph.inputs[0].shape == ("rows", "4 * samples_div_4")
    session = load(bundle, "model")
    wave = torch.randn(3, 28)
    want = model(wave).detach()
    torch.testing.assert_close(session(wave=wave)["output"], want, rtol=0, atol=1e-5)
    with pytest.raises(
        RotaryExportError, match=r"shape \(rows, 4 \* samples_div_4\), .* \(3, 30\)"
    ):
        session(wave=torch.randn(3, 30))


@pytest.mark.parametrize(
    "size", [{"multiple": 4, "min": 8}, 4 * torch.export.Dim("n", min=2)], ids=["dict", "torch"]
)
def test_a_multiple_that_is_given(tmp_path, size):
    model = Stem(4, 4, whole=True)
    bundle = export_model(
        model, WAVE, tmp_path / "b", dynamic_shapes={"wave": {1: size}}, formats=["onnx"]
    )
    graph = bundle.manifest.graphs["model"]
    assert list(graph.min_size.values()) == [2]
    load(bundle, "model")(wave=torch.randn(2, 8))
    with pytest.raises(RotaryExportError, match="must be >= 2, got 1"):
        load(bundle, "model")(wave=torch.randn(2, 4))
