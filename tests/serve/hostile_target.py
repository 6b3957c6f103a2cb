"""A decoder's child in the hands of its image, whose bytes are a verb and perhaps a word."""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kintsugi.errors import ImageError
from kintsugi.imaging import Image
from kintsugi_serve.decoding.child import receive_head, send

kept: list[object] = []


def decode(image: bytes, mask: bytes | None, white_level: int | None, max_pixels: int) -> tuple[Image, None]:
    """Do as the image says; otherwise answer its length as a grey level, with this process in the tags."""
    verb, _, word = image.decode().partition(" ")
    if verb in VERBS:
        VERBS[verb](word)
    shape = (max_pixels + 1, 1) if verb == "exceed" else (2, 2)
    return Image(np.full(shape, len(image), np.uint8), tags=(("pid", str(os.getpid())),)), None


def crash(word: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def nibble(word: str) -> None:
    pieces: list[bytearray] = []
    while True:
        pieces.append(bytearray(2**20))


def spin(word: str) -> None:
    while True:
        pass


def tell_and_spin(word: str) -> None:
    """`word` is a pipe, which whoever waits at its other end finds closed."""
    with open(word, "w"):
        pass
    spin(word)


def babble(word: str) -> None:
    for descriptor in range(3, 16):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\0\0\0\x07{wrong}")


def fail(word: str) -> None:
    raise ZeroDivisionError("division by zero")


def describe(word: str) -> None:
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_CORE", "RLIMIT_FSIZE")}
    threads = len(os.listdir("/proc/self/task"))
    facts = {"environment": dict(os.environ), "modules": list(sys.modules), "limits": limits, "threads": threads}
    raise ImageError("undecodable", json.dumps(facts))


VERBS: dict[str, Callable[[str], object]] = {
    "crash": crash,
    "swallow": lambda word: kept.append(np.ones(2**40, np.uint8)),
    "nibble": nibble,
    "keep": lambda word: kept.append(np.empty(int(word), np.uint8)),
    "spin": spin,
    "tell-and-spin": tell_and_spin,
    "hang": lambda word: signal.pause(),
    "wait": lambda word: Path(word).read_text(),
    "fail": fail,
    "babble": babble,
    "describe": describe,
}


def unpack(stream: socket.socket, source: int, sink: int) -> None:
    """A large image in the hands of a child: what stands behind the TIFF's magic number is a verb."""
    receive_head(stream)
    verb, _, word = Path(f"/proc/self/fd/{source}").read_bytes()[4:].decode().strip().partition(" ")
    if verb in VERBS:
        VERBS[verb](word)
    height, width = (8, 8) if verb == "flood" else (2**20, 2**10)
    head = {"height": height, "width": width, "channels": 1, "dtype": "uint8", "white_level": 255}
    send(stream, json.dumps({**head, "compression": "none", "photometric": "minisblack"}).encode())
    receive_head(stream)
    os.write(sink, bytes(2**16))
    send(stream, json.dumps({"rows": os.fstat(sink).st_size // width}).encode())
