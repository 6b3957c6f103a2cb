"""Decode and encode inspection images without losing a bit. With `tiff`, the only place that touches a codec.

PNG, TIFF, JPEG and BMP; grey or RGB; 8 or 16 bit. What would be changed behind the user's back (alpha,
palettes, float, packed bits, several pages) is refused, and so is a file that is cut off. Pixels stay as stored: no
orientation tag turns them. Depth inside the container is explicit: a 12-bit camera writes
16-bit files whose `white_level` is 4095.
"""

import contextlib
import io
import warnings
import zlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from kintsugi.completeness import check_bmp_offset, check_png_chunks, check_size, with_filled_scans
from kintsugi.errors import ImageError
from kintsugi.tiff import decode_tiff, description_of, encode_tiff

Format = Literal["png", "tiff", "jpeg", "bmp"]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]
MAX_PIXELS = 100_000_000
_CHUNK = 2**18
"""Samples that are turned into levels at a time."""

_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"BM", "bmp"),
)
_NOTE = b"kintsugi"
_AFTER_IHDR = 33
NEGATIVE = ("photometric", "miniswhite")
DEPTHS = (np.uint8, np.uint16)
_PILLOW_MODES = {"L": "grey", "RGB": "rgb", "1": "black and white", "P": "palette"}
_PNG_MODES = {0: "grey", 2: "rgb", 3: "palette", 4: "grey with alpha", 6: "rgb with alpha"}


