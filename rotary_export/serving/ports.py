"""The ports that a server listens on."""

from __future__ import annotations

import socket

from rotary_export.errors import RotaryExportError


def find_ports(host: str, *ports: int) -> list[int]:
    """Return the ports, free ones for those that are 0; one that is taken is an error."""
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
