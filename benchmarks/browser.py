"""Headless Chromium on two pipes: pages at any width, in light and dark, with all that they log.

It speaks the DevTools protocol, so a page is looked at as it is: with its policy, without a script
of ours in it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
TALL = 1000  # pixels of the window
PATIENCE_S = 240.0


def program() -> str | None:
    """The browser's program; None if there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Seen:
    """What a page did while it was loaded.

    Attributes:
        logged: messages of the console and uncaught errors.
        requests: addresses that were asked for, except the page's own.
    """

    logged: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser(AbstractContextManager["Browser"]):
    """One browser with one tab."""

    def __init__(self) -> None:
        found = program()
        if found is None:
            raise FileNotFoundError(f"none of {', '.join(PROGRAMS)} is installed")
        self._profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        to_read, self._writes = os.pipe()
        self._reads, to_write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--disable-background-networking", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'  # the descriptors that it speaks on
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", found, *options, "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path | str, width: int, *, dark: bool) -> Seen:
        """Load a page.

        Args:
            page: a file, or an address.
            width: of the window, in pixels.
        """
        size = {"width": width, "height": TALL, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[colours])
        self._events.clear()
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", url=address)
        self._wait_for("Page.loadEventFired")
        self.evaluate("new Promise(done => setTimeout(done, 100))")  # requests of its script, too
        return self._seen(address)

    def _seen(self, address: str) -> Seen:
        seen = Seen()
        for event in self._events:
            told = event["params"]
            match event["method"]:
                case "Network.requestWillBeSent" if told["request"]["url"] != address:
                    seen.requests.append(told["request"]["url"])
                case "Runtime.exceptionThrown":
                    seen.logged.append(json.dumps(told["exceptionDetails"]))
                case "Log.entryAdded":
                    seen.logged.append(told["entry"]["text"])
                case "Runtime.consoleAPICalled":
                    seen.logged.append(json.dumps(told["args"]))
        return seen

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": options}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        """The next message."""
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            if not select.select([self._reads], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has said nothing for {PATIENCE_S:.0f} s")
            part = os.read(self._reads, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended with {self._process.wait()}")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def __exit__(self, *_: object) -> None:
        os.close(self._writes)
        os.close(self._reads)
        self._process.terminate()
        self._process.wait()
        self._profile.cleanup()
