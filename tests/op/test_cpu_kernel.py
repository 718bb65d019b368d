"""The eager CPU op: it calls the library's kernel; its threads; its fallback."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import sys

import pytest
import torch
from helpers.cases import Case
from helpers.oracles import assert_same_bits
from helpers.torch_calls import OP, order, run

from rotary_export.errors import RotaryExportError
from rotary_export.op import cpu_kernel, spec

LARGE = Case(batch=3, seq_len=11, rows=16, kv_heads=2, scaled=True)


class Spy:
    """The library, recording the parts that it computes."""

    def __init__(self, library) -> None:
        self.library = library
        self.parts: list[tuple[int, int]] = []

    def RotaryExportRotate(self, call, message, size):  # noqa: N802 (as in C)
        self.parts.append((call._obj.part, call._obj.parts))
        return self.library.RotaryExportRotate(call, message, size)


@pytest.fixture
def spy(monkeypatch):
    made = Spy(cpu_kernel._find_library())
    monkeypatch.setattr(cpu_kernel, "_find_library", lambda: made)
    return made


@pytest.fixture
def threads():
    """Return a function that sets torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_kernel_is_called_once_for_small_tensors(spy, threads):
    threads(4)
    run(LARGE, LARGE.make_inputs())
    assert spy.parts == [(0, 1)]


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


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own"])
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_share_the_rows(count, batch, openmp, spy, threads, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_THREAD_BYTES", 64)
    if openmp:
        assert cpu_kernel._find_openmp() is not None
    else:
        monkeypatch.setattr(cpu_kernel, "_find_openmp", lambda: None)
    case = Case(batch=batch, seq_len=11, rows=16, kv_heads=2, scaled=True)
    inputs = case.make_inputs()
    threads(count)
    outputs = run(case, inputs)
    assert sorted(spy.parts) == [(part, count) for part in range(count)]
    for got, want in zip(outputs, case.compute_eager(inputs), strict=True):
        assert_same_bits(got, want)


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


def test_query_and_key_are_read_without_a_copy(spy, monkeypatch):
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
