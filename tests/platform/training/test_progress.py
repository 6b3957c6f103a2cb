import io

from rich.console import Console

from kintsugi.training.progress import ProgressBar, progress_line

METRICS = {
    "epoch": 2, "loss/total": 0.25, "val/psnr": 30.0, "val/psnr_gain": 4.0,
    "train/images_per_second": 123.4, "train/seconds": 90.0,
}  # fmt: skip


def test_an_epoch_is_told_in_one_line_with_its_speed_and_the_time_left() -> None:
    line = progress_line(METRICS, 10, 90.0)
    assert line == "epoch   2/10  loss 0.2500  PSNR 30.00 dB (+4.00)  123.4 images/s  90 s, 12 min left"


def test_the_bar_shows_epochs_speed_and_time_left_and_ignores_saves_within_an_epoch() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    with ProgressBar(10, "unet", console) as bar:
        bar.show(METRICS)
        bar.show({"epoch": 2, "step": 7})
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for word in ("unet", "2/10", "123.4 images/s, 12 min left"):
        assert word in text
