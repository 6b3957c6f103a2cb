"""PNG, JPEG and BMP files that a careful service refuses."""

import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from malformed_parts import BIG, Make, cut, either, grey, in_mode, rgb, saved, zeros
from PIL import Image as PillowImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _ihdr(width: int, height: int, bits: int = 8, colour: int = 0, *methods: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, *(methods or (0, 0, 0))))


def _rows(pixels: Any) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def _png(*chunks: bytes) -> bytes:
    return SIGNATURE + b"".join(chunks) + _chunk(b"IEND", b"")


def _idat(data: bytes) -> bytes:
    return _chunk(b"IDAT", zlib.compress(data))


def png_of(dice: random.Random, *before: bytes) -> bytes:
    pixels = either(dice)
    height, width = pixels.shape[:2]
    return _png(_ihdr(width, height, 8, 2 if pixels.ndim == 3 else 0), *before, _idat(_rows(pixels)))


def _lying_png(lie: Callable[[int, int, random.Random], tuple[int, ...]]) -> Make:
    def make(dice: random.Random) -> bytes:
        pixels = grey(dice)
        height, width = pixels.shape
        return _png(_ihdr(*lie(width, height, dice)), _idat(_rows(pixels)))

    return make


def _png_bad_stream(spoil: Callable[[bytes, random.Random], bytes]) -> Make:
    """A whole PNG, with chunks that are right, whose compressed stream is not."""

    def make(dice: random.Random) -> bytes:
        pixels = grey(dice)
        height, width = pixels.shape
        return _png(_ihdr(width, height), _chunk(b"IDAT", spoil(_rows(pixels), dice)))

    return make


def _unpacking_png(dice: random.Random) -> bytes:
    width, height = dice.randint(2_000, 2_500), dice.choice((2_000, 2_500))
    return _png(_ihdr(width, height), _chunk(b"IDAT", zeros((2_500 + 1) * 2_500)))


def _text_bomb(dice: random.Random) -> bytes:
    kind = dice.choice((b"zTXt", b"iCCP"))
    return png_of(dice, _chunk(kind, b"a\0\0" + zeros(80_000_000)))


def _flipped_png(dice: random.Random) -> bytes:
    data = bytearray(png_of(dice))
    name = dice.choice((b"IHDR", b"IDAT"))
    at = data.index(name) + 4
    length = int.from_bytes(data[at - 8 : at - 4], "big")
    data[dice.randrange(at, at + length + 4)] ^= 1 << dice.randrange(8)
    return bytes(data)


def _long_chunk(dice: random.Random) -> bytes:
    data = png_of(dice)
    at = data.index(b"IDAT") - 4
    return data[:at] + struct.pack(">I", dice.choice((2**31 - 1, 2**32 - 1, len(data), 10**6))) + data[at + 4 :]


def _animated_png(dice: random.Random) -> bytes:
    frames = [PillowImage.fromarray(grey(dice)).resize((32, 32)) for _ in range(dice.randint(2, 4))]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


