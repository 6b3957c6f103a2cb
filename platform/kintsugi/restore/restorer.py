"""Restorer: the only way a model meets an image outside its training step.

Images of any size pass in bands of tiles; what comes out does not depend on how they were cut. Only a band is
held as floats, and `restore_strips` never holds more than a band at all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kintsugi.checkpoint import load_checkpoint, load_model
from kintsugi.errors import ConfigError, ImageError, KintsugiError, ModelNotFound
from kintsugi.imaging import Image, check_pixels
from kintsugi.models import Prediction, RestorationUNet
from kintsugi.restore.inference import Rows, Stop, TiledModel
from kintsugi.restore.sources import Mask, MaskSource, RowSource, WholeMask
from kintsugi.restore.tiling import POSES, Ensemble, cores, windows
from kintsugi.trust.judge import abstain_reason
from kintsugi.trust.report import Audit, Calibration, Report, read_calibration, untouched

Map = NDArray[np.float32]
Array = TypeVar("Array", bound=NDArray[Any])


@dataclass(frozen=True)
class RestoreSettings:
    """How an image passes the model.

    Attributes:
        tile: px of a tile's core; changes memory and time, not the result.
        halo: px that a tile sees around its core; by default as far as the model's config reaches.
        ensemble: also restore the image flipped (4 poses) or flipped and turned (8), and take the mean.
        window: px. A model that pools over its whole input does so up to this size; of larger images it gets
            the mean over windows of this size.
        abstain: leave images alone that are clean already, or unlike those that the model was trained on.
    """

    tile: int = 512
    halo: int | None = None
    ensemble: Ensemble = "none"
    window: int = 512
    abstain: bool = True

    def __post_init__(self) -> None:
        for name, value in (("tile", self.tile), ("window", self.window), ("halo", self.halo or 1)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1 px (got {value})")
        if self.ensemble not in POSES:
            raise ConfigError(f"ensemble must be one of {', '.join(POSES)} (got {self.ensemble})")


@dataclass(frozen=True)
class Restoration:
    """The restored image in its input's format, size, depth and colour mode, and what is said of it.

    Attributes:
        defect_map: (H, W), probability of a defect, of models that predict it.
        error_bound: (H, W), bound of the absolute error, of full scale, of models that predict it.

    Of a colour image that passed a grey model both hold the largest value of its planes. An image that was left
    alone has neither.
    """

    image: Image
    report: Report
    defect_map: Map | None = None
    error_bound: Map | None = None


@dataclass(frozen=True)
class Band:
    """Restored rows of one image, with the rows that they came from."""

    rows: slice
    source: Image
    image: Image
    defect_map: Map | None = None
    error_bound: Map | None = None


@dataclass
class Restorer:
    """A model in evaluation mode and the rules by which an image passes it.

    One call gives the same bytes as any other for the same image and number of threads: on a CPU images of a
    batch pass the model one by one, since stacking changes the last bits there and gains nothing. On an
    accelerator images of one size are stacked, and equal up to the rounding of float32.
    """

    model: RestorationUNet
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: RestoreSettings = field(default_factory=RestoreSettings)
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def from_checkpoint(
        cls, path: Path | None = None, device: str | torch.device = "cpu", settings: RestoreSettings | None = None
    ) -> "Restorer":
        """Load and verify a checkpoint, a fetched model version, or by default the weights that are shipped.

        Raises:
            IntegrityError: a file differs from the folder's manifest.
            ModelNotFound: no path, and no weights were shipped.
        """
        checkpoint = load_checkpoint(path or shipped_weights())
        model = load_model(checkpoint, device)
        if torch.device(device).type == "cpu":
            # Convolutions are about a quarter faster with channels last.
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return cls(model, torch.device(device), settings or RestoreSettings(), read_calibration(checkpoint.folder))

    def restore(self, image: Image, mask: Mask | None = None) -> Restoration:
        """Restore one image at its native size.

        Args:
            mask: (H, W), True on a known defect. Needed by a model with `mask: given`, welcome with
                `mask: optional` and `mask: predicted`, without effect with `mask: none`.

        Raises:
            ImageError: the mask is missing or differs in size; the image has other channels than the model, or
                holds floats, or values above its white level.
            KintsugiError: the model gave values that are not finite.
        """
        answer = self.restore_batch([image], [mask])[0]
        if isinstance(answer, KintsugiError):
            raise answer
        return answer

    def restore_batch(
        self, images: Sequence[Image], masks: Sequence[Mask | None], *, stop: Stop = lambda: False
    ) -> list[Restoration | KintsugiError]:
        """Restore several images; what is wrong with one is its answer and does not touch the others.

        Raises:
            Abandoned: `stop` said that nobody waits for them any more.
        """
        answers: dict[int, Restoration | KintsugiError] = {}
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            early = self._without_model(image, mask)
            if early is not None:
                answers[index] = early
            else:
                alone = index if self.device.type == "cpu" else None
                groups.setdefault((image.pixels.shape, mask is None, alone), []).append(index)
        for members in groups.values():
            canvases = [_Canvas(images[i], Audit(images[i].size, self.calibration.limits)) for i in members]
            shown = [_whole(masks[i]) for i in members]
            for parts in self._bands([images[i] for i in members], shown, stop):
                for canvas, part in zip(canvases, parts, strict=True):
                    canvas.paint(part)
            answers |= {i: canvas.answer() for i, canvas in zip(members, canvases, strict=True)}
        return [answers[index] for index in range(len(images))]

    def restore_strips(
        self,
        source: RowSource,
        write: Callable[[Iterator[Image]], None],
        mask: MaskSource | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        maps: Callable[[Band], None] | None = None,
        stop: Stop = lambda: False,
    ) -> Report:
        """Restore an image band by band, with memory that does not grow with its height.

        The pixels and the report are those of `restore`.

        Args:
            write: takes the restored bands from top to bottom, and keeps them only if the iterator ends in peace.
            progress: called after each band with the rows that are done and all rows.
            maps: called with each band, for its defect map and error bound.

        Raises:
            ImageError, KintsugiError: as `restore`, perhaps only after some bands.
            Abandoned: `stop` said that nobody waits for it any more.
        """
        problem = self._problem(source, mask)
        if problem is not None:
            raise problem
        reason = self._abstains(source)
        audit = Audit(source.size, self.calibration.limits)

        def restored() -> Iterator[Image]:
            for band in self._strips(source, mask, stop) if reason is None else self._copied(source):
                audit.add(band.source, band.image, band.error_bound)
                if maps is not None:
                    maps(band)
                yield band.image
                done = band.rows.stop
                del band  # The next one is made before the loop would let go of it.
                if progress is not None:
                    progress(done, source.size[0])

        write(restored())
        return untouched(reason) if reason else audit.report()

    def _strips(self, source: RowSource, mask: MaskSource | None, stop: Stop) -> Iterator[Band]:
        return map(_only, self._bands([source], [mask], stop))

    def _copied(self, source: RowSource) -> Iterator[Band]:
        for rows in cores(source.size[0], self.settings.tile, 1):
            band = source.rows(rows.start, rows.stop)
            yield Band(rows, band, band)

    def _without_model(self, image: Image, mask: Mask | None) -> Restoration | KintsugiError | None:
        """What can be answered of an image before the model sees it."""
        if mask is not None and mask.ndim != 2:
            return ImageError("mismatch", f"the mask has the shape {mask.shape}: give (height, width)")
        try:
            check_pixels(image)
        except ImageError as error:
            return error
        problem = self._problem(image, _whole(mask))
        if problem is not None:
            return problem
        reason = self._abstains(image)
        return Restoration(image, untouched(reason)) if reason else None

    def _problem(self, image: RowSource, mask: MaskSource | None) -> ImageError | None:
        config = self.model.config
        if mask is not None and mask.size != image.size:
            (height, width), (mask_height, mask_width) = image.size, mask.size
            return ImageError(
                "mismatch",
                f"the mask is {mask_width} x {mask_height} px, the image {width} x {height}: give them one size",
            )
        if mask is None and config.mask == "given":
            return ImageError(
                "mask_required", "this model was trained with the defect mask as input: give the mask too"
            )
        # Grey is a colour image with equal planes; a grey model takes planes one by one.
        if config.channels not in (1, image.channels) and (image.channels, config.channels) != (1, 3):
            return ImageError(
                "mismatch",
                f"the image has {image.channels} channels and the model {config.channels}: give an image of "
                f"{config.channels}, or take a model of 1 channel, which restores planes one by one",
            )
        return None

    def _abstains(self, source: RowSource) -> str | None:
        """Why the image is left alone; of a large one every window must have a reason."""
        profile = self.calibration.profile
        if profile is None or not self.settings.abstain:
            return None
        reasons: list[str] = []
        for rows in windows(source.size[0], 1024, 1):
            band = source.rows(rows.start, rows.stop)
            for columns in windows(source.size[1], 1024, 1):
                reason = abstain_reason(replace(band, pixels=band.pixels[:, columns]).to_unit(), profile)
                if reason is None:
                    return None
                reasons.append(reason)
        return reasons[0]

    def _bands(
        self, sources: Sequence[RowSource], masks: Sequence[MaskSource | None], stop: Stop
    ) -> Iterator[list[Band | KintsugiError]]:
        """Restored bands of images of one size and mode, or what is wrong with them."""
        settings = self.settings
        tiled = TiledModel(
            self.model, self.device, settings.tile, settings.halo, settings.ensemble, settings.window, stop
        )

        def read(rows: slice) -> Rows:
            planes = [self._to_planes(source.rows(rows.start, rows.stop)) for source in sources]
            known = [_to_plane(mask, rows).expand(len(planes[0]), -1, -1, -1) for mask in masks if mask is not None]
            return _batch(planes), _batch(known) if known else None

        def answered(rows: slice, answer: Prediction) -> list[Band | KintsugiError]:
            shares = [[None] * len(sources) if part is None else part.chunk(len(sources)) for part in answer]
            found = [Prediction(*parts) for parts in zip(*shares, strict=True)]
            return [self._band(source, rows, part) for source, part in zip(sources, found, strict=True)]

        # Not a generator, whose frame would hold one answer until the next is made.
        return starmap(answered, tiled.bands(read, sources[0].size))

    def _to_planes(self, image: Image) -> Tensor:
        """(n, C, rows, W) for a model of C channels: a colour image passes a grey model plane by plane."""
        unit = image.to_unit()
        planes = torch.from_numpy(unit[None] if unit.ndim == 2 else unit.transpose(2, 0, 1).copy())
        channels = self.model.config.channels
        return planes[:, None] if channels == 1 else planes.expand(channels, -1, -1)[None]

    def _band(self, source: RowSource, rows: slice, answer: Prediction) -> Band | KintsugiError:
        band = source.rows(rows.start, rows.stop)
        if not all(part is None or _is_finite(part) for part in answer):
            return KintsugiError(
                "the model gave values that are not finite: no image is answered; check the model's weights"
            )
        bound = _over_planes(answer.error)
        return Band(
            rows,
            band,
            band.with_unit(_from_planes(answer.image, band)),
            _over_planes(answer.defect),
            None if bound is None else bound * np.float32(self.calibration.error_scale),
        )


def shipped_weights() -> Path:
    """The checkpoint folder of the model that comes with the package.

    Raises:
        ModelNotFound: this installation has none.
    """
    folder = Path(str(resources.files("kintsugi").joinpath("weights", "light")))
    if not folder.is_dir():
        raise ModelNotFound(
            "this installation comes without weights: name a checkpoint folder or a published model with --model"
        )
    return folder


def _whole(mask: Mask | None) -> MaskSource | None:
    return None if mask is None else WholeMask(mask)


@dataclass
class _Canvas:
    """Where the bands of one image come together."""

    source: Image
    audit: Audit
    bands: list[Band] = field(default_factory=list)
    problem: KintsugiError | None = None

    def paint(self, part: Band | KintsugiError) -> None:
        if isinstance(part, KintsugiError):
            self.problem = self.problem or part
        elif self.problem is None:
            self.bands.append(part)
            self.audit.add(part.source, part.image, part.error_bound)

    def answer(self) -> Restoration | KintsugiError:
        if self.problem is not None:
            return self.problem
        pixels = _stacked([band.image.pixels for band in self.bands])
        assert pixels is not None
        return Restoration(
            replace(self.source, pixels=pixels),
            self.audit.report(),
            _stacked([band.defect_map for band in self.bands]),
            _stacked([band.error_bound for band in self.bands]),
        )


def _stacked(parts: Sequence[Array | None]) -> Array | None:
    known = [part for part in parts if part is not None]
    return None if not known else known[0] if len(known) == 1 else cast(Array, np.concatenate(known))


def _only(parts: list[Band | KintsugiError]) -> Band:
    """The band of a batch of one image."""
    if isinstance(parts[0], KintsugiError):
        raise parts[0]
    return parts[0]


def _batch(planes: Sequence[Tensor]) -> Tensor:
    return planes[0] if len(planes) == 1 else torch.cat(list(planes))


def _is_finite(part: Tensor) -> bool:
    """By its extremes, which are NaN where any value is: `isfinite` would copy all of it."""
    return bool(torch.stack(part.aminmax()).isfinite().all())


def _to_plane(mask: MaskSource, rows: slice) -> Tensor:
    return torch.from_numpy(mask.mask_rows(rows.start, rows.stop).astype(np.float32))[None, None]


def _from_planes(planes: Tensor, like: Image) -> Map:
    """Back to (rows, W) or (rows, W, C); a grey image from a colour model is the planes' mean."""
    flat = planes.flatten(0, 1)
    if like.pixels.ndim == 2:
        return (flat[0] if len(flat) == 1 else flat.mean(0)).numpy()
    return np.ascontiguousarray(flat.permute(1, 2, 0).numpy())


def _over_planes(part: Tensor | None) -> Map | None:
    """(rows, W): the largest value of the planes."""
    if part is None:
        return None
    flat = part.flatten(0, 1)
    return (flat[0] if len(flat) == 1 else flat.amax(0)).numpy()
