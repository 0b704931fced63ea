"""A headless Chromium, driven over its debugging pipe: enough of the DevTools protocol to hold a page to account.

No driver and no package is needed: Chromium reads commands from file descriptor 3 and answers on 4, JSON texts ended by
a zero byte (`--remote-debugging-pipe`). See https://chromedevtools.github.io/devtools-protocol/ for the commands.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patience import HUNG_SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # needed for root, as in containers; the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--no-first-run",
    "--no-default-browser-check",
    # whatever a page asks of another host is recorded, and goes nowhere
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)

LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(RuntimeError):
    """Chromium did not start, died, or refused a command."""


def find_chromium() -> str | None:
    """The path of the system's Chromium or Chrome ($CHROMIUM names another), or None."""
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One Chromium process. Use it as a context manager; `page()` opens a tab."""

    def __init__(self, binary: str):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Another interpreter puts the pipes' ends on 3 and 4; until then they must be somewhere else.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]
        command = [sys.executable, "-c", LAUNCH, *map(str, ends), binary, *FLAGS]
        command += [f"--user-data-dir={self.profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=ends, **quiet)
        for fd in (to_read, to_write, *ends):
            os.close(fd)
        self._buffer = b""
        self._last_id = 0
        self._listeners: dict[str, list[dict]] = {}
        self.version = self.command("Browser.getVersion")["product"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        try:
            self.command("Browser.close", timeout=5)
            self.process.wait(timeout=10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _message(self, deadline: float) -> dict | None:
        """The next message from Chromium, or None when `deadline` (of time.monotonic) passes first."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._read, 1 << 20)
            if not data:
                raise BrowserError(f"Chromium ended with status {self.process.poll()}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _sort(self, message: dict) -> None:
        if message.get("sessionId") in self._listeners:
            self._listeners[message["sessionId"]].append(message)

    def pump(self, seconds: float) -> None:
        """Read whatever events arrive within `seconds`."""
        deadline = time.monotonic() + seconds
        while (message := self._message(deadline)) is not None:
            self._sort(message)

    def command(self, method: str, session: str | None = None, timeout: float = HUNG_SECONDS, **parameters) -> dict:
        """Send one command and return its result; events that arrive meanwhile are kept for their page."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:  # a pipe takes a long text in pieces
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + timeout
        while (answer := self._message(deadline)) is not None:
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self._sort(answer)
        raise BrowserError(f"{method}: no answer within {timeout:.0f} s")

    def page(self, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """Open a tab of this size, which asks for the light or the dark colours."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._listeners[session] = []
        return Page(self, target, session, width, height, dark)


class Page:
    """A tab and what happened in it: `requests` (addresses), `problems` (console errors, exceptions, failed loads)."""

    def __init__(self, browser: Browser, target: str, session: str, width: int, height: int, dark: bool):
        self.browser, self.target, self.session = browser, target, session
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.command(f"{domain}.enable")
        self.resize(width, height)
        self.colours(dark)

    def command(self, method: str, timeout: float = HUNG_SECONDS, **parameters) -> dict:
        return self.browser.command(method, session=self.session, timeout=timeout, **parameters)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def colours(self, dark: bool) -> None:
        """Ask for dark or light colours, as the reader's system does."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[scheme, motion])

    def open(self, url: str, timeout: float = HUNG_SECONDS) -> None:
        """Load `url` and wait until it has loaded and MathJax, where there is any, has typeset."""
        self.command("Page.navigate", url=url)
        deadline = time.monotonic() + timeout
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > deadline:
                raise BrowserError(f"{url} did not load within {timeout:.0f} s")
            self.browser.pump(0.02)
        self.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")
        self.browser.pump(0.1)

    def evaluate(self, expression: str, timeout: float = HUNG_SECONDS):
        """The value of a JavaScript expression; a promise is waited for."""
        parameters = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self.command("Runtime.evaluate", timeout=timeout, **parameters)
        if "exceptionDetails" in answer:
            told = answer["exceptionDetails"]
            raise BrowserError(told.get("exception", {}).get("description") or told["text"])
        return answer["result"].get("value")

    def until(self, condition: str, timeout: float = HUNG_SECONDS) -> bool:
        """Whether a JavaScript condition comes true."""
        deadline = time.monotonic() + timeout
        while not (found := self.evaluate(f"!!({condition})")) and time.monotonic() < deadline:
            self.browser.pump(0.02)
        return found

    def screenshot(self, path: Path, **parameters) -> None:
        data = self.command("Page.captureScreenshot", format="png", **parameters)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.browser.command("Target.closeTarget", targetId=self.target)
        self.browser._listeners.pop(self.session, None)

    @property
    def events(self) -> list[dict]:
        return self.browser._listeners[self.session]

    @property
    def requests(self) -> list[str]:
        """Every address that the page asked for, `data:` and `blob:` ones left out."""
        sent = (e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [url for url in sent if not url.startswith(("data:", "blob:", "about:"))]

    @property
    def problems(self) -> list[str]:
        """Console errors, uncaught exceptions, failed and refused loads, as text."""
        found = []
        for event in self.events:
            p = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                told = p["exceptionDetails"]
                found.append("exception: " + told.get("exception", {}).get("description", told["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
                found.append("console: " + " ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
            elif event["method"] == "Log.entryAdded" and p["entry"]["level"] == "error":
                found.append(f"log: {p['entry']['text']} {p['entry'].get('url', '')}")
            elif event["method"] == "Network.responseReceived" and p["response"]["status"] >= 400:
                found.append(f"{p['response']['status']}: {p['response']['url']}")
            elif event["method"] == "Network.loadingFailed" and not p.get("canceled"):
                found.append(f"not loaded: {p.get('errorText')}")
        return found
