"""Images that a careful service refuses: damaged, lying, hostile, or of a kind that it does not restore.

Every one is wrong by its making, not by chance: a mutation that may leave a valid image (a flipped bit in what a JPEG
or zstd packs without a checksum, surplus data behind a picture) is not among them. Run as a program, it has them
decoded in child processes.
"""

import argparse
import asyncio
import base64
import gzip
import io
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from malformed_files import BMP, JPEG, PNG, SIGNATURE, bmp, jpeg, png_of
from malformed_parts import PIXELS, Make
from malformed_tiff import TIFF, tiff_of
from rows import Row, measured, output_of, print_table, write_rows

from kintsugi.errors import ImageError
from kintsugi_serve.decoding.codec import Decoder


def corpus(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` files with the names of their kinds, each kind in its turn."""
    names = list(KINDS)
    for number in range(count):
        name = names[number % len(names)]
        yield name, KINDS[name](random.Random(f"{seed}/{number}"))


def _image(dice: random.Random) -> bytes:
    return dice.choice((png_of, jpeg, bmp, tiff_of))(dice)


def _zipped(dice: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("image.png"), _image(dice))
    return buffer.getvalue()


MAGICS = (SIGNATURE, b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"BM", b"II*\0", b"MM\0*", b"II+\0")
OTHERS = (
    *(b"GIF87a", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8 ", b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    *(b"\0\0\0\x1cftypheic", b"\0\0\0\x1cftypavif", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x0a", b"8BPS\0\1", b"P6 9 9 "),
    *(b"v/1\x01", b"<!DOCTYPE html>", b"\x7fELF", b"{}", b"\xef\xbb\xbf", b"\x1f\x8b\x08", b"#!/bin/sh\n", b"qoif"),
)  # fmt: skip

FOREIGN: dict[str, Make] = {
    "nothing": lambda d: b"",
    "one byte": lambda d: d.randbytes(1),
    "random bytes": lambda d: b"\0" + d.randbytes(d.randint(1, 9_999)),
    "a magic alone": lambda d: d.choice(MAGICS),
    "random bytes behind a magic": lambda d: d.choice(MAGICS) + d.randbytes(d.randint(1, 9_999)),
    "zeros behind a magic": lambda d: d.choice(MAGICS) + bytes(d.randint(1, 9_999)),
    "another format": lambda d: d.choice(OTHERS) + d.randbytes(d.randint(0, 999)),
    "an image behind another format's head": lambda d: d.choice(OTHERS) + _image(d),
    "an image behind another magic": lambda d: d.choice(MAGICS[:2]) + _image(d),
    "a page behind a magic": lambda d: d.choice(MAGICS) + b"<html><script>alert(1)</script></html>" * d.randint(1, 99),
    "an archive that holds an image": _zipped,
    "an archive behind a magic": lambda d: d.choice(MAGICS) + _zipped(d),
    "an image in gzip": lambda d: gzip.compress(_image(d), mtime=0),
    "an image in base64": lambda d: base64.b64encode(_image(d)),
    "an image sent as text": lambda d: png_of(d).replace(b"\r\n", b"\n"),
    "an image without its first byte": lambda d: _image(d)[1:],
}

KINDS: dict[str, Make] = {**PNG, **JPEG, **BMP, **TIFF, **FOREIGN}


def main() -> int:
    """Exit 0 where every file was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output_of("malformed"))
    options = parser.parse_args()
    rows = asyncio.run(attack(options.count, options.seed))
    print_table(rows)
    write_rows(rows, options.output)
    return 0 if all(row.holds is not False for row in rows) else 1


async def attack(count: int, seed: int) -> list[Row]:
    """Have `count` files decoded, and an honest one behind every tenth."""
    decoder, process, dice = Decoder(), psutil.Process(), random.Random(seed)
    await decoder.start()
    before = process.memory_info().rss
    answers: Counter[str] = Counter()
    ended = unforeseen = honest = 0
    for number, (name, data) in enumerate(corpus(count, seed)):
        code, sentence = await _answer(decoder, data)
        answers[code] += 1
        ended += "ended" in sentence
        unforeseen += "): save it anew" in sentence
        if code == "accepted" or "): save it anew" in sentence:
            print(f"{name}: {code}, {sentence}")
        if number % 10 == 0:
            honest += (await _answer(decoder, _image(dice)))[0] == "accepted"
    grown = (process.memory_info().rss - before) / 2**20
    decoder.close()
    return [
        measured("files that were accepted", answers["accepted"], "== 0", n=count, note=str(dict(answers))),
        measured("files that ended a child", ended, "== 0", n=count),
        measured("files that imaging did not foresee", unforeseen, "== 0", n=count),
        measured("honest files between them that were accepted", honest, f"== {-(-count // 10)}", n=-(-count // 10)),
        measured("growth of the process that asks", grown, "<= 50", unit="MiB", n=count),
    ]


async def _answer(decoder: Decoder, data: bytes) -> tuple[str, str]:
    """The code and the sentence of the refusal, if it is one."""
    try:
        await decoder.decode(data, max_pixels=PIXELS)
    except ImageError as error:
        return error.code, str(error)
    return "accepted", ""


if __name__ == "__main__":
    sys.exit(main())
