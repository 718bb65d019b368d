"""The eager CPU op: it calls the library's kernel; its threads; its fallback."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import sys
import threading

import pytest
import torch
from helpers.cases import Case
from helpers.oracles import assert_same_bits
from helpers.torch_calls import OP, order, run

from rotary_export.errors import RotaryExportError
from rotary_export.op import cpu_kernel, spec

LARGE = Case(batch=3, seq_len=11, rows=16, kv_heads=2, scaled=True)


@pytest.fixture
def teams(monkeypatch):
    """The teams of threads that the op made, with what the library counted in them."""
    made = []

    class Recorded(cpu_kernel._Team):
        def __init__(self, *fields) -> None:
            super().__init__(*fields)
            made.append(self)

    monkeypatch.setattr(cpu_kernel, "_Team", Recorded)
    return made


@pytest.fixture
def threads():
    """Return a function that sets torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_small_tensors_are_rotated_without_threads(teams, threads):
    threads(4)
    run(LARGE, LARGE.make_inputs())
    assert teams == []


class Advice:
    """The process's libc, recording the functions called."""

    def __init__(self) -> None:
        self.libc, self.called = ctypes.CDLL(None), []

    def __getattr__(self, name):
        def call(*arguments):
            self.called.append(name)
            return getattr(self.libc, name)(*arguments)

        return call


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are a feature of Linux")
def test_large_pages_are_requested_for_memory_that_is_not_resident(monkeypatch):
    size = 2 * cpu_kernel._FRESH_BYTES
    like = torch.zeros(1, dtype=torch.uint8).expand(size)
    memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # malloc's may be resident
    monkeypatch.setattr(cpu_kernel, "_load_process", lambda: advice)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: memory)
    for resident, called in ((False, ["mincore", "madvise"]), (True, ["mincore"])):
        advice = Advice()
        if resident:
            memory.fill_(1)
        cpu_kernel._allocate_like(like)
        assert advice.called == called


class OpenMP:
    """GNU's OpenMP, recording how many threads were requested. `run` can replace the team's run."""

    def __init__(self, run=None) -> None:
        self.counts: list[int] = []
        self.run = run or cpu_kernel._find_openmp().GOMP_parallel

    def GOMP_parallel(self, function, team, count, flags):  # noqa: N802 (as in C)
        self.counts.append(count)
        self.run(function, team, count, flags)


@pytest.fixture
def started(monkeypatch):
    """Record the Python threads that are started."""
    threads, start = [], threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (threads.append(thread), start(thread))[1]
    )
    return threads


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own"])
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_share_the_rows(count, batch, openmp, teams, threads, started, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    spy = OpenMP() if openmp else None
    monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: spy)
    case = Case(batch=batch, seq_len=11, rows=16, kv_heads=2, scaled=True)
    inputs = case.make_inputs()
    threads(count)
    outputs = run(case, inputs)
    assert [(team.parts, team.ended, team.failed) for team in teams] == [(count, count, 0)]
    assert (spy.counts if spy else [len(started) + 1]) == [count]
    for got, want in zip(outputs, case.compute_eager(inputs), strict=True):
        assert_same_bits(got, want)


class InterruptError(BaseException):
    """As KeyboardInterrupt: no code of the package catches it by name."""


def interrupt(*_):
    raise InterruptError


def run_nothing(function, team, count, flags):
    pass


def run_and_interrupt(function, team, count, flags):
    function(team)
    raise InterruptError


def test_rows_are_written_even_if_no_thread_is_started(teams, threads, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: OpenMP(run_nothing))
    threads(3)
    inputs = LARGE.make_inputs()
    for got, want in zip(run(LARGE, inputs), LARGE.compute_eager(inputs), strict=True):
        assert_same_bits(got, want)
    assert [team.ended for team in teams] == [3]


@pytest.mark.parametrize("run_team", [interrupt, run_and_interrupt])
def test_an_exception_around_openmp_is_raised_when_all_parts_have_ended(
    run_team, teams, threads, monkeypatch
):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: OpenMP(run_team))
    threads(3)
    with pytest.raises(InterruptError):
        run(LARGE, LARGE.make_inputs())
    assert [team.ended for team in teams] == [3]


