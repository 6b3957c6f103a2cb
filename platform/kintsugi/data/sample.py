"""What the rest of kintsugi knows of one inspected part in one photograph."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kintsugi.errors import DataError
from kintsugi.imaging import Image, decode, decode_mask
from kintsugi.sections import Split

GOOD = "good"
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class RawSample:
    """Encoded bytes, as the files held them.

    `defect_type` is `good` for a defect-free image and `unlabelled` where nobody looked. `mask` is None
    where no file says where the defect is. `white_level` is None where the container's full scale is meant.
    `preset` names how the degraded image was made, None where nobody says.
    """

    sample_id: str
    part_id: str
    category: str
    defect_type: str
    split: Split | None
    clean: bytes
    mask: bytes | None
    degraded: bytes | None
    white_level: int | None = None
    preset: str | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """Decoded: `mask` is (H, W) bool, all False if there is none; `mask_known` tells whether that means anything."""

    sample_id: str
    part_id: str
    category: str
    defect_type: str
    clean: Image
    mask: NDArray[np.bool_]
    degraded: Image | None
    mask_known: bool = True
    preset: str | None = None


def decode_sample(raw: RawSample) -> Sample:
    """Decode the images and check that they belong together.

    Raises:
        ImageError: an image cannot be read.
        DataError: sizes, channels or depths differ, or the mask contradicts the defect type.
    """
    clean = decode(raw.clean, white_level=raw.white_level)
    degraded = None if raw.degraded is None else decode(raw.degraded, white_level=raw.white_level)
    if degraded is not None:
        _check_pair(clean, degraded)
    mask = np.zeros(clean.size, np.bool_) if raw.mask is None else decode_mask(raw.mask)
    if raw.mask is not None:
        _check_mask(mask, clean, raw.defect_type)
    known = raw.defect_type == GOOD or (raw.mask is not None and raw.defect_type != UNLABELLED)
    return Sample(raw.sample_id, raw.part_id, raw.category, raw.defect_type, clean, mask, degraded, known, raw.preset)


def _check_pair(clean: Image, degraded: Image) -> None:
    if clean.size != degraded.size:
        raise DataError(f"the clean image is {_px(clean.size)} but the degraded one {_px(degraded.size)}")
    if clean.channels != degraded.channels:
        raise DataError(f"the clean image has {clean.channels} channel(s) but the degraded one {degraded.channels}")
    if clean.bit_depth != degraded.bit_depth:
        raise DataError(f"the clean image has {clean.bit_depth} bits but the degraded one {degraded.bit_depth}")


def _check_mask(mask: NDArray[np.bool_], clean: Image, defect_type: str) -> None:
    if mask.shape != clean.size:
        raise DataError(f"the clean image is {_px(clean.size)} but its mask {_px((mask.shape[0], mask.shape[1]))}")
    if defect_type == GOOD and mask.any():
        raise DataError(f"it is labelled good but its mask marks {int(mask.sum())} px")
    if defect_type not in (GOOD, UNLABELLED) and not mask.any():
        raise DataError(f"it is labelled {defect_type} but its mask is empty")


def _px(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"
