"""A small defect segmenter, trained on clean images, for judging restorations.

Fully convolutional, grey, any size. It is no product of its own: its card says how well it finds the defects of
clean images, and no figure made with it means more than that one.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kintsugi.data.degradation import generator_for
from kintsugi.data.sample import Sample
from kintsugi.detection.detectability import Map, Mask, average_precision
from kintsugi.errors import DataError, IntegrityError
from kintsugi.imaging import Image
from kintsugi.manifest import MANIFEST, Manifest, check_file, make_manifest
from kintsugi.storage import write_atomically

WEIGHTS, CARD = "weights.safetensors", "card.json"
KIND = "detector"
STRIDE = 16
"""Sides are padded to a multiple of this."""
_CELL = 2
"""Pixels of a square this wide are channels of one place, which costs no detail and a fraction of the time."""
_TILE, _CONTEXT = 1536, 160
Unit = NDArray[np.float32]


class Samples(Protocol):
    """Clean images with masks by number, as `SplitReader` gives them."""

    def __len__(self) -> int: ...
    def sample(self, index: int) -> Sample: ...


class SegmenterCard(BaseModel):
    """How a segmenter came to be, and its average precision over the pixels of clean images it never saw."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    width: int
    steps: int
    seed: int
    crop: int
    batch: int
    train_images: int
    train_defect_images: int
    val_images: int
    val_average_precision: float | None
    test_average_precision: float | None = None
    trained_on: str = ""
    vary_grain: bool = False


class SegmenterNet(nn.Module):
    """A U-Net of plain residual blocks at 1/2 to 1/16 of the size; logits of a defect, (N, 1, H, W).

    Plain 3x3 convolutions in channels_last are what a CPU is fastest at; BatchNorm folds to nothing at test time.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, width * 5 // 4, width * 3 // 2, width * 3 // 2]
        self.stem = nn.Conv2d(_CELL**2, width, 3, padding=1)
        self.encoders = nn.ModuleList(_Block(w) for w in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.decoders = nn.ModuleList(_Block(w) for w in widths[:-1])
        self.middle = _Block(widths[-1])
        self.head = nn.Conv2d(width, _CELL**2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(image, _CELL).contiguous(memory_format=torch.channels_last))
        skips: list[Tensor] = []
        for encoder, down in zip(self.encoders, self.downs, strict=False):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle(self.encoders[-1](x))
        for up, decoder, skip in zip(reversed(self.ups), reversed(self.decoders), reversed(skips), strict=True):
            x = decoder(skip + F.interpolate(up(x), scale_factor=2.0, mode="bilinear"))
        return F.pixel_shuffle(self.head(x), _CELL)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@dataclass
class Segmenter:
    """A trained net; a `Detector`. Exposure does not matter: each image is brought to mean 0 and deviation 1."""

    net: SegmenterNet
    card: SegmenterCard

    @torch.inference_mode()
    def __call__(self, image: Image) -> Map:
        """(H, W) in [0, 1]. An image above 1536 px is cut into tiles that see 160 px around them."""
        unit = normalised(image)
        scores = np.empty_like(unit)
        for rows in _pieces(unit.shape[0]):
            for columns in _pieces(unit.shape[1]):
                scores[rows, columns] = self._tile(unit, rows, columns)
        return scores

    def _tile(self, unit: Unit, rows: slice, columns: slice) -> Map:
        around = [
            slice(max(s.start - _CONTEXT, 0), min(s.stop + _CONTEXT, side))
            for s, side in zip((rows, columns), unit.shape, strict=True)
        ]
        seen = unit[around[0], around[1]]
        padded = np.pad(seen, [(0, -side % STRIDE) for side in seen.shape], mode="reflect")
        scores = torch.sigmoid(self.net.eval()(torch.from_numpy(padded)[None, None]))[0, 0].numpy()
        top, left = rows.start - around[0].start, columns.start - around[1].start
        return scores[top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]

    def save(self, folder: Path) -> Manifest:
        """Write the folder, weights in half precision; the manifest comes last: a torn folder is never used."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.net.state_dict().items()
        }
        save_file(weights, folder / WEIGHTS)
        (folder / CARD).write_text(self.card.model_dump_json(indent=1) + "\n")
        manifest = make_manifest(folder, KIND)
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest

    @classmethod
    def load(cls, folder: Path) -> "Segmenter":
        """Verify a folder against its manifest and read it.

        Raises:
            IntegrityError: no manifest, a file that differs from it, or weights of another net.
        """
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise IntegrityError(f"{folder} has no readable {MANIFEST}: it is no finished detector") from error
        for name, entry in manifest.files.items():
            check_file(folder / name, entry, str(folder / name))
        if manifest.kind != KIND or {WEIGHTS, CARD} - manifest.files.keys():
            raise IntegrityError(f"{folder} is a {manifest.kind}, no detector: give a folder that 'save' wrote")
        card = SegmenterCard.model_validate(json.loads((folder / CARD).read_text()))
        net = SegmenterNet(card.width)
        try:
            net.load_state_dict(load_file(folder / WEIGHTS))
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(
                f"{folder}: the weights do not fit the detector of its card: train it again"
            ) from error
        return cls(net.to(memory_format=torch.channels_last).eval(), card)


