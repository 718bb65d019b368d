"""The cases of the op that tests sweep, with inputs; `oracles` computes the expected outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.oracles import Expected, Tensors, compute_eager, compute_expected
from torch import Tensor

from rotary_export.proof.tolerances import TOLERANCES

TYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
TYPE_PAIRS = (
    *((name, name) for name in TYPES),
    *((name, "float32") for name in TYPES if name != "float32"),
)
ID_FORMS = ("per-batch", "shared", "offset", "tables-per-batch", "tables-shared")


# ---- the table


@dataclass(frozen=True)
class Case:
    """One call of the op; sizes as in (B, N, S, H), with M rows in a 2-D table."""

    types: tuple[str, str] = ("float32", "float32")
    interleaved: bool = False
    rotary_dim: int = 0
    flat: bool = False  # X is (B, S, N*H)
    ids: str = "per-batch"
    kv_heads: int = 0
    scaled: bool = False
    batch: int = 2
    heads: int = 3
    seq_len: int = 5
    head_dim: int = 8
    rows: int = 9
    edge: str = ""

    @property
    def id(self) -> str:
        x, table = (SHORT[name] for name in self.types)
        words = [
            x if x == table else f"{x}.{table}",
            "interleaved" if self.interleaved else "half",
            "partial" if self.rotary_dim else "full",
            "3d" if self.flat else "",
            self.ids,
            "key" if self.kv_heads else "",
            "xpos" if self.scaled else "",
            self.edge,
        ]
        return "-".join(word for word in words if word)

    @property
    def attributes(self) -> dict[str, int]:
        """The op's attributes, ONNX names."""
        given = {
            "interleaved": int(self.interleaved),
            "rotary_embedding_dim": self.rotary_dim,
            "num_heads": self.heads if self.flat else 0,
            "kv_num_heads": self.kv_heads if self.flat else 0,
        }
        return {name: value for name, value in given.items() if value}

    @property
    def torch_options(self) -> dict[str, int | bool]:
        """The op's attributes, names and types of the torch op."""
        given = self.attributes
        given["rotary_dim"] = given.pop("rotary_embedding_dim", 0)
        return given | {"interleaved": self.interleaved}

    def make_inputs(self, seed: int = 0) -> Tensors:
        inputs = make_inputs(
            np.random.default_rng(seed),
            self.types,
            self.ids,
            sizes=(self.batch, self.heads, self.seq_len, self.head_dim),
            kv_heads=self.kv_heads,
            rotary_dim=self.rotary_dim,
            scaled=self.scaled,
            rows=self.rows,
        )
        return {
            k: flatten_heads(v) if self.flat and k in ("X", "key") else v for k, v in inputs.items()
        }

    def compute_eager(self, inputs: Tensors) -> list[Tensor]:
        """Return Y, and key_out if there is a key."""
        split = self._split(inputs)
        outputs = compute_eager(split, self.interleaved)
        return [flatten_heads(y) for y in outputs] if self.flat else outputs

    def compute_expected(self, inputs: Tensors) -> list[Expected]:
        """Return Y, and key_out if there is a key."""
        expected = compute_expected(self._split(inputs), self.interleaved)
        if not self.flat:
            return expected
        return [Expected(*(_flatten_array(part) for part in head)) for head in expected]

    @property
    def max_ulp(self) -> float:
        """How far from the oracle an implementation may be."""
        half = TYPES[self.types[0]].itemsize == 2
        name = "oracle-half" if half else "oracle-xpos" if self.scaled else "oracle-rotate"
        return TOLERANCES[name].max_ulp

    def _split(self, inputs: Tensors) -> Tensors:
        if not self.flat:
            return inputs
        shape = {"X": (self.heads, self.head_dim), "key": (self.kv_heads, self.head_dim)}
        return {
            k: v.unflatten(-1, shape[k]).transpose(1, 2) if k in shape else v
            for k, v in inputs.items()
        }


