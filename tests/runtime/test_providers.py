"""Which providers run, why CUDA does not, and that our library never makes a deployment worse."""

from __future__ import annotations

import ctypes
import re

import onnxruntime
import pytest
from helpers.bundles import PORTABLE, get_bundle

from rotary_export import RotaryExportError, load
from rotary_export.op import library as op_library
from rotary_export.runtime import providers
from rotary_export.runtime.providers import (
    CPU,
    CUDA,
    check_version,
    choose_providers,
    find_cuda_problem,
    library_refusal,
)

TENSORRT, OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
BOTH = f"{CPU},{CUDA}"


# ---- is the op library registered


class FakeLibrary:
    """An op library with kernels for some providers."""

    def __init__(self, names: str) -> None:
        self.RotaryExportProviders = lambda: names.encode()


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Return a function that puts a library in place: kernels for `names`, absent or broken."""

    def put(names: str) -> None:
        monkeypatch.setattr(op_library, "package_folders", lambda: [tmp_path])
        if names != "absent":
            (tmp_path / op_library.LIBRARY_NAME).write_text("garbage")
        if names not in ("absent", "broken"):
            monkeypatch.setattr(op_library, "_load_library", lambda _: FakeLibrary(names))

    return put


# first provider decides: (kernels of the library, providers) -> registered with "auto"
REGISTERED = {
    (CPU, (CPU,)): True,
    (CPU, (CPU, CUDA)): True,  # the CPU takes the node
    (CPU, (CUDA, CPU)): False,  # it would be pulled off the GPU
    (CPU, (CUDA,)): False,
    (CPU, (TENSORRT, CUDA, CPU)): False,
    (CPU, (OPENVINO, CPU)): False,
    (CUDA, (CPU,)): False,
    (CUDA, (CUDA, CPU)): "opt-in",
    (BOTH, (CPU,)): True,
    (BOTH, (CUDA, CPU)): "opt-in",
    (BOTH, (TENSORRT, CUDA, CPU)): False,
    (BOTH, (OPENVINO, CPU)): False,
}


@pytest.mark.parametrize("use", ["auto", True, False])
@pytest.mark.parametrize(
    ("kernels", "names"), REGISTERED, ids=lambda value: "+".join(value) if value else None
)
def test_registered_only_with_a_kernel_for_the_first_provider(library, kernels, names, use):
    library(kernels)
    refusal = library_refusal(names, use)
    if use is False:
        assert refusal == "the op library is switched off (use_op_library=False)"
    elif REGISTERED[kernels, names] == "opt-in" and use == "auto":
        assert "never been run on a GPU" in refusal
    elif REGISTERED[kernels, names]:
        assert refusal is None
    else:
        assert refusal == (
            f"the op library has kernels for {kernels.replace(',', ', ')}, "
            f"and the first provider is {names[0]}"
        )


@pytest.mark.parametrize("names", [[CPU], [CUDA, CPU], [TENSORRT, CUDA, CPU], [OPENVINO, CPU]])
@pytest.mark.parametrize("use", ["auto", True, False])
@pytest.mark.parametrize("state", ["absent", "broken"])
def test_a_library_that_is_absent_or_broken(library, state, use, names):
    library(state)
    if use is False:  # it is not even looked for
        assert "switched off" in str(library_refusal(names, use))
    elif state == "absent":
        assert "librotary_export.so must be beside" in str(library_refusal(names, use))
    else:
        with pytest.raises(RotaryExportError, match="must be a loadable op library, got: "):
            library_refusal(names, use)


@pytest.mark.parametrize("use", ["yes", None, 1, 0, "True"])
def test_use_op_library_is_one_of_three(use):
    with pytest.raises(RotaryExportError, match=f"'auto', True or False, got {use!r}$"):
        library_refusal([CPU], use)


@pytest.mark.parametrize("arguments", [{"use_op_library": True}, {"require_fused": True}], ids=str)
def test_no_kernel_for_the_provider_is_an_error_where_fused_was_asked_for(library, arguments):
    library(CUDA)
    asked = re.escape(next(iter(arguments)))
    with pytest.raises(RotaryExportError, match=f"^{asked}.*: the op library has kernels for CUDA"):
        load(get_bundle("plain"), providers=[CPU], **arguments)
    assert load(get_bundle("plain"), providers=[CPU]).kernel_path == "native"


# ---- which providers


def test_cuda_by_name_is_an_error_that_names_what_is_missing():
    """On a machine without an NVIDIA driver, whatever wheel of ONNX Runtime is installed."""
    if find_cuda_problem() is None:
        pytest.skip("CUDA works here")
    for asked in (CUDA, [CUDA], [CUDA, CPU], [CPU, CUDA]):
        with pytest.raises(RotaryExportError, match=f"^{CUDA} can't run here: .*(driver|without)"):
            choose_providers(asked)
        with pytest.raises(RotaryExportError, match=f"^{CUDA} can't run here: "):
            load(get_bundle("plain"), providers=asked)
    assert choose_providers("auto") == [CPU]
    assert load(get_bundle("plain")).providers == (CPU,)


def test_auto_selects_cuda_where_it_works(monkeypatch):
    monkeypatch.setattr(providers, "find_cuda_problem", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert choose_providers("auto") == [CUDA, CPU]
    assert choose_providers(CUDA) == [CUDA, CPU]
    assert choose_providers([CPU, CUDA]) == [CPU, CUDA]
    assert choose_providers((CPU,)) == [CPU]


def test_no_silent_fallback(monkeypatch):
    """ONNX Runtime says that it can, and then runs on the CPU."""
    monkeypatch.setattr(providers, "find_cuda_problem", lambda: None)
    session = onnxruntime.InferenceSession

    def start(file, options, providers):
        return session(file, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    for asked in ("auto", CUDA):
        with pytest.raises(RotaryExportError, match=f"not start {CUDA} and would run on {CPU}"):
            load(get_bundle("plain"), providers=asked, **PORTABLE)


def test_an_unknown_provider_is_named():
    with pytest.raises(
        RotaryExportError, match=r"^FooProvider is not in this ONNX Runtime; it has"
    ):
        choose_providers([CPU, "FooProvider"])


@pytest.mark.parametrize("asked", [[], (), None, 5])
def test_providers_are_names(asked):
    with pytest.raises(RotaryExportError, match=f"a list of names, got {re.escape(repr(asked))}$"):
        choose_providers(asked)


# ---- why CUDA does not run

NVIDIA = "the NVIDIA driver"


class FakeDriver:
    def __init__(self, start: int = 0, asked: int = 0, devices: int = 1) -> None:
        def count_devices(count):
            count._obj.value = devices
            return asked

        self.cuInit = lambda flags: start
        self.cuDeviceGetCount = count_devices


PROBLEMS = {
    "built without": ({"available": [CPU]}, "is built without it; install onnxruntime-gpu$"),
    "no driver": ({"driver": None}, rf"^{NVIDIA} is not installed \(libcuda.so.1 is not found\)$"),
    "no start": (
        {"driver": FakeDriver(start=100)},
        rf"^{NVIDIA} does not start \(cuInit returned 100\)$",
    ),
    "no count": ({"driver": FakeDriver(asked=3)}, f"^{NVIDIA} sees no device$"),
    "no device": ({"driver": FakeDriver(devices=0)}, f"^{NVIDIA} sees no device$"),
    "no cuda library": (
        {"missing": "libonnxruntime_providers_cuda.so"},
        r"needs is missing: libcublasLt.so.13: cannot open$",
    ),
    "no shared library": (
        {"missing": "libonnxruntime_providers_shared.so"},
        r"needs is missing: libcublasLt.so.13: cannot open$",
    ),
    "none": ({}, None),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_missing_for_cuda(monkeypatch, problem):
    given, message = PROBLEMS[problem]

    def open_library(name, mode=0):
        if name == "libcuda.so.1":
            driver = given.get("driver", FakeDriver())
            if driver is None:
                raise OSError("libcuda.so.1: cannot open")
            return driver
        if name.endswith(given.get("missing", "nothing")):
            raise OSError("libcublasLt.so.13: cannot open")
        return object()

    available = given.get("available", [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    found = find_cuda_problem()
    if message is None:
        assert found is None
    else:
        assert re.search(message, found)


# ---- which version

VERSIONS = {
    ("1.31.1", "1.23"): True,
    ("1.23.0", "1.23"): True,
    ("1.24.0.dev20251101001", "1.24"): True,
    ("1.23rc1", "1.23"): True,
    ("2.0.0", "1.23"): True,
    ("1.22.9", "1.23"): False,
    ("1.9.0", "1.23"): False,
    ("0.99.0", "1.23"): False,
}


@pytest.mark.parametrize(("installed", "minimum"), VERSIONS)
def test_an_old_onnx_runtime_is_refused(installed, minimum):
    if VERSIONS[installed, minimum]:
        check_version(installed, minimum)
        return
    wanted = f"^this bundle needs ONNX Runtime >= 1.23, installed is {re.escape(installed)}$"
    with pytest.raises(RotaryExportError, match=wanted):
        check_version(installed, minimum)


def test_load_requires_the_version_of_the_path_that_runs(monkeypatch):
    minimum = get_bundle("plain").manifest.minimum_onnxruntime
    assert (minimum["fused"], minimum["portable"]) == ("1.23", "1.25")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    assert load(get_bundle("plain")).kernel_path.startswith("fused")
    with pytest.raises(RotaryExportError, match=r"needs ONNX Runtime >= 1\.25, installed is 1\.24"):
        load(get_bundle("plain"), **PORTABLE)
