"""A folder of real tiles with fixed degradations: `manifest.csv`, `<split>/{clean,degraded,mask}/` and `degrade.py`.

`degrade.py` is the folder's own, so that figures agree with those published for it. It offers
`degrade(clean, name, preset) -> (uint8 image, parameters)`, `motion_kernel(length, angle)` and `disk_kernel(radius)`.
"""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray
from quality_methods import Truth

from kintsugi.data.layouts import BadPair, check, read_unchecked
from kintsugi.data.sample import GOOD, RawSample, Sample
from kintsugi.errors import DataError
from kintsugi.imaging import Image, convert


@dataclass(frozen=True)
class Trial:
    """One image in one degradation."""

    sample: Sample
    degraded: Image
    truth: Truth

    @property
    def clean(self) -> Image:
        return self.sample.clean

    @property
    def good(self) -> bool:
        return self.sample.defect_type == GOOD


class Tiles:
    """The images of one split, read when they are asked for; a `Samples` of kintsugi.detection.segmenter."""

    def __init__(self, folder: Path, split: str, limit: int | None = None) -> None:
        self.folder = folder
        found = [raw for raw in read_unchecked("pairs", folder) if _right(raw).split == split]
        raws = [_right(raw) for raw in found]
        self.total = len(raws)
        wanted = min(limit or len(raws), len(raws))
        # Spread over the whole split, so that a shortened run meets every category.
        self.raws = [raws[i * len(raws) // wanted] for i in range(wanted)]

    def __len__(self) -> int:
        return len(self.raws)

    def sample(self, index: int) -> Sample:
        sample = check(self.raws[index])
        if isinstance(sample, BadPair):
            raise DataError(f"{sample.name}: {sample.reason}")
        return sample

    def trial(self, index: int, preset: str | None) -> Trial:
        """In its assigned preset (None), whose file is checked against `degrade.py`, or in another."""
        sample = self.sample(index)
        name = preset or sample.preset
        if name is None:
            raise DataError(f"{sample.sample_id} has no preset in {self.folder}/manifest.csv: add the column")
        pixels, parameters = self._degrade.degrade(sample.clean.to_unit(), sample.sample_id, name)
        degraded = convert(Image(np.asarray(pixels, np.uint8)), "png")
        if preset is None and sample.degraded is not None and (sample.degraded.pixels != degraded.pixels).any():
            raise DataError(f"{sample.sample_id}: the degraded file is not what degrade.py makes of the clean one")
        return Trial(sample, degraded, self._truth(parameters, sample))

    @cached_property
    def _degrade(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("tiles_degrade", self.folder / "degrade.py")
        if spec is None or spec.loader is None or not (self.folder / "degrade.py").is_file():
            raise DataError(f"{self.folder} holds no degrade.py: give a folder of tiles with their degradation")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _truth(self, p: dict[str, float], sample: Sample) -> Truth:
        kernel: NDArray[np.float32] | None = None
        if p["L"] > 1:
            kernel = self._degrade.motion_kernel(p["L"], p["ang"])
        if p["defocus"] > 0.4:
            disk = self._degrade.disk_kernel(p["defocus"])
            kernel = disk if kernel is None else _convolved(kernel, disk)
        light = float(sample.clean.to_unit().mean()) * p["gain"] + p["offset"]
        shot = light / p["peak"] if p["peak"] else 0.0
        return Truth(p["gain"], p["offset"], float(np.sqrt(p["sigma"] ** 2 + shot)), kernel)


def _convolved(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    return cv2.filter2D(np.pad(a, b.shape[0] // 2), -1, b, borderType=cv2.BORDER_CONSTANT)


def _right(raw: RawSample | BadPair) -> RawSample:
    if isinstance(raw, BadPair):
        raise DataError(f"{raw.name}: {raw.reason}")
    return raw
