import numpy as np
import pytest

from kintsugi.data.sample import RawSample, decode_sample
from kintsugi.errors import DataError
from kintsugi.imaging import Image, encode, encode_mask


def raw(
    clean: Image, *, degraded: Image | None = None, mask: np.ndarray | None = None, kind: str = "good"
) -> RawSample:
    return RawSample(
        "a",
        "a",
        "steel",
        kind,
        None,
        encode(clean),
        None if mask is None else encode_mask(mask),
        None if degraded is None else encode(degraded),
    )


def grey(height: int = 8, width: int = 10, kind: type[np.unsignedinteger] = np.uint8) -> Image:
    level = int(np.iinfo(kind).max)
    return Image(np.full((height, width), level // 2, kind), "png", level)


def test_a_good_sample_without_a_mask_has_a_known_empty_one() -> None:
    sample = decode_sample(raw(grey()))
    assert sample.mask.shape == (8, 10) and not sample.mask.any() and sample.mask_known


def test_the_mask_of_an_unlabelled_sample_is_not_known_even_if_a_file_is_there() -> None:
    assert not decode_sample(raw(grey(), kind="unlabelled")).mask_known
    assert not decode_sample(raw(grey(), mask=np.zeros((8, 10), bool), kind="unlabelled")).mask_known


def test_a_defect_without_a_mask_file_is_not_taken_for_defect_free() -> None:
    assert not decode_sample(raw(grey(), kind="crack")).mask_known


@pytest.mark.parametrize(
    ("degraded", "reason"),
    [
        (grey(9, 10), "10 x 8 px but the degraded one 10 x 9 px"),
        (grey(kind=np.uint16), "8 bits but the degraded one 16"),
        (Image(np.zeros((8, 10, 3), np.uint8)), "1 channel"),
    ],
)
def test_a_degraded_image_of_another_kind_is_refused(degraded: Image, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_sample(raw(grey(), degraded=degraded))


def test_a_mask_that_contradicts_the_label_is_refused() -> None:
    with pytest.raises(DataError, match="labelled good but its mask marks 80 px"):
        decode_sample(raw(grey(), mask=np.ones((8, 10), bool)))
    with pytest.raises(DataError, match="labelled crack but its mask is empty"):
        decode_sample(raw(grey(), mask=np.zeros((8, 10), bool), kind="crack"))


def test_the_white_level_scales_both_images() -> None:
    twelve_bits = Image(np.full((4, 4), 4095, np.uint16), "png", 4095)
    sample = decode_sample(
        RawSample("a", "a", "x", "good", None, encode(twelve_bits), None, encode(twelve_bits), white_level=4095)
    )
    assert sample.degraded is not None
    assert sample.clean.to_unit().max() == sample.degraded.to_unit().max() == 1.0
