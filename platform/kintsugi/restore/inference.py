"""Run a model over a batch of any size in bands of tiles; the answer does not depend on the tiles."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from kintsugi.errors import Abandoned
from kintsugi.models import Prediction, RestorationUNet
from kintsugi.restore.pooling import Statistics, fixed, measure, watch
from kintsugi.restore.tiling import POSES, Ensemble, Pose, context, cores, inside, windows
from kintsugi.sections import ModelConfig

Rows = tuple[Tensor, Tensor | None]
"""(N, C, rows, W) in [0, 1] and, where it is known, the defect mask (N, 1, rows, W)."""
Read = Callable[[slice], Rows]
Stop = Callable[[], bool]
"""Whether the work can be given up; asked before each tile."""
_Posed = tuple[Pose, Statistics]


def reach(config: ModelConfig) -> int:
    """How far, in px, surroundings change a restored value by anything to speak of.

    Measured on networks with random weights and a correction of 0.1 rms, with surroundings of noise and of nothing:
    at this distance values differ by 0 to 0.2 of 255 levels. What a network could see reaches further.
    """
    return max(64, 8 * 2**config.levels) + (config.attention_window or 0)


@dataclass(frozen=True)
class TiledModel:
    """A model and how large images pass it; see `RestoreSettings` for the settings."""

    model: RestorationUNet
    device: torch.device
    tile: int
    halo: int | None
    ensemble: Ensemble
    window: int
    stop: Stop = lambda: False

    def bands(self, read: Read, size: tuple[int, int]) -> Iterator[tuple[slice, Prediction]]:
        """Rows of the answer, from top to bottom: `defect` as probabilities, everything on the CPU.

        Args:
            read: gives any rows of the batch.
            size: (height, width) of the batch.

        Raises:
            Abandoned: `stop` said so.
        """
        poses = [(pose, self._pooled(read, size, pose)) for pose in POSES[self.ensemble]]
        for rows in cores(size[0], self.tile, self._grid[0]):
            yield rows, self._band(read, size, rows, poses)

    def _band(self, read: Read, size: tuple[int, int], rows: slice, poses: Sequence[_Posed]) -> Prediction:
        (height, width), (stride, halo) = size, self._grid
        slab = _union(context(rows, height, halo, stride, pose.rows) for pose, _ in poses)
        given, band = read(slab), None
        for columns in cores(width, self.tile, stride):
            answers: list[Prediction] = []
            for pose, statistics in poses:
                tall = context(rows, height, halo, stride, pose.rows)
                wide = context(columns, width, halo, stride, pose.columns)
                with fixed(statistics):
                    answer = self._predict(given, (inside(tall, slab), wide), pose)
                answers.append(_crop(answer, inside(rows, tall), inside(columns, wide)))
            mean = _each(lambda values: sum(values[1:], values[0]) / len(values), answers)
            band = band or _each(lambda parts: parts[0].new_empty((*parts[0].shape[:-1], width)), [mean])
            _put(band, columns, mean)
        assert band is not None
        return band

    @cached_property
    def _grid(self) -> tuple[int, int]:
        """The model's stride, and the halo as a multiple of it."""
        stride = self.model.stride
        halo = reach(self.model.config) if self.halo is None else self.halo
        return stride, max(1, -(-halo // stride)) * stride

    def _pooled(self, read: Read, size: tuple[int, int], pose: Pose) -> Statistics:
        """What pools over the whole input see of a large image, on windows that do not depend on the tiles."""
        stride, _ = self._grid
        window = -(-self.window // stride) * stride
        if max(size) <= window or not watch(self.model):
            return []

        def runs() -> Iterator[Callable[[], Prediction]]:
            for rows in windows(size[0], window, stride):
                given = read(rows)
                for columns in windows(size[1], window, stride):
                    view = slice(None), columns
                    yield lambda given=given, view=view: self._predict(given, view, pose)

        return measure(runs())

    @torch.inference_mode()
    def _predict(self, given: Rows, view: tuple[slice, slice], pose: Pose) -> Prediction:
        if self.stop():
            raise Abandoned("nobody waits for this image any more")
        layout = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
        image, mask = (
            None if part is None else pose.apply(part[(..., *view)]).to(self.device).contiguous(memory_format=layout)
            for part in given
        )
        assert image is not None
        # TF32 keeps 10 bits of 16; benchmarking would choose kernels by their speed of the moment.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            answer = self.model(image, mask)
        chance = None if answer.defect is None else torch.sigmoid(answer.defect)
        return _each(lambda parts: pose.undo(parts[0]).cpu(), [answer._replace(defect=chance)])


def _crop(answer: Prediction, rows: slice, columns: slice) -> Prediction:
    return _each(lambda parts: parts[0][..., rows, columns], [answer])


def _put(band: Prediction, columns: slice, answer: Prediction) -> None:
    for whole, part in zip(band, answer, strict=True):
        if whole is not None and part is not None:
            whole[..., columns] = part


def _each(join: Callable[[list[Tensor]], Tensor], answers: list[Prediction]) -> Prediction:
    """Join several answers part by part."""
    images, defects, errors = zip(*answers, strict=True)
    return Prediction(
        join(list(images)),
        None if defects[0] is None else join(list(defects)),
        None if errors[0] is None else join(list(errors)),
    )


def _union(parts: Iterable[slice]) -> slice:
    return reduce(lambda a, b: slice(min(a.start, b.start), max(a.stop, b.stop)), parts)