FORMS = [
    Case(types, interleaved, rotary_dim, flat, ids, kv_heads, scaled)
    for types, interleaved, rotary_dim, flat, ids, kv_heads, scaled in itertools.product(
        TYPE_PAIRS, (False, True), (0, 4), (False, True), ID_FORMS, (0, 2), (False, True)
    )
]
_BUSY = {"kv_heads": 1, "scaled": True}
EDGES = [
    *(Case(ids=ids, edge="decode", seq_len=1, **_BUSY) for ids in ID_FORMS),
    *(Case(ids=ids, edge="empty", seq_len=0, **_BUSY) for ids in ID_FORMS),
    *(Case(ids=ids, edge="no-batch", batch=0, **_BUSY) for ids in ID_FORMS),
    *(Case(ids=ids, edge="one-batch", batch=1, **_BUSY) for ids in ID_FORMS),
    *(Case(flat=True, ids=ids, edge="3d-decode", seq_len=1, **_BUSY) for ids in ID_FORMS),
    Case(flat=True, edge="empty", seq_len=0, **_BUSY),
    Case(flat=True, edge="no-batch", batch=0, **_BUSY),
    Case(("float16", "float32"), True, 4, edge="decode", seq_len=1, **_BUSY),
    Case(("bfloat16", "float32"), rotary_dim=2, edge="smallest", head_dim=6, seq_len=7, **_BUSY),
    Case(
        rotary_dim=22, edge="odd-sizes", batch=3, heads=7, seq_len=13, head_dim=51, rows=17, **_BUSY
    ),
    Case(interleaved=True, rotary_dim=22, edge="odd-sizes", batch=3, head_dim=51, **_BUSY),
    Case(edge="wide", head_dim=256, seq_len=33, rows=40, **_BUSY),
    Case(edge="one-row", rows=1, seq_len=1, **_BUSY),
]
# More positions than table rows, so ids repeat. ONNX Runtime's own op refuses that: not in CASES.
LONG = [
    Case(types, ids=ids, edge="longer-than-table", seq_len=20, rows=4, **_BUSY)
    for types in (("float32", "float32"), ("float64", "float64"))
    for ids in ("per-batch", "shared")
]
CASES = FORMS + EDGES


FIELDS = ("types", "interleaved", "rotary_dim", "flat", "ids", "kv_heads", "scaled")


def pick_pairwise(cases: Sequence[Case], names: Sequence[str] = FIELDS) -> list[Case]:
    """Pick cases so that any two values of two fields that occur together in `cases` still do."""

    def pairs(case: Case) -> set[object]:
        return set(itertools.combinations([(name, getattr(case, name)) for name in names], 2))

    pairs_of = {case: pairs(case) for case in cases}
    missing = set().union(*pairs_of.values())
    picked = []
    while missing:
        best = max(cases, key=lambda case: len(pairs_of[case] & missing))
        picked.append(best)
        missing -= pairs_of[best]
    return picked


# For tests that are too slow for all CASES.
PAIRWISE = pick_pairwise(FORMS)


def sweep(cases: Sequence[Case] = tuple(CASES)) -> pytest.MarkDecorator:
    """Parametrise a test over `case`."""
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def group_cases(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Group cases for `check_each`: the edges, and the others, if many, by types and layout."""
    groups: dict[str, list[Case]] = {}
    words = 0 if len(cases) < 100 else 2
    for case in cases:
        name = "edges" if case.edge else "-".join(case.id.split("-")[:words]) or "pairwise"
        groups.setdefault(name, []).append(case)
    return groups


def check_each(cases: Sequence[Case], check: Callable[[Case], object]) -> None:
    """Check many cases in one test, which takes a tenth of the time of a test for each.

    All cases are checked; the failure names those that fail and contains the first error.
    """
    errors = []
    for case in cases:
        try:
            check(case)
        except (Exception, pytest.fail.Exception) as error:
            errors.append((case.id, error))
    if errors:
        names = ", ".join(name for name, _ in errors)
        raise AssertionError(f"{len(errors)} of {len(cases)} cases fail: {names}") from errors[0][1]


# ---- inputs


def make_inputs(
    rng: np.random.Generator,
    types: tuple[str, str] = ("float32", "float32"),
    form: str = "per-batch",
    *,
    sizes: tuple[int, int, int, int] = (2, 3, 5, 8),
    kv_heads: int = 0,
    rotary_dim: int = 0,
    scaled: bool = False,
    rows: int | None = None,
) -> Tensors:
    """Make random inputs of 4-D X, by the op's names; `rows` are those of a 2-D table."""
    batch, _, seq_len, head_dim = sizes
    half = (rotary_dim or head_dim) // 2
    rows = seq_len + 3 if rows is None else rows

    def draw(*shape: int, dtype: str, mean: float = 0.0) -> Tensor:
        return torch.from_numpy(rng.normal(mean, 1 + mean, shape)).to(TYPES[dtype])

    with_ids = not form.startswith("tables")
    table_shape = (rows, half) if with_ids else (1 if "shared" in form else batch, seq_len, half)
    inputs = {
        "X": draw(*sizes, dtype=types[0]),
        "cos_cache": draw(*table_shape, dtype=types[1]),
        "sin_cache": draw(*table_shape, dtype=types[1]),
    }
    id_shape = {"per-batch": (batch, seq_len), "shared": (1, seq_len), "offset": (1,)}
    if with_ids:
        high = rows - seq_len + 1 if form == "offset" else rows
        inputs["position_ids"] = torch.from_numpy(rng.integers(0, high, id_shape[form]))
    if kv_heads:
        inputs["key"] = draw(batch, kv_heads, seq_len, head_dim, dtype=types[0])
    if scaled:
        inputs["scale_cache"] = draw(*table_shape, dtype=types[1], mean=3.0)
    return inputs


def flatten_heads(x: Tensor) -> Tensor:
    """(B, N, S, H) -> (B, S, N*H)."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _flatten_array(x: np.ndarray) -> np.ndarray:
    batch, heads, seq_len, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, seq_len, heads * head_dim)
