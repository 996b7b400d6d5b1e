"""Local web server for a page of all runs below a directory, up to date at each request."""

from __future__ import annotations

import os
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.reporting.recorded_run import RecordedRun, read_run
from consyn_jax.reporting.runs_page import runs_page
from consyn_jax.training.logging.metrics import FILE_NAME
from consyn_jax.training.run.directory import CONFIG

HERE = "127.0.0.1"
DEPTH = 4  # levels of directories below the watched one
RELOAD_S = 10


def find_runs(top: Path, faults: list[str]) -> dict[str, Path]:
    """Find run directories at and below `top`, by their path relative to `top`.

    Symbolic links are not followed.

    Args:
        faults: list to which a sentence is added for each directory that cannot be listed.
    """
    found: dict[str, Path] = {}

    def note(error: OSError) -> None:
        faults.append(_unreadable(error.filename, error))

    for place, directories, files in os.walk(top, onerror=note):
        path = Path(place)
        if CONFIG in files and FILE_NAME in files:
            found[path.relative_to(top).as_posix()] = path
            directories.clear()
        if len(path.relative_to(top).parts) >= DEPTH:
            directories.clear()
        directories[:] = sorted(name for name in directories if not name.startswith("."))
    return found


def _unreadable(path: Path | str, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror}."


class Watched:
    """The runs below a directory; a run is read again if it is running or its log has changed."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self._kept: dict[Path, tuple[tuple[int, int], RecordedRun]] = {}
        self._lock = Lock()  # each request runs in its own thread

    def page(self) -> str:
        """Return the HTML page of all runs; the run with the newest log comes first."""
        runs: list[tuple[tuple[int, int], RecordedRun]] = []
        faults: list[str] = []
        with self._lock:
            for name, path in find_runs(self.top, faults).items():
                try:
                    runs.append((self._changed(path), self._read(path, name)))
                except UserError as error:
                    faults.append(str(error))
                except FileNotFoundError:  # deleted since it was found
                    continue
                except OSError as error:
                    faults.append(_unreadable(path, error))
        newest_first = sorted(runs, key=lambda found: found[0], reverse=True)
        title = f"Runs in {self.top.resolve().name}"
        return runs_page([run for _, run in newest_first], title, faults, RELOAD_S)

    def _changed(self, path: Path) -> tuple[int, int]:
        status = (path / FILE_NAME).stat()
        return status.st_mtime_ns, status.st_size

    def _read(self, path: Path, name: str) -> RecordedRun:
        changed, kept = self._changed(path), self._kept.get(path)
        # A killed run logs no end: only its lock, which is read with the run, shows that it ended.
        if kept is None or kept[0] != changed or kept[1].is_running:
            self._kept[path] = kept = changed, read_run(path, name)
        return kept[1]


def open_server(top: Path, port: int) -> ThreadingHTTPServer:
    """Build the server, which only this machine can reach; `serve_forever` starts it.

    Raises:
        UserError: `top` is not a directory, or the port cannot be used.
    """
    if not top.is_dir():
        raise UserError(f"--watch {top} is not a directory. Name a directory that contains runs.")
    watched = Watched(top)

    class Handler(BaseHTTPRequestHandler):
        """Answer GET and HEAD requests for the page, which has the path `/`."""

        server_version = "consyn-report"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, with_body: bool) -> None:
            # Any other host name shows DNS rebinding: a web page elsewhere points its own host name
            # at this machine.
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host not in (HERE, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
            elif self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                content = watched.page().encode("utf-8", "replace")
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                if with_body:
                    with suppress(ConnectionError):  # the page was closed meanwhile
                        self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing, because the page sends a request every few seconds."""

    try:
        return ThreadingHTTPServer((HERE, port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {port} cannot be used: {error.strerror}. Give another port, or 0 for any free "
            "port."
        ) from error
