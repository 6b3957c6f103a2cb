import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ImageError, StoreError
from kintsugi.imaging import Image
from kintsugi.restore.strips import TiffStrips, write_strips

HEIGHT, WIDTH = 150, 77
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain strips": {"rowsperstrip": 7},
    "plain tiles": {"tile": (16, 32)},
    "deflate": {"compression": "zlib", "rowsperstrip": 7},
    "deflate with a predictor": {"compression": "zlib", "predictor": True, "rowsperstrip": 64},
    "zstd tiles": {"compression": "zstd", "tile": (64, 64)},
    "lzw": {"compression": "lzw", "rowsperstrip": 10},
    "packbits": {"compression": "packbits", "rowsperstrip": 5},
    "big endian": {"byteorder": ">"},
    "big endian, deflate": {"byteorder": ">", "compression": "zlib", "rowsperstrip": 9},
    "bigtiff": {"bigtiff": True},
    "colours apart": {"planarconfig": "separate", "rowsperstrip": 11},
    "colours apart in tiles": {"planarconfig": "separate", "tile": (32, 16), "compression": "zlib"},
}


def _pixels(dtype: type[np.uint8] | type[np.uint16] = np.uint16, channels: int = 1) -> imaging.Pixels:
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def _write(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, 2, 0)
    photometric = options.pop("photometric", "minisblack" if pixels.ndim == 2 else "rgb")
    tifffile.imwrite(path, pixels, photometric=photometric, **options)
    return path


def _refusal(path: Path, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught, TiffStrips(path, **options) as strips:
        strips.rows(0, strips.size[0])
    return caught.value


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("layout", "channels"), [(name, n) for name in LAYOUTS for n in (1, 3) if n == 3 or "apart" not in name]
)
def test_any_rows_are_those_of_the_whole_image(
    tmp_path: Path, layout: str, channels: int, dtype: type[np.uint8]
) -> None:
    path = _write(tmp_path / "a.tiff", _pixels(dtype, channels), **LAYOUTS[layout])
    whole = imaging.decode(path.read_bytes())
    with TiffStrips(path) as strips:
        assert (strips.size, strips.channels) == (whole.size, whole.channels)
        for start, stop in ((0, HEIGHT), (0, 1), (13, 99), (63, 65), (140, HEIGHT)):
            band = strips.rows(start, stop)
            np.testing.assert_array_equal(band.pixels, whole.pixels[start:stop])
            assert (band.tags, band.white_level, band.pixels.dtype) == (whole.tags, whole.white_level, dtype)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "apart" not in name])
@pytest.mark.parametrize("channels", [1, 3])
def test_bands_written_make_the_same_image_packed_in_the_same_way(tmp_path: Path, layout: str, channels: int) -> None:
    image = imaging.decode(_write(tmp_path / "a.tiff", _pixels(channels=channels), **LAYOUTS[layout]).read_bytes())
    bands = (image.rows(top, min(top + 37, HEIGHT)) for top in range(0, HEIGHT, 37))
    write_strips(tmp_path / "b.tiff", image.rows(0, 1), HEIGHT, bands)
    back = imaging.decode((tmp_path / "b.tiff").read_bytes())
    np.testing.assert_array_equal(back.pixels, image.pixels)
    assert back.tags == image.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tiff", "b.tiff"]


def test_a_wide_image_is_written_in_several_strips_that_are_read_again(tmp_path: Path) -> None:
    image = Image(np.random.default_rng(0).integers(0, 4096, (300, 4000)).astype(np.uint16), "tiff", 65535)
    write_strips(tmp_path / "a.tiff", image.rows(0, 1), 300, [image.rows(0, 200), image.rows(200, 300)])
    with TiffStrips(tmp_path / "a.tiff") as strips:
        np.testing.assert_array_equal(strips.rows(120, 300).pixels, image.pixels[120:])
    with tifffile.TiffFile(tmp_path / "a.tiff") as tiff:
        page: Any = tiff.pages[0]
        assert len(page.dataoffsets) == 3


