"""Interleaved timing: its statistics, its verdicts and its warning. No time is asserted."""

from __future__ import annotations

import gc
import random
import time

import pytest

from rotary_export.measure import timing
from rotary_export.measure.timing import Goal, Spread


class Clock:
    """Advances only when something is called, by what that costs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def make_call(self, *costs: float):
        given = iter(range(10**9))

        def call() -> None:
            self.now += costs[next(given) % len(costs)]

        return call


def test_calls_take_turns_and_short_ones_are_repeated():
    clock, order = Clock(), []

    def make(name: str, cost: float):
        def call() -> None:
            order.append(name)
            clock.now += cost

        return call

    calls = {"slow": make("slow", 0.5), "fast": make("fast", 1.5e-3)}
    times = timing.time_interleaved(calls, seconds=0, clock=clock)
    assert {name: spread.median for name, spread in times.items()} == pytest.approx(
        {"slow": 0.5, "fast": 1.5e-3}
    )
    assert {len(spread.values) for spread in times.values()} == {timing.MIN_ROUNDS}
    measured = order[order.index("fast") :]  # "slow" is warmed up before
    turn = timing.WARMING_CALLS * "s" + "s" + timing.WARMING_CALLS * "f" + "ff"
    assert "".join(name[0] for name in measured).endswith(2 * turn)
    assert order.count("fast") > 2 * timing.MIN_ROUNDS


def test_the_collector_is_off_while_measuring_and_as_before_afterwards():
    seen = []
    timing.time_interleaved({"a": lambda: seen.append(gc.isenabled())}, seconds=0)
    assert gc.isenabled()
    assert not seen[-1]

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timing.time_interleaved({"a": fail}, seconds=0)
    assert gc.isenabled()


def test_rounds_end_with_the_time(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    long = timing.time_interleaved({"a": lambda: None}, seconds=60)
    assert len(long["a"].values) == timing.MAX_ROUNDS
    slow = timing.time_interleaved({"a": lambda: time.sleep(1e-3)}, seconds=0.02)
    assert timing.MIN_ROUNDS <= len(slow["a"].values) < timing.MAX_ROUNDS


def test_a_pause_stands_before_every_sample(monkeypatch):
    slept = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    timing.time_interleaved({"a": int, "b": int}, seconds=0, pause=0.25)
    assert slept == [0.25] * 2 * timing.MIN_ROUNDS


def test_ratios_are_of_neighbours():
    slow_moment = Spread((2.0, 2.0, 20.0)), Spread((1.0, 1.0, 10.0))
    assert timing.divide(*slow_moment).values == (2.0, 2.0, 2.0)
    assert timing.subtract(*slow_moment, parts=2).values == (0.5, 0.5, 5.0)


def test_the_interval_holds_the_true_median_19_times_in_20():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = Spread(tuple(rng.lognormvariate(0, 1) for _ in range(25))).interval
        hits += low <= 1 <= high
    assert 0.94 < hits / 2000 < 0.99


def test_few_values_say_little():
    assert Spread((3.0, 1.0, 2.0)).interval == (1.0, 3.0)
    assert Spread((5.0,)).interval == (5.0, 5.0)


def test_uncertainty_is_relative_to_the_median():
    assert Spread((2.0, 1.9, 2.5)).uncertainty == pytest.approx(0.25)
    assert Spread((-2.0, -1.0, -2.0)).uncertainty == pytest.approx(0.5)
    assert Spread((3.0,)).uncertainty == 0


def test_to_dict_rounds():
    assert Spread((1.23456789, 2.0, 9.0)).to_dict() == {"min": 1.235, "median": 2.0, "max": 9.0}


TIGHT = tuple(1.0 + 0.001 * k for k in range(-10, 11))
WIDE = tuple(1.0 + 0.05 * k for k in range(-10, 11))


@pytest.mark.parametrize(
    ("goal", "values", "verdict"),
    [
        (Goal(1.0), TIGHT, "ok"),
        (Goal(1.1), TIGHT, "missed"),
        (Goal(1.1), WIDE, "unsure"),
        (Goal(0.9), WIDE, "ok"),
        (Goal(1.02, slack=0.03), TIGHT, "ok"),
        (Goal(1.0, is_maximum=True), TIGHT, "ok"),
        (Goal(0.9, is_maximum=True), TIGHT, "missed"),
        (Goal(0.9, is_maximum=True), WIDE, "unsure"),
        (Goal(0.98, is_maximum=True, slack=0.03), TIGHT, "ok"),
    ],
)
def test_verdicts(goal, values, verdict):
    assert goal.judge(Spread(values)) == verdict


def test_goals_are_written_as_they_are_asked():
    assert [str(Goal(3.5)), str(Goal(0.72, is_maximum=True))] == [">= 3.5", "<= 0.72"]


def test_a_quiet_machine_is_told_from_a_noisy_one():
    quiet, noisy = Clock(), Clock()
    same = timing.measure_noise(quiet.make_call(0.01), 0, clock=quiet)
    # A period that is no multiple of a turn's calls: the two names see different costs.
    other = timing.measure_noise(noisy.make_call(0.01, 0.012, 0.02, 0.012), 0, clock=noisy)
    assert same == pytest.approx(0)
    assert other > timing.NOISE_LIMIT


def test_the_warning_names_the_noise():
    assert timing.describe_noise(timing.NOISE_LIMIT) is None
    warning = timing.describe_noise(0.25)
    assert warning is not None
    assert warning.startswith("this machine is noisy: identical calls differ by 25% (quiet: at mos")
