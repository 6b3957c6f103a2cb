"""A small dataset and a small experiment for the tests of this room."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kintsugi.config import ExperimentConfig, parse_config
from kintsugi.data.dataset import build_dataset
from kintsugi.imaging import Image, encode, encode_mask
from kintsugi.storage import LocalStore

TINY = {
    "data": {"dataset": "tiny", "crop": 32, "mask_dropout": 0.5, "batch_size": 4},
    "degradation": {"presets": {"noise": 1.0}},
    "model": {
        "channels": 1,
        "base": 8,
        "levels": 2,
        "skips": [True, True],
        "reduction": 4,
        "dropout": 0.1,
        "mask": "optional",
        "residual": True,
    },
    "loss": {"perceptual": {"network": "vgg11", "layers": [1], "weights": "random"}},
    "optim": {"learning_rate": 0.003},
    "train": {"epochs": 2, "steps_per_epoch": 3, "workers": 1},
}


@pytest.fixture(scope="session")
def tiny_config() -> ExperimentConfig:
    return parse_config(TINY)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A store with the dataset `tiny`: 16-bit grey waves with a dark square, all three splits."""
    folder = tmp_path_factory.mktemp("tiny-images")
    rows = ["name,part,category,split"]
    for index in range(12):
        split = ("train", "val", "test")[max(0, index - 7) // 2] if index > 7 else "train"
        name = f"wave{index:02d}"
        rows.append(f"{name},{name},waves,{split}")
        clean, mask = _wave(index)
        for kind, data in (("clean", encode(Image(clean, "png", 65535))), ("mask", encode_mask(mask))):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{name}.png").write_bytes(data)
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    store = LocalStore(tmp_path_factory.mktemp("tiny-store"))
    build_dataset("pairs", folder, "tiny", store)
    return store


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


Serve = Callable[[Mapping[str, tuple[int, bytes]]], str]


@pytest.fixture
def serve_http() -> Iterator[Serve]:
    """Starts an HTTP server on loopback that answers each path as told, all others 404; gives its URL."""
    with contextlib.ExitStack() as running:

        def start(answers: Mapping[str, tuple[int, bytes]]) -> str:
            server = running.enter_context(_Answering(answers))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start


class _Answering(ThreadingHTTPServer):
    def __init__(self, answers: Mapping[str, tuple[int, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers


class _Handler(BaseHTTPRequestHandler):
    server: _Answering

    def do_GET(self) -> None:
        status, body = self.server.answers.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def _wave(index: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:48, :56]
    image = 0.5 + 0.2 * np.sin((x + index * 3) / 5) * np.cos(y / (4 + index % 3))
    mask = np.zeros(image.shape, bool)
    top, left = 8 + index % 5, 10 + 2 * (index % 7)
    mask[top : top + 8, left : left + 8] = True
    image[mask] -= 0.25
    return np.rint(np.clip(image, 0, 1) * 65535).astype(np.uint16), mask
