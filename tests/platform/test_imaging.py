import contextlib
import io
import random
import struct
import zlib
from typing import Any, get_args

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PillowImage

from kintsugi.errors import ImageError
from kintsugi.imaging import Format, Image, Pixels, convert, decode, decode_mask, encode, note_of, sniff

FORMATS: tuple[Format, ...] = get_args(Format)
HEIGHT, WIDTH = 24, 31


def _pixels(dtype: type[np.uint8] | type[np.uint16] = np.uint8, channels: int = 3, seed: int = 0) -> Pixels:
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True)
    return values.astype(dtype)


def _image(kind: Format, dtype: type[np.uint8] | type[np.uint16] = np.uint8, channels: int = 3) -> Image:
    return Image(_pixels(dtype, channels), kind, int(np.iinfo(dtype).max))


def _pillow(mode: str, kind: str, **options: Any) -> bytes:
    picture = PillowImage.fromarray(_pixels()).convert("L" if mode in ("I", "I;16", "F") else mode).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def _refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.code


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("png", np.uint8), ("png", np.uint16), ("tiff", np.uint8), ("tiff", np.uint16), ("bmp", np.uint8)],
)
def test_no_bit_changes_on_the_way_through_a_file(kind: Format, dtype: type[np.uint8], channels: int) -> None:
    image = _image(kind, dtype, channels)
    back = decode(encode(image))
    assert back.pixels.dtype == dtype
    np.testing.assert_array_equal(back.pixels, image.pixels)
    assert (back.format, back.white_level, back.channels) == (kind, np.iinfo(dtype).max, channels)
    assert encode(back) == encode(decode(encode(back)))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_size_mode_and_nearly_every_value(channels: int) -> None:
    image = _image("jpeg", channels=channels)
    back = decode(encode(image))
    assert back.pixels.shape == image.pixels.shape
    assert np.abs(back.pixels.astype(int) - image.pixels.astype(int)).mean() < 1.5


@pytest.mark.parametrize("kind", FORMATS)
def test_colours_are_red_green_blue(kind: Format) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    data = encode(Image(red, kind))
    assert decode(data).pixels[8, 8].argmax() == 0
    with PillowImage.open(io.BytesIO(data)) as seen_by_others:
        assert np.asarray(seen_by_others.convert("RGB"))[8, 8].argmax() == 0


