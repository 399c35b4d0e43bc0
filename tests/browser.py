"""A small driver for Chromium, for pages that must be tried out with a real pointer, finger and keyboard.

    with Browser() as browser:
        page = browser.open(path.as_uri())
        page.click(*page.middle("button"))

Chromium is driven over its debugging pipe (messages in JSON, ended by a NUL byte), so nothing has to be
installed beside it. Input is sent as input events, not as calls of JavaScript. Source of the protocol: the
Chrome DevTools Protocol's documentation (domains Target, Page, Runtime, Input, Network, Emulation).
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "no Chromium: install one (apt-get install chromium) or give its path in CHROME=/path/to/chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root, where the sandbox refuses to start
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
# Chromium reads commands from file descriptor 3 and writes to 4; the launcher moves the pipe's ends there.
LAUNCHER = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]);"
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {"PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "Tab": 9, "Escape": 27, "Enter": 13}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium():
    """The path of a Chromium; skips the test loudly where there is none."""
    given = os.environ.get("CHROME")
    if given and not shutil.which(given):
        pytest.fail(f"CHROME is {given!r}, which is no program; give the path of a Chromium")
    found = given or next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        pytest.skip(HOW)
    return shutil.which(found)


class BrowserError(RuntimeError):
    """Chromium refused a command, ended, or did not answer in time."""


class Browser:
    """One Chromium with a profile of its own, which goes with it."""

    def __init__(self):
        self.path = find_chromium()

    def __enter__(self):
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        command_read, self._out = os.pipe()
        self._in, answer_write = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", LAUNCHER, str(command_read), str(answer_write), self.path, *flags],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command_read)
        os.close(answer_write)
        self._buffer, self._last, self._answers, self.events = b"", 0, {}, deque()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrowserError, OSError):
            self.send("Browser.close", timeout=5)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, session=None, timeout=30, **parameters):
        """Send a command and return its result; events that arrive meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number, end = self._last, time.monotonic() + timeout
        while number not in self._answers:
            if time.monotonic() > end:
                raise BrowserError(f"{method} got no answer in {timeout} s")
            self.receive(end - time.monotonic())
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self, timeout):
        """Take in what has arrived, waiting at most `timeout` seconds."""
        if not select.select([self._in], [], [], max(0, timeout))[0]:
            return
        read = os.read(self._in, 1 << 20)
        if not read:
            raise BrowserError(f"{self.path} ended")
        *whole, self._buffer = (self._buffer + read).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def open(self, address, **options):
        """A page in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        page.load(address, **options)
        return page


class Page:
    """One tab: what it shows, what it asked the network for, and what it complained about."""

    def __init__(self, browser, session, target):
        self.browser, self.session, self.target = browser, session, target
        self.requests, self.problems, self._loaded = [], [], False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """A command to this tab."""
        result = self.browser.send(method, self.session, **parameters)
        self._sort_events()
        return result

    def load(self, address, *, width=900, height=1400, touch=False, dark=False, reduced=False):
        """Go to an address and wait until it has loaded."""
        media = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced else "no-preference"},
        ]
        self.send("Emulation.setEmulatedMedia", features=media)
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.move(0, 0)  # where the last page left the pointer, it would hover over something
        self._loaded = False
        self.send("Page.navigate", url=address)
        self.wait(lambda: self._loaded, f"{address} to load")

    def wait(self, condition, what, timeout=30):
        """Wait until a function, or an expression of the page, is true."""
        test = condition if callable(condition) else lambda: self.evaluate(condition)
        end = time.monotonic() + timeout
        while not test():
            if time.monotonic() > end:
                raise BrowserError(f"waited {timeout} s for {what}; problems: {self.problems}")
            self.browser.receive(0.05)
            self._sort_events()

    def evaluate(self, expression):
        """The value of a JavaScript expression (a promise is awaited), as JSON holds it."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def move(self, x, y):
        """The mouse to a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        """A click of the left button."""
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, x, y):
        """A finger down and up again."""
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key, *, control=False, shift=False):
        """A key of KEYS, down and up again."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        code["modifiers"] = 2 * control + 8 * shift
        self.send("Input.dispatchKeyEvent", type="rawKeyDown", **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self, path):
        """The whole page as PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self):
        """Close the tab."""
        self.browser.send("Target.closeTarget", targetId=self.target)

    def _sort_events(self):
        others = deque()
        while self.browser.events:
            event = self.browser.events.popleft()
            if event.get("sessionId") == self.session:
                self._take(event["method"], event["params"])
            else:
                others.append(event)
        self.browser.events.extend(others)

    def _take(self, method, given):
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in given["args"]]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.problems.append(given["entry"]["text"])
