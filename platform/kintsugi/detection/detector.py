"""Detectors: what finds the defects in an image, ours or the user's own.

A detector maps an image to a score of a defect at each pixel. Ours is a small segmenter trained on clean images
(`train_detector`); any other is named as `package.module:attribute` (`load_detector`). Use it as

    detector = load_detector("inspection.models:find_scratches")
    maps = [defect_map(detector, image) for image in images]

and compare the maps of clean, degraded and restored images with `measure_detectability`.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from kintsugi.data.dataset import SplitReader, open_split
from kintsugi.detection.detectability import Map
from kintsugi.detection.segmenter import Segmenter, SegmenterCard, clean_average_precision, train_detector
from kintsugi.errors import ConfigError, DataError
from kintsugi.imaging import Image
from kintsugi.storage import ObjectStore


@runtime_checkable
class Detector(Protocol):
    """Anything that scores the pixels of one image, whatever it is made of.

    `__call__` takes an `Image` of any size, depth and colour mode and answers (H, W) float32 in [0, 1], higher
    where a defect is likelier. It must not depend on images seen before.
    """

    def __call__(self, image: Image) -> Map: ...


def load_detector(spec: str | Path) -> Detector:
    """A detector by name.

    Args:
        spec: a folder that `Segmenter.save` wrote, or `package.module:attribute`. The attribute is a function
            `(Image) -> (H, W) float32`, an object with such a `__call__`, or a class of such objects that is
            made without arguments.

    Raises:
        ConfigError: nothing answers to that name.
        IntegrityError: the folder is damaged.
    """
    if isinstance(spec, Path) or ":" not in spec or Path(spec).is_dir():
        if not Path(spec).is_dir():
            raise ConfigError(f"there is no detector '{spec}': give a detector's folder, or package.module:attribute")
        return Segmenter.load(Path(spec))
    module, _, attribute = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the detector '{spec}' cannot be imported ({error}): install it, or put it on PYTHONPATH"
        ) from error
    made = found() if inspect.isclass(found) else found
    if not isinstance(made, Detector):
        raise ConfigError(f"the detector '{spec}' cannot be called: name a function of an Image")
    return made


def defect_map(detector: Detector, image: Image) -> Map:
    """The detector's map, checked.

    Raises:
        DataError: it is not of the image's size, or leaves [0, 1].
    """
    scores = np.asarray(detector(image), np.float32)
    if scores.shape != image.size:
        raise DataError(f"the detector answered {scores.shape} for an image of {image.size}: answer one score a pixel")
    if not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise DataError("the detector's scores leave [0, 1]: map them into it, e.g. by a sigmoid")
    return scores


def build_detector(
    store: ObjectStore,
    ref: str,
    folder: Path,
    *,
    steps: int = 5000,
    seed: int = 0,
    vary_grain: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> SegmenterCard:
    """Train our segmenter on a dataset's train split, measure it on val and, where there is one, on test, and save it.

    Args:
        ref: `name` or `name@digest`.
        folder: for `load_detector`.
        vary_grain: see `train_detector`.
        progress: called with the step and its loss.

    Raises:
        DataError: no such dataset, no val split, or no image of train with a known defect.
    """
    train, val = open_split(store, ref, "train"), open_split(store, ref, "val")
    trained = train_detector(
        train, val, steps=steps, seed=seed, trained_on=f"{ref}, digest {train.digest[:12]}", vary_grain=vary_grain,
        progress=progress,
    )  # fmt: skip
    found = clean_average_precision(trained, test) if (test := _test_split(store, ref)) is not None else None
    card = trained.card.model_copy(update={"test_average_precision": found})
    Segmenter(trained.net, card).save(folder)
    return card


def _test_split(store: ObjectStore, ref: str) -> SplitReader | None:
    try:
        return open_split(store, ref, "test")
    except DataError:
        return None  # small datasets have none
