"""The op in the place of the functions of a model, for as long as it is being exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rotary_export.errors import CheckFailedError
from rotary_export.models.find.calls import (
    Call,
    Function,
    Target,
    find_targets,
    is_rotary_name,
    make_signature,
    patch_targets,
    record_calls,
)
from rotary_export.models.find.probe import NotReplacedError, find_rotation, is_close
from rotary_export.models.find.rotation import Rotation, Tables, compute_tables, rotate_slots

Key = tuple[Target, tuple[Any, ...]]


@dataclass(frozen=True)
class Finding:
    """What became of the calls of one function.

    Attributes:
        function: Its module and name.
        calls: How often the model called it, in one run.
        fused: How many of these calls the op replaces.
        what: The layout, the channels and the dimensions of what it rotates.
        reason: Why the calls were left alone; "" if they were not.
    """

    function: str
    calls: int
    fused: int
    what: str
    reason: str = ""


@dataclass
class Replacement:
    """What will be replaced in a model.

    Attributes:
        targets: The functions to patch.
        rotations: What their calls compute, by signature.
        answers: One recorded call of each signature.
        findings: What was found, for people.
        tables_from: Modules whose tables go into the op alone: they compute them in float32.
    """

    targets: list[Target] = field(default_factory=list)
    rotations: dict[Key, Rotation] = field(default_factory=dict)
    answers: dict[Key, Call] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    tables_from: list[nn.Module] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Rotary calls in one run."""
        return sum(finding.calls for finding in self.findings)

    @property
    def fused(self) -> int:
        """Those of them that the op replaces."""
        return sum(finding.fused for finding in self.findings)


def find_replacement(model: nn.Module, run: Callable[[], Any]) -> Replacement:
    """Run a model once and find out what its rotary functions compute.

    Args:
        model: The model.
        run: Runs it, with two positions or more, and rows of different positions where it takes
            them.

    Returns:
        What to replace, and what was found.
    """
    found = Replacement(find_targets(model))
    with _watch_tables(model) as makers:
        calls = record_calls(run, found.targets)
    reasons: dict[Key, str] = {}
    fused: Counter[Key] = Counter()
    left: Counter[Key] = Counter()
    unfused_tables: set[int] = set()

    def visit(call: Call) -> bool:
        """Return whether the call, or one that it makes, is replaced."""
        key = (call.target, call.signature)
        if _explain(call, key, found, reasons):
            fused[key] += 1
            return True
        inner = [visit(child) for child in call.children]
        unfused_tables.update(id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor))
        if key in reasons and not any(inner):
            left[key] += 1
        return any(inner)

    for call in calls:
        visit(call)
    found.rotations = {key: found.rotations[key] for key in fused}
    found.findings = [
        Finding(key[0].name, count, count, str(found.rotations[key]))
        for key, count in fused.items()
    ] + [Finding(key[0].name, count, 0, "", reasons[key]) for key, count in left.items()]
    found.targets = list({id(key[0]): key[0] for key in found.rotations}.values())
    kept = {id(leaf) for call in calls for leaf in call.leaves if isinstance(leaf, Tensor)}
    found.tables_from = list(
        {
            id(maker): maker
            for table, maker in makers.items()
            if table in kept and not _feeds(maker, makers, unfused_tables)
        }.values()
    )
    return found


def _feeds(maker: nn.Module, makers: Mapping[int, nn.Module], tables: set[int]) -> bool:
    return any(table in tables for table, other in makers.items() if other is maker)


def _explain(call: Call, key: Key, found: Replacement, reasons: dict[Key, str]) -> bool:
    """Whether a call is a rotation, as all others of its signature are."""
    if key in reasons:
        return False
    try:
        rotation = find_rotation(call) if key not in found.rotations else found.rotations[key]
    except NotReplacedError as error:
        reasons[key] = str(error)
        return False
    if rotation is None:
        return False
    found.rotations[key] = rotation
    found.answers.setdefault(key, call)
    return True


