"""Curves in TensorBoard's format, kept in the object store beside the run they belong to."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from kintsugi.errors import StoreUnavailable
from kintsugi.pictures import mosaic
from kintsugi.storage import ObjectStore

_log = logging.getLogger(__name__)

SHOWN_METRICS = ("score", "val/psnr", "val/defect_psnr")


class Curves:
    """Write scalars and pictures epoch by epoch; each `log` brings the event file in the store up to date.

    A resumed run adds a second event file; TensorBoard joins them.
    """

    def __init__(self, store: ObjectStore, prefix: str, settings: Mapping[str, float | str] | None = None) -> None:
        self._store, self._prefix = store, prefix
        self._folder = tempfile.TemporaryDirectory(prefix="kintsugi-curves-")
        self._writer = SummaryWriter(self._folder.name)
        if settings:
            self._write_settings(settings)

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
        self._send(Path(self._folder.name), "")

    def show(self, pictures: Sequence[Sequence[NDArray[Any]]], epoch: int) -> None:
        """Rows of degraded, restored and clean, as one picture in a file of its own: each is sent only once."""
        if not pictures:
            return
        with tempfile.TemporaryDirectory(prefix="kintsugi-pictures-") as folder:
            with SummaryWriter(folder, filename_suffix=f".{epoch}") as writer:
                writer.add_image("degraded, restored, clean", mosaic(pictures), epoch, dataformats="HWC")
            self._send(Path(folder), "pictures/")

    def _send(self, folder: Path, below: str) -> None:
        try:
            for path in folder.iterdir():
                self._store.put(f"{self._prefix}/{below}{path.name}", path)
        except StoreUnavailable as error:
            _log.warning("%s: the curves follow with the next epoch", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
        self._folder.cleanup()

    def _write_settings(self, settings: Mapping[str, float | str]) -> None:
        """The HParams table takes the values from the scalars of the same names, also of a run that was stopped."""
        experiment, start, end = hparams(dict(settings), dict.fromkeys(SHOWN_METRICS, 0.0))
        writer = self._writer._get_file_writer()  # type: ignore[reportPrivateUsage]
        for summary in (experiment, start, end):
            writer.add_summary(summary)
