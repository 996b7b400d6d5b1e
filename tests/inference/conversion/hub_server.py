"""A server that speaks as much of the Hub's API as an upload needs, and keeps what it gets."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn

MOMENTS = ("begun", "half read", "read", "done")  # of a request


class Hub(ThreadingHTTPServer):
    """The models that were uploaded: `files` by name of the model and path.

    Attributes:
        refuses: The path whose request gets this code instead of an answer.
        at: Called with the path and one of MOMENTS of every request that changes something.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.refuses: tuple[str, int] | None = None
        self.at: Callable[[str, str], None] = lambda path, moment: None

    def settle(self) -> None:
        """Wait until no request is being answered."""
        while any("process_request_thread" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        """The whole body, without which nothing is done.

        Raises:
            ConnectionError: The other side has gone before its end.
        """
        self.server.at(self.path, "begun")
        pieces = self._pieces()
        data = next(pieces, b"")
        self.server.at(self.path, "half read")
        data += b"".join(pieces)
        self.server.at(self.path, "read")
        return data

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            for part in (size // 2, size - size // 2):
                yield self._exactly(part)
            return
        while size := int(self.rfile.readline() or self._gone(), 16):
            yield self._exactly(size)
            self.rfile.readline()
        self.rfile.readline()

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        return data if len(data) == size else self._gone()

    def _gone(self) -> NoReturn:
        raise ConnectionError("the body ends early")

    def do_GET(self) -> None:
        self.body()
        self.answer({"error": "not found"}, 404)  # asked for when a model cannot be made

    def do_PUT(self) -> None:
        data = self.body()
        self.server.blobs[self.path.rsplit("/", 1)[1]] = data
        self.server.at(self.path, "done")
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.server.refuses and self.server.refuses[0] in self.path:
            self.answer({"error": "no"}, self.server.refuses[1])
        elif self.path.endswith("/repos/create"):
            name = json.loads(data)
            self.answer({"url": f"{self.server.url}/{name.get('organization')}/{name['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(data)["files"]
            self.answer({"files": [self._mode(file["path"]) for file in files]})
        elif self.path.endswith("/objects/batch"):
            self.answer(self._batch(json.loads(data)))
        elif "/commit/" in self.path:
            self._commit(data)
            self.server.at(self.path, "done")
            url = f"{self.server.url}/me/model/commit/{'1' * 40}"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({})

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, data: bytes) -> None:
        name = "/".join(self.path.split("/")[3:5])
        found: dict[str, bytes] = {}
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                blob = self.server.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                found[value["path"]] = blob
        self.server.files.setdefault(name, {}).update(found)
        self.server.commits.append({"model": name, "paths": sorted(found)})


@contextmanager
def hub() -> Iterator[Hub]:
    """A server that runs while the context is open."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
