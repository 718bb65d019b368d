"""How faults are planted in a model: context managers, each for a place where they can be.

They are used in two places alike: in a model while it is traced, and in a copy of it in float64,
which shows the effect of a fault.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.models.find import replace as replacing
from rotary_export.models.find.lowering import Lowering, Tables
from rotary_export.models.find.names import is_rotary_name

Plant = Callable[[nn.Module, float], AbstractContextManager[None]]


@contextmanager
def change_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for as long as the context lasts."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def in_modules(
    matches: Callable[[nn.Module], bool],
    change: Callable[[nn.Module, float], AbstractContextManager[Any]],
) -> Plant:
    """Plant a fault in every module that matches; there must be one."""

    @contextmanager
    def plant(model: nn.Module, size: float) -> Iterator[None]:
        modules = [module for module in model.modules() if matches(module)]
        if not modules:
            raise LookupError(f"{type(model).__name__} has no module for this fault")
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(change(module, size))
            yield

    return plant


def _is_rotary(module: nn.Module) -> bool:
    return is_rotary_name(type(module).__name__) and hasattr(module, "inv_freq")


@contextmanager
def _change_argument(module: nn.Module, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Change what a module receives as an argument, by position or by name."""
    index = list(inspect.signature(module.forward).parameters).index(name)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return args, kwargs | {name: change(kwargs[name])}
        return (*args[:index], change(args[index]), *args[index + 1 :]), kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def in_positions(change: Callable[[Tensor, float], Tensor]) -> Plant:
    """Change the positions that the rotary modules receive, (B or 1, S)."""
    return in_modules(
        _is_rotary,
        lambda module, size: _change_argument(
            module, "position_ids", lambda ids: change(ids, size)
        ),
    )


def in_mask(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change the padding mask that the model receives, (B, past + S)."""
    return in_modules(
        lambda module: hasattr(module, "get_input_embeddings") and hasattr(module, "lm_head"),
        lambda module, _: _change_argument(module, "attention_mask", change),
    )


def in_frequencies(change: Callable[[Tensor, float], Tensor]) -> Plant:
    """Change inv_freq, (R/2,)."""
    return in_modules(
        _is_rotary,
        lambda module, size: change_attribute(
            module, "inv_freq", change(module.inv_freq.double(), size).to(module.inv_freq.dtype)
        ),
    )


def scale_base(inv_freq: Tensor, factor: float) -> Tensor:
    exponents = torch.arange(len(inv_freq), dtype=torch.float64) / len(inv_freq)
    return inv_freq * factor**-exponents


def scale_second(inv_freq: Tensor, factor: float) -> Tensor:
    return torch.cat((inv_freq[:1], inv_freq[1:2] * factor, inv_freq[2:]))


def in_attribute(name: str, change: Callable[[Any, float], Any]) -> Plant:
    """Change an attribute of all modules that have it."""
    return in_modules(
        lambda module: hasattr(module, name),
        lambda module, size: change_attribute(module, name, change(getattr(module, name), size)),
    )


Rotate = Callable[[Sequence[Tensor], Sequence[Tables], Lowering], list[Tensor]]
ChangeOp = Callable[[Rotate, Sequence[Tensor], Sequence[Tables], Lowering, float], list[Tensor]]


def in_op(change: ChangeOp) -> Plant:
    """Change what the op computes, or the tables that it reads."""

    def plant(_: nn.Module, size: float) -> AbstractContextManager[None]:
        rotate = replacing.rotate_slots
        return change_attribute(
            replacing,
            "rotate_slots",
            lambda xs, tables, lowering: change(rotate, xs, tables, lowering, size),
        )

    return plant


def in_tables(change: Callable[[Tensor, Tensor, float], Tables]) -> Plant:
    """Change the cos and sin, (B or 1, S, R/2), that the op reads."""
    return in_op(
        lambda rotate, xs, tables, lowering, size: rotate(
            xs, [change(cos, sin, size) for cos, sin in tables], lowering
        )
    )


def in_layout(layout: str) -> Plant:
    return in_op(
        lambda rotate, xs, tables, lowering, _: rotate(xs, tables, replace(lowering, layout=layout))
    )


def keep_slot(index: int) -> Plant:
    """Leave the query (0) or the key (1) as it is."""

    def change(rotate: Rotate, xs: Any, tables: Any, lowering: Lowering, _: float) -> list[Tensor]:
        rotated = rotate(xs, tables, lowering)
        rotated[index] = xs[index]
        return rotated

    return in_op(change)


def shorten(rotate: Rotate, xs: Any, tables: Any, lowering: Lowering, _: float) -> list[Tensor]:
    shorter = replace(lowering, rotary_dim=lowering.rotary_dim - 2)
    return rotate(xs, [(cos[..., :-1], sin[..., :-1]) for cos, sin in tables], shorter)


def skip_last_pair(cos: Tensor, sin: Tensor, _: float) -> Tables:
    return (
        torch.cat((cos[..., :-1], torch.ones_like(cos[..., -1:])), -1),
        torch.cat((sin[..., :-1], torch.zeros_like(sin[..., -1:])), -1),
    )


def take_first_row(cos: Tensor, sin: Tensor, _: float) -> Tables:
    return cos[:1].expand_as(cos), sin[:1].expand_as(sin)


@contextmanager
def use_query_scale(_: nn.Module, __: float) -> Iterator[None]:
    """Scale keys as queries are: calls take turns, each query before its key."""
    rotate, calls = replacing.rotate_slots, 0

    def rotate_wrongly(xs: Any, tables: Any, lowering: Lowering) -> list[Tensor]:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            squares = [(cos, sin, cos * cos + sin * sin) for cos, sin in tables]
            tables = [(cos / square, sin / square) for cos, sin, square in squares]
        return rotate(xs, tables, lowering)

    with change_attribute(replacing, "rotate_slots", rotate_wrongly):
        yield


@dataclass
class Attention:
    """A call of transformers' attention: (B, N, S, H) tensors, and a mask that is True or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    options: dict[str, Any]


def in_attention(
    before: Callable[[Attention, float], None],
    after: Callable[[Tensor, int], Tensor] = lambda output, _: output,
) -> Plant:
    """Change what attention receives and returns, (B, S, N, H); `after` has kv_num_heads."""

    @contextmanager
    def plant(_: nn.Module, size: float) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        attend = FUNCTIONS["sdpa"]

        def attend_wrongly(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> Any:
            if mask is None:  # all positions up to the query's own
                shape = query.shape[-2], key.shape[-2]
                mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])[None, None]
            call = Attention(query, key, value, mask, options)
            before(call, size)
            output, weights = attend(
                module, call.query, call.key, call.value, call.mask, **call.options
            )
            return after(output, key.shape[1]), weights

        FUNCTIONS["sdpa"] = attend_wrongly
        try:
            yield
        finally:
            del FUNCTIONS["sdpa"]

    return plant


