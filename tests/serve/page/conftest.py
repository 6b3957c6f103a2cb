"""A headless Chromium that is driven over the DevTools protocol, and a service for its page."""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.sync.client import connect

from kintsugi import imaging
from kintsugi_serve.ingress.api import build_api
from kintsugi_serve.jobs import Answer, Job, LoadedModel, Rejection, Serving
from kintsugi_serve.schemas import Refusal, Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows", "--disable-extensions",
)  # fmt: skip
KEYS = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13, " ": 32, "Home": 36,
    "End": 35,
}  # fmt: skip
PATIENCE_S = 30
WATCH = "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.blockedURI));"
VERSION = LoadedModel("unet", 3, "d" * 64)


class Browser:
    """One Chromium; every page has a context of its own."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stderr is not None
        told = next(filter(None, (re.search(r"listening on (ws://\S+)", line) for line in self._process.stderr)))
        # Chromium would stop at a full pipe.
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(connect(told[1], max_size=None))
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        number = next(self._numbers)
        head = {"id": number, "method": method, "params": params}
        self._socket.send(json.dumps(head | ({"sessionId": session} if session else {})))
        while (message := self._receive(method)).get("id") != number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def wait_for(self, method: str, **wanted: Any) -> dict[str, Any]:
        """Take the first event of this kind whose parameters hold `wanted`, be it past or to come."""
        while True:
            for event in self.events:
                if event.get("method") == method and wanted.items() <= event["params"].items():
                    self.events.remove(event)
                    return event["params"]
            self.events.append(self._receive(method))

    def _receive(self, what: str) -> dict[str, Any]:
        try:
            return json.loads(self._socket.recv(timeout=PATIENCE_S))
        except TimeoutError:
            raise AssertionError(f"nothing came for {PATIENCE_S} s, in {what}") from None

    def close(self) -> None:
        self._stack.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_S)


class Page:
    """One tab, by what a person does with it."""

    def __init__(self, browser: Browser, width: int = 1280, height: int = 900) -> None:
        self._browser = browser
        self._context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        self.resize(width, height)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def resize(self, width: int, height: int, *, touch: bool = False, ratio: float = 1) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": touch}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def colours(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && typeof Stage === 'function'")

    def sign_in(self, url: str, password: str) -> None:
        """Open a page whose password is asked for in the browser's own dialog."""
        self._browser.events.clear()
        self.send("Fetch.enable", handleAuthRequests=True, patterns=[{"urlPattern": url}])
        self.value(f"setTimeout(() => location.assign({url!r})) && 0")
        paused = self._browser.wait_for("Fetch.requestPaused")
        self.send("Fetch.continueRequest", requestId=paused["requestId"])
        asked = self._browser.wait_for("Fetch.authRequired")
        answer = {"response": "ProvideCredentials", "username": "", "password": password}
        self.send("Fetch.continueWithAuth", requestId=asked["requestId"], authChallengeResponse=answer)
        self._browser.wait_for("Page.loadEventFired")
        self.send("Fetch.disable")

    def value(self, expression: str) -> Any:
        """What the expression is, or becomes."""
        done = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, f"{expression}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Return once the condition holds in the page."""
        look = f"const look = () => ({condition}) ? done(true) : requestAnimationFrame(look); look();"
        assert self.value(f"new Promise(done => {{ {look} }})")

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({selector!r}).innerText")

    def choose(self, selector: str, *files: Path) -> None:
        found = self.send("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]["objectId"]
        self.send("DOM.setFileInputFiles", objectId=found, files=[str(file) for file in files])

    def restored(self, *files: Path) -> None:
        """Give the page files and wait until the first is on screen."""
        self.choose("#file", *files)
        self.until("document.querySelector('#queue li:is(.done, .alarm)') && !$('work').hidden && view.size")
        self.settled()

    def settled(self) -> None:
        """Wait until what was asked for is painted."""
        self.until("!view.frame")

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({selector!r}).click()")
        self.settled()

    def press(self, key: str, times: int = 1, *, shift: bool = False, hold: bool = False) -> None:
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        params = {
            "key": key,
            "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper())),
            "modifiers": 8 if shift else 0,
        }
        for _ in range(times):
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **params)
            if not hold:
                self.send("Input.dispatchKeyEvent", type="keyUp", **params)
        self.settled()

    def release(self, key: str) -> None:
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=KEYS[key])
        self.settled()

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def pixel(self, x: float, y: float) -> list[int]:
        """RGBA of the canvas, at a share of its width and height."""
        box = "view.canvas.width, view.canvas.height"
        pick = f"((w, h) => [...view.context.getImageData(Math.floor(w * {x}), Math.floor(h * {y}), 1, 1).data])({box})"
        return self.value(pick)

    def painting(self) -> str:
        """The canvas, for comparing."""
        return hashlib.sha256(self.value("view.canvas.toDataURL()").encode()).hexdigest()

    def events(self, method: str) -> list[dict[str, Any]]:
        self.value("0")
        return [
            e["params"]
            for e in self._browser.events
            if (e.get("sessionId"), e.get("method")) == (self._session, method)
        ]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the content security policy stopped."""
        logged = [
            e["entry"]["text"] for e in self.events("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")
        ]
        thrown = [str(e["exceptionDetails"]) for e in self.events("Runtime.exceptionThrown")]
        return logged + thrown + self.value("violations")

    def download(self, selector: str, folder: Path) -> Path:
        """The file that a link gives."""
        behaviour = {"behavior": "allow", "downloadPath": str(folder), "eventsEnabled": True}
        self._browser.send("Browser.setDownloadBehavior", browserContextId=self._context, **behaviour)
        self.click(selector)
        begun = self._browser.wait_for("Browser.downloadWillBegin")
        self._browser.wait_for("Browser.downloadProgress", guid=begun["guid"], state="completed")
        return folder / begun["suggestedFilename"]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._browser.send("Target.disposeBrowserContext", browserContextId=self._context)
        self._browser.events.clear()


class Models:
    """The backend behind everything but restoring."""

    async def restore(self, job: Job) -> Answer | Rejection:
        raise AssertionError("restoring goes to the other part")

    async def describe(self) -> Serving:
        return Serving(VERSION)

    async def resolve(self, model: str | None) -> LoadedModel:
        return VERSION

    async def published(self) -> list[dict[str, Any]]:
        versions = [{"version": n, "digest": "d" * 64, "created": ""} for n in (1, 2, 3)]
        return [{"name": "unet", "aliases": {"production": 3, "candidate": 2}, "versions": versions}]


class Served:
    """The endpoint, whose restoring is a blur that answers as the contract says. `problems` come first, one by one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.problems: list[tuple[Refusal, dict[str, str]]] = []
        self.queries: list[dict[str, str]] = []
        self.masks: list[bool] = []
        self.key = ""
        self.password = ""
        self.sent = b""
        self.body: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.without: tuple[str, ...] = ()
        self.echoes = False

    @property
    def image(self) -> bytes:
        """The file that was answered."""
        return base64.b64decode(self.body["image"])

    @property
    def pixels(self) -> tuple[Any, Any]:
        """Of the image that came and of the one that went."""
        return imaging.decode(self.sent).pixels, imaging.decode(self.image).pixels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        basic = base64.b64encode(f":{self.password}".encode()).decode()
        if self.password and Headers(scope=scope).get("authorization") != f"Basic {basic}":
            await Response("", 401, {"WWW-Authenticate": "Basic"})(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/v1/restore":
            await (await self._restored(Request(scope, receive)))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _restored(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return self._problem(Refusal("unauthorized", "send a known key as 'Authorization: Bearer KEY'"), {})
        if self.problems:
            return self._problem(*self.problems.pop(0))
        self.queries.append(dict(request.query_params))
        data, mask = await self._files(request)
        self.masks.append(mask)
        white = request.query_params.get("white_level")
        try:
            self.sent = data
            self.body = self._answer(data, int(white) if white else None)
        except imaging.ImageError as error:
            return self._problem(Refusal(error.code, str(error)), {})
        return JSONResponse({name: value for name, value in self.body.items() if name not in self.without})

    async def _files(self, request: Request) -> tuple[bytes, bool]:
        if not request.headers["content-type"].startswith("multipart/"):
            return await request.body(), False
        async with request.form() as form:
            return await form["image"].read(), "mask" in form  # type: ignore[union-attr]

    def _answer(self, data: bytes, white: int | None) -> dict[str, Any]:
        encoded, map_file = data, b""
        if not self.echoes:
            image = imaging.decode(data, white_level=white)
            blurred = cv2.GaussianBlur(image.pixels, (0, 0), 1.2)
            encoded = imaging.encode(imaging.replace(image, pixels=blurred))
            defects = np.zeros(image.size, np.uint8)
            defects[10:14, 12:20] = 255
            map_file = imaging.encode(imaging.Image(defects))
        report = {
            "retention": 0.9421, "local_retention": 0.71, "added": 0.0012, "removed": 0.0004, "alarm_score": 3.1,
            "expected_error": 0.02, "alarm": False, "reasons": [], "abstained": None,
            "defect_map": {"max": 0.97, "mean": 0.01, "area": 0.0167},
        }  # fmt: skip
        return {
            "image": base64.b64encode(encoded).decode(), "format": imaging.sniff(encoded), "model": "unet@3",
            "digest": "d" * 64, "report": report | self.report, "request_id": "9f2c-4e1",
            "input_sha256": hashlib.sha256(data).hexdigest(), "output_sha256": hashlib.sha256(encoded).hexdigest(),
            "timing_ms": {"decode": 1.2, "queue": 0.4, "model": 80.5, "encode": 2.0},
            "defect_map": base64.b64encode(map_file).decode() or None,
        }  # fmt: skip

    def _problem(self, refusal: Refusal, headers: dict[str, str]) -> Response:
        body = {"type": "about:blank", "title": refusal.title, "status": refusal.status, "detail": refusal.detail}
        body |= {"code": refusal.code, "request_id": "5a5a-77"}
        return JSONResponse(body, refusal.status, headers, "application/problem+json")


@contextlib.contextmanager
def serving(folder: Path) -> Generator[Served]:
    """The endpoint on a free port of loopback."""
    served = Served(build_api(Settings(store=str(folder)), Models()))
    server = uvicorn.Server(uvicorn.Config(served, port=0, log_level="warning"))
    sockets = [server.config.bind_socket()]
    served.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: sudo apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    with serving(tmp_path_factory.mktemp("store")) as served:
        yield served


@pytest.fixture
def served(endpoint: Served) -> Served:
    endpoint.reset()
    return endpoint


@pytest.fixture
def tab(browser: Browser, served: Served) -> Generator[Page]:
    """The endpoint's page, in a window of 1280 x 900."""
    page = Page(browser)
    page.open(served.url)
    yield page
    page.close()


def _part(folder: Path, kind: imaging.Format = "png", name: str = "part") -> Path:
    """A file of 80 x 60 px with the values of a 12-bit camera."""
    pixels = np.random.default_rng(4).integers(0, 4096, (60, 80)).astype(np.uint16)
    pixels[0, 0] = 4000
    path = folder / f"{name}.{kind}"
    path.write_bytes(imaging.encode(imaging.Image(pixels, kind, 4095)))
    return path


@pytest.fixture
def part() -> object:
    return _part
