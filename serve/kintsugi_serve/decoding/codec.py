"""Decoding of untrusted images in processes of their own, so that what an image does to a decoder stays there."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, PositiveInt, TypeAdapter

from kintsugi import imaging
from kintsugi.errors import ImageError, KintsugiError
from kintsugi_serve.decoding import child as child_program
from kintsugi_serve.decoding.child import Decoded, receive_head, receive_into, send
from kintsugi_serve.decoding.ledger import Ledger

logger = logging.getLogger(__name__)

POISON = "this image ended the decoder twice before and is not tried again: save it anew from its source"
_INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TIFFFILE_NUM_THREADS"), "1")


class Decoder:
    """Decodes images for one process, on one asyncio loop.

    `workers` images are decoded at a time, each in a child process, for at most `timeout_s` seconds of wall clock
    and with at most `memory_bytes` of memory on top of what a child has at its start (less where `max_pixels` needs
    less, see `child.memory_needed`; 100 megapixels of 16-bit RGB in the most demanding TIFF take 2.2 GiB).
    A child is replaced after `images_per_child` images, when it keeps memory, and when an image ended it.
    `ledger` is a folder that remembers the images that did, for all decoders of a machine; None remembers nothing.
    `target` names the function that children call, as "module:function"; tests bring their own.

    Linux only. The first image waits for the children to start, unless `start` was awaited.
    """

    def __init__(
        self,
        workers: int = 2,
        memory_bytes: int = 3 * 2**30,
        timeout_s: float = 20,
        ledger: Path | None = None,
        *,
        images_per_child: int = 1000,
        target: str = "kintsugi_serve.decoding.child:decode",
    ) -> None:
        self._timeout_s = timeout_s
        self._images_per_child = images_per_child
        self._ledger = Ledger(ledger) if ledger is not None else None
        self._nursery = Nursery(memory_bytes, target)
        self._threads = ThreadPoolExecutor(workers, "decoder")
        self._all = [_Slot() for _ in range(workers)]
        # The last one used is the first to be used again: its memory is still at hand.
        self._free: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()
        for slot in self._all:
            self._free.put_nowait(slot)

    async def start(self) -> None:
        """Start all children before the first image. Raises KintsugiError where they do not start."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, self._fill, slot) for slot in self._all))

    async def decode(
        self, image: bytes, mask: bytes | None = None, *, white_level: int | None = None, max_pixels: int
    ) -> Decoded:
        """As `imaging.decode` and `imaging.decode_mask`. A caller that goes away leaves the answer to nobody.

        Raises:
            ImageError: as those two; `too_large` if `memory_bytes` did not suffice; `undecodable` if the image ended
                its process or took longer than `timeout_s`; `poison` if it did so twice before.
            KintsugiError: no child can be started, or the decoder is closed.
        """
        job = _Job(image, mask, white_level, max_pixels)
        slot = await self._free.get()
        if self._nursery.closed:
            self._free.put_nowait(slot)
            raise KintsugiError("the decoder is closed: send the image again")
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._decode, slot, job)
        # Only when the child has answered, whoever still waits for it, may it get the next image.
        work.add_done_callback(lambda done: self._release(loop, slot, done))
        return await asyncio.shield(work)

    def close(self) -> None:
        """End all processes. Images that are still in them are refused with a KintsugiError."""
        self._nursery.close()
        self._threads.shutdown(wait=True)
        for slot in self._all:
            slot.empty()

    def _release(self, loop: asyncio.AbstractEventLoop, slot: "_Slot", done: "asyncio.Future[Decoded]") -> None:
        if not done.cancelled():
            done.exception()  # else asyncio would complain of what a caller that went away never heard
        worn = slot.worn or slot.images >= self._images_per_child
        if (slot.child is None or worn) and not self._nursery.closed:
            renewal = loop.run_in_executor(self._threads, self._renew, slot)
            renewal.add_done_callback(lambda _: self._free.put_nowait(slot))
        else:
            self._free.put_nowait(slot)

    def _renew(self, slot: "_Slot") -> None:
        # What fails here is met again, and told, by the next image.
        with contextlib.suppress(KintsugiError, OSError):
            if (child := slot.empty()) is not None:
                self._nursery.end(child)
            self._fill(slot)

    def _fill(self, slot: "_Slot") -> "_Child":
        if slot.child is not None and slot.child.hung_up():
            # It ended while it had nothing to do: not the next image's fault.
            self._nursery.end(slot.child)
            slot.empty()
        if slot.child is None:
            slot.child = self._nursery.fork()
        return slot.child

    def _decode(self, slot: "_Slot", job: "_Job") -> Decoded:
        if self._ledger is not None and not self._ledger.empty() and self._ledger.refuses(job.sha256):
            raise ImageError("poison", POISON)
        for _ in range(2):
            child = self._fill(slot)
            try:
                reply = child.ask(job, time.monotonic() + self._timeout_s)
            except (OSError, EOFError, ValueError) as error:
                slot.empty()
                if (status := self._nursery.end(child)) is not None:
                    cause = "timeout" if isinstance(error, TimeoutError) else cause_of(status)
                    raise blame(self._ledger, job.sha256, len(job.image), cause, self._timeout_s) from error
            else:
                slot.images, slot.worn = slot.images + 1, reply.worn
                return reply.decoded()
        raise KintsugiError("the decoder's processes are ended from outside: see whether memory is short")