PNG: dict[str, Make] = {
    "png that claims gigapixels": lambda d: _png(
        _ihdr(d.choice(BIG), d.choice(BIG), d.choice((8, 16)), d.choice((0, 2))), _idat(bytes(d.randint(0, 9_999)))
    ),
    "png of zeros over the limit": _unpacking_png,
    "png with a bomb in its text or profile": _text_bomb,
    "png cut off": lambda d: cut(png_of(d), d, 13),
    "png with a flipped bit": _flipped_png,
    "png with a chunk beyond its end": _long_chunk,
    "png taller than its data": _lying_png(lambda w, h, d: (w, h + d.randint(1, 99))),
    "png wider than its data": _lying_png(lambda w, h, d: (w * 2 + d.randint(1, 99), h)),
    "png deeper than its data": _lying_png(lambda w, h, d: (w, h, *d.choice(((16, 0), (8, 2), (16, 2))))),
    "png of a depth that is none": _lying_png(
        lambda w, h, d: (w, h, *d.choice(((3, 0), (0, 0), (4, 2), (16, 3), (8, 1), (8, 5), (255, 0), (32, 2))))
    ),
    "png of an unknown method": _lying_png(
        lambda w, h, d: (w, h, 8, 0, *d.choice(((1, 0, 0), (0, 7, 0), (0, 0, 9), (255, 255, 255))))
    ),
    "png of few bits": _lying_png(lambda w, h, d: (w, h, d.choice((1, 2, 4)), 0)),
    "png of no size": _lying_png(lambda w, h, d: d.choice(((0, h), (w, 0), (0, 0)))),
    "png with a bad filter": _png_bad_stream(lambda rows, d: zlib.compress(bytes([d.randint(5, 255)]) + rows[1:])),
    "png with a bad checksum of its data": _png_bad_stream(
        lambda rows, d: zlib.compress(rows)[:-4] + struct.pack(">I", zlib.adler32(rows) ^ d.randint(1, 2**32 - 1))
    ),
    "png with too little data": _png_bad_stream(lambda rows, d: zlib.compress(rows[: d.randrange(len(rows))])),
    "png whose data is not compressed": _png_bad_stream(lambda rows, d: rows),
    "png without data": lambda d: _png(_ihdr(d.randint(1, 99), d.randint(1, 99))),
    "png with two headers": lambda d: png_of(d, _ihdr(d.randint(1, 99), d.randint(1, 99))),
    "png with its data first": lambda d: _png(_idat(bytes(d.randint(1, 999))), _ihdr(d.randint(1, 99), 1)),
    "png with an unknown critical chunk": lambda d: png_of(d, _chunk(b"KINT", d.randbytes(d.randint(0, 99)))),
    "animated png": _animated_png,
    "png with a palette": lambda d: in_mode("P", "PNG", d),
    "png with alpha": lambda d: in_mode(d.choice(("LA", "RGBA")), "PNG", d),
    "png with a transparent colour": lambda d: in_mode("L", "PNG", d, transparency=d.randrange(256)),
}


# JPEG


def jpeg(dice: random.Random) -> bytes:
    options = dice.choice(({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}))
    return in_mode(dice.choice(("L", "RGB")), "JPEG", dice, quality=dice.randint(60, 100), **options)


