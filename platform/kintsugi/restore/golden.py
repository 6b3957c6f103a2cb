"""A golden image: what a model made of a fixed probe when it was published; it must make the same of it in service."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import IntegrityError
from kintsugi.imaging import Image
from kintsugi.restore.restorer import Restorer

GOLDEN = "golden.png"
TOLERANCE = 1 / 255
"""Largest difference, of full scale, that is taken for another device's rounding."""
_SIZE = 64


def probe(channels: int) -> tuple[Image, NDArray[np.bool_]]:
    """A 16-bit ramp with grain, a dark scratch and a bright spot, and the mask of both."""
    noise = np.random.default_rng(0).normal(0, 0.03, (_SIZE, _SIZE, channels))
    ramp = np.linspace(0.2, 0.8, _SIZE)
    surface = np.add.outer(ramp / 2, ramp / 2)[..., None] + noise
    mask = np.zeros((_SIZE, _SIZE), dtype=np.bool_)
    mask[20:44, 30:33] = mask[50:55, 12:17] = True
    surface[20:44, 30:33] -= 0.25
    surface[50:55, 12:17] += 0.25
    pixels = np.rint(np.clip(surface, 0, 1) * 65535).astype(np.uint16)
    return Image(pixels[..., 0] if channels == 1 else pixels, "png", 65535), mask


def make_golden(restorer: Restorer) -> bytes | None:
    """The answer to the probe as a 16-bit PNG; None for a model whose channels fit no file.

    Raises:
        KintsugiError: the model does not restore.
    """
    channels = restorer.model.config.channels
    return imaging.encode(_answer(restorer, channels)) if channels in (1, 3) else None


def check_golden(restorer: Restorer, folder: Path) -> None:
    """Raise unless the model answers the probe as it did when the version in `folder` was published.

    A version without a golden image only has to answer.

    Raises:
        IntegrityError: the answer differs by more than `TOLERANCE`.
        KintsugiError: the model does not restore.
    """
    channels = restorer.model.config.channels
    if channels not in (1, 3):
        return
    answer = _answer(restorer, channels)
    path = folder / GOLDEN
    if not path.is_file():
        return
    golden = imaging.decode(path.read_bytes())
    if golden.pixels.shape != answer.pixels.shape:
        raise IntegrityError(f"the golden image has the shape {golden.pixels.shape}: publish the model again")
    difference = float(np.abs(golden.to_unit() - answer.to_unit()).max())
    if difference > TOLERANCE:
        raise IntegrityError(
            f"the model's answer to the golden image differs by {difference:.4f} of full scale from the one that was "
            "published: publish it again, or look at the device"
        )


def _answer(restorer: Restorer, channels: int) -> Image:
    image, mask = probe(channels)
    plain = replace(restorer, settings=replace(restorer.settings, abstain=False))
    return plain.restore(image, mask if restorer.model.config.mask != "none" else None).image