@dataclass(frozen=True)
class Image:
    """Pixels as the file held them.

    `pixels` is (H, W) or (H, W, 3) in RGB order, uint8 or uint16; an image made in Python may have any number
    of channels. `white_level` is the value of full scale; `tags` holds what the encoder needs to answer in kind
    (TIFF compression and photometric).
    """

    pixels: Pixels
    format: Format = "png"
    white_level: int = 255
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def channels(self) -> int:
        return 1 if self.pixels.ndim == 2 else self.pixels.shape[2]

    @property
    def bit_depth(self) -> int:
        """Bits of a sample in the container: 8 or 16."""
        return self.pixels.dtype.itemsize * 8

    def rows(self, start: int, stop: int) -> "Image":
        """A band of the image, not copied."""
        return replace(self, pixels=self.pixels[start:stop])

    def to_unit(self) -> NDArray[np.float32]:
        """float32 in [0, 1], 0 is black, shaped as `pixels`."""
        unit = np.divide(self.pixels, np.float32(self.white_level), dtype=np.float32)
        return np.subtract(1, unit, out=unit) if self._stores_negative else unit

    def with_unit(self, unit: NDArray[np.float32]) -> "Image":
        """The same kind of image with other content; `unit` is shaped as `pixels`, clipped to [0, 1]."""
        if unit.shape != self.pixels.shape:
            raise ImageError("mismatch", f"expected an image of shape {self.pixels.shape}, got {unit.shape}")
        if not np.isfinite(unit).all():
            raise ImageError("mismatch", "the image holds values that are not finite")
        pixels = np.empty_like(self.pixels)
        # Some rows at a time: float64 takes four times the memory of 16-bit pixels, and more for each step.
        rows = max(1, _CHUNK * len(pixels) // max(1, pixels.size))
        for top in range(0, len(pixels), rows):
            pixels[top : top + rows] = self._to_levels(unit[top : top + rows])
        return replace(self, pixels=pixels)

    def _to_levels(self, unit: NDArray[np.float32]) -> NDArray[np.float64]:
        shares = np.clip(unit.astype(np.float64), 0, 1)
        return np.rint((1 - shares if self._stores_negative else shares) * self.white_level)

    @property
    def _stores_negative(self) -> bool:
        return NEGATIVE in self.tags


@contextlib.contextmanager
def _within_memory() -> Generator[None]:
    try:
        yield
    except MemoryError as error:
        raise ImageError("too_large", "the image needs more memory than there is: cut it into parts") from error


@_within_memory()
def decode(data: bytes, *, white_level: int | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image; its size is checked before anything is decompressed.

    Raises:
        ImageError: not a supported image, larger than `max_pixels`, or brighter than `white_level`.
    """
    kind = sniff(data)
    if kind == "tiff":
        pixels, tags = decode_tiff(data, max_pixels, DEPTHS)
    else:
        _check_header(data, kind, max_pixels)
        pixels, tags = _decode_jpeg(data) if kind == "jpeg" else _decode_with_opencv(data, kind), ()
    image = Image(pixels, kind, fitting_white_level(pixels.dtype, white_level), tags)
    check_pixels(image)
    return image


def fitting_white_level(dtype: np.dtype[Any], white_level: int | None) -> int:
    """The white level to use with samples of `dtype`; by default all that they can hold.

    Raises:
        ImageError: it does not fit.
    """
    full_scale = int(np.iinfo(dtype).max)
    if white_level is not None and not 1 <= white_level <= full_scale:
        raise ImageError("over_white_level", f"white level {white_level} does not fit {dtype}: give 1 to {full_scale}")
    return full_scale if white_level is None else white_level


def check_pixels(image: Image) -> None:
    """Raise ImageError for samples that are no uint8 or uint16 (floats may hide NaN), or above the white level."""
    dtype: np.dtype[Any] = image.pixels.dtype
    if dtype.type not in DEPTHS or image.pixels.ndim not in (2, 3) or image.pixels.size == 0:
        raise ImageError(
            "unsupported_mode",
            f"pixels of type {dtype} and shape {image.pixels.shape} are not restored: give uint8 or uint16 of shape "
            "(height, width) or (height, width, channels)",
        )
    fitting_white_level(dtype, image.white_level)
    brightest = int(image.pixels.max())
    if brightest > image.white_level:
        raise ImageError(
            "over_white_level",
            f"the image holds {brightest}, above the white level {image.white_level}: give the camera's own "
            f"white level, at least {brightest}, or none for all {image.bit_depth} bits",
        )


@_within_memory()
def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """Read a defect mask as (H, W) bool: all but black is defect, at any depth, with any palette.

    JPEG rings around edges, so there only the brighter half is defect.
    """
    kind = sniff(data)
    if kind == "tiff":
        pixels, tags = decode_tiff(data, max_pixels, (*DEPTHS, np.bool_))
        pixels = ~pixels if NEGATIVE in tags else pixels
    else:
        with _header(data, kind) as header:
            check_size(header.height, header.width, max_pixels)
        pixels = _decode_jpeg(data) if kind == "jpeg" else _opencv(data)
        # Alpha, where a drawing tool left it, says nothing about defects.
        pixels = pixels[..., :3] if pixels.ndim == 3 else pixels
    mask = pixels > (127 if kind == "jpeg" else 0)
    return mask.any(axis=2) if mask.ndim == 3 else mask


def encode(image: Image, *, quality: int = 100, note: str | None = None) -> bytes:
    """Write the image in its own format: lossless, except JPEG, which is written at `quality` in 4:4:4.

    Args:
        note: ASCII text for the file, as iTXt `kintsugi` of a PNG or ImageDescription of a TIFF; `note_of` reads it.
    """
    if note is not None and image.format not in ("png", "tiff"):
        raise ImageError(
            "unsupported_format", f"a {image.format} holds no facts: ask without them, or send PNG or TIFF"
        )
    if image.channels not in (1, 3):
        raise ImageError("unsupported_mode", f"an image of {image.channels} channels fits no file: grey and RGB do")
    if image.format == "tiff":
        return encode_tiff(image.pixels, image.tags, note)
    if image.bit_depth == 16 and image.format != "png":
        raise ImageError("unsupported_mode", f"{image.format} holds 8 bits a sample: use PNG or TIFF for 16")
    pixels = image.pixels[..., ::-1] if image.channels == 3 else image.pixels
    options: dict[Format, list[int]] = {
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 1],
        "jpeg": [
            cv2.IMWRITE_JPEG_QUALITY,
            quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
    }
    ok, data = cv2.imencode("." + image.format, np.ascontiguousarray(pixels), options.get(image.format, []))
    if not ok:
        raise ImageError("unsupported_mode", f"the image could not be written as {image.format}")
    return data.tobytes() if note is None else _with_text(data.tobytes(), note)


def note_of(data: bytes) -> str | None:
    """The text that `encode` put into a PNG or a TIFF; None where there is none."""
    kind = sniff(data)
    if kind == "tiff":
        return description_of(data)
    if kind != "png":
        return None
    with _header(data, kind) as header:
        return header.info.get(_NOTE.decode())


def _with_text(png: bytes, text: str) -> bytes:
    """The PNG with an iTXt chunk after its header: keyword, no compression, no language, UTF-8 text."""
    body = b"iTXt" + _NOTE + bytes(5) + text.encode()
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return png[:_AFTER_IHDR] + chunk + png[_AFTER_IHDR:]


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask as an 8-bit PNG of 0 and 255."""
    return encode(Image(mask.astype(np.uint8) * np.uint8(255)))


def convert(image: Image, kind: Format) -> Image:
    """The same picture for another container."""
    if kind not in get_args(Format):
        raise ImageError("unsupported_format", f"{kind} is not a format: use png, tiff, jpeg or bmp")
    pixels = image.white_level - image.pixels if NEGATIVE in image.tags else image.pixels
    return replace(image, pixels=pixels.astype(image.pixels.dtype), format=kind, tags=())


def sniff(data: bytes) -> Format:
    """The format by magic number; names and content types are not trusted."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    raise ImageError("unsupported_format", "not a PNG, TIFF, JPEG or BMP image: convert it without loss and try again")


def _decode_with_opencv(data: bytes, kind: Format) -> Pixels:
    pixels = _opencv(data)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype not in (np.uint8, np.uint16) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ImageError("unsupported_mode", f"this {kind} is neither grey nor RGB of 8 or 16 bit: convert it first")
    return np.ascontiguousarray(pixels[..., ::-1]) if pixels.ndim == 3 else pixels


def _opencv(data: bytes) -> Any:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        raise ImageError("undecodable", f"the image cannot be decoded ({error.err})") from error
    if pixels is None:
        raise ImageError("undecodable", "the image cannot be decoded: it is damaged or cut off")
    return pixels


def _decode_jpeg(data: bytes) -> Any:
    """libjpeg makes up what a scan lacks. That shows when other bits follow the scan: a whole one never reads them."""
    pixels, again = (_pillow_jpeg(version) for version in (data, with_filled_scans(data)))
    if not np.array_equal(pixels, again):
        raise ImageError("undecodable", "the JPEG lacks a part of its image: send it whole")
    return pixels


def _pillow_jpeg(data: bytes) -> Pixels:
    with _header(data, "jpeg") as picture:
        try:
            return np.array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError("undecodable", "the image cannot be decoded: it is damaged or cut off") from error


def _check_header(data: bytes, kind: Format, max_pixels: int) -> None:
    """Refuse by the header alone what is too large or would not come back as it is."""
    with _header(data, kind) as header:
        check_size(header.height, header.width, max_pixels)
        if getattr(header, "is_animated", False):
            raise ImageError("unsupported_mode", f"a {kind} of several pictures is not restored: send them one by one")
        if kind == "png":
            mode, bits = _PNG_MODES.get(data[25], "unknown"), data[24]
        else:
            mode, bits = _PILLOW_MODES.get(header.mode, header.mode), _bmp_bits(data) if kind == "bmp" else 8
        if kind == "bmp" and header.info.get("compression"):
            mode += " with run lengths"  # which may leave pixels out
        if "transparency" in header.info:
            mode += " with a transparent colour"
    if mode not in ("grey", "rgb") or bits not in ((8, 24) if kind == "bmp" else (8, 16)):
        raise ImageError(
            "unsupported_mode",
            f"a {kind} of {bits} bits in mode '{mode}' is not restored: save it as 8- or 16-bit grey or RGB",
        )


@contextlib.contextmanager
def _header(data: bytes, kind: Format) -> Generator[PillowImage.Image]:
    """Pillow's view of the file, before any pixel is decompressed."""
    if kind == "png":
        check_png_chunks(data)
    if kind == "bmp":
        check_bmp_offset(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
            header = PillowImage.open(io.BytesIO(data), formats=[kind.upper()])
    except PillowImage.DecompressionBombError as error:
        raise ImageError("too_large", f"the image is too large ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("undecodable", "the image's header cannot be read: it is damaged or cut off") from error
    with header:
        yield header


def _bmp_bits(data: bytes) -> int:
    """Bits of a pixel, from the DIB header; the oldest kind (12 bytes) keeps them 4 bytes earlier."""
    at = 24 if data[14] == 12 else 28
    return int.from_bytes(data[at : at + 2], "little")
