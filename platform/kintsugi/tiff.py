"""TIFF as it is read whole and written: what is taken, what is refused, and how an answer is packed in kind."""

import io
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from kintsugi.completeness import check_size, check_tiff_ends, check_tiff_parts
from kintsugi.errors import ImageError

Tags = tuple[tuple[str, str], ...]
"""TIFF's compression and photometric, by name."""


def decode_tiff(data: bytes, max_pixels: int, depths: tuple[type[np.generic], ...]) -> tuple[Any, Tags]:
    """The pixels of a TIFF of one page, and what `tiff_options` needs to answer in kind.

    Raises:
        ImageError: as `check_tiff_page`; `undecodable`, where it is damaged or cut off.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            if len(tiff.pages) == 0:
                raise ImageError("undecodable", "the TIFF holds no page: it is damaged or cut off")
            if len(tiff.pages) > 1:
                raise ImageError(
                    "unsupported_mode", f"a TIFF of {len(tiff.pages)} pages is not restored: send them one by one"
                )
            page: Any = tiff.pages[0]
            check_tiff_ends(tiff)
            check_tiff_page(page, max_pixels, depths)
            tags = ("compression", page.compression.name.lower()), ("photometric", page.photometric.name.lower())
            pixels: Any = page.asarray()
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # tifffile and its codecs raise whatever their C code meets
        raise ImageError("undecodable", f"the TIFF cannot be decoded ({type(error).__name__}: {error})") from error
    if page.samplesperpixel == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        pixels = np.moveaxis(pixels, 0, 2)
    return np.ascontiguousarray(pixels), tags


def check_tiff_page(page: Any, max_pixels: int, depths: tuple[type[np.generic], ...]) -> None:
    """Refuse by the tags alone what is too large or would not come back as it is."""
    check_size(page.imagelength, page.imagewidth, max_pixels)
    # A tile may claim to be far larger than the image that it belongs to, and is decompressed whole.
    check_size(page.tilelength or 1, page.tilewidth or 1, max(max_pixels, 4096 * 4096))
    mode, samples, bits = page.photometric.name.lower(), page.samplesperpixel, page.bitspersample
    known = samples == 3 if mode == "rgb" else samples == 1 and mode in ("minisblack", "miniswhite")
    if not known or page.imagedepth != 1 or page.dtype not in depths or bits not in (1, 8, 16):
        raise ImageError(
            "unsupported_mode",
            f"a TIFF of {samples} x {bits} bits ({page.dtype}) in mode '{mode}' is not restored: "
            "save it as 8- or 16-bit grey or RGB",
        )
    check_tiff_parts(page)


def tiff_options(channels: int, tags: Tags) -> dict[str, Any]:
    """How tifffile shall write an image so that it answers in kind, and without loss."""
    known = dict(tags)
    lossless = {"none": None, "lzw": "lzw", "zstd": "zstd", "packbits": "packbits"}
    return {
        "photometric": known.get("photometric", "rgb" if channels == 3 else "minisblack"),
        "compression": lossless.get(known.get("compression", ""), "adobe_deflate"),
        "metadata": None,
    }


def encode_tiff(pixels: NDArray[Any], tags: Tags, description: str | None) -> bytes:
    buffer = io.BytesIO()
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    tifffile.imwrite(buffer, pixels, description=description, **tiff_options(channels, tags))
    return buffer.getvalue()


def description_of(data: bytes) -> str | None:
    """ImageDescription of a TIFF; None where there is none."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return tiff.pages.first.description or None
