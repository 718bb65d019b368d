"""A server on loopback that answers as the Hugging Face hub does, for its own client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

MODEL = "acme/tiny-llama"


def name_commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub:
    """A hub of one model.

    Attributes:
        url: Of the server.
        fetched: The names of the files that were sent.
    """

    def __init__(self, revisions: Mapping[str, Mapping[str, bytes]], gated: bool) -> None:
        self.commits = {name_commit(name): files for name, files in revisions.items()}
        self.gated = gated
        self.fetched: list[str] = []
        self.url = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body of a GET."""
        api = f"/api/models/{MODEL}/"
        if path.startswith(f"{api}revision/"):
            revision = path.rpartition("/")[2]
            commit = revision if revision in self.commits else name_commit(revision)
            if commit not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {}, json.dumps({"id": MODEL, "sha": commit, "siblings": []}).encode()
        if path.startswith(f"{api}tree/"):
            files = self.commits[path.rpartition("/")[2]]
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": name_commit(name)}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        if path.startswith(f"/{MODEL}/resolve/"):
            commit, _, name = path.removeprefix(f"/{MODEL}/resolve/").partition("/")
            if self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
            data = self.commits[commit][name]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": commit}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@contextmanager
def serve_hub(
    revisions: Mapping[str, Mapping[str, bytes]], *, gated: bool = False
) -> Iterator[Hub]:
    """Serve a hub of one model.

    Args:
        revisions: Its files by name, by revision.
        gated: Refuse to send a file.
    """
    hub = Hub(revisions, gated)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(send_body=False)

        def do_GET(self) -> None:
            self.reply(send_body=True)

        def reply(self, send_body: bool) -> None:
            path = urlsplit(self.path).path
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                if "/resolve/" in path and status == 200:
                    hub.fetched.append(path.partition("/resolve/")[2].partition("/")[2])
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
