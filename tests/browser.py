"""A real Chromium for the tests: started without a window and told what to do over a pipe.

    with Browser(find_chromium(), directory) as browser:
        page = browser.open("file:///...")
        page.click("#run"); page.wait("!state.run"); page.evaluate("1 + 1")

The language is the Chrome DevTools Protocol: JSON, each message ended by a zero byte; Chromium reads it from its file 3
and answers on its file 4. Needs nothing but the standard library; bench_page.py measures with it.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time

PATIENCE = 60  # seconds until a test says that something did not come


class NoChromium(Exception):
    """There is none, and it cannot be installed from here; the message says how it could be."""


def find_chromium():
    """The path of Chromium; installs Debian's where that can be done, as root or in CI. Raises NoChromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if found is None and shutil.which("apt-get") and (is_root or os.environ.get("CI")):
        apt_get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            command = [*([] if is_root else ["sudo", "-n"]), *apt_get, *words]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # there is no sudo; no answer from Debian
                subprocess.run(command, env=environment, capture_output=True, timeout=400)
        found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise NoChromium("no Chromium, and it cannot be installed from here; on Debian: sudo apt-get install chromium")
    return found


class Browser:
    """One Chromium process. directory: an empty one, for its profile."""

    FLAGS = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-crash-reporter --disable-dev-shm-usage --mute-audio "
        "--hide-scrollbars --remote-debugging-pipe"
    )

    def __init__(self, program, directory):
        ours_in, theirs_out = (self._high(fd) for fd in os.pipe())
        theirs_in, ours_out = (self._high(fd) for fd in os.pipe())
        argv = [program, *self.FLAGS.split(), f"--user-data-dir={directory}", "about:blank"]
        quiet = os.open(os.devnull, os.O_WRONLY)
        files = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        files += [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
        self.process = os.posix_spawn(program, argv, {**os.environ, "HOME": str(directory)}, file_actions=files)
        for fd in (theirs_in, theirs_out, quiet):
            os.close(fd)
        self.reading, self.writing = ours_in, ours_out
        self.received, self.last_id, self.answers, self.pages = b"", 0, {}, {}

    @staticmethod
    def _high(fd):
        """The same file under a number that is not 3 or 4."""
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(fd)
        return high

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.send("Browser.close")
        until = time.monotonic() + 5
        while os.waitpid(self.process, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                break
            time.sleep(0.02)
        os.close(self.reading)
        os.close(self.writing)

    def send(self, method, session=None, **params):
        """Ask, and do not wait. Returns the number of the question."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.writing, data) :]
        return self.last_id

    def ask(self, method, session=None, **params):
        """Ask, and wait for the answer: a dict."""
        number = self.send(method, session, **params)
        until = time.monotonic() + PATIENCE
        while number not in self.answers:
            self.receive(until - time.monotonic(), method)
        answer = self.answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self, seconds, waiting_for):
        """Read what has come; events go to their page."""
        ready, _, _ = select.select([self.reading], [], [], max(0, seconds))
        assert ready, f"no answer from the browser: {waiting_for}"
        data = os.read(self.reading, 1 << 20)
        assert data, "the browser has ended"
        *messages, self.received = (self.received + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self.answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].happened(message["method"], message["params"])

    def open(self, url, width=1280, height=900):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session, url, width, height)


KEYS = {"Backspace": 8, "Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
KEYS.update({"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32, "e": 69})


class Page:
    """A page and its workers. `requests`: every address asked for; `complaints`: errors and warnings, as text."""

    def __init__(self, browser, target, session, url, width, height):
        self.browser, self.target, self.session = browser, target, session
        self.requests, self.complaints = [], []
        browser.pages[session] = self
        self._enable(session)
        self.ask("Page.enable")
        self.ask("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.resize(width, height)
        self.ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def _enable(self, session):
        for domain in ("Runtime", "Log", "Network"):
            self.browser.send(f"{domain}.enable", session)

    def ask(self, method, **params):
        return self.browser.ask(method, self.session, **params)

    def happened(self, event, params):
        if event == "Target.attachedToTarget":  # a worker: it is listened to from its first line on
            self.browser.pages[params["sessionId"]] = self
            self._enable(params["sessionId"])
            self.browser.send("Runtime.runIfWaitingForDebugger", params["sessionId"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])

    def evaluate(self, code):
        """The value of an expression in the page, awaited where it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", answer))
        return answer["result"].get("value")

    def wait(self, code):
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.evaluate(code):
            assert time.monotonic() < until, f"did not come true: {code}; {self.complaints}"
            time.sleep(0.01)

    def text(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector, nth=0):
        """A click of the mouse in the middle of an element, as soon as it lies still."""
        x, y = self.evaluate(
            f"""(async () => {{
                const element = document.querySelectorAll({json.dumps(selector)})[{nth}];
                const middle = () => {{
                    element.scrollIntoView({{ block: "center" }});
                    const box = element.getClientRects()[0];
                    return [box.x + box.width / 2, box.y + box.height / 2];
                }};
                for (let before = middle(); ; ) {{
                    await new Promise((done) => {{ requestAnimationFrame(done); setTimeout(done, 100); }});
                    const now = middle();
                    if (now.every((place, i) => place === before[i])) return now;
                    before = now;
                }}
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            buttons = {} if kind == "mouseMoved" else dict(button="left", clickCount=1)
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def press(self, key, times=1, ctrl=False):
        """A key of the keyboard, where the focus is."""
        text = {"Enter": "\r", " ": " ", "e": "e"}.get(key, "") if not ctrl else ""
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                code = dict(key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=KEYS[key])
                more = dict(text=text) if text and kind == "keyDown" else {}
                self.ask("Input.dispatchKeyEvent", type=kind, modifiers=2 if ctrl else 0, **code, **more)

    def type(self, text):
        self.ask("Input.insertText", text=text)

    def focus(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")

    def choose(self, selector, value):
        """An option of a select: as by hand, it changes the value and says so."""
        self.evaluate(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.value = {json.dumps(value)};
                element.dispatchEvent(new Event("change"));
            }})()"""
        )

    def resize(self, width, height, phone=False):
        size = dict(width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def dark(self, on):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path, whole=False):
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as f:
            f.write(base64.b64decode(picture))

    def close(self):
        """Close the tab; what it asked for and complained of is still there."""
        self.browser.ask("Target.closeTarget", targetId=self.target)
