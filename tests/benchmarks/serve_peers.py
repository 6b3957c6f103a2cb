"""Other servers that decode an image, leave it as it is, and encode it: what the endpoint is compared with.

`bare` is FastAPI under uvicorn, in the project's own environment. LitServe and BentoML have one of their own under
.kintsugi/bench/peers, which `install` makes, with the same versions of the codecs. All of them call
kintsugi.imaging, and write no access log.

    with peer("litserve", workers=2) as server:
        run_load(Load(server.address, server.bodies(files), headers=server.headers, path=server.path))

As a script, `serve_peers.py bare|echo PORT WORKERS` is one of these servers.
"""

import http.client
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI, Request, Response

from kintsugi import imaging
from kintsugi.processes import free_ports, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".kintsugi" / "bench" / "peers"
PINNED = {"litserve": "0.2.19", "bentoml": "1.4.39"}
CODECS = ("numpy", "opencv-python-headless", "tifffile", "imagecodecs", "pillow", "pydantic", "fastapi", "uvicorn")
START_S = 90.0
_BOUNDARY = "kintsugi-bench"


class PeerFailed(Exception):
    """A peer cannot be installed or started."""


# ---------------------------------------------------------------------------- outside


@dataclass(frozen=True)
class Peer:
    """A server that answers; `headers`, `path` and `bodies` are what it wants to be sent."""

    kind: str
    address: str
    pid: int
    path: str = "/v1/restore"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "image/png"})
    scratch: Path = Path()

    def bodies(self, files: Sequence[str]) -> tuple[str, ...]:
        """Files with the bodies for images; LitServe takes binary data as parts of a form only."""
        if self.kind != "litserve":
            return tuple(files)
        return tuple(str(_as_form(Path(file), self.scratch)) for file in files)


def _as_form(image: Path, folder: Path) -> Path:
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image.png"\r\n\r\n'
    form = folder / f"{image.stem}.form"
    form.write_bytes(head.encode() + image.read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode())
    return form


def install() -> None:
    """Make the peers' environment, unless it is there.

    Raises:
        PeerFailed: it cannot be made, for example without a network.
    """
    wanted = [f"{name}=={number}" for name, number in (PINNED | {name: version(name) for name in CODECS}).items()]
    stamp = ENVIRONMENT / "installed.txt"
    if stamp.is_file() and stamp.read_text() == "\n".join(wanted):
        return
    uv = str(Path(sys.executable).parent / "uv")
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENT)],
        [uv, "pip", "install", "--quiet", "--python", str(ENVIRONMENT / "bin/python"), *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerFailed(f"not installed: {done.stderr.strip()[-200:]}")
    stamp.write_text("\n".join(wanted))


@contextmanager
def peer(kind: str, workers: int = 1) -> Iterator[Peer]:
    """The server `kind` (bare, echo, litserve or bentoml) with `workers` processes that do the work.

    Raises:
        PeerFailed: it did not come up.
    """
    if kind in PINNED:
        install()
    python = str(ENVIRONMENT / "bin/python") if kind in PINNED else sys.executable
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory(prefix="kintsugi-bench-") as folder:
        scratch = Path(folder)
        own = {"BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True", "LIT_DISABLE_TRACKING": "1"}
        environment = {**os.environ, **own, "PYTHONPATH": f"{ROOT / 'platform'}:{HERE}", "OMP_NUM_THREADS": "1"}
        script = [f"serve_peer_{kind}.py"] if kind in PINNED else ["serve_peers.py", kind]
        command = [python, str(HERE / script[0]), *script[1:], str(port), str(workers)]
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, cwd=scratch, stdout=log, stderr=log)
        try:
            came = wait_until(lambda: process.poll() is not None or _answers(port), START_S)
            if not came or process.poll() is not None:
                raise PeerFailed(f"did not start: {(scratch / 'log').read_text()[-200:]}")
            yield Peer(kind, f"127.0.0.1:{port}", process.pid, scratch=scratch, **_wants(kind))
        finally:
            _end(process)


def _wants(kind: str) -> dict[str, Any]:
    if kind == "litserve":
        return {"headers": {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}, "path": "/predict"}
    return {"path": "/restore"} if kind == "bentoml" else {}


def _answers(port: int) -> bool:
    """Whether HTTP is spoken there; BentoML's port is open long before."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def _end(process: "subprocess.Popen[bytes]") -> None:
    """BentoML's workers are in sessions of their own."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


# ---------------------------------------------------------------------------- servers


def echo_app() -> Any:
    """Answers with the request's body, and shows what the load generator itself can do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more, parts = scope["type"] == "http", list[bytes]()
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]
        headers = [(b"content-length", str(sum(map(len, parts))).encode()), (b"content-type", b"image/png")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"".join(parts)})

    return app


def bare_app() -> Any:
    app = FastAPI()

    async def restore(request: Request) -> Response:
        image = imaging.decode(await request.body())
        return Response(imaging.encode(image), media_type="image/png")

    app.post("/v1/restore")(restore)
    return app


def main(kind: str, port: int, workers: int) -> None:
    app = f"serve_peers:{kind}_app"
    uvicorn.run(app, factory=True, port=port, workers=workers, access_log=False, log_level="error", lifespan="off")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
