"""The addresses that a server listens on."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from rotary_export.errors import RotaryExportError


@dataclass(frozen=True)
class Addresses:
    """A host and its ports.

    Attributes:
        host: A name or an address.
        http_port: Of HTTP.
        grpc_port: Of gRPC.
        metrics_port: Of Prometheus metrics.
    """

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def url_host(self) -> str:
        """The host as URLs write it: an IPv6 address in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def describe(self, name: str, state: str, metrics_host: str | None = None) -> str:
        """Return the line that a server prints once it is ready.

        Args:
            name: Of the model.
            state: The kernel path, and other facts.
            metrics_host: Of the metrics; default: the same host.
        """
        return (
            f"serving {name} ({state}) on http://{self.url_host}:{self.http_port}, "
            f"grpc://{self.url_host}:{self.grpc_port}, "
            f"metrics http://{metrics_host or self.url_host}:{self.metrics_port}/metrics"
        )


def find_ports(host: str, *ports: int) -> list[int]:
    """Return the ports, with a free port for each 0.

    Raises:
        RotaryExportError: A port is already in use, or the host is not an address of this machine.
    """
    found, sockets = [], []
    try:
        for port in ports:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.socket(family))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sockets[-1].bind((host, port))
            except OSError as error:
                raise RotaryExportError(
                    f"serve needs a free port, got {host}:{port}: {error.strerror or error}"
                ) from None
            found.append(sockets[-1].getsockname()[1])
    finally:
        for each in sockets:
            each.close()
    return found
