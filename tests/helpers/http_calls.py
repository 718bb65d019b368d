"""Requests of the Open Inference Protocol over HTTP, written by hand so that they can be wrong."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def send(
    address: str,
    body: bytes,
    headers: Mapping[str, object] | None = None,
    path: str = "/v2/models/plain/infer",
) -> tuple[int, Any]:
    """Send a body as it is; return the status and the answer."""
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.putrequest("POST", path)
        for header in ({"Content-Length": len(body)} | (headers or {})).items():
            connection.putheader(*header)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def make_body(inputs: Mapping[str, np.ndarray], **changes: Any) -> bytes:
    """Write a request as JSON; changes are of the first input."""
    tensors = [
        {**_describe(n, value), "data": value.ravel().tolist()} for n, value in inputs.items()
    ]
    return json.dumps({"inputs": [tensors[0] | changes, *tensors[1:]]}).encode()


def make_binary_body(inputs: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
    """Write a request whose tensors, and those of the answer, are binary; return both parts."""
    tensors = [
        {**_describe(name, value), "parameters": {"binary_data_size": value.nbytes}}
        for name, value in inputs.items()
    ]
    request = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    return json.dumps(request).encode(), b"".join(v.tobytes() for v in inputs.values())


def _describe(name: str, value: np.ndarray) -> dict[str, Any]:
    datatype = "INT64" if value.dtype == np.int64 else "FP32"
    return {"name": name, "datatype": datatype, "shape": list(value.shape)}