def train_detector(
    samples: Samples,
    val_samples: Samples,
    *,
    steps: int = 5000,
    seed: int = 0,
    width: int = 32,
    crop: int = 256,
    batch: int = 4,
    learning_rate: float = 2e-3,
    trained_on: str = "",
    vary_grain: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Segmenter:
    """Train on the clean images of one split, measure on the clean images of another.

    Half of the crops lie on a defect, each defect image as likely as any other. Images that nobody labelled are
    left out. Every second step sees 4 times as many crops of half the side: small defects are lost in large crops,
    large ones need them.

    Args:
        crop: px, a multiple of 32; smaller images are mirrored at their border.
        trained_on: for the card, in words.
        vary_grain: soften three crops of five or add noise: a detector that only ever saw one camera's grain may take
            the smoothness of a denoised surface for a defect. It then finds fewer defects in clean images.
        progress: called with the step and its loss.

    Raises:
        DataError: no image has a defect to learn from.
    """
    crops = _Crops(samples, seed, vary_grain)
    if crop % (2 * STRIDE):
        raise DataError(f"a crop of {crop} px does not fit the detector: use a multiple of {2 * STRIDE}")
    torch.manual_seed(seed)
    net = SegmenterNet(width).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        image, mask = crops.batch(step, *((crop, batch) if step % 2 else (crop // 2, 4 * batch)))
        loss = segmentation_loss(net(image), mask)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    card = SegmenterCard(
        width=width, steps=steps, seed=seed, crop=crop, batch=batch, train_images=len(crops.known),
        train_defect_images=len(crops.defective), val_images=len(val_samples), val_average_precision=None,
        trained_on=trained_on, vary_grain=vary_grain,
    )  # fmt: skip
    # Half precision is what 'save' writes: measured is what will be loaded.
    trained = Segmenter(net.eval().half().float(), card)
    found = clean_average_precision(trained, val_samples)
    return Segmenter(trained.net, card.model_copy(update={"val_average_precision": found}))


def clean_average_precision(detector: Callable[[Image], Map], samples: Samples) -> float | None:
    """Average precision over the pixels of the labelled clean images; None where none has a defect."""
    maps: list[Map] = []
    masks: list[Mask] = []
    for index in range(len(samples)):
        sample = samples.sample(index)
        if sample.mask_known:
            maps.append(detector(sample.clean))
            masks.append(sample.mask)
    value = average_precision(maps, masks)
    return value if math.isfinite(value) else None


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """BCE plus half the soft Dice of each image by itself, so that small defects count; both (N, 1, H, W).

    The BCE is not balanced: scores that are probabilities can be compared between images, as average precision does.
    """
    likelihood = F.binary_cross_entropy_with_logits(logits, mask)
    score, truth = torch.sigmoid(logits).flatten(1), mask.flatten(1)
    missed = 1 - (2 * (score * truth).sum(1) + 1) / (score.sum(1) + truth.sum(1) + 1)
    # Without a defect nothing can be missed: there, Dice is near 1 whatever the scores, and teaches nothing.
    defective = truth.amax(1)
    return likelihood + 0.5 * (missed * defective).sum() / defective.sum().clamp_min(1)


def normalised(image: Image) -> Unit:
    """(H, W) grey of mean 0 and deviation 1; all 0 for a constant image."""
    unit = image.to_unit()
    grey = unit if unit.ndim == 2 else unit.mean(axis=2, dtype=np.float32)
    return ((grey - grey.mean()) / max(float(grey.std()), 1e-3)).astype(np.float32)


class _Crops:
    """Batches that follow from (seed, step) alone."""

    def __init__(self, samples: Samples, seed: int, vary_grain: bool) -> None:
        self.samples, self.seed, self.vary_grain = samples, seed, vary_grain
        self.known: list[int] = []
        self.defective: list[int] = []
        for index in range(len(samples)):
            sample = samples.sample(index)
            if sample.mask_known:
                self.known.append(index)
                if sample.mask.any():
                    self.defective.append(index)
        if not self.defective:
            raise DataError("no image has a known defect: a detector needs masks to learn from")

    def batch(self, step: int, side: int, count: int) -> tuple[Tensor, Tensor]:
        """(count, 1, side, side) images and masks."""
        pairs = [self._crop(generator_for(self.seed, "detector", step, place), side) for place in range(count)]
        image, mask = (torch.from_numpy(np.stack(planes)[:, None]) for planes in zip(*pairs, strict=True))
        return image, mask

    def _crop(self, generator: np.random.Generator, side: int) -> tuple[Unit, Unit]:
        on_defect = generator.random() < 0.5
        sample = self.samples.sample(int(generator.choice(self.defective if on_defect else self.known)))
        image, mask = normalised(sample.clean), sample.mask.astype(np.float32)
        padding = [(max(0, side - length),) * 2 for length in image.shape]
        image, mask = (np.pad(plane, padding, mode="reflect") for plane in (image, mask))
        top, left = _corner(mask, side, on_defect, generator)
        places = (slice(top, top + side), slice(left, left + side))
        # No quarter turns: parts lie the same way in front of a camera.
        flips = tuple(slice(None, None, 1 - 2 * int(flip)) for flip in generator.integers(2, size=2))
        gain, offset = np.exp(generator.uniform(-0.35, 0.35)), generator.uniform(-0.4, 0.4)
        image = (image[places] * gain + offset).astype(np.float32)
        if self.vary_grain:
            image = _varied(image, generator)
        return image[flips].copy(), mask[places][flips].copy()


def _varied(image: Unit, generator: np.random.Generator) -> Unit:
    """Three crops of five with other grain: softened, its edges kept or not, or noisier."""
    kind = generator.integers(5)
    if kind == 0:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), generator.uniform(0.4, 1.5)), np.float32)
    if kind == 1:
        return np.asarray(cv2.bilateralFilter(image, 7, generator.uniform(0.2, 1.2), 2.0), np.float32)
    if kind == 2:
        noise = generator.standard_normal(image.shape, np.float32)
        return (image + generator.uniform(0, 0.2) * noise).astype(np.float32)
    return image


def _corner(mask: Unit, size: int, on_defect: bool, generator: np.random.Generator) -> tuple[int, int]:
    corner: list[int] = []
    pixel = generator.choice(np.argwhere(mask)) if on_defect else None
    for axis, side in enumerate(mask.shape):
        low, high = 0, side - size
        if pixel is not None:
            low, high = max(0, int(pixel[axis]) - size + 1), min(side - size, int(pixel[axis]))
        corner.append(int(generator.integers(low, high, endpoint=True)))
    return corner[0], corner[1]


def _pieces(side: int) -> list[slice]:
    count = max(1, math.ceil(side / _TILE))
    step = math.ceil(math.ceil(side / count) / STRIDE) * STRIDE
    return [slice(start, min(start + step, side)) for start in range(0, side, step)]