@pytest.mark.parametrize("started_before", [0, 1])
def test_an_exception_while_threads_start_is_raised_when_all_parts_have_ended(
    started_before, started, teams, threads, monkeypatch
):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: None)
    start = threading.Thread.start

    def start_or_fail(thread):
        if len(started) == started_before:
            raise InterruptError
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    threads(4)
    with pytest.raises(InterruptError):
        run(LARGE, LARGE.make_inputs())
    assert len(started) == started_before
    assert [team.ended for team in teams] == [4]


def test_a_team_keeps_the_memory_that_its_threads_use(teams, threads, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    threads(2)
    inputs = LARGE.make_inputs()
    outputs = OP(*order(inputs))
    kept = {x.data_ptr() for x in teams[0].tensors}
    assert kept == {x.data_ptr() for x in (*inputs.values(), *outputs)}


# A signal may arrive in a callback of torch, where Python can only print what it raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own"])
def test_signals_lose_no_rows(openmp, threads, monkeypatch):
    """As Ctrl-C, at any moment of a call: it ends in the exception, or in the right rows."""
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 2**16)
    if not openmp:
        monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: None)
    threads(2)
    case = Case(batch=2, seq_len=256, rows=256, heads=8, head_dim=64)
    inputs = case.make_inputs()
    (want,) = run(case, inputs)
    arguments = order(inputs)
    handler = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for i in range(300):
            got = None
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 100))
                got, _ = OP(*arguments)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptError:
                interrupted += 1
            if got is not None:
                assert torch.equal(got, want)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupted > 0


def test_a_bad_id_in_one_thread_s_rows_is_named(threads, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    threads(4)
    inputs = LARGE.make_inputs()
    inputs["position_ids"][2, 10] = 16
    message = re.escape(spec.bad_id_message(16, 2, 10, 16))
    with pytest.raises(RotaryExportError, match=f"^{message}$"):
        OP(*order(inputs))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of Python 3.12
def test_in_a_forked_process_threads_are_new(threads, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    threads(4)
    inputs = LARGE.make_inputs()
    want = run(LARGE, inputs)  # in OpenMP's threads, which the child does not have
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # missing threads would never finish
        same = all(map(torch.equal, run(LARGE, inputs), want))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_unusable_library_is_not_an_error(monkeypatch):
    def refuse():
        raise RotaryExportError("not installed")

    cpu_kernel._find_library.cache_clear()
    try:
        monkeypatch.setattr(cpu_kernel.op_library, "load_library", refuse)
        assert not cpu_kernel.can_rotate([torch.zeros(1)])
    finally:
        cpu_kernel._find_library.cache_clear()


def test_aten_computes_other_devices_and_layouts():
    assert cpu_kernel.can_rotate([torch.zeros(2), None])
    assert not cpu_kernel.can_rotate([torch.zeros(2, device="meta")])
    assert not cpu_kernel.can_rotate([torch.zeros(2, 2).to_sparse()])


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    inputs = Case().make_inputs()
    x = inputs["X"]
    lazy = torch.complex(x, -x).conj().imag
    assert lazy.is_neg()
    for name in ("X", "cos_cache"):
        given = inputs | {name: torch.complex(inputs[name], -inputs[name]).conj().imag}
        assert_same_bits(OP(*order(given))[0], OP(*order(inputs))[0])


def test_query_and_key_are_read_without_a_copy(monkeypatch):
    case = Case(kv_heads=2)
    inputs = case.make_inputs()
    wide = {name: inputs[name].transpose(1, 2).contiguous() for name in ("X", "key")}
    given = inputs | {name: value.transpose(1, 2) for name, value in wide.items()}
    read = []
    real = cpu_kernel._describe
    monkeypatch.setattr(
        cpu_kernel, "_describe", lambda t: (read.append(t is not None and t.data_ptr()), real(t))[1]
    )
    for got, want in zip(run(case, given), case.compute_eager(inputs), strict=True):
        assert_same_bits(got, want)
    assert {value.data_ptr() for value in wide.values()} <= set(read)
