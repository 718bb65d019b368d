"""Attack a server of the Open Inference Protocol, and watch its health and its memory.

  python tools/targets/attack_server.py --model NAME --http HOST:PORT --pid PID

Bodies of zeros and of empty lists, six at once; 300 requests of which a half is sent. Meanwhile
another client asks for the server's health. Standard library only; Linux.

Exit codes: 0 fine, 1 a limit was exceeded, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

MAX_HEALTH_S = 1.0
MAX_GROWTH_MIB = 100
AT_ONCE = 6
HALF_SENT = 300
PATH = "/v2/models/{}/infer"


def make_body(item: bytes, mib: int) -> bytes:
    """Return a request of one tensor, whose data are an item, many times."""
    head = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": ['
    return head + item * ((mib << 20) // len(item)) + item[:-1] + b"]}]}"


def post(address: str, path: str, body: bytes) -> str:
    """Send a body; return the status, or the name of the error."""
    connection = HTTPConnection(address, timeout=120)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return str(connection.getresponse().status)
    except (OSError, HTTPException) as error:  # refused before all of it was sent
        return type(error).__name__
    finally:
        connection.close()


def send_at_once(address: str, path: str, body: bytes) -> list[str]:
    """Send a body from AT_ONCE clients; return what each got."""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(post(address, path, body)))
        for _ in range(AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def send_halves(address: str, path: str, seconds: float) -> list[str]:
    """Open HALF_SENT requests, a half of each sent; return how many the server closed."""
    host, _, port = address.rpartition(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4000\r\n"
    with ExitStack() as stack:
        sockets = []
        for index in range(HALF_SENT):
            sockets.append(stack.enter_context(socket.create_connection((host, int(port)))))
            with suppress(OSError):  # closed already
                sockets[-1].sendall((head + "\r\n{" if index % 2 else head).encode())
        time.sleep(seconds)
        closed = sum(map(is_closed, sockets))
    return [f"{closed} of {HALF_SENT} closed"]


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended a connection, with or without an answer."""
    connection.settimeout(0.2)
    try:
        while data := connection.recv(1 << 16):
            del data
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


class Watch:
    """Asks for the server's health every 50 ms, on a new connection; a context.

    Attributes:
        seconds: Of each answer.
        errors: Of requests that got none.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._end.wait(0.05):
            start = time.perf_counter()
            connection = HTTPConnection(self._address, timeout=60)
            try:
                connection.request("GET", "/v2/health/live")
                status = connection.getresponse().status
            except (OSError, HTTPException) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            else:
                self.errors += [] if status == 200 else [str(status)]
            finally:
                connection.close()
            self.seconds.append(time.perf_counter() - start)


def read_memory(pid: int) -> float:
    """Return the memory of a process and its descendants that is theirs alone, in MiB."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family, added = {pid}, True
    while added:
        more = {child for child, parent in parents.items() if parent in family} - family
        family, added = family | more, bool(more)
    total = 0
    for member in family:
        with suppress(OSError):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total / 1024


def attack(name: str, address: str, pid: int, act: Callable[[], list[str]]) -> dict[str, Any]:
    """Attack once; return what was seen."""
    before, start = read_memory(pid), time.perf_counter()
    with Watch(address) as watch:
        answers = act()
    took = time.perf_counter() - start
    time.sleep(1)
    return {
        "attack": name,
        "seconds": round(took, 1),
        "answers": ", ".join(f"{answers.count(a)} x {a}" for a in sorted(set(answers))),
        "health_asked": len(watch.seconds),
        "health_max_ms": round(1e3 * max(watch.seconds, default=0.0), 1),
        "health_errors": sorted(set(watch.errors)),
        "growth_mib": round(read_memory(pid) - before, 1),
    }


def main() -> int:
    """Attack the server and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--http", metavar="HOST:PORT", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--mib", type=int, default=62, help="of a body")
    parser.add_argument("--half-sent-seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, metavar="FILE", help="a JSON file to write")
    arguments = parser.parse_args()
    path = PATH.format(arguments.model)
    items = {"zeros": b"0,", "empty lists": b"[],", "numbers": b"1234.5678,"}
    bodies = {name: make_body(item, arguments.mib) for name, item in items.items()}
    acts: dict[str, Callable[[], list[str]]] = {
        f"{AT_ONCE} bodies of {name}": lambda body=body: send_at_once(arguments.http, path, body)
        for name, body in bodies.items()
    }
    acts[f"{HALF_SENT} requests, half sent"] = lambda: send_halves(
        arguments.http, path, arguments.half_sent_seconds
    )
    found = [attack(name, arguments.http, arguments.pid, act) for name, act in acts.items()]
    if arguments.save:
        arguments.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(found))
    else:
        for each in found:
            print(", ".join(f"{key} {value}" for key, value in each.items()))
    return int(
        any(
            each["health_errors"]
            or each["health_max_ms"] > 1e3 * MAX_HEALTH_S
            or each["growth_mib"] > MAX_GROWTH_MIB
            for each in found
        )
    )


if __name__ == "__main__":
    sys.exit(main())
