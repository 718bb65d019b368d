"""Time calls against each other on a machine that others use too.

Calls are interleaved (a, b, a, b, ...), so that a slow moment hits all of them. What counts is the
ratio of neighbours, and of those the median. Its confidence interval shows how far the machine can
be trusted; `measure_noise` measures that beforehand. Standard library only.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Call = Callable[[], object]
Clock = Callable[[], float]

# Calls shorter than this are repeated within one sample: the timer and the loop then cost nothing.
SAMPLE_SECONDS = 2e-3
# What another call has left in the caches is not this one's to write back. (One call is not enough
# where it uses streaming stores: what the cache contains is then replaced by reads alone.)
WARMING_CALLS = 2
MIN_ROUNDS = 9
MAX_ROUNDS = 201
SECONDS = 1.5  # per measurement, if one is not told

# Identical calls that differ by more than this make a few per cent meaningless.
NOISE_LIMIT = 0.05

_Z95 = 1.96


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, in the order they were measured; seconds or a ratio."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median is, with 95 % confidence; no distribution is assumed."""
        ordered = sorted(self.values)
        count = len(ordered)
        skipped = max(0, math.floor((count - _Z95 * math.sqrt(count)) / 2))
        return ordered[skipped], ordered[count - 1 - skipped]

    @property
    def uncertainty(self) -> float:
        """How far an end of the interval is from the median, as a part of the median."""
        middle = self.median
        return max(abs(end - middle) for end in self.interval) / abs(middle)

    def to_dict(self) -> dict[str, float]:
        """Return min, median and max as values that JSON can express."""
        limits = {"min": min(self.values), "median": self.median, "max": max(self.values)}
        return {name: _round(value) for name, value in limits.items()}


def _round(value: float) -> float:
    """Keep four digits: more would be noise, in a file that is read and compared."""
    return float(f"{value:.4g}")


def divide(numerator: Spread, denominator: Spread) -> Spread:
    """Return the ratios of what was measured side by side."""
    pairs = zip(numerator.values, denominator.values, strict=True)
    return Spread(tuple(a / b for a, b in pairs))


def add(one: Spread, other: Spread) -> Spread:
    """Return the sums of what was measured side by side."""
    pairs = zip(one.values, other.values, strict=True)
    return Spread(tuple(a + b for a, b in pairs))


def subtract(longer: Spread, shorter: Spread, parts: int = 1) -> Spread:
    """Return (longer - shorter) / parts, of what was measured side by side."""
    pairs = zip(longer.values, shorter.values, strict=True)
    return Spread(tuple((a - b) / parts for a, b in pairs))


def time_interleaved(
    calls: Mapping[str, Call],
    seconds: float = SECONDS,
    pause: float = 0.0,
    clock: Clock = time.perf_counter,
) -> dict[str, Spread]:
    """Time calls in turns, each after `WARMING_CALLS` of itself that do not count.

    Args:
        calls: By name.
        seconds: About how long it may take; at least `MIN_ROUNDS` rounds are measured.
        pause: Seconds to sleep before each sample, for the threads of the call before to come to
            rest: those of some runtimes go on spinning for a while.
        clock: `time.thread_time` leaves out when other processes had the processor, where all the
            work is done by this thread.

    Returns:
        Seconds of one call in each round, by name.
    """
    repeats = {name: _choose_repeats(call, clock) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > end:
                break
            for name, call in calls.items():
                time.sleep(pause)
                for _ in range(WARMING_CALLS):
                    call()
                times[name].append(_time(call, repeats[name], clock))
    finally:
        if was_enabled:
            gc.enable()
    return {name: Spread(tuple(values)) for name, values in times.items()}


def _time(call: Call, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _choose_repeats(call: Call, clock: Clock) -> int:
    """Warm the call up and find out how often it fits into a sample."""
    call()
    once = max(_time(call, 1, clock), 1e-7)
    if once < SAMPLE_SECONDS:
        once = max(_time(call, max(1, int(SAMPLE_SECONDS / 10 / once)), clock), 1e-7)
    return max(1, math.ceil(SAMPLE_SECONDS / once))


def measure_noise(
    call: Call, seconds: float = SECONDS, pause: float = 0.0, clock: Clock = time.perf_counter
) -> float:
    """Time one call against itself.

    Args:
        call: What is typical of the measurements to come.
        seconds: About how long it may take.
        pause: As in `time_interleaved`.
        clock: Likewise.

    Returns:
        Half the spread of the middle half of the ratios: 0.02 means that single comparisons of
        identical calls are off by 2 %, half of them by more.
    """
    times = time_interleaved({"a": call, "b": call}, seconds, pause, clock)
    ratios = sorted(divide(times["a"], times["b"]).values)
    quarter = len(ratios) // 4
    return (ratios[-1 - quarter] - ratios[quarter]) / 2


def describe_noise(noise: float) -> str | None:
    """Return a warning if the machine is too noisy to tell small differences."""
    if noise <= NOISE_LIMIT:
        return None
    return (
        f"this machine is noisy: identical calls differ by {noise:.0%} (quiet: at most "
        f"{NOISE_LIMIT:.0%}); differences of that size mean nothing"
    )


@dataclass(frozen=True)
class Goal:
    """What a ratio should be.

    Attributes:
        limit: Asked.
        is_maximum: The ratio should be at most `limit`, not at least.
        slack: The part of `limit` by which it may be missed; for "never slower".
    """

    limit: float
    is_maximum: bool = False
    slack: float = 0.0

    def __str__(self) -> str:
        """Return what is asked, as tables show it."""
        return f"{'<=' if self.is_maximum else '>='} {self.limit:g}"

    def judge(self, ratio: Spread) -> str:
        """Return "ok", "missed", or "unsure": missed, but by less than the uncertainty."""
        sign = -1 if self.is_maximum else 1
        wanted = sign * self.limit * (1 - sign * self.slack)
        if sign * ratio.median >= wanted:
            return "ok"
        return "unsure" if max(sign * end for end in ratio.interval) >= wanted else "missed"
