"""How far a run is, for the person who watches."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


def progress_line(metrics: Mapping[str, float], epochs: int, seconds: float) -> str:
    """One epoch in one line; figures are aligned, gains are over the degraded input."""
    defect = ""
    if "val/defect_psnr" in metrics:
        defect = f"  defect {metrics['val/defect_psnr']:.2f} dB ({metrics['val/defect_psnr_gain']:+.2f})"
    speed = f"  {metrics['train/images_per_second']:.1f} images/s" if "train/images_per_second" in metrics else ""
    return (
        f"epoch {int(metrics['epoch']):3d}/{epochs}  loss {metrics['loss/total']:.4f}"
        f"  PSNR {metrics['val/psnr']:.2f} dB ({metrics['val/psnr_gain']:+.2f}){defect}"
        f"{speed}  {seconds:.0f} s, {minutes_left(metrics['epoch'], epochs, seconds):.0f} min left"
    )


def minutes_left(epoch: float, epochs: int, seconds: float) -> float:
    return (epochs - epoch) * seconds / 60


class ProgressBar:
    """One line at the foot of a terminal: epochs, images/s, time left. What others print passes above it."""

    def __init__(self, epochs: int, label: str, console: Console | None = None) -> None:
        self._epochs = epochs
        self._bar = Progress(
            TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("epochs  {task.fields[told]}"),
            console=console or Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=epochs, told="starting")

    def show(self, metrics: Mapping[str, float]) -> None:
        """The metrics of an epoch's end; those of a save within an epoch have no speed, and change nothing."""
        if "train/images_per_second" not in metrics:
            return
        left = minutes_left(metrics["epoch"], self._epochs, metrics["train/seconds"])
        told = f"{metrics['train/images_per_second']:.1f} images/s, {left:.0f} min left"
        self._bar.update(self._task, completed=metrics["epoch"], told=told)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
