"""What will be replaced in a model, found by running it once; and why the rest is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rotary_export.compat import pytree
from rotary_export.models.find.calls import (
    RecordedCall,
    generalize,
    make_signature,
    record_calls,
)
from rotary_export.models.find.candidates import Candidate, find_candidates
from rotary_export.models.find.lowering import Lowering
from rotary_export.models.find.names import is_rotary_name
from rotary_export.models.find.probe import NotReplacedError, find_lowering

Key = tuple[Candidate, tuple[Any, ...]]  # a function, and the signature of a call


@dataclass(frozen=True)
class Finding:
    """The result for the calls of one function.

    Attributes:
        function: Its module and name.
        calls: How often the model called it, in one run.
        fused: How many of these calls the op replaces.
        rotation: The layout, the channels and the dimensions of what it rotates.
        reason: Why the calls are not replaced; "" if they are.
    """

    function: str
    calls: int
    fused: int
    rotation: str
    reason: str = ""


@dataclass
class Replacement:
    """What will be replaced in a model.

    Attributes:
        candidates: The functions to patch.
        lowerings: How their calls map onto the op, by signature.
        recorded_calls: One recorded call of each signature.
        findings: What was found, human-readable.
        table_modules: Modules whose tables only the op reads: they compute them in float32.
    """

    candidates: list[Candidate] = field(default_factory=list)
    lowerings: dict[Key, Lowering] = field(default_factory=dict)
    recorded_calls: dict[Key, RecordedCall] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    table_modules: list[nn.Module] = field(default_factory=list)

    def find(self, candidate: Candidate, leaves: Sequence[Any]) -> Key | None:
        """Return the key of a call, flattened; None: it stays.

        A call with another integer than those that were recorded is taken for a call with another
        size, unless the integer decides how calls map onto the op.
        """
        signature = make_signature(leaves)
        if (candidate, signature) in self.lowerings:
            return candidate, signature
        general = generalize(signature)
        keys = [k for k in self.lowerings if k[0] is candidate and generalize(k[1]) == general]
        same = len({self.lowerings[key] for key in keys}) == 1
        return keys[0] if same else None

    @property
    def calls(self) -> int:
        """Number of rotary calls in one run."""
        return sum(finding.calls for finding in self.findings)

    @property
    def fused(self) -> int:
        """Number of those that the op replaces."""
        return sum(finding.fused for finding in self.findings)


def find_replacement(model: nn.Module, run: Callable[[], Any]) -> Replacement:
    """Run a model once and find out what its rotary functions compute.

    Args:
        model: The model.
        run: Runs it, with two positions or more, and rows of different positions where it accepts
            them.

    Returns:
        What to replace, and what was found.
    """
    found = Replacement(find_candidates(model))
    with _record_makers(model) as makers:
        calls = record_calls(run, found.candidates)
    reasons: dict[Key, str] = {}
    fused: Counter[Key] = Counter()
    not_replaced: Counter[Key] = Counter()
    tables_elsewhere: set[int] = set()  # ids of tensors that go into calls that stay

    def visit(call: RecordedCall) -> bool:
        """Return whether the call, or one that it makes, is replaced."""
        key = (call.candidate, call.signature)
        if _has_lowering(call, key, found, reasons):
            fused[key] += 1
            return True
        inner = [visit(child) for child in call.children]
        tables_elsewhere.update(id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor))
        if key in reasons and not any(inner):
            not_replaced[key] += 1
        return any(inner)

    for call in calls:
        visit(call)
    found.lowerings = {key: found.lowerings[key] for key in fused}
    found.findings = [
        Finding(key[0].name, count, count, str(found.lowerings[key]))
        for key, count in fused.items()
    ] + [Finding(key[0].name, count, 0, "", reasons[key]) for key, count in not_replaced.items()]
    found.candidates = list({id(key[0]): key[0] for key in found.lowerings}.values())
    found.table_modules = _find_table_modules(calls, makers, tables_elsewhere)
    return found


def _has_lowering(
    call: RecordedCall, key: Key, found: Replacement, reasons: dict[Key, str]
) -> bool:
    """Return whether a call maps onto the op; note its lowering, or the reason why not."""
    if key in reasons:
        return False
    try:
        lowering = found.lowerings[key] if key in found.lowerings else find_lowering(call)
    except NotReplacedError as error:
        reasons[key] = str(error)
        return False
    if lowering is None:
        return False
    found.lowerings[key] = lowering
    found.recorded_calls.setdefault(key, call)
    return True


@contextmanager
def _record_makers(model: nn.Module) -> Iterator[dict[int, nn.Module]]:
    """Record which rotary module made which tensor, by its id."""
    makers: dict[int, nn.Module] = {}
    held: list[Any] = []  # an id is of use only while its tensor lives

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        held.append(output)
        for leaf in pytree.list_leaves(output):
            if isinstance(leaf, Tensor):
                makers[id(leaf)] = module

    with ExitStack() as stack:
        for module in model.modules():
            if is_rotary_name(type(module).__name__):
                stack.callback(module.register_forward_hook(hook).remove)
        yield makers


def _find_table_modules(
    calls: list[RecordedCall], makers: Mapping[int, nn.Module], tables_elsewhere: set[int]
) -> list[nn.Module]:
    """Return the modules whose tensors go into calls, and into none that stays."""
    arguments = {id(leaf) for call in calls for leaf in call.leaves if isinstance(leaf, Tensor)}
    elsewhere = {id(maker) for table, maker in makers.items() if table in tables_elsewhere}
    used = {id(maker): maker for table, maker in makers.items() if table in arguments}
    return [maker for key, maker in used.items() if key not in elsewhere]