def blame(ledger: Ledger | None, sha256: str, size: int, cause: str, timeout_s: float) -> ImageError:
    """The refusal of an image of `size` bytes that ended its decoder; the ledger remembers it."""
    logger.warning("an image of %d bytes ended its decoder (%s)", size, cause)
    if ledger is not None:
        ledger.record(sha256, cause)
    if cause == "timeout":
        return ImageError(
            "undecodable", f"the image was not decoded within {timeout_s:g} s, which ended it: save it anew"
        )
    return ImageError("undecodable", f"the image ended its decoder ({cause}): it is damaged, save it anew")


class Nursery:
    """The process whose forks decode: it has loaded the codecs, and is started anew when it is gone.

    Methods may be called from any thread.
    """

    def __init__(self, memory_bytes: int, target: str, *, start_s: float = 60) -> None:
        self._words = [str(memory_bytes), target]
        self._start_s = start_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def fork(self, *files: int, file_bytes: int = 0) -> "_Child":
        """A new child. Raises KintsugiError where there is none.

        Args:
            files: descriptors of a large image and of where its rows go, for a child that unpacks it.
            file_bytes: what it may write.
        """
        with self._lock:
            if self.closed:
                raise KintsugiError("the decoder is closed: send the image again")
            try:
                return self._fork(*files, file_bytes=file_bytes)
            except OSError:
                self._stop()
            try:
                return self._fork(*files, file_bytes=file_bytes)
            except OSError as error:
                self._stop()
                raise KintsugiError(f"the decoder's processes do not start ({error}): see the log") from error

    def end(self, child: "_Child") -> int | None:
        """End a child for sure; its wait status, or None where it ended with the nursery.

        Raises:
            KintsugiError: closed.
        """
        with self._lock:
            if self.closed:
                raise KintsugiError("the decoder was closed before the image was decoded: send it again")
            try:
                # A nursery that is gone took its children along; their numbers mean nothing to another one.
                return self._ask(b"%d" % child.pid) if child.nursery is self._process else None
            except OSError:
                self._stop()
                return None

    def close(self) -> None:
        self.closed = True
        with self._lock:
            self._stop()

    def _launch(self) -> "subprocess.Popen[bytes]":
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(self._start_s)
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", child_program.__name__, str(theirs.fileno()), *self._words],
                pass_fds=[theirs.fileno()],
                env=environment | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _fork(self, *files: int, file_bytes: int) -> "_Child":
        self._process = self._process or self._launch()
        ours, theirs = socket.socketpair()
        with theirs:
            return _Child(ours, self._ask(b"fork %d" % file_bytes, theirs.fileno(), *files), self._process)

    def _ask(self, message: bytes, *descriptors: int) -> int:
        socket.send_fds(self._control, [message], descriptors)
        answer = self._control.recv(32)
        if not answer:
            raise ConnectionResetError("the process ended")
        return int(answer)

    def _stop(self) -> None:
        if self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass(frozen=True)
