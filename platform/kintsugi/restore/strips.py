"""Read and write TIFF files too large to be held: rows come and go in bands.

Line-scan images are a few thousand pixels wide and as long as the web runs. A file is read segment by segment,
so memory follows its width and not its height. It is written beside its target, whose place it takes when it is
whole.
"""

import math
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from kintsugi.errors import ImageError, StoreError
from kintsugi.imaging import DEPTHS, NEGATIVE, Image, check_pixels, fitting_white_level
from kintsugi.tiff import check_tiff_page, tiff_options

MAX_STREAMED_PIXELS = 2**36
_MAX_SEGMENT = 4096 * 4096
_MAX_RATIO = 1100
"""Deflate cannot pack more than about 1032 bytes into one; no camera image comes near it."""
_COMPRESSIONS = {1: "none", 5: "lzw", 8: "adobe_deflate", 32773: "packbits", 32946: "deflate", 50000: "zstd"}
_STRIP_BYTES = 2**20


class TiffStrips:
    """A TIFF that is read in bands of rows; a `RowSource` and a `MaskSource` for `Restorer.restore_strips`.

    Every limit is checked on the header: what the tags claim must be in the file.

    Raises:
        ImageError: as `imaging.decode`, and where the file's strips or tiles are too large to be read one by one.
    """

    def __init__(self, path: Path, *, white_level: int | None = None, max_pixels: int = MAX_STREAMED_PIXELS) -> None:
        try:
            self._tiff = tifffile.TiffFile(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}): check the path") from error
        except Exception as error:
            raise _damaged(error) from error
        try:
            self._page = self._checked_page(max_pixels)
            self.white_level = 0 if self._page.dtype == np.bool_ else fitting_white_level(self._page.dtype, white_level)
        except ImageError:
            self._tiff.close()
            raise
        except Exception as error:  # tifffile raises whatever it meets in a damaged file
            self._tiff.close()
            raise _damaged(error) from error
        self._segments: dict[int, NDArray[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tiff.close()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self._page.imagelength, self._page.imagewidth

    @property
    def channels(self) -> int:
        return self._page.samplesperpixel

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        page = self._page
        return ("compression", page.compression.name.lower()), ("photometric", page.photometric.name.lower())

    def rows(self, start: int, stop: int) -> Image:
        """A band of the image.

        Raises:
            ImageError: the file is damaged there, or holds values above its white level.
        """
        if self._page.dtype == np.bool_:
            raise ImageError("unsupported_mode", "a TIFF of 1 bit is a mask: save the image as 8- or 16-bit grey")
        image = Image(self._read(start, stop), "tiff", self.white_level, self.tags)
        check_pixels(image)
        return image

    def mask_rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """A band of the file read as a defect mask, see `imaging.decode_mask`."""
        pixels = self._read(start, stop)
        mask: NDArray[np.bool_] = (~pixels if NEGATIVE in self.tags else pixels) > 0
        return np.logical_or.reduce(mask, axis=2) if mask.ndim == 3 else mask

    def _checked_page(self, max_pixels: int) -> Any:
        if len(self._tiff.pages) == 0:
            raise ImageError("undecodable", "the TIFF holds no page: it is damaged or cut off")
        if len(self._tiff.pages) > 1:
            raise ImageError(
                "unsupported_mode",
                f"a TIFF of {len(self._tiff.pages)} pages is not restored: send them one by one",
            )
        page: Any = self._tiff.pages[0]
        check_tiff_page(page, max_pixels, (*DEPTHS, np.bool_))
        if page.compression not in _COMPRESSIONS:
            raise ImageError(
                "unsupported_mode",
                f"a large TIFF packed as {page.compression.name.lower()} is not read in strips: save it as "
                f"{', '.join(sorted(set(_COMPRESSIONS.values())))}",
            )
        self._check_segments(page)
        return page

    def _check_segments(self, page: Any) -> None:
        """Everything that the tags claim lies in the file, and unpacks to no more than the tags say."""
        end = self._tiff.filehandle.size
        offsets, counts = page.dataoffsets, page.databytecounts
        planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
        tall, wide = _segment_shape(page)
        down, across = math.ceil(page.imagelength / tall), math.ceil(page.imagewidth / wide)
        line = page.imagewidth * page.samplesperpixel // planes * page.bitspersample // 8 if self._is_plain(page) else 0
        least = (max(1, line * min(tall, page.imagelength - i % down * tall)) for i in range(len(counts)))
        inside = all(
            count >= needed and at + count <= end for at, count, needed in zip(offsets, counts, least, strict=True)
        )
        if len(offsets) != down * across * planes or not inside:
            raise ImageError("undecodable", "the TIFF is damaged or cut off: not all of its strips are in the file")
        # Each image line of an uncompressed strip is read for itself.
        if not self._is_plain(page) and tall * wide > _MAX_SEGMENT:
            raise ImageError(
                "too_large",
                f"the TIFF is packed in pieces of {wide} x {tall} px, which cannot be read in strips: save it with "
                "at most 16 million pixels in each strip or tile (tifffile: rowsperstrip=64)",
            )
        claimed = page.imagelength * page.imagewidth * page.samplesperpixel * page.bitspersample // 8
        if claimed > _MAX_RATIO * sum(counts):
            raise ImageError(
                "undecodable", f"the TIFF claims {claimed} bytes of image in a file of {end}: it is damaged or cut off"
            )

    def _is_plain(self, page: Any) -> bool:
        """Whether rows lie in the file as they are."""
        return page.compression == 1 and not page.is_tiled and page.bitspersample in (8, 16) and page.fillorder == 1

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        try:
            return self._plain_rows(start, stop) if self._is_plain(self._page) else self._packed_rows(start, stop)
        except Exception as error:  # tifffile and its codecs raise whatever their C code meets
            raise _damaged(error) from error

    def _plain_rows(self, start: int, stop: int) -> NDArray[Any]:
        page, (height, _) = self._page, self.size
        separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
        samples = 1 if separate else page.samplesperpixel
        per_strip = min(page.rowsperstrip, height)
        strips = math.ceil(height / per_strip)
        stored = np.dtype(page.dtype).newbyteorder(self._tiff.byteorder)
        line = page.imagewidth * samples * stored.itemsize
        planes = [np.empty((stop - start, page.imagewidth, samples), stored) for _ in range(3 if separate else 1)]
        for number, plane in enumerate(planes):
            for strip in range(start // per_strip, math.ceil(stop / per_strip)):
                first, last = max(start, strip * per_strip), min(stop, (strip + 1) * per_strip)
                at = page.dataoffsets[number * strips + strip] + (first - strip * per_strip) * line
                self._tiff.filehandle.seek(at)
                data = self._tiff.filehandle.read((last - first) * line)
                plane[first - start : last - start] = np.frombuffer(data, stored).reshape(last - first, -1, samples)
        return _as_pixels(planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2), page.dtype)

    def _packed_rows(self, start: int, stop: int) -> NDArray[Any]:
        page = self._page
        tall, wide = _segment_shape(page)
        across, down = math.ceil(page.imagewidth / wide), math.ceil(page.imagelength / tall)
        planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
        lines = range(start // tall, math.ceil(stop / tall))
        needed = [(p * down + line) * across + i for p in range(planes) for line in lines for i in range(across)]
        self._segments = {index: self._segment(index) for index in needed}
        out = np.empty((stop - start, page.imagewidth, page.samplesperpixel), page.dtype)
        for index, pixels in self._segments.items():
            plane, place = divmod(index, down * across)
            top, left = place // across * tall, place % across * wide
            first, last = max(start, top), min(stop, top + pixels.shape[0])
            samples = slice(plane, plane + 1) if planes > 1 else slice(None)
            right = min(page.imagewidth, left + pixels.shape[1])
            out[first - start : last - start, left:right, samples] = pixels[first - top : last - top, : right - left]
        return _as_pixels(out, page.dtype)

    def _segment(self, index: int) -> NDArray[Any]:
        """(rows, columns, samples) of one strip or tile; those of the last band are kept."""
        if index in self._segments:
            return self._segments[index]
        handle, page = self._tiff.filehandle, self._page
        handle.seek(page.dataoffsets[index])
        pixels, _, _ = page.decode(handle.read(page.databytecounts[index]), index)
        return pixels[0]


def write_strips(path: Path, like: Image, height: int, bands: Iterable[Image]) -> None:
    """Write bands of rows, top to bottom, to a TIFF that appears when it is whole.

    Args:
        like: an image of the same width, depth and mode; its tags say how to compress.

    Raises:
        ImageError: a band differs from `like`, or the bands are not `height` rows in all.
    """
    part = path.with_name(f".kintsugi-{uuid.uuid4().hex}")
    width, channels, dtype = like.size[1], like.channels, like.pixels.dtype
    rows = max(1, _STRIP_BYTES // (width * channels * dtype.itemsize))
    shape = (height, width, channels) if channels > 1 else (height, width)
    options: dict[str, Any] = {**tiff_options(like.channels, like.tags), "rowsperstrip": rows}
    pack = _packer(options["compression"])
    big = height * width * channels * dtype.itemsize > 2**31
    try:
        with part.open("xb") as stream:
            with tifffile.TiffWriter(stream, bigtiff=big) as writer:
                packed = (pack(strip) for strip in _cut(bands, rows, height, like))
                writer.write(packed, shape=shape, dtype=dtype, **options)
                # The writer stops at its last strip; the bands have to come to their own end.
                for _ in packed:
                    raise ImageError("mismatch", f"more than {height} rows came")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _packer(compression: str | None) -> Any:
    if compression is None:
        return lambda strip: strip.tobytes()
    return tifffile.TIFF.COMPRESSORS[tifffile.COMPRESSION[compression.upper()]]


def _cut(bands: Iterable[Image], rows: int, height: int, like: Image) -> Iterator[NDArray[Any]]:
    """Strips of `rows` rows, of bands of any height."""
    waiting: NDArray[Any] = like.pixels[:0]
    seen = 0
    for band in bands:
        if band.pixels.shape[1:] != like.pixels.shape[1:] or band.pixels.dtype != like.pixels.dtype:
            raise ImageError("mismatch", f"a band of {band.pixels.shape} does not fit rows of {like.pixels.shape}")
        seen += len(band.pixels)
        waiting = np.concatenate([waiting, band.pixels])
        del band  # The next one is made while this frame waits for it.
        whole = len(waiting) // rows * rows
        yield from (np.ascontiguousarray(waiting[top : top + rows]) for top in range(0, whole, rows))
        waiting = waiting[whole:].copy()
    if seen != height:
        raise ImageError("mismatch", f"{seen} rows came for an image of {height}")
    if len(waiting):
        yield np.ascontiguousarray(waiting)


def _segment_shape(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _as_pixels(block: NDArray[Any], dtype: Any) -> NDArray[Any]:
    native = np.ascontiguousarray(block, dtype)
    return native[..., 0] if native.shape[2] == 1 else native


def _damaged(error: Exception) -> ImageError:
    return ImageError("undecodable", f"the TIFF cannot be decoded ({type(error).__name__}: {error})")
