"""TIFF files that a careful service refuses."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from malformed_parts import BIG, Make, cut, either, grey, in_mode, rgb, saved, zeros
from PIL import Image as PillowImage

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
OFFSETS, SAMPLES, ROWS, COUNTS, TILE_WIDTH, TILE_HEIGHT = 273, 277, 278, 279, 322, 323
PACKED: dict[int, Callable[[bytes], bytes]] = {1: bytes, 8: zlib.compress}


def tiff_of(dice: random.Random, lies: dict[int, Any] | None = None, after: int = 0, packing: int = 0) -> bytes:
    """A grey TIFF of one strip, its data last, with lying values of its tags; None leaves a tag out."""
    pixels = grey(dice)
    height, width = pixels.shape
    packing = packing or dice.choice(list(PACKED))
    data, at = PACKED[packing](pixels.tobytes()), 8 + 2 + 12 * (9 + sum(key > COUNTS for key in lies or {})) + 4
    tags = {WIDTH: width, HEIGHT: height, BITS: 8, COMPRESSION: packing, PHOTOMETRIC: 1, OFFSETS: at, SAMPLES: 1}
    tags |= {ROWS: height, COUNTS: len(data)} | (lies or {})
    entries = [(tag, *(value if isinstance(value, tuple) else (4, 1, value))) for tag, value in sorted(tags.items())]
    packed = [struct.pack("<HHII", *entry) if entry[3] is not None else bytes(12) for entry in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + struct.pack("<I", after) + data


def _lying_tiff(*tags: int, values: tuple[Any, ...], packing: int = 0) -> Make:
    return lambda dice: tiff_of(dice, {dice.choice(tags): dice.choice(values)}, packing=packing)


def _huge_tile(dice: random.Random) -> bytes:
    sides = {TILE_WIDTH: dice.choice((32_768, 65_520, 2**20)), TILE_HEIGHT: dice.choice((32_768, 65_520))}
    return tiff_of(dice, {**sides, 324: 200, 325: 100})


def _strip_bomb(dice: random.Random) -> bytes:
    """A strip that unpacks far beyond its image."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        shape = (dice.randint(8, 64), dice.randint(8, 64))
        strips = iter([zeros(80_000_000)])
        writer.write(strips, shape=shape, dtype=np.uint8, compression="zlib", photometric="minisblack")
    return buffer.getvalue()


def _lacking_tiff(dice: random.Random) -> bytes:
    """One of several strips is said to be nowhere, or to have no bytes."""
    buffer, pixels = io.BytesIO(), either(dice)
    compression = dice.choice((None, "zlib", "lzw", "zstd"))
    mode = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, pixels, photometric=mode, rowsperstrip=8, compression=compression)
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as tiff:
        page: Any = tiff.pages[0]
        tag = page.tags[dice.choice(("StripOffsets", "StripByteCounts"))]
        size, number = {3: 2, 4: 4}[int(tag.dtype)], dice.randrange(tag.count)
    data = bytearray(buffer.getvalue())
    data[tag.valueoffset + size * number : tag.valueoffset + size * (number + 1)] = bytes(size)
    return bytes(data)


def _typed_tiff(dice: random.Random) -> bytes:
    dtype = dice.choice(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u4", "u8", "c8", "?"))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, grey(dice, dtype), photometric="minisblack", compression=dice.choice((None, "zlib")))
    return buffer.getvalue()


def _paged_tiff(dice: random.Random) -> bytes:
    pages = [PillowImage.fromarray(rgb(dice)) for _ in range(dice.randint(2, 4))]
    return saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])


TIFF: dict[str, Make] = {
    "tiff cut off": lambda d: cut(tiff_of(d), d, 1),
    "tiff over the limit": lambda d: tiff_of(d, {WIDTH: d.choice(BIG), HEIGHT: d.choice(BIG)}),
    "tiff of a huge tile": _huge_tile,
    "tiff whose strip is a bomb": _strip_bomb,
    "tiff of no size": _lying_tiff(WIDTH, HEIGHT, values=(0,)),
    "tiff taller than its data": lambda d: tiff_of(d, {HEIGHT: 100, ROWS: d.choice((1, 30, 100))}),
    "tiff wider than its data": _lying_tiff(WIDTH, values=(100, 999)),
    "tiff whose strip is nowhere": _lying_tiff(OFFSETS, COUNTS, values=(0,)),
    "tiff whose strip is beyond its end": _lying_tiff(OFFSETS, COUNTS, values=(10**5, 2**31, 2**32 - 1)),
    "tiff whose strip is short": _lying_tiff(COUNTS, values=(1, 10, 200)),
    "tiff that lacks a strip": _lacking_tiff,
    "tiff without a tag": _lying_tiff(WIDTH, HEIGHT, OFFSETS, values=((4, 1, None),)),
    "tiff of values that are none": _lying_tiff(WIDTH, HEIGHT, OFFSETS, values=((4, 2**31, 8), (2, 10**6, 8))),
    "tiff of other bits": _lying_tiff(BITS, values=(0, 2, 4, 7, 9, 12, 16, 24, 32, 64, 65_535)),
    "tiff of other samples": _lying_tiff(SAMPLES, values=(0, 2, 3, 4, 5, 60_000)),
    "tiff of another compression": _lying_tiff(COMPRESSION, values=(2, 3, 4, 6, 7, 9, 34_712, 50_001, 60_000)),
    "tiff in another colour space": _lying_tiff(PHOTOMETRIC, values=(2, 3, 4, 5, 6, 8, 9, 32_803, 34_892, 99)),
    "tiff that says deflate": _lying_tiff(COMPRESSION, values=(8, 32_946), packing=1),
    "tiff whose pages go in a circle": lambda d: tiff_of(d, after=8),
    "tiff whose next page is not there": lambda d: tiff_of(d, after=d.choice((10**5, 2**31, 2**32 - 1, 3))),
    "tiff that begins nowhere": lambda d: (
        b"II*\0" + struct.pack("<I", d.choice((0, 4, 10**5, 2**32 - 1))) + tiff_of(d)[8:]
    ),
    "tiff of the other byte order": lambda d: b"MM\0*" + tiff_of(d)[4:],
    "tiff that says it is a BigTIFF": lambda d: d.choice((b"II+\0", b"MM\0+")) + tiff_of(d)[4:],
    "tiff of many tags": lambda d: (data := tiff_of(d))[:8] + struct.pack("<H", d.choice((0, 60_000))) + data[10:],
    "tiff of other numbers": _typed_tiff,
    "tiff of several pages": _paged_tiff,
    "tiff of another mode": lambda d: in_mode(d.choice(("CMYK", "YCbCr", "P", "LA", "RGBA", "1", "F", "I")), "TIFF", d),
}
