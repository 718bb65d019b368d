"""The ops that the library registers in each version of ONNX Runtime, in a fake one."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from rotary_export.op.library import op_library_path

# Slots of OrtApi (csrc/ort/ort_abi.h).
CREATE_DOMAIN, ADD_OP, ADD_DOMAIN = 26, 27, 28
SLOTS = 415
# Members of OrtCustomOp, each of 8 bytes.
VERSION, INFER_OUTPUT_SHAPE, MEMBERS = 0, 19, 26

CALL = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
ADD = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GET_VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)


class FakeRuntime:
    """An OrtApiBase of a version, which keeps the ops that are registered.

    Attributes:
        requested: The API versions that were requested.
        ops: The members of each OrtCustomOp.
        domains: How many domains a session got.
    """

    def __init__(self, version):
        self.requested, self.ops, self.domains = [], [], 0
        self._text = ctypes.create_string_buffer(version.encode())
        self._domain = ctypes.create_string_buffer(8)
        self._keep = [
            GET_API(self._get_api),
            GET_VERSION(lambda: ctypes.addressof(self._text)),
            CALL(self._create_domain),
            ADD(self._add_op),
            ADD(self._add_domain),
        ]
        get_api, get_version, create, add_op, add_domain = (
            ctypes.cast(function, ctypes.c_void_p).value for function in self._keep
        )
        self._api = (ctypes.c_void_p * SLOTS)()
        self._api[CREATE_DOMAIN], self._api[ADD_OP], self._api[ADD_DOMAIN] = (
            create,
            add_op,
            add_domain,
        )
        self.base = (ctypes.c_void_p * 2)(get_api, get_version)

    def _get_api(self, version):
        self.requested.append(version)
        return ctypes.addressof(self._api)

    def _create_domain(self, name, domain):
        assert ctypes.string_at(name) == b"rotary_export"
        domain[0] = ctypes.addressof(self._domain)
        return None

    def _add_op(self, domain, op):
        assert domain == ctypes.addressof(self._domain)
        self.ops.append(list((ctypes.c_uint64 * MEMBERS).from_address(op)))
        return None

    def _add_domain(self, options, domain):
        assert domain == ctypes.addressof(self._domain)
        self.domains += 1
        return None


RUNTIMES = []  # the library keeps a pointer to the API of each


def register(version, folder):
    """Register the op library in a fake runtime, from a copy: a library registers its ops once."""
    RUNTIMES.append(FakeRuntime(version))
    library = ctypes.CDLL(shutil.copy(op_library_path(), folder))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    library.RegisterCustomOps.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    assert library.RegisterCustomOps(None, RUNTIMES[-1].base) is None
    return RUNTIMES[-1]


@pytest.mark.parametrize(
    ("version", "api", "infers"),
    [
        ("1.20.1", 18, False),
        ("1.23.2", 18, False),
        ("1.24.0", 24, True),
        ("1.31.1", 24, True),
        ("1.100.0", 24, True),
        ("2.0.0", 24, True),
    ],
)
def test_shapes_are_inferred_only_where_that_is_safe(version, api, infers, tmp_path):
    """Before 1.24, ONNX Runtime crashes in an op's shape inference at an omitted input."""
    runtime = register(version, tmp_path)
    assert runtime.requested == [api]
    assert runtime.domains == 1
    assert len(runtime.ops) >= 7  # one for each pair of types
    assert {bool(op[INFER_OUTPUT_SHAPE]) for op in runtime.ops} == {infers}
    assert {op[VERSION] & 0xFFFFFFFF for op in runtime.ops} == {18}
