"""When our op library is registered: every provider list, without a GPU.

ONNX Runtime is real in the first table's questions, and a replacement in `load`, which would need
CUDA.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import onnxruntime
import pytest
from helpers.paths import EXPORTED

from rotary_export import load
from rotary_export.cli.inspection import examine_machine
from rotary_export.errors import RotaryExportError
from rotary_export.op import library as op_library
from rotary_export.runtime import ort, providers
from rotary_export.runtime.providers import CPU, CUDA, choose_providers, library_refusal

TENSORRT = "TensorrtExecutionProvider"
BUILDS = {"without-nvcc": (CPU,), "with-nvcc": (CPU, CUDA)}
BUNDLE = EXPORTED / "plain"
NO_KERNEL = "has kernels for"
OPT_IN = "never been run on a GPU"
OFF = "switched off"

# (build, providers in order of preference): what "auto" and what True come to; "": registered.
POLICY = {
    ("without-nvcc", (CPU,)): ("", ""),
    ("without-nvcc", (CPU, CUDA)): ("", ""),
    ("without-nvcc", (CUDA,)): (NO_KERNEL, NO_KERNEL),
    ("without-nvcc", (CUDA, CPU)): (NO_KERNEL, NO_KERNEL),
    ("without-nvcc", (TENSORRT, CUDA, CPU)): (NO_KERNEL, NO_KERNEL),
    ("with-nvcc", (CPU,)): ("", ""),
    ("with-nvcc", (CPU, CUDA)): ("", ""),
    ("with-nvcc", (CUDA,)): (OPT_IN, ""),
    ("with-nvcc", (CUDA, CPU)): (OPT_IN, ""),
    ("with-nvcc", (TENSORRT, CUDA, CPU)): (NO_KERNEL, NO_KERNEL),
    ("with-nvcc", (TENSORRT, CPU)): (NO_KERNEL, NO_KERNEL),
}
CASES = pytest.mark.parametrize(
    ("build", "names", "use_op_library", "refusal"),
    [
        pytest.param(build, names, use, refusal, id=f"{build}-{'-'.join(names)}-{use}")
        for (build, names), (auto, forced) in POLICY.items()
        for use, refusal in (("auto", auto), (True, forced), (False, OFF))
    ],
)


@CASES
def test_when_the_library_is_registered(monkeypatch, build, names, use_op_library, refusal):
    monkeypatch.setattr(op_library, "library_providers", lambda: BUILDS[build])
    got = library_refusal(names, use_op_library)
    if refusal:
        assert got is not None
        assert refusal in got
    else:
        assert got is None


@pytest.fixture
def registered(monkeypatch) -> list[str]:
    """An ONNX Runtime with every provider, which only notes which library is registered."""
    libraries: list[str] = []

    def open_session(file, options, providers):
        portable = onnxruntime.InferenceSession(file, providers=[CPU])
        return SimpleNamespace(
            get_providers=lambda: providers,
            get_inputs=portable.get_inputs,
            get_outputs=portable.get_outputs,
        )

    stand_in = SimpleNamespace(
        __version__=onnxruntime.__version__,
        SessionOptions=lambda: SimpleNamespace(register_custom_ops_library=libraries.append),
        InferenceSession=open_session,
        get_available_providers=lambda: [TENSORRT, CUDA, CPU],
    )
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: stand_in)
    monkeypatch.setattr(ort, "import_onnxruntime", lambda: stand_in)
    monkeypatch.setattr(providers, "find_cuda_problem", lambda: None)
    return libraries


@CASES
def test_load_follows_the_policy(monkeypatch, registered, build, names, use_op_library, refusal):
    monkeypatch.setattr(op_library, "library_providers", lambda: BUILDS[build])
    if refusal and use_op_library is True:
        with pytest.raises(RotaryExportError, match=f"use_op_library=True: .*{refusal}"):
            load(BUNDLE, providers=names, use_op_library=True)
        return
    session = load(BUNDLE, providers=names, use_op_library=use_op_library)
    assert registered == ([] if refusal else [str(op_library.op_library_path())])
    kernel = "cuda" if names[0] == CUDA else op_library.instruction_set()
    assert session.kernel_path == ("native" if refusal else f"fused ({kernel})")
    assert session.providers[0] == names[0]


def test_auto_prefers_cuda_and_never_our_kernel_there(monkeypatch, registered):
    monkeypatch.setattr(op_library, "library_providers", lambda: BUILDS["with-nvcc"])
    session = load(BUNDLE)
    assert (session.providers, session.kernel_path) == ((CUDA, CPU), "native")
    assert registered == []
    assert load(BUNDLE, use_op_library=True).kernel_path == "fused (cuda)"


def test_require_fused_does_not_opt_in_by_itself(monkeypatch, registered):
    monkeypatch.setattr(op_library, "library_providers", lambda: BUILDS["with-nvcc"])
    wanted = re.escape("only with use_op_library=True")
    with pytest.raises(RotaryExportError, match=f"require_fused: .*{wanted}"):
        load(BUNDLE, providers=[CUDA], require_fused=True)
    session = load(BUNDLE, providers=[CUDA], require_fused=True, use_op_library=True)
    assert session.kernel_path == "fused (cuda)"


@pytest.mark.parametrize(("build", "reason"), [("without-nvcc", NO_KERNEL), ("with-nvcc", OPT_IN)])
def test_doctor_reports_what_runs_on_cuda(monkeypatch, build, reason):
    monkeypatch.setattr(op_library, "library_providers", lambda: BUILDS[build])
    facts, _ = examine_machine()
    assert facts["on CUDA"].startswith("function body: ")
    assert reason in facts["on CUDA"]


def test_the_cpu_is_always_the_last_resort(registered):
    assert choose_providers([CUDA]) == [CUDA, CPU]
    assert choose_providers(TENSORRT) == [TENSORRT, CPU]
