import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from kintsugi import imaging

LEVELS = np.random.default_rng(4).integers(0, 4096, (60, 80)).astype(np.uint16)


def png(pixels: NDArray[Any]) -> bytes:
    """A PNG whose rows go through all five filters."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    step = channels * pixels.dtype.itemsize
    plain = np.zeros((height + 1, width * step + step), np.uint8)
    plain[1:, step:] = np.frombuffer(pixels.astype(pixels.dtype.newbyteorder(">")).tobytes(), np.uint8).reshape(
        height, -1
    )
    rows = b"".join(bytes([y % 5]) + _filtered(plain[y : y + 2].astype(int), step, y % 5) for y in range(height))
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    head = size + bytes([8 * pixels.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def _filtered(pair: NDArray[Any], step: int, kind: int) -> bytes:
    up, row = pair[0, step:], pair[1, step:]
    left, corner = pair[1, :-step], pair[0, :-step]
    near = np.abs(np.stack([up - corner, left - corner, up + left - 2 * corner]))
    paeth = np.choose(near.argmin(axis=0), [left, up, corner])
    return ((row - [0, left, up, (left + up) // 2, paeth][kind]) % 256).astype(np.uint8).tobytes()


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    big = {name: options.pop(name) for name in ("byteorder", "bigtiff") if name in options}
    with tifffile.TiffWriter(buffer, **big) as writer:
        writer.write(pixels, metadata=None, **options)
    return buffer.getvalue()


GREY8 = (LEVELS >> 4).astype(np.uint8)
COLOUR8 = np.dstack([GREY8, GREY8[::-1], GREY8[:, ::-1]])
COLOUR = np.dstack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]])
TALL = np.tile(COLOUR, (4, 1, 1))
PLANES = np.moveaxis(COLOUR, 2, 0).copy()
SMOOTH = np.add.outer(np.arange(300), np.arange(200)).astype(np.uint16) * 17
FILES = {
    "png grey 8": (png(GREY8), GREY8),
    "png grey 16": (png(LEVELS), LEVELS),
    "png rgb 16": (png(COLOUR), COLOUR),
    "png of opencv": (imaging.encode(imaging.Image(SMOOTH, "png", 65535)), SMOOTH),
    "jpeg": (imaging.encode(imaging.Image(GREY8 // 9 + 100, "jpeg", 255)), None),
    "bmp": (imaging.encode(imaging.Image(GREY8, "bmp", 255)), GREY8),
    "bmp rgb": (imaging.encode(imaging.Image(COLOUR8, "bmp", 255)), COLOUR8),
    "tiff": (tiff(LEVELS), LEVELS),
    "tiff rgb 8": (tiff(COLOUR8, photometric="rgb"), COLOUR8),
    "tiff big-endian strips": (tiff(LEVELS, byteorder=">", rowsperstrip=7), LEVELS),
    "tiff bigtiff": (tiff(LEVELS, bigtiff=True), LEVELS),
    "tiff tiles": (tiff(SMOOTH, tile=(64, 48), compression="adobe_deflate"), SMOOTH),
    "tiff lzw": (tiff(SMOOTH, compression="lzw"), SMOOTH),
    "tiff lzw of noise": (tiff(TALL, photometric="rgb", compression="lzw"), TALL),
    "tiff lzw with predictor": (tiff(SMOOTH, compression="lzw", predictor=True), SMOOTH),
    "tiff deflate with predictor": (tiff(COLOUR, photometric="rgb", compression="zlib", predictor=True), COLOUR),
    "tiff big-endian predictor": (tiff(LEVELS, byteorder=">", compression="deflate", predictor=True), LEVELS),
    "tiff packbits": (tiff(GREY8 // 100, compression="packbits"), GREY8 // 100),
    "tiff planes": (tiff(PLANES, photometric="rgb", planarconfig="separate", rowsperstrip=16), COLOUR),
    "tiff of the service": (imaging.encode(imaging.Image(LEVELS, "tiff", 4095)), LEVELS),
}  # fmt: skip


def test_every_file_that_is_shown_is_read_to_the_values_it_holds(tab: Any) -> None:
    for name, (data, pixels) in FILES.items():
        wanted = imaging.decode(data).pixels if pixels is None else pixels
        code = f"decodeBytes(bytesOfBase64('{base64.b64encode(data).decode()}'))"
        read = tab.value(
            f"{code}.then(p => ({{...p, data: btoa(String.fromCharCode(...new Uint8Array(p.data.buffer)))}}))"
        )
        found = np.frombuffer(base64.b64decode(read["data"]), np.uint8 if read["bits"] == 8 else np.uint16)
        shape = (read["height"], read["width"], *([3] if read["channels"] == 3 else []))
        assert (name, shape, read["bits"]) == (name, wanted.shape, wanted.dtype.itemsize * 8)
        np.testing.assert_array_equal(found.reshape(shape), wanted, err_msg=name)


def test_what_a_browser_cannot_show_is_said_and_can_be_downloaded(tab: Any, served: Any, tmp_path: Path) -> None:
    (tmp_path / "z.tif").write_bytes(tiff(LEVELS, compression="zstd"))
    tab.choose("#file", tmp_path / "z.tif")
    tab.until("!$('noview').hidden && !$('work').hidden")
    assert "Zstandard" in tab.text("#noview") and "94.2 %" in tab.text("#report")
    assert tab.download("#download", tmp_path / "kept").read_bytes() == served.image


def test_an_image_too_large_for_a_preview_is_said_to_be(tab: Any, served: Any, tmp_path: Path) -> None:
    served.echoes = True
    head = (20000).to_bytes(4, "big") * 2 + bytes([16, 0, 0, 0, 0])
    (tmp_path / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    )
    tab.choose("#file", tmp_path / "huge.png")
    tab.until("!$('noview').hidden && !$('work').hidden")
    assert "20000 × 20000 px are too many to preview" in tab.text("#noview")


def test_a_pasted_picture_loses_its_empty_alpha_and_a_dropped_file_is_taken(
    tab: Any, served: Any, tmp_path: Path, part: Any
) -> None:
    opaque = np.dstack([COLOUR8, np.full(LEVELS.shape, 255, np.uint8)])
    for kind, name, carried, data in (
        ("ClipboardEvent", "paste", "clipboardData", png(opaque)),
        ("DragEvent", "drop", "dataTransfer", part(tmp_path).read_bytes()),
    ):
        made = f"new File([bytesOfBase64('{base64.b64encode(data).decode()}')], 'image.png', {{type: 'image/png'}})"
        event = f"new {kind}('{name}', {{{carried}: all, bubbles: true, cancelable: true}})"
        carry = f"const all = new DataTransfer; all.items.add({made}); document.body.dispatchEvent({event});"
        tab.value(f"(() => {{ {carry} }})()")
        tab.until("items.at(-1)?.state === 'done'")
    assert tab.value("items.map(item => item.file.name)") == ["image.bmp", "image.png"]