def _scan(data: bytes) -> int:
    """Where the first scan's data begins."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _ended_jpeg(dice: random.Random) -> bytes:
    """Cut off within its first scan, and given an end mark as if it were whole.

    A progressive JPEG without its last scans would be a valid one, only coarser.
    """
    data = jpeg(dice)
    first = _scan(data)
    end = min(at for code in b"\xc4\xd9\xda" if (at := data.find(bytes([0xFF, code]), first)) > 0)
    return data[: dice.randrange(first, first + 3 * (end - first) // 4)].rstrip(b"\xff") + b"\xff\xd9"


def _jpeg_frame(change: Callable[[int, int, random.Random], tuple[int, int, int]]) -> Make:
    """A JPEG whose frame says other bits, height and width than its data has."""

    def make(dice: random.Random) -> bytes:
        data = jpeg(dice)
        at = next(place for code in b"\xc0\xc2" if (place := data.find(bytes([0xFF, code, 0]))) > 0)
        height, width = struct.unpack(">HH", data[at + 5 : at + 9])
        return data[: at + 4] + struct.pack(">BHH", *change(height, width, dice)) + data[at + 9 :]

    return make


def _without(marker: bytes) -> Make:
    """A JPEG that has a comment instead of its tables."""
    return lambda dice: in_mode("RGB", "JPEG", dice, progressive=True).replace(marker, b"\xff\xfe")


def _ycck(dice: random.Random) -> bytes:
    data = bytearray(in_mode("CMYK", "JPEG", dice))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


JPEG: dict[str, Make] = {
    "jpeg cut off": lambda d: cut(jpeg(d), d, 16),
    "jpeg cut off and ended": _ended_jpeg,
    "jpeg taller than its data": _jpeg_frame(lambda h, w, d: (8, h + d.randint(64, 400), w)),
    "jpeg over the limit": _jpeg_frame(lambda h, w, d: (8, d.choice(BIG[:3]), d.choice(BIG[:3]))),
    "jpeg of no size": _jpeg_frame(lambda h, w, d: (8, *d.choice(((0, w), (h, 0), (0, 0))))),
    "jpeg of a depth that is none": _jpeg_frame(lambda h, w, d: (d.choice((0, 1, 7, 9, 12, 16, 255)), h, w)),
    "jpeg without a scan": lambda d: (data := jpeg(d))[: data.index(b"\xff\xda")] + b"\xff\xd9",
    "jpeg with an empty scan": lambda d: (data := jpeg(d))[: _scan(data)] + b"\xff\xd9",
    "jpeg without quantisation": _without(b"\xff\xdb"),
    "jpeg without codes": _without(b"\xff\xc4"),
    "jpeg that says lossless": lambda d: in_mode("RGB", "JPEG", d).replace(b"\xff\xc0", b"\xff\xc3", 1),
    "jpeg in CMYK": lambda d: in_mode("CMYK", "JPEG", d),
    "jpeg in YCCK": _ycck,
    "jpeg of two pictures": lambda d: in_mode(
        "RGB", "MPO", d, save_all=True, append_images=[PillowImage.fromarray(rgb(d))]
    ),
}


# BMP


def bmp(dice: random.Random, **lies: int) -> bytes:
    pixels = rgb(dice)
    height, width = pixels.shape[:2]
    rows = np.zeros((height, -(-width * 3 // 4) * 4), np.uint8)
    rows[:, : width * 3] = pixels.reshape(height, -1)
    facts = {"offset": 54, "dib": 40, "width": width, "height": height, "bits": 24, "compression": 0} | lies
    header = struct.pack("<IIiiHHIIiiII", *list(facts.values())[:4], 1, *list(facts.values())[4:], 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHH", 54 + rows.size, 0, 0) + header + rows.tobytes()


def _empty_run_lengths(dice: random.Random) -> bytes:
    """A grey BMP that leaves out all pixels, or all but a few."""
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    runs = b"".join(bytes([dice.randint(1, 9), dice.randrange(256)]) for _ in range(dice.randrange(3)))
    header = struct.pack("<IiiHHIIiiII", 40, dice.randint(50, 99), dice.randint(20, 99), 1, 8, 1, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + palette + runs + b"\0\1"


BMP: dict[str, Make] = {
    "bmp cut off": lambda d: cut(bmp(d), d, 8),
    "bmp over the limit": lambda d: bmp(d, width=d.choice(BIG), height=d.choice((1, -1)) * d.choice(BIG)),
    "bmp of a negative width": lambda d: bmp(d, width=-d.randint(1, 2**31)),
    "bmp of no size": lambda d: bmp(d, **d.choice(({"width": 0}, {"height": 0}, {"width": 0, "height": 0}))),
    "bmp of the lowest height": lambda d: bmp(d, height=-(2**31)),
    "bmp taller than its data": lambda d: bmp(d, height=d.choice((1, -1)) * d.randint(100, 999)),
    "bmp of other bits": lambda d: bmp(d, bits=d.choice((0, 1, 2, 4, 7, 8, 15, 16, 25, 32, 48, 64, 65_535))),
    "bmp of another compression": lambda d: bmp(d, compression=d.choice((1, 2, 3, 4, 5, 6, 11, 99, 2**32 - 1))),
    "bmp whose pixels begin beyond its end": lambda d: bmp(d, offset=d.choice((10**5, 2**31 - 1, 2**32 - 10))),
    "bmp whose pixels begin in its header": lambda d: bmp(d, offset=d.randrange(54)),
    "bmp of an unknown header": lambda d: bmp(d, dib=d.choice((0, 1, 12, 13, 39, 41, 999, 2**31))),
    "bmp without its pixels": _empty_run_lengths,
    "bmp with a palette": lambda d: in_mode("P", "BMP", d),
    "bmp of 1 bit": lambda d: in_mode("1", "BMP", d),
    "bmp of 32 bits": lambda d: in_mode("RGBA", "BMP", d),
}
