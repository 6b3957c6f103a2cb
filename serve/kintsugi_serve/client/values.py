"""What the client takes and gives: images in many shapes, restored images, outcomes, errors."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Union

import httpx2

from kintsugi.errors import ConfigError, KintsugiError, StoreError
from kintsugi.storage import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    # Lines that only send files need no codec.
    from kintsugi.imaging import Image

Source = Union[bytes, str, Path, "Image"]
"""A file's bytes, the path of a file, or an image in memory."""
Mask = Union[bytes, str, Path, "NDArray[np.bool_]"]
"""Known defects: a file's bytes, the path of a file, or (H, W) bool."""


class RestoreOptions(TypedDict, total=False):
    """What each restore of many may say; see `Client.restore`."""

    white_level: int | None
    model: str | None
    embed: bool
    deadline_s: float | None


class ServiceError(KintsugiError):
    """The service answered with a problem, or not at all.

    `code` is the problem's, or one of the client's own: `unreachable` (no answer; `status` is 0), `corrupted` (bytes
    were damaged on their way), `deadline_exceeded` (no time was left; `status` is 0), `unknown` (not the service's
    answer). `detail` is the sentence without the request's id.
    """

    def __init__(self, code: str, status: int, detail: str, request_id: str = "") -> None:
        super().__init__(f"{detail} (request id {request_id})" if request_id else detail)
        self.code = code
        self.status = status
        self.detail = detail
        self.request_id = request_id

    def __reduce__(self) -> tuple[type["ServiceError"], tuple[str, int, str, str]]:
        return type(self), (self.code, self.status, self.detail, self.request_id)


@dataclass(frozen=True)
class RestoredImage:
    """The restored file, in the format that was sent, and what the service said of it.

    Attributes:
        model: name and number of the version that answered; `digest` is its own.
        retention: share of the structure that was kept, 0 to 1; `alarm` says that a person should look.
        input_sha256: of the bytes that were sent, as hex; `output_sha256` of `data`. Both agree with what the service
            says, if it says so.
        timing: milliseconds that each stage took in the service.
        white_level: as it was sent.
        report: `kintsugi.trust.report.Report` as a dict; None where it was not asked for.
        defect_map: (H, W) float32, probability of a defect; None where it was not asked for or the model predicts none.
    """

    data: bytes
    model: str
    digest: str
    retention: float
    alarm: bool
    request_id: str
    input_sha256: str
    output_sha256: str
    timing: Mapping[str, float] = field(default_factory=dict[str, float])
    white_level: int | None = None
    report: dict[str, Any] | None = None
    defect_map: "NDArray[np.float32] | None" = field(default=None, compare=False)

    def image(self) -> "Image":
        """The pixels.

        Raises:
            ImageError: they cannot be decoded.
        """
        from kintsugi import imaging

        return imaging.decode(self.data, white_level=self.white_level)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the file, which appears when it is whole. The same bytes may be there already.

        Raises:
            ConfigError: another file is there, and `overwrite` is not set.
            StoreError: it cannot be written.
        """
        target = Path(path)
        try:
            if target.exists() and not overwrite:
                if target.read_bytes() == self.data:
                    return target
                raise ConfigError(f"{target} holds something else: choose another name, or replace it with overwrite")
            write_atomically(target, self.data)
        except OSError as error:
            raise StoreError(
                f"{target} cannot be written ({error.strerror}): check the folder and its free space"
            ) from error
        return target


@dataclass(frozen=True)
class Outcome:
    """What became of one of many: `image`, or the `error` that it met.

    Attributes:
        index: place among the sources, from 0.
        source: what was given: an image, or a pair of image and mask.
    """

    index: int
    source: Source | tuple[Source, Mask | None]
    image: RestoredImage | None = None
    error: KintsugiError | None = None


@dataclass(frozen=True)
class Body:
    """The body of a request, and what is known of it."""

    content: bytes
    content_type: str
    input_sha256: str = ""
    white_level: int | None = None

    def headers(self) -> dict[str, str]:
        """The content's type and its digest (RFC 9530)."""
        digest = base64.b64encode(hashlib.sha256(self.content).digest()).decode()
        return {"Content-Type": self.content_type, "Content-Digest": f"sha-256=:{digest}:"}


def image_body(source: Source, mask: Mask | None, white_level: int | None) -> Body:
    """Read or encode an image and its mask. An image in memory brings its own white level.

    Raises:
        StoreError: a file cannot be read.
        ImageError: the image fits no file.
    """
    image = _bytes_of(source)
    if white_level is None:
        white_level = _white_level_of(source)
    digest = hashlib.sha256(image).hexdigest()
    if mask is None:
        return Body(image, "application/octet-stream", digest, white_level)
    files = {"image": ("image", image), "mask": ("mask", _bytes_of_mask(mask))}
    # Encoded once, so that every try sends the same bytes, and their digest is known before.
    encoded = httpx2.Request("POST", "http://localhost", files=files)
    return Body(encoded.read(), encoded.headers["content-type"], digest, white_level)


def _bytes_of(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, Path)):
        return _read(Path(source))
    from kintsugi import imaging

    return imaging.encode(source)


def _bytes_of_mask(mask: Mask) -> bytes:
    if isinstance(mask, bytes):
        return mask
    if isinstance(mask, (str, Path)):
        return _read(Path(mask))
    from kintsugi import imaging

    return imaging.encode_mask(mask)


def _white_level_of(source: Source) -> int | None:
    if isinstance(source, (bytes, str, Path)) or source.white_level == 2**source.bit_depth - 1:
        return None
    return source.white_level


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}): check the path") from error


def several(
    sources: Iterable[Source | tuple[Source, Mask | None]], concurrency: int
) -> Iterator[tuple[int, Source | tuple[Source, Mask | None]]]:
    """The sources with their places; refuses what a caller of `restore_many` gets wrong."""
    if isinstance(sources, (str, bytes)):
        raise ConfigError("restore_many takes several images: give a list, or call restore for one")
    if concurrency < 1:
        raise ConfigError(f"concurrency must be 1 or more (got {concurrency})")
    return enumerate(sources)


def split_pair(given: Source | tuple[Source, Mask | None]) -> tuple[Source, Mask | None]:
    """Image and mask."""
    return given if isinstance(given, tuple) else (given, None)


def size_of(sources: Iterable[Any]) -> int | None:
    """How many there are, where that is known."""
    return len(sources) if isinstance(sources, Sized) else None