class _Job:
    image: bytes
    mask: bytes | None
    white_level: int | None
    max_pixels: int

    @property
    def sha256(self) -> str:
        """Of the image; of it and the mask's SHA-256 where there is a mask."""
        digest = hashlib.sha256(self.image)
        if self.mask is not None:
            digest.update(hashlib.sha256(self.mask).digest())
        return digest.hexdigest()

    @property
    def head(self) -> bytes:
        sizes = {"image": len(self.image), "mask": None if self.mask is None else len(self.mask)}
        return json.dumps(sizes | {"white_level": self.white_level, "max_pixels": self.max_pixels}).encode()


class _Refused(BaseModel):
    code: Literal["undecodable", "unsupported_format", "unsupported_mode", "too_large", "over_white_level"]
    sentence: str
    worn: bool


class _Accepted(BaseModel):
    shape: tuple[PositiveInt, PositiveInt] | tuple[PositiveInt, PositiveInt, Literal[3]]
    dtype: Literal["uint8", "uint16"]
    format: imaging.Format
    white_level: PositiveInt
    tags: tuple[tuple[str, str], ...]
    mask: tuple[PositiveInt, PositiveInt] | None
    worn: bool

    def check(self, job: _Job) -> None:
        """Raise ValueError where this cannot be the answer to `job`."""
        fits = all(height * width <= job.max_pixels for height, width, *_ in (self.shape, self.mask or (1, 1)))
        if not fits or (self.mask is None) != (job.mask is None) or self.white_level > np.iinfo(self.dtype).max:
            raise ValueError("the decoder's answer does not belong to the image")


_HEAD: TypeAdapter[_Refused | _Accepted] = TypeAdapter(_Refused | _Accepted)


@dataclass(frozen=True)
class _Reply:
    head: _Refused | _Accepted
    pixels: imaging.Pixels
    mask: NDArray[np.bool_] | None

    @property
    def worn(self) -> bool:
        return self.head.worn

    def decoded(self) -> Decoded:
        if isinstance(self.head, _Refused):
            raise ImageError(self.head.code, self.head.sentence)
        return imaging.Image(self.pixels, self.head.format, self.head.white_level, self.head.tags), self.mask


@dataclass(frozen=True)
class _Child:
    """A process that decodes. An image may have made an enemy of it: nothing that it says is taken on trust."""

    stream: socket.socket
    pid: int
    nursery: "subprocess.Popen[bytes]"

    def ask(self, job: _Job, deadline: float) -> _Reply:
        """Raises OSError or EOFError where the child ended or is late, and ValueError where it speaks nonsense."""
        self.stream.settimeout(max(deadline - time.monotonic(), 1e-3))
        send(self.stream, job.head, job.image, job.mask or b"")
        head = _HEAD.validate_json(receive_head(self.stream, deadline))
        if isinstance(head, _Refused):
            return _Reply(head, np.empty(0, np.uint8), None)
        head.check(job)
        pixels = self._receive(np.empty(head.shape, head.dtype), deadline)
        mask = None if head.mask is None else self._receive(np.empty(head.mask, np.uint8), deadline)
        # A byte that is neither 0 nor 1 would be no boolean.
        return _Reply(head, pixels, None if mask is None else mask != 0)

    def hung_up(self) -> bool:
        """Whether there is something to hear, though nothing was asked: as a rule, that it ended."""
        waiting = select.poll()
        waiting.register(self.stream, select.POLLIN)
        return bool(waiting.poll(0))

    def _receive(self, array: NDArray[Any], deadline: float) -> NDArray[Any]:
        receive_into(self.stream, array.data.cast("B"), deadline)
        return array


@dataclass
class _Slot:
    """Room for one child; whoever took it from the free ones is alone with it."""

    child: _Child | None = None
    images: int = 0
    worn: bool = False

    def empty(self) -> _Child | None:
        """Take the child out, and hang up."""
        child, self.child, self.images, self.worn = self.child, None, 0, False
        if child is not None:
            child.stream.close()
        return child


def cause_of(status: int) -> str:
    """How a process with that wait status ended."""
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit {code}"
