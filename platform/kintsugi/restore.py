"""Restorer: the only way a model meets an image outside its training step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kintsugi.checkpoint import load_checkpoint, load_model
from kintsugi.config import ModelConfig
from kintsugi.errors import ImageError, KintsugiError
from kintsugi.imaging import Image
from kintsugi.metrics import structure
from kintsugi.models import RestorationUNet
from kintsugi.tiling import Tile, run_tiled

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RestoreSettings:
    """How an image passes the model.

    Images with a side above `tile` px are cut into tiles that share `overlap` px. An alarm is raised below
    `min_retention` or above `max_added`; the two limits are conventions, not calibrated on data.
    """

    tile: int = 1024
    overlap: int = 64
    min_retention: float = 0.5
    max_added: float = 0.05


@dataclass(frozen=True)
class Report:
    """What a restoration did to its input, told without a clean original (see `metrics.structure`)."""

    retention: float
    added: float
    alarm: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Restoration:
    """The restored image in its input's format, size, depth and colour mode, and its report."""

    image: Image
    report: Report


@dataclass
class Restorer:
    """A model in evaluation mode and the rules by which an image passes it.

    One call gives the same bytes as any other for the same image: on a CPU images of a batch pass the
    model one by one, since stacking changes the last bits there and gains nothing. On an accelerator
    images of one size are stacked.
    """

    model: RestorationUNet
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: RestoreSettings = field(default_factory=RestoreSettings)

    @classmethod
    def from_checkpoint(
        cls, path: Path, device: str | torch.device = "cpu", settings: RestoreSettings | None = None
    ) -> "Restorer":
        """Load and verify a checkpoint or a fetched model version.

        Raises:
            IntegrityError: a file differs from the folder's manifest.
        """
        model = load_model(load_checkpoint(path), device)
        return cls(model, torch.device(device), settings or RestoreSettings())

    def restore(self, image: Image, mask: Mask | None = None) -> Restoration:
        """Restore one image at its native size.

        Args:
            mask: (H, W), True on a known defect. Needed by a model with `mask: given`, welcome with
                `mask: optional`, without effect with `mask: none`.

        Raises:
            ImageError: the mask is missing or differs in size.
            KintsugiError: the model gave values that are not finite.
        """
        answer = self.restore_batch([image], [mask])[0]
        if isinstance(answer, KintsugiError):
            raise answer
        return answer

    def restore_batch(self, images: Sequence[Image], masks: Sequence[Mask | None]) -> list[Restoration | KintsugiError]:
        """Restore several images; what is wrong with one is its answer and does not touch the others."""
        answers: dict[int, Restoration | KintsugiError] = {}
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            problem = self._problem(image, mask)
            if problem is not None:
                answers[index] = problem
            else:
                alone = index if self.device.type == "cpu" else None
                groups.setdefault((image.pixels.shape, mask is None, alone), []).append(index)
        for members in groups.values():
            restored = self._run([images[i] for i in members], [masks[i] for i in members])
            answers |= {i: self._answer(images[i], unit) for i, unit in zip(members, restored, strict=True)}
        return [answers[index] for index in range(len(images))]

    @property
    def _config(self) -> ModelConfig:
        return self.model.config

    def _problem(self, image: Image, mask: Mask | None) -> ImageError | None:
        if mask is not None and mask.shape != image.size:
            height, width = image.size
            return ImageError(
                "mismatch",
                f"the mask is {mask.shape[1]} x {mask.shape[0]} px, the image {width} x {height}: give them one size",
            )
        if mask is None and self._config.mask == "given":
            return ImageError(
                "mask_required", "this model was trained with the defect mask as input: give the mask too"
            )
        return None

    @torch.inference_mode()
    def _run(self, images: Sequence[Image], masks: Sequence[Mask | None]) -> list[NDArray[np.float32]]:
        batch = torch.cat([self._to_planes(image) for image in images]).to(self.device)
        known = [m for m in masks if m is not None]
        mask = torch.from_numpy(np.stack(known)[:, None].astype(np.float32)).to(self.device) if known else None
        per_image = batch.shape[0] // len(images)
        if mask is not None:
            mask = mask.repeat_interleave(per_image, 0)
        restored = self._pass(batch, mask).cpu()
        return [
            _from_planes(restored[i * per_image : (i + 1) * per_image], image.channels)
            for i, image in enumerate(images)
        ]

    def _pass(self, batch: Tensor, mask: Tensor | None) -> Tensor:
        settings = self.settings

        def run(tile: Tile) -> Tensor:
            rows, columns = tile
            return self.model(batch[..., rows, columns], None if mask is None else mask[..., rows, columns])

        if max(batch.shape[-2:]) <= settings.tile:
            return run((slice(None), slice(None)))
        return run_tiled(run, batch, settings.tile, settings.overlap)

    def _to_planes(self, image: Image) -> Tensor:
        """(n, C, H, W) for a model of C channels: a colour image passes a grey model plane by plane."""
        unit = image.to_unit()
        planes = torch.from_numpy(unit[None] if unit.ndim == 2 else unit.transpose(2, 0, 1).copy())
        if self._config.channels == 1:
            return planes[:, None]
        return planes.expand(3, -1, -1)[None]

    def _answer(self, image: Image, unit: NDArray[np.float32]) -> Restoration | KintsugiError:
        if not np.isfinite(unit).all():
            return KintsugiError("the model gave values that are not finite: no image is answered; check the model")
        restored = image.with_unit(unit)
        found = structure(image.to_unit(), restored.to_unit())
        alarm = found.retention < self.settings.min_retention or found.added > self.settings.max_added
        return Restoration(restored, Report(found.retention, found.added, alarm))


def _from_planes(planes: Tensor, channels: int) -> NDArray[np.float32]:
    """Back to the image's own (H, W) or (H, W, 3); a grey image from a colour model is the planes' mean."""
    flat = planes.flatten(0, 1)
    return flat.mean(0).numpy() if channels == 1 else np.ascontiguousarray(flat.permute(1, 2, 0).numpy())
