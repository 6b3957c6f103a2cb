"""Whether an image file holds all of its image, and no more than it may.

Decoders that are kind to damaged files make up what is missing.
"""

import math
import re
from typing import Any

from kintsugi.errors import ImageError

_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_JPEG_FILLING = bytes(37 * number % 251 for number in range(1, 65))
_RST0, _EOI, _SOS, _DRI = 0xD0, 0xD9, 0xDA, 0xDD
_UNCOMPRESSED, _FAX = 1, (2, 3, 4)
"""Of TIFF's compressions."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image without pixels, or with more than `max_pixels`."""
    if height < 1 or width < 1:
        raise ImageError("undecodable", f"an image of {width} x {height} px holds nothing")
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} px is over the limit of {max_pixels} pixels: cut it, or raise the limit"
        )


def check_png_chunks(data: bytes) -> None:
    """Refuse a chunk that claims to reach beyond the file: OpenCV 5.0 would first clear up to 2 GiB for it."""
    at = 8
    while data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if at + 12 > len(data):
            raise ImageError("undecodable", "the PNG is damaged or cut off: send it whole")


def check_bmp_offset(data: bytes) -> None:
    """Refuse a BMP whose pixels begin within its headers: OpenCV would read on behind them."""
    if int.from_bytes(data[10:14], "little") < 14 + int.from_bytes(data[14:18], "little"):
        raise ImageError("undecodable", "the BMP takes its header for pixels: it is damaged, send it anew")


def with_filled_scans(data: bytes) -> bytes:
    """The JPEG with other bits where the data of a scan, or of a part between two restart markers, ends.

    A decoder never uses them where the scan is whole. Where it is not, libjpeg would go on with grey, and now goes on
    with these: the image is another one.

    Raises:
        ImageError: restart markers do not follow each other, so a part is missing.
    """
    pieces: list[bytes] = []
    at, copied, scanning, restarts, following = 2, 0, False, False, 0
    while marker := _JPEG_MARKER.search(data, at):
        code, body = marker[1][0], data[marker.end() : marker.end() + 4]
        restart = _RST0 <= code < _RST0 + 8
        if scanning and restart and code != _RST0 + following:
            raise ImageError("undecodable", "the JPEG lacks a part of its image: send it whole")
        if scanning:
            another = bytes([0xFF, _RST0 + following]) + _JPEG_FILLING if restarts and not restart else b""
            pieces += data[copied : marker.start()], _JPEG_FILLING, another
            copied = marker.start()
        at = marker.end()
        if restart:
            following = (following + 1) % 8
            continue
        if code == _EOI:
            break
        restarts = any(body[2:]) if code == _DRI else restarts
        scanning, following = code == _SOS, 0
        at += int.from_bytes(body[:2], "big")
    return b"".join([*pieces, data[copied:]])


def check_tiff_parts(page: Any) -> None:
    """Refuse an image of which strips or tiles are not in the file: tifffile would answer zeros for them."""
    parts, file_bytes = list(zip(page.dataoffsets, page.databytecounts, strict=False)), page.parent.filehandle.size
    stored = all(offset > 0 and 0 < count <= file_bytes - offset for offset, count in parts)
    needed = page.imagelength * ((page.imagewidth * page.samplesperpixel * page.bitspersample + 7) // 8)
    short = page.compression == _UNCOMPRESSED and sum(page.databytecounts) < needed
    if not stored or short or len(parts) < math.prod(page.chunked):
        raise ImageError("undecodable", "the TIFF lacks a part of its image: send it whole")
    if page.compression in _FAX and page.bitspersample != 1:
        raise ImageError("undecodable", f"a TIFF of {page.bitspersample} bits a sample is no fax: save it anew")


def check_tiff_ends(tiff: Any) -> None:
    """Refuse a page behind the first that cannot be read: tifffile would pass over it."""
    layout, file = tiff.tiff, tiff.filehandle
    order = "little" if tiff.byteorder == "<" else "big"
    file.seek(tiff.pages[0].offset)
    count = int.from_bytes(file.read(layout.tagnosize), order)
    file.seek(tiff.pages[0].offset + layout.tagnosize + count * layout.tagsize)
    if any(file.read(layout.offsetsize)):
        raise ImageError("undecodable", "the TIFF names another page, which is not there: send it whole")