def test_a_failure_halfway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tiff", Image(_pixels(), "tiff", 65535)
    path.write_bytes(b"before")

    def bands() -> Any:
        yield image.rows(0, 100)
        raise ImageError("undecodable", "the second half is damaged")

    with pytest.raises(ImageError, match="second half"):
        write_strips(path, image.rows(0, 1), HEIGHT, bands())
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rows", [HEIGHT - 1, HEIGHT + 1, 2 * HEIGHT])
def test_other_rows_than_announced_are_refused(tmp_path: Path, rows: int) -> None:
    image = Image(np.concatenate([_pixels()] * 2), "tiff", 65535)
    with pytest.raises((ImageError, RuntimeError, StopIteration)):
        write_strips(tmp_path / "a.tiff", image.rows(0, 1), HEIGHT, iter([image.rows(0, rows)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["plain", "plain strips", "deflate", "zstd tiles"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, layout: str) -> None:
    data = _write(tmp_path / "a.tiff", _pixels(), **LAYOUTS[layout]).read_bytes()
    for length in (0, 3, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "b.tiff").write_bytes(data[:length])
        assert _refusal(tmp_path / "b.tiff").code == "undecodable"


def _with_tag(path: Path, tag: str, value: int) -> None:
    data = path.read_bytes()
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        found = page.tags[tag]
    width = {3: 2, 4: 4}[int(found.dtype)]
    path.write_bytes(data[: found.valueoffset] + value.to_bytes(width, "little") + data[found.valueoffset + width :])


@pytest.mark.parametrize("layout", ["plain", "deflate", "zstd tiles"])
@pytest.mark.parametrize("tag", ["ImageLength", "ImageWidth"])
def test_a_small_file_that_claims_a_huge_image_is_refused(tmp_path: Path, layout: str, tag: str) -> None:
    path = _write(tmp_path / "a.tiff", _pixels(), **LAYOUTS[layout])
    _with_tag(path, tag, 65_535)
    assert _refusal(path).code in ("undecodable", "too_large")


def test_rows_packed_beyond_what_any_camera_gives_are_refused(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(64 * 20_000), 9)
    with tifffile.TiffWriter(tmp_path / "a.tiff") as writer:
        strips = iter([packed] * 100)
        writer.write(
            strips, shape=(6400, 20_000), dtype=np.uint8, compression="zlib", photometric="minisblack", rowsperstrip=64
        )
    with tifffile.TiffFile(tmp_path / "a.tiff") as tiff:
        page: Any = tiff.pages[0]
        counts = sum(page.databytecounts)
    assert 6400 * 20_000 / counts < 1100
    with TiffStrips(tmp_path / "a.tiff") as whole:
        assert not whole.rows(0, 64).pixels.any()
    _with_tag(tmp_path / "a.tiff", "ImageWidth", 60_000)
    assert _refusal(tmp_path / "a.tiff").code == "undecodable"


def test_one_packed_strip_too_large_to_hold_is_refused_with_the_remedy(tmp_path: Path) -> None:
    pixels = np.zeros((5000, 4000), np.uint8)
    _write(tmp_path / "a.tiff", pixels, compression="zlib", rowsperstrip=5000)
    error = _refusal(tmp_path / "a.tiff")
    assert error.code == "too_large" and "rowsperstrip" in str(error)


def test_the_pixel_limit_and_the_white_level_hold(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tiff", _pixels())
    assert _refusal(path, max_pixels=HEIGHT * WIDTH - 1).code == "too_large"
    assert _refusal(path, white_level=70_000).code == "over_white_level"
    error = _refusal(path, white_level=4095)
    assert error.code == "over_white_level" and str(_pixels().max()) in str(error)


REFUSED: dict[str, dict[str, Any]] = {
    "jpeg": {"compression": "jpeg"},
    "float": {"dtype": np.float32},
    "32 bits": {"dtype": np.uint32},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_restored_is_refused(tmp_path: Path, kind: str) -> None:
    options = dict(REFUSED[kind])
    path = _write(tmp_path / "a.tiff", _pixels(np.uint8).astype(options.pop("dtype", np.uint8)), **options)
    assert _refusal(path).code == "unsupported_mode"


def test_two_pages_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tiff") as writer:
        for _ in range(2):
            writer.write(_pixels(), contiguous=False)
    assert _refusal(tmp_path / "a.tiff").code == "unsupported_mode"


def test_what_is_no_tiff_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").write_bytes(imaging.encode(Image(_pixels(np.uint8))))
    assert _refusal(tmp_path / "a.tiff").code == "undecodable"
    with pytest.raises(StoreError, match="check the path"):
        TiffStrips(tmp_path / "b.tiff")


MASKS: dict[str, Any] = {
    "0 and 1": (lambda m: m.astype(np.uint8), {}),
    "16 bits": (lambda m: m.astype(np.uint16) * 7, {"compression": "zlib"}),
    "colour": (lambda m: np.where(m[..., None], [0, 0, 9], 0).astype(np.uint8), {}),
    "1 bit": (lambda m: m, {}),
    "white is 0": (lambda m: np.where(m, 0, 255).astype(np.uint8), {"photometric": "miniswhite"}),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_read_in_bands(tmp_path: Path, kind: str) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[40:90, 10:30] = True
    make, options = MASKS[kind]
    with TiffStrips(_write(tmp_path / "a.tiff", make(mask), **options)) as strips:
        np.testing.assert_array_equal(strips.mask_rows(30, 100), mask[30:100])
