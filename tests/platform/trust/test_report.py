import tracemalloc

import numpy as np
import pytest

from kintsugi.imaging import Image
from kintsugi.trust.judge import TrustLimits, judge
from kintsugi.trust.report import Audit, Report, untouched


def scene(height: int = 300, width: int = 120, seed: int = 0) -> Image:
    y, x = np.mgrid[:height, :width]
    values = 0.5 + 0.2 * np.sin(x / 6) * np.cos(y / 9) + np.random.default_rng(seed).normal(0, 0.03, (height, width))
    return Image(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def report(source: Image, restored: Image, band: int) -> Report:
    found = Audit(source.size, TrustLimits())
    for top in range(0, source.size[0], band):
        found.add(source.rows(top, top + band), restored.rows(top, top + band), None)
    return found.report()


def with_hole(image: Image, top: int) -> Image:
    pixels = image.pixels.copy()
    pixels[top : top + 30, 40:80] = 128
    return Image(pixels)


@pytest.mark.parametrize("blocks", [2**22, 120 * 90])
@pytest.mark.parametrize("band", [1, 37, 64, 300])
def test_bands_of_any_height_give_one_report(band: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kintsugi.trust.report.BLOCK_PIXELS", blocks)
    source, restored = scene(), with_hole(scene(seed=1), 200)
    assert report(source, restored, band) == report(source, restored, 300)


def test_a_small_image_is_judged_whole() -> None:
    source, restored = scene(), with_hole(scene(seed=1), 200)
    trust, told = judge(source.to_unit(), restored.to_unit()), report(source, restored, 50)
    assert (told.retention, told.alarm_score, told.added) == (trust.retention, trust.alarm_score, trust.added)
    assert told.reasons == trust.reasons and told.abstained is None


def test_a_large_image_is_as_bad_as_its_worst_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kintsugi.trust.report.BLOCK_PIXELS", 120 * 100)
    source, restored = scene(), with_hole(scene(seed=1), 220)
    worst = judge(source.rows(200, 300).to_unit(), restored.rows(200, 300).to_unit())
    told = report(source, restored, 100)
    assert told.alarm_score == worst.alarm_score and told.local_retention == worst.local_retention
    assert told.alarm == bool(told.reasons)
    assert all(reason.startswith("rows 200 to 300: ") for reason in told.reasons)


def test_of_rows_that_were_judged_only_figures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kintsugi.trust.report.BLOCK_PIXELS", 120 * 100)
    image = scene(1000)
    audit = Audit(image.size, TrustLimits())
    tracemalloc.start()
    for top in range(0, 1000, 50):
        audit.add(image.rows(top, top + 50), image.rows(top, top + 50), None)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 120 * 1000 and not audit.report().alarm


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (63, 4)])
def test_images_of_any_size_are_judged(shape: tuple[int, int]) -> None:
    image = Image(np.full(shape, 100, np.uint8))
    told = report(image, image, 7)
    assert told.retention == 1 and not told.alarm


def test_a_report_is_plain_data() -> None:
    told = untouched("already clean").to_dict()
    assert told["abstained"] == "already clean" and told["reasons"] == [] and told["alarm"] is False