def see_next(call: Attention, _: float) -> None:
    call.mask = torch.cat((call.mask[..., :1], call.mask[..., :-1]), -1)


def scale_scores(call: Attention, factor: float) -> None:
    call.options["scaling"] = call.options["scaling"] * factor


def pair_heads_wrongly(call: Attention, _: float) -> None:
    """Head h attends with key h % kv_num_heads, not h // group."""
    kv_num_heads = call.key.shape[1]
    call.query = call.query.unflatten(1, (-1, kv_num_heads)).transpose(1, 2).flatten(1, 2)


def restore_heads(output: Tensor, kv_num_heads: int) -> Tensor:
    return output.unflatten(2, (kv_num_heads, -1)).transpose(2, 3).flatten(2, 3)


@contextmanager
def append_in_front(_: nn.Module, __: float) -> Iterator[None]:
    """Write new keys and values in front of the cached ones."""
    from transformers.cache_utils import DynamicLayer

    def update(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys = torch.cat((keys, self.keys), -2)
        self.values = torch.cat((values, self.values), -2)
        return self.keys, self.values

    with change_attribute(DynamicLayer, "update", update):
        yield


@contextmanager
def widen_window(model: nn.Module, _: float) -> Iterator[None]:
    config: Any = model.config
    with change_attribute(config, "sliding_window", config.sliding_window + 1):
        yield


@contextmanager
def approximate_gelu(module: nn.Module, _: float) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Tensor], __: Tensor) -> Tensor:
        return nn.functional.gelu(args[0], approximate="tanh")

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def round_weight(model: nn.Module, _: float) -> Iterator[None]:
    """Round one weight matrix, the middle one, to bfloat16."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    chosen = layers[len(layers) // 2]
    rounded = chosen.weight.detach().bfloat16().to(chosen.weight.dtype)
    with change_attribute(chosen, "weight", nn.Parameter(rounded)):
        yield
