"""Masks: all but black is defect, however they were saved."""

import io
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PillowImage

from kintsugi.errors import ImageError
from kintsugi.imaging import Image, decode_mask, encode, encode_mask

HEIGHT, WIDTH = 24, 31


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def _drawn_mask() -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:12, 8:20] = True
    return mask


def test_a_mask_comes_back_from_its_own_encoding() -> None:
    np.testing.assert_array_equal(decode_mask(encode_mask(_drawn_mask())), _drawn_mask())


MASKS = {
    "labels of 0 and 1": lambda m: encode(Image(m.astype(np.uint8))),
    "labels of 0 and 1 in 16 bits": lambda m: encode(Image(m.astype(np.uint16), "png", 65535)),
    "one colour for each defect": lambda m: encode(Image(np.where(m[..., None], [0, 0, 9], 0).astype(np.uint8))),
    "png of 1 bit": lambda m: _saved(PillowImage.fromarray(m), "PNG"),
    "png with a palette": lambda m: _saved(PillowImage.fromarray(m.astype(np.uint8) * 255).convert("P"), "PNG"),
    "png with opaque alpha": lambda m: _saved(PillowImage.fromarray(m.astype(np.uint8) * 255).convert("RGBA"), "PNG"),
    "bmp": lambda m: encode(Image(m.astype(np.uint8) * np.uint8(255), "bmp")),
    "bmp of 1 bit": lambda m: _saved(PillowImage.fromarray(m), "BMP"),
    "tiff": lambda m: _tiff(m.astype(np.uint8), photometric="minisblack"),
    "tiff of 1 bit": lambda m: _saved(PillowImage.fromarray(m), "TIFF"),
    "tiff of 1 bit, white is 0": lambda m: _tiff(~m, photometric="miniswhite"),
    "tiff of 8 bits, white is 0": lambda m: _tiff(np.where(m, 0, 255).astype(np.uint8), photometric="miniswhite"),
    "jpeg, which rings": lambda m: _saved(PillowImage.fromarray(m.astype(np.uint8) * 255), "JPEG", quality=60),
}


def _saved(picture: PillowImage.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", MASKS)
def test_all_but_black_is_defect_however_the_mask_was_saved(name: str) -> None:
    decoded = decode_mask(MASKS[name](_drawn_mask()))
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, _drawn_mask())


@pytest.mark.parametrize("data", [b"", b"not an image", encode_mask(np.ones((8, 8), bool))[:40]])
def test_a_mask_that_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_mask(data)
