"""Large TIFFs as plain rows in a scratch file, unpacked by a confined process of their own."""

import json
import math
import resource
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter

from kintsugi.errors import Abandoned, ImageError, KintsugiError
from kintsugi.imaging import Image
from kintsugi.storage import cache_folder
from kintsugi_serve.decoding.child import receive_head, send
from kintsugi_serve.decoding.codec import POISON, Nursery, blame, cause_of
from kintsugi_serve.decoding.ledger import Ledger
from kintsugi_serve.decoding.scratch import reserve

Stop = Callable[[], bool]
T = TypeVar("T")

MAX_WIDTH = 2**16
"""Pixels of a row: what is held in memory grows with it."""
MEMORY_BYTES = 2**30
"""Of a child, on top of what it has at its start. Strips and tiles have at most 16 million pixels each."""
SHARE_BYTES = 2**28
"""For so many bytes of rows, or a part of so many, a child has its time limit once."""
_POLL_MS = 200
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Limits:
    """What an image that is restored in strips may be, and take.

    Attributes:
        max_pixels: 0 where no image is restored in strips.
        max_bytes: of its file, and of its rows once they are unpacked.
        decode_timeout_s: for reading the header, and again for each `SHARE_BYTES` of rows.
        ledger: remembers images that ended their process; None remembers nothing.
        target: what the process does, as "module:function"; tests bring their own.
    """

    max_pixels: int = 2**30
    max_bytes: int = 2**32
    decode_timeout_s: float = 20
    ledger: Path | None = None
    target: str = "kintsugi_serve.decoding.strips_child:unpack"

    def here(self) -> "Limits":
        """With the ledger that all processes of this machine share."""
        return replace(self, ledger=cache_folder() / "refused-images")


class _Refused(BaseModel):
    code: Literal["undecodable", "unsupported_format", "unsupported_mode", "too_large", "over_white_level"]
    sentence: str


class _Written(BaseModel):
    rows: PositiveInt


class Head(BaseModel):
    """What a child says of a TIFF before it unpacks it."""

    model_config = ConfigDict(frozen=True)

    height: PositiveInt
    width: PositiveInt
    channels: Literal[1, 3]
    dtype: Literal["uint8", "uint16", "bool"]
    white_level: int
    compression: Literal["none", "lzw", "adobe_deflate", "packbits", "deflate", "zstd"]
    photometric: Literal["minisblack", "miniswhite", "rgb"]

    @property
    def line_bytes(self) -> int:
        return self.width * self.channels * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.height * self.line_bytes

    def check(self, limits: Limits, mask: bool) -> None:
        """Raise ImageError for what is too large, and ValueError for what no honest child says."""
        if self.width > MAX_WIDTH:
            raise ImageError(
                "too_large", f"rows of {self.width} px are more than {MAX_WIDTH}: turn the image, or cut it"
            )
        if self.bytes > limits.max_bytes:
            raise ImageError(
                "too_large", f"{self.bytes} bytes of pixels are more than {limits.max_bytes}: cut the image"
            )
        honest = self.height * self.width <= limits.max_pixels and (self.dtype == "bool") == mask
        if not honest or not (mask or 1 <= self.white_level <= np.iinfo(self.dtype).max):
            raise ValueError("the decoder's answer does not belong to the image")


_ANSWER: TypeAdapter[_Refused | _Written | Head] = TypeAdapter(_Refused | _Written | Head)


@dataclass(frozen=True)
class RawRows:
    """Rows in a file; a `RowSource` and a `MaskSource` for `Restorer.restore_strips`."""

    path: Path
    head: Head

    @property
    def size(self) -> tuple[int, int]:
        return self.head.height, self.head.width

    @property
    def channels(self) -> int:
        return self.head.channels

    def rows(self, start: int, stop: int) -> Image:
        tags = ("compression", self.head.compression), ("photometric", self.head.photometric)
        return Image(self._read(start, stop), "tiff", self.head.white_level, tags)

    def mask_rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        head, dtype = self.head, np.dtype(self.head.dtype)
        count = (stop - start) * head.line_bytes // dtype.itemsize
        # A byte that is neither 0 nor 1 would be no boolean.
        stored = np.dtype(np.uint8) if head.dtype == "bool" else dtype
        flat: NDArray[Any] = np.fromfile(self.path, stored, count, offset=start * head.line_bytes)
        shape = (stop - start, head.width, 3) if head.channels == 3 else (stop - start, head.width)
        return flat.reshape(shape) != 0 if head.dtype == "bool" else flat.reshape(shape)


