import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PillowImage

from kintsugi.errors import ImageError
from kintsugi.imaging import Image, decode, decode_mask, encode

HEIGHT, WIDTH = 24, 31


def _pixels(channels: int = 3) -> NDArray[np.uint8]:
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _jpeg(mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(_pixels()).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def _with_tag(data: bytes, tag: str, value: int, place: int = 0) -> bytes:
    """The TIFF with another value of a tag, or of one of its values."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        found = page.tags[tag]
    size = {3: 2, 4: 4}[int(found.dtype)]
    at = found.valueoffset + size * place
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.code


JPEGS = {
    "jpeg": _jpeg,
    "grey jpeg": lambda: _jpeg("L"),
    "progressive jpeg": lambda: _jpeg(progressive=True),
    "jpeg with restart markers": lambda: _jpeg(restart_marker_blocks=1),
}


def _scan_of(data: bytes) -> tuple[int, int]:
    """Where the data of the first scan begins and ends."""
    at = data.index(b"\xff\xda")
    begin = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return begin, min(end for code in b"\xc4\xd9\xda" if (end := data.find(bytes([0xFF, code]), begin)) > 0)


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_data_is_refused_even_if_it_ends_as_one_should(name: str) -> None:
    data = JPEGS[name]()
    begin, end = _scan_of(data)
    for stop in range(begin, begin + (end - begin) * 3 // 4, max(1, (end - begin) // 60)):
        for ended in (data[:stop] + b"\xff\xd9", data[:stop] + data[end:]):
            assert _refusal(ended) == "undecodable"
            with pytest.raises(ImageError):
                decode_mask(ended)


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_claims_more_rows_than_it_has_is_refused(name: str) -> None:
    data = JPEGS[name]()
    at = data.index(b"\xff\xc2\0" if "progressive" in name else b"\xff\xc0\0") + 5
    assert _refusal(data[:at] + struct.pack(">H", HEIGHT + 16) + data[at + 2 :]) == "undecodable"


def test_a_jpeg_that_lacks_the_data_between_two_restart_markers_is_refused() -> None:
    data = JPEGS["jpeg with restart markers"]()
    first, second = data.index(b"\xff\xd0"), data.index(b"\xff\xd1")
    assert _refusal(data[:first] + data[second:]) == "undecodable"


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}]
)
def test_whole_jpegs_of_every_make_are_read_as_opencv_reads_them(
    sampling: str, mode: str, options: dict[str, Any]
) -> None:
    for quality in (20, 75, 100):
        data = _jpeg(mode, quality=quality, subsampling=sampling, **options) + b"a trailer"
        seen_by_others = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(
            decode(data).pixels, seen_by_others[..., ::-1] if mode == "RGB" else seen_by_others
        )


@pytest.mark.parametrize("value", [0, 60_000])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize(
    ("tag", "options"),
    [
        ("StripOffsets", {"rowsperstrip": 16}),
        ("StripByteCounts", {"rowsperstrip": 16}),
        ("TileOffsets", {"tile": (16, 16)}),
        ("TileByteCounts", {"tile": (16, 16)}),
    ],
    ids=str,
)
def test_a_tiff_that_lacks_a_strip_or_tile_is_refused_where_tifffile_answers_zeros(
    tag: str, options: dict[str, Any], compression: str | None, value: int
) -> None:
    whole = _tiff(np.full((48, 31), 9, np.uint8), photometric="minisblack", compression=compression, **options)
    data = _with_tag(whole, tag, value, place=1)
    assert decode(whole).size == (48, 31)
    assert _refusal(data) == "undecodable"
    with pytest.raises(ImageError):
        decode_mask(data)


def test_a_tiff_of_more_rows_than_its_strips_have_is_refused() -> None:
    data = _tiff(_pixels(1), photometric="minisblack", compression="zlib")
    assert _refusal(_with_tag(data, "ImageLength", 2 * HEIGHT)) == "undecodable"


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("elsewhere", [None, 10**6])
def test_a_tiff_whose_next_page_is_not_there_is_refused(byteorder: Any, bigtiff: bool, elsewhere: int | None) -> None:
    data = _tiff(_pixels(), photometric="rgb", byteorder=byteorder, bigtiff=bigtiff)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        layout, begin = tiff.tiff, page.offset
        at = begin + layout.tagnosize + len(page.tags) * layout.tagsize
    following = struct.pack(layout.offsetformat, elsewhere or begin)
    assert _refusal(data[:at] + following + data[at + layout.offsetsize :]) == "undecodable"


def test_a_tiff_of_8_bits_that_says_it_is_a_fax_is_refused() -> None:
    data = _tiff(_pixels(1), photometric="minisblack")
    assert _refusal(_with_tag(data, "Compression", 4)) == "undecodable"


def test_a_bmp_in_run_lengths_which_may_leave_pixels_out_is_refused() -> None:
    data = encode(Image(_pixels(1), "bmp"))
    assert _refusal(data[:30] + struct.pack("<I", 1) + data[34:]) == "unsupported_mode"


def test_a_bmp_whose_pixels_begin_in_its_header_is_refused() -> None:
    data = encode(Image(_pixels(), "bmp"))
    assert _refusal(data[:10] + struct.pack("<I", 20) + data[14:]) == "undecodable"
