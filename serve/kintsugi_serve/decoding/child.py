"""The processes that read foreign bytes: a nursery, and the children that it forks. Run as a program by `codec`.

The nursery loads the codecs once and never touches an image, so that a child costs a fork. A child reads one image
at a time, on one thread, and ends with its parent. It is confined in memory, core dumps and files, and knows
neither keys nor addresses of the store. That contains what crashes, spins or swallows memory; it is no sandbox
against code of the image's own, which would still run as the same user.

A child that is forked with two files as well unpacks a large image from the one into the other, and nothing else.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ImageError

Decoded = tuple[imaging.Image, NDArray[np.bool_] | None]
Decode = Callable[[bytes, bytes | None, int | None, int], Decoded]

BYTES_PER_PIXEL = 24
"""The most that was seen is 22: 16-bit RGB in a TIFF of one strip, of the other byte order, with a predictor."""
LEAST_PIXELS = 4096 * 4096
"""A TIFF may have tiles of this size, however small the image."""
MARGIN_BYTES = 64 * 2**20
GROWTH_BYTES = 256 * 2**20
"""A child that keeps this much more than at its start is worn out."""
MAX_HEAD_BYTES = 2**20

_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def decode(image: bytes, mask: bytes | None, white_level: int | None, max_pixels: int) -> Decoded:
    """What a child does with a job, unless a test says otherwise."""
    decoded = imaging.decode(image, white_level=white_level, max_pixels=max_pixels)
    return decoded, None if mask is None else imaging.decode_mask(mask, max_pixels=max_pixels)


def send(stream: socket.socket, head: bytes, *bodies: memoryview | bytes) -> None:
    """One message: the length of `head`, `head`, and bodies whose lengths it tells."""
    stream.sendall(_LENGTH.pack(len(head)) + head)
    for body in bodies:
        stream.sendall(body)


def receive_head(stream: socket.socket, deadline: float | None = None) -> bytes:
    """The head of a message. Raises EOFError, TimeoutError, or ValueError where it is no message."""
    length = bytearray(_LENGTH.size)
    receive_into(stream, memoryview(length), deadline)
    size: int = _LENGTH.unpack(length)[0]
    if size > MAX_HEAD_BYTES:
        raise ValueError(f"a head of {size} bytes")
    head = bytearray(size)
    receive_into(stream, memoryview(head), deadline)
    return bytes(head)


def receive_into(stream: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fill `view`. `deadline` is in seconds of `time.monotonic`. Raises EOFError or TimeoutError."""
    while view:
        if deadline is not None:
            # A timeout of 0 would mean that the call must not wait at all.
            stream.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = stream.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]


def memory_needed(max_pixels: int) -> int:
    """Bytes that decoding may take on top of the file: enough for every image of up to `max_pixels`."""
    return MARGIN_BYTES + BYTES_PER_PIXEL * max(max_pixels, LEAST_PIXELS)


def main(control: socket.socket, memory_bytes: int, target: str) -> None:
    """The nursery. A message with a socket asks for a child on it and is answered with its process id; a message
    with a process id ends that child and is answered with its wait status.

    With the socket may come two open files and, in the message, the bytes that the child may write.
    """
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # ignored, as a parent may bequeath it, it would hide how children end
    cv2.setNumThreads(1)
    module, _, name = target.partition(":")
    work: Any = getattr(importlib.import_module(module), name)
    _load_codecs()
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 32, 3)
        if not message:
            return
        if descriptors:
            stream, files = socket.socket(fileno=descriptors[0]), descriptors[1:]
            serve = partial(work, stream, *files) if files else partial(_serve, stream, work)
            answer = _fork(control, memory_bytes, int(message.partition(b" ")[2] or 0), serve)
            stream.close()
            for file in files:
                os.close(file)
        else:
            os.kill(int(message), signal.SIGKILL)
            answer = os.waitpid(int(message), 0)[1]
        control.send(b"%d" % answer)


def _load_codecs() -> None:
    """Decode one image of each make, since codecs are loaded at first use: later that would be in every child."""
    grey = np.zeros((16, 16), np.uint8)
    for tags in ("none", "lzw", "adobe_deflate", "zstd", "packbits"):
        imaging.decode(imaging.encode(imaging.Image(grey, "tiff", 255, (("compression", tags),))))
    for kind in ("png", "jpeg", "bmp"):
        imaging.decode_mask(imaging.encode(imaging.Image(grey, kind)))


def _fork(control: socket.socket, memory_bytes: int, file_bytes: int, serve: Callable[[], None]) -> int:
    nursery = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        control.close()
        _confine(nursery, memory_bytes, file_bytes)
        serve()
    finally:
        os._exit(0)


def _confine(nursery: int, memory_bytes: int, file_bytes: int) -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != nursery:
        os._exit(0)
    # What codecs print of an image is for nobody's log.
    os.dup2(0, 1)
    os.dup2(0, 2)
    # Where the machine runs out of memory, this process is to go, and not the one that holds the model.
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    most = _memory()[0] + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _serve(stream: socket.socket, work: Decode) -> None:
    size, resident = _memory()
    while True:
        try:
            job = json.loads(receive_head(stream))
        except EOFError:
            return
        head, bodies = _answer(stream, job, work)
        now = _memory()
        head["worn"] = max(now[0] - size, now[1] - resident) > GROWTH_BYTES
        send(stream, json.dumps(head).encode(), *bodies)


def _answer(stream: socket.socket, job: dict[str, Any], work: Decode) -> tuple[dict[str, Any], list[memoryview]]:
    try:
        image, mask = _decode(stream, job, work)
    except ImageError as error:
        return {"code": error.code, "sentence": str(error)}, []
    bodies = [np.ascontiguousarray(part).data.cast("B") for part in (image.pixels, mask) if part is not None]
    head = {
        "shape": image.pixels.shape,
        "dtype": image.pixels.dtype.name,
        "format": image.format,
        "white_level": image.white_level,
        "tags": image.tags,
        "mask": None if mask is None else mask.shape,
    }
    return head, bodies


def _decode(stream: socket.socket, job: dict[str, Any], work: Decode) -> Decoded:
    image = _receive(stream, job["image"])
    mask = None if job["mask"] is None else _receive(stream, job["mask"])
    with as_image_errors():
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(_memory()[0] + memory_needed(job["max_pixels"]), most), most))
        return work(image, mask, job["white_level"], job["max_pixels"])


@contextmanager
def as_image_errors() -> Generator[None]:
    """Whatever reading foreign bytes raises, as an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("too_large", "the image needs more memory than it may take: cut it into parts") from error
    except Exception as error:  # whatever foreign bytes bring about, the next image is not to suffer
        kind = type(error).__name__
        raise ImageError("undecodable", f"the image cannot be decoded ({kind}: {error}): save it anew") from error


def _receive(stream: socket.socket, size: int) -> bytes:
    # One call and no copy, as nothing else asks the socket to wait.
    body = stream.recv(size, socket.MSG_WAITALL) if size else b""
    if len(body) < size:
        raise EOFError
    return body


def _memory() -> tuple[int, int]:
    """Bytes of address space, and of memory, of this process."""
    with open("/proc/self/statm", "rb") as file:
        size, resident = file.read().split()[:2]
    return int(size) * resource.getpagesize(), int(resident) * resource.getpagesize()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