@dataclass(frozen=True)
class Question:
    """A TIFF to unpack: its file, the SHA-256 of that, and what its numbers mean."""

    source: Path
    sha256: str
    white_level: int | None = None
    mask: bool = False


def starts_as_tiff(data: bytes) -> bool:
    return data[:4] in _TIFF


def unpack(question: Question, sink: Path, limits: Limits, stop: Stop = lambda: False) -> RawRows:
    """The rows of a TIFF, which lie in `sink` from now on; read by a process that lives for this image only.

    Raises:
        ImageError: as `kintsugi.restore.strips.TiffStrips`; `undecodable` if the image ended its process or took
            longer than it may (see `Limits`), and `poison` if it did so twice before.
        Refusal: `unavailable`, the disk is too full.
        Abandoned: `stop` said so.
    """
    ledger = Ledger(limits.ledger) if limits.ledger is not None else None
    if ledger is not None and not ledger.empty() and ledger.refuses(question.sha256):
        raise ImageError("poison", POISON)
    nursery = Nursery(MEMORY_BYTES, limits.target)
    try:
        return _unpack(nursery, ledger, question, sink, limits, stop)
    finally:
        nursery.close()


def _unpack(
    nursery: Nursery, ledger: Ledger | None, question: Question, sink: Path, limits: Limits, stop: Stop
) -> RawRows:
    with question.source.open("rb") as given, sink.open("xb") as rows:
        child = nursery.fork(given.fileno(), rows.fileno(), file_bytes=limits.max_bytes)
        talk = _Talk(child.stream, limits.decode_timeout_s, stop)
        try:
            job = {"white_level": question.white_level, "max_pixels": limits.max_pixels, "mask": question.mask}
            head = talk.ask(job, Head)
            head.check(limits, question.mask)
            reserve(sink, rows.fileno(), head.bytes)
            # From now on it writes what it announced, and no more.
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (head.bytes, head.bytes))
            talk = replace(talk, seconds=limits.decode_timeout_s * math.ceil(head.bytes / SHARE_BYTES))
            if talk.ask({}, _Written).rows != head.height:
                raise ValueError("rows are missing")
        except (OSError, EOFError, ValueError) as error:
            status = nursery.end(child)
            if status is None:
                raise KintsugiError(
                    "the decoder's process was ended from outside: see whether memory is short"
                ) from error
            cause = "timeout" if isinstance(error, TimeoutError) else cause_of(status)
            size = question.source.stat().st_size
            raise blame(ledger, question.sha256, size, cause, talk.seconds) from error
        finally:
            child.stream.close()
    return RawRows(sink, head)


@dataclass(frozen=True)
class _Talk:
    """A talk with a child, of whom an image may have made an enemy; it has `seconds` for each answer."""

    stream: socket.socket
    seconds: float
    stop: Stop

    def ask(self, what: dict[str, Any], kind: type[T]) -> T:
        """Raises OSError or EOFError where the child ended or is late, and ValueError where it speaks nonsense."""
        deadline = time.monotonic() + self.seconds
        self.stream.settimeout(self.seconds)
        send(self.stream, json.dumps(what).encode())
        waiting = select.poll()
        waiting.register(self.stream, select.POLLIN)
        while not waiting.poll(_POLL_MS):
            if self.stop():
                raise Abandoned("nobody waits for this image any more")
            if time.monotonic() > deadline:
                raise TimeoutError
        answer = _ANSWER.validate_json(receive_head(self.stream, deadline))
        if isinstance(answer, _Refused):
            raise ImageError(answer.code, answer.sentence)
        if not isinstance(answer, kind):
            raise ValueError("the decoder answers what it was not asked")
        return answer