@pytest.mark.parametrize("kind", ["jpeg", "bmp"])
def test_a_format_of_8_bits_refuses_16(kind: Format) -> None:
    with pytest.raises(ImageError, match="use PNG or TIFF") as caught:
        encode(_image(kind, np.uint16))
    assert caught.value.code == "unsupported_mode"


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_twelve_bits_in_sixteen_come_back_exactly(kind: Format) -> None:
    pixels = (_pixels(np.uint16, 1) // 16).astype(np.uint16)
    pixels[0, 0] = 4095
    image = decode(encode(Image(pixels, kind, 4095)), white_level=4095)
    unit = image.to_unit()
    assert (unit.dtype, float(unit.max())) == (np.float32, 1.0)
    np.testing.assert_array_equal(image.with_unit(unit).pixels, pixels)


def test_every_16_bit_value_survives_the_unit_interval() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for tags in ((), (("photometric", "miniswhite"),)):
        image = Image(ramp, "tiff", 65535, tags)
        np.testing.assert_array_equal(image.with_unit(image.to_unit()).pixels, ramp)


def test_values_above_the_white_level_are_refused() -> None:
    data = encode(Image(np.full((4, 4), 5000, np.uint16), "png", 65535))
    assert _refusal(data, white_level=4095) == "over_white_level"
    assert decode(data, white_level=5000).white_level == 5000


@pytest.mark.parametrize("level", [0, -1, 256])
def test_a_white_level_that_the_file_cannot_hold_is_refused(level: int) -> None:
    assert _refusal(encode(_image("png")), white_level=level) == "over_white_level"


def test_restored_values_are_clipped_and_must_fit_the_image() -> None:
    image = Image(np.zeros((1, 3), np.uint8))
    values = np.array([[-1, 0.5, 2]], np.float32)
    np.testing.assert_array_equal(image.with_unit(values).pixels, [[0, 128, 255]])
    for wrong in (values[:, :2], values * np.float32("nan")):
        with pytest.raises(ImageError) as caught:
            image.with_unit(wrong)
        assert caught.value.code == "mismatch"


REFUSED_MODES = {
    "png with alpha": lambda: _pillow("RGBA", "PNG"),
    "grey png with alpha": lambda: _pillow("LA", "PNG"),
    "png with a palette": lambda: _pillow("P", "PNG"),
    "png of 1 bit": lambda: _pillow("1", "PNG"),
    "png with a transparent colour": lambda: _pillow("RGB", "PNG", transparency=(1, 2, 3)),
    "grey png with a transparent level": lambda: _pillow("L", "PNG", transparency=7),
    "animated png": lambda: _pillow(
        "RGB", "PNG", save_all=True, append_images=[PillowImage.fromarray(_pixels(seed=1))]
    ),
    "jpeg in CMYK": lambda: _pillow("CMYK", "JPEG"),
    "jpeg of two pictures": lambda: _pillow(
        "RGB", "MPO", save_all=True, append_images=[PillowImage.fromarray(_pixels(seed=1))]
    ),
    "bmp of 1 bit": lambda: _pillow("1", "BMP"),
    "bmp with a palette": lambda: _pillow("P", "BMP"),
    "bmp of 32 bits": lambda: _pillow("RGBA", "BMP"),
    "tiff of 1 bit": lambda: _pillow("1", "TIFF"),
    "tiff with alpha": lambda: _pillow("RGBA", "TIFF"),
    "grey tiff with alpha": lambda: _pillow("LA", "TIFF"),
    "tiff with a palette": lambda: _pillow("P", "TIFF"),
    "tiff in CMYK": lambda: _pillow("CMYK", "TIFF"),
    "tiff in YCbCr": lambda: _pillow("YCbCr", "TIFF"),
    "tiff of float": lambda: _pillow("F", "TIFF"),
    "tiff of 32 bits": lambda: _pillow("I", "TIFF"),
    "tiff of signed 16 bits": lambda: _tiff(_pixels(channels=1).astype(np.int16)),
    "tiff of packed 12 bits": lambda: _tiff(_pixels(np.uint16, 1) // 16, bitspersample=12),
    "tiff of two pages": lambda: _pillow(
        "RGB", "TIFF", save_all=True, append_images=[PillowImage.fromarray(_pixels(seed=1))]
    ),
    "tiff of a volume": lambda: _tiff(
        np.zeros((16, 16, 16), np.uint8), volumetric=True, tile=(16, 16, 16), photometric="minisblack"
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODES)
def test_what_would_be_changed_behind_the_users_back_is_refused(name: str) -> None:
    assert _refusal(REFUSED_MODES[name]()) == "unsupported_mode"


@pytest.mark.parametrize(
    "data", [b"", b"P5 1 1 255 x", b"GIF89a", b"RIFF....WEBP", b"%PDF-1.7", b"\x89PNG", b"<svg/>", b"\x00" * 64]
)
def test_bytes_of_another_kind_are_refused(data: bytes) -> None:
    assert _refusal(data) == "unsupported_format"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_size_limit_counts_pixels(kind: Format) -> None:
    data = encode(_image(kind))
    assert decode(data, max_pixels=HEIGHT * WIDTH).size == (HEIGHT, WIDTH)
    assert _refusal(data, max_pixels=HEIGHT * WIDTH - 1) == "too_large"


def _png_bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def _with_tag(data: bytes, tag: str, value: int) -> bytes:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        found = page.tags[tag]
        width = {3: 2, 4: 4}[int(found.dtype)]
    return data[: found.valueoffset] + value.to_bytes(width, "little") + data[found.valueoffset + width :]


BOMBS = {
    "png that claims 10 gigapixels": _png_bomb,
    "bmp that claims 4 gigapixels": lambda: (
        encode(_image("bmp"))[:18] + struct.pack("<ii", 65_535, 65_535) + encode(_image("bmp"))[26:]
    ),
    "tiff that claims 4 gigapixels": lambda: _with_tag(
        _with_tag(_tiff(_pixels(channels=1), photometric="minisblack", compression="zlib"), "ImageWidth", 65_535),
        "ImageLength",
        65_535,
    ),
    "tiff whose one tile claims 4 gigapixels": lambda: _with_tag(
        _with_tag(
            _tiff(np.zeros((64, 64), np.uint8), photometric="minisblack", tile=(64, 64), compression="zlib"),
            "TileWidth",
            65_520,
        ),
        "TileLength",
        65_520,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_claims_a_huge_image_is_refused_by_its_header(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 100_000
    assert _refusal(data) == "too_large"
    with pytest.raises(ImageError):
        decode_mask(data)


def test_a_tiff_that_claims_thousands_of_samples_a_pixel_is_refused() -> None:
    data = _tiff(_pixels(), photometric="rgb", compression="zlib")
    assert _refusal(_with_tag(data, "SamplesPerPixel", 60_000)) == "unsupported_mode"


def test_a_strip_that_unpacks_beyond_its_image_is_refused() -> None:
    packed, buffer = zlib.compress(bytes(50_000_000), 9), io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(iter([packed]), shape=(16, 16), dtype=np.uint8, compression="zlib", photometric="minisblack")
    assert _refusal(buffer.getvalue()) == "undecodable"


WHOLE_FILES = {
    "png": lambda: encode(_image("png")),
    "grey png of 16 bits": lambda: encode(_image("png", np.uint16, 1)),
    "jpeg": lambda: encode(_image("jpeg")),
    "progressive jpeg": lambda: _pillow("RGB", "JPEG", progressive=True),
    "jpeg with restart markers": lambda: _pillow("RGB", "JPEG", restart_marker_blocks=1),
    "grey jpeg": lambda: encode(_image("jpeg", channels=1)),
    "bmp": lambda: encode(_image("bmp")),
    "grey bmp": lambda: encode(_image("bmp", channels=1)),
    "tiff": lambda: encode(_image("tiff")),
    "uncompressed tiff": lambda: _tiff(_pixels(), photometric="rgb"),
    "uncompressed tiff in strips": lambda: _tiff(_pixels(), photometric="rgb", rowsperstrip=4),
    "tiff in tiles": lambda: _tiff(_pixels(), photometric="rgb", tile=(16, 16), compression="zstd"),
    "tiff in LZW": lambda: _pillow("RGB", "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_cut_off_anywhere_is_refused_and_never_answered_in_part(name: str) -> None:
    data = WHOLE_FILES[name]()
    whole = decode(data).pixels
    for length in {*range(0, len(data), 7), *range(max(0, len(data) - 40), len(data))}:
        try:
            pixels = decode(data[:length]).pixels
        except ImageError:
            continue
        # Only an end mark was cut off: nothing of the image is missing.
        np.testing.assert_array_equal(pixels, whole, err_msg=f"{name} cut to {length} of {len(data)} bytes")


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_damaged_bytes_never_raise_anything_but_an_image_error(name: str) -> None:
    data, dice = WHOLE_FILES[name](), random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 3))):
            damaged[dice.randrange(min(len(data), dice.choice((64, 10_000))))] = dice.randrange(256)
        for read in (decode, decode_mask):
            with contextlib.suppress(ImageError):
                read(bytes(damaged), max_pixels=1_000_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_orientation_tag_turns_neither_image_nor_mask(kind: str) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    turned, plain = _pillow("RGB", kind, exif=exif), _pillow("RGB", kind)
    np.testing.assert_array_equal(decode(turned).pixels, decode(plain).pixels)
    assert decode_mask(turned).shape == (HEIGHT, WIDTH)


def test_a_miniswhite_tiff_stays_one_and_its_black_is_0_for_the_model() -> None:
    pixels = _pixels(channels=1)
    image = decode(_tiff(pixels, photometric="miniswhite"))
    np.testing.assert_array_equal(image.pixels, pixels)
    np.testing.assert_array_equal(image.to_unit(), 1 - pixels.astype(np.float32) / np.float32(255))
    with tifffile.TiffFile(io.BytesIO(encode(image.with_unit(image.to_unit())))) as tiff:
        page: Any = tiff.pages[0]
        assert page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        np.testing.assert_array_equal(page.asarray(), pixels)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
def test_a_tiff_keeps_its_compression(compression: str | None) -> None:
    image = decode(_tiff(_pixels(), photometric="rgb", compression=compression))
    assert decode(encode(image)).tags == image.tags


@pytest.mark.parametrize(
    "options",
    [{"byteorder": ">"}, {"bigtiff": True}, {"predictor": True, "compression": "zlib"}, {"tile": (16, 16)}],
    ids=str,
)
def test_tiffs_of_every_make_are_read(options: dict[str, Any]) -> None:
    pixels = _pixels(np.uint16)
    np.testing.assert_array_equal(decode(_tiff(pixels, photometric="rgb", **options)).pixels, pixels)


def test_a_tiff_that_stores_its_colours_apart_is_read() -> None:
    pixels = _pixels()
    apart = _tiff(np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(decode(apart).pixels, pixels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 1, 3), (3, 7, 3), (7, 3, 3)])
@pytest.mark.parametrize("kind", ["png", "tiff", "bmp"])
def test_thin_images_keep_their_shape(kind: Format, shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(decode(encode(Image(pixels, kind))).pixels, pixels)


def test_convert_changes_the_container_and_not_the_picture() -> None:
    negative = decode(_tiff(_pixels(channels=1), photometric="miniswhite"))
    for image in (_image("tiff", np.uint16), negative):
        back = decode(encode(convert(image, "png")))
        assert (back.format, back.tags) == ("png", ())
        np.testing.assert_allclose(back.to_unit(), image.to_unit(), atol=1e-6)


def test_convert_refuses_a_format_that_is_none() -> None:
    with pytest.raises(ImageError, match="webp is not a format"):
        convert(_image("png"), "webp")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_magic_number_tells_the_format(kind: Format) -> None:
    assert sniff(encode(_image(kind))) == kind


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_note_travels_in_the_file_and_changes_no_pixel(kind: Format) -> None:
    pixels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    image = Image(pixels, kind, 65535)
    noted = encode(image, note='{"model": "unet@3"}')
    assert note_of(noted) == '{"model": "unet@3"}'
    assert np.array_equal(decode(noted).pixels, pixels)
    assert note_of(encode(image)) is None
    assert encode(decode(noted)) == encode(decode(encode(image)))


@pytest.mark.parametrize("kind", ["bmp", "jpeg"])
def test_a_format_without_room_for_a_note_says_so(kind: Format) -> None:
    with pytest.raises(ImageError, match="holds no facts"):
        encode(Image(np.zeros((8, 8), np.uint8), kind), note="{}")
    assert note_of(encode(Image(np.zeros((8, 8), np.uint8), kind))) is None