@contextmanager
def _watch_tables(model: nn.Module) -> Iterator[dict[int, nn.Module]]:
    """Note which rotary module made which tensor, by its id."""
    makers: dict[int, nn.Module] = {}
    held: list[Any] = []  # an id is of use only while its tensor lives

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        held.append(output)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                makers[id(leaf)] = module

    with ExitStack() as stack:
        for module in model.modules():
            if is_rotary_name(type(module).__name__):
                stack.callback(module.register_forward_hook(hook).remove)
        yield makers


@contextmanager
def replace_calls(found: Replacement, *, check: bool = False) -> Iterator[Counter[str]]:
    """Put the op in the place of what was found; everything comes back at the end.

    Args:
        found: As `find_replacement` found it.
        check: Return what the functions return, compared with what the op does.

    Yields:
        Counts replaced calls by function.

    Raises:
        CheckFailedError: With `check`: the op computes something else for a call.
    """
    counts: Counter[str] = Counter()
    memo: dict[Any, tuple[list[Any], list[Tables]]] = {}
    probing = False

    def ask(function: Callable[[], Any]) -> Any:
        """Run the model's own function as it is, the functions that it calls included."""
        nonlocal probing
        probing = True
        try:
            return function()
        finally:
            probing = False

    def make_wrapper(target: Target) -> Function:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            key = (target, make_signature(leaves))
            rotation = None if probing else found.rotations.get(key)
            if rotation is None:
                return target.function(*args, **kwargs)
            sources = [slot.source for slot in rotation.slots]
            memo_key = (target, *_identify(leaves, sources, rotation))
            if memo_key not in memo:
                tables = ask(lambda: compute_tables(target.function, leaves, tree, rotation))
                # Held, so that their ids stay taken.
                held = [leaf for index, leaf in enumerate(leaves) if index not in sources]
                memo[memo_key] = held, tables
            rotated = rotate_slots([leaves[s] for s in sources], memo[memo_key][1], rotation)
            counts[target.name] += 1
            if check:
                output = ask(lambda: target.function(*args, **kwargs))
                _check_rotated(target, rotation, pytree.tree_leaves(output), rotated)
                return output
            return _rebuild(found.answers[key], leaves, rotation, rotated)

        return wrapper

    with ExitStack() as stack:
        for module in [] if check else found.tables_from:
            handle = module.register_forward_pre_hook(_widen, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(patch_targets(found.targets, make_wrapper))
        yield counts


def _check_rotated(
    target: Target, rotation: Rotation, output: list[Any], rotated: list[Tensor]
) -> None:
    for slot, ours in zip(rotation.slots, rotated, strict=True):
        if not is_close(ours, output[slot.result]):
            difference = (ours - output[slot.result]).abs().max()
            raise CheckFailedError(
                f"the op differs from {target.name} by {float(difference):.3g} for a tensor of "
                f"shape {tuple(ours.shape)}, though not where it was traced"
            )


def _widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Cast half types to float32: what a rotary module gets says what type its tables have."""

    def widen(leaf: Any) -> Any:
        half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if half else leaf

    return pytree.tree_map(widen, (args, kwargs))


def _identify(leaves: list[Any], sources: list[int], rotation: Rotation) -> Iterator[Any]:
    """Say which tables a call takes: layers that share their angles share one computation."""
    for index, leaf in enumerate(leaves):
        if index not in sources:
            if isinstance(leaf, torch.SymInt):
                yield str(leaf)
            else:
                yield leaf if isinstance(leaf, (int, float, str)) else id(leaf)
            continue
        for axis, name in enumerate(rotation.axes):
            if name in "SH" or (name == "B" and rotation.whole_batch):
                size = leaf.shape[axis]
                yield str(size) if isinstance(size, torch.SymInt) else int(size)
        yield leaf.dtype


def _rebuild(answer: Call, leaves: list[Any], rotation: Rotation, rotated: list[Tensor]) -> Any:
    """Nest the results as the function does."""
    output = list(answer.output)
    for index, value in enumerate(output):
        if isinstance(value, Tensor):  # an argument that comes back as it was
            places = [i for i, leaf in enumerate(answer.leaves) if leaf is value]
            output[index] = leaves[places[0]] if places else None
    for slot, value in zip(rotation.slots, rotated, strict=True):
        output[slot.result] = value
    return pytree.tree_unflatten(output, answer.output_tree)
