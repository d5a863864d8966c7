"""A headless Chromium that is driven as a person would: keys, clicks, pictures, what it loads.

- Its DevTools protocol over two pipes (`--remote-debugging-pipe`): no port, no package.
- Every error of the console, and every address that is asked for, is kept.

Source: the Chrome DevTools Protocol; messages are JSON, each ended by a zero byte.
"""

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.browser import QUIET, chromium
from tests.support.command_line import HANG_SECONDS

KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "ArrowUp": 38, "Escape": 27}
WITHOUT_BUDGET = [option for option in QUIET if not option.startswith("--virtual-time")]
SHIFT = 8


class Page:
    """One tab of the browser."""

    def __init__(self, process: "subprocess.Popen[bytes]", send: int, receive: int) -> None:
        self.process, self.send, self.receive = process, send, receive
        self.buffer, self.number, self.session = b"", 0, ""
        self.problems: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])
            self._event(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.receive], [], [], HANG_SECONDS)[0], (
                "the browser says nothing"
            )
            part = os.read(self.receive, 2**16)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(line))

    def _event(self, found: dict[str, Any]) -> None:
        facts = found.get("params", {})
        match found.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(facts["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(facts["exceptionDetails"])[:600])
            case "Runtime.consoleAPICalled" if facts["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(facts["args"])[:600])
            case "Log.entryAdded":
                self.problems.append(facts["entry"]["text"])

    def run(self, script: str) -> Any:
        """Value of an expression in the page; a promise is waited for."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true, which it is soon or never."""
        deadline = time.monotonic() + HANG_SECONDS
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never true: {script}; {self.problems}"
            time.sleep(0.02)

    def open(self, address: str) -> None:
        """Go to an address, and wait until the page and its scripts are there."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key, as the keyboard does."""
        facts: dict[str, Any] = {"key": key, "modifiers": SHIFT if shift else 0}
        facts["windowsVirtualKeyCode"] = KEYS.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def type(self, text: str) -> None:
        """Put a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        """Text of an element as it is shown."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Set the size of the window, and the scheme that the reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Save what is in the window as PNG."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(scratch: Path) -> Iterator[Page]:
    """A browser of its own with one page; ended in any case."""
    read_own, write_there = os.pipe()
    read_there, write_own = os.pipe()
    # The browser reads descriptor 3 and writes 4.
    script = f'exec "$@" 3<&{read_there} 4>&{write_there}'
    options = [*WITHOUT_BUDGET, "--remote-debugging-pipe", f"--user-data-dir={scratch}"]
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", chromium(), *options, "about:blank"],
        pass_fds=(read_there, write_there),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Page(process, write_own, read_own)
    finally:
        process.terminate()
        try:
            process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read_own)
        os.close(write_own)
