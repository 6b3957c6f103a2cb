from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi import demo
from kintsugi.demo_report import Outcome, write_report
from kintsugi.errors import StackError, TrainingError
from kintsugi.pictures import picture_grid


def outcome(psnr_gain: float = 4.0, defect_gain: float = 3.0) -> Outcome:
    def image(name: str, defect: bool) -> dict[str, Any]:
        gains = {"psnr": psnr_gain, "ssim": 0.1, "aligned_psnr": 1.0}
        if defect:
            gains |= {"defect_psnr": defect_gain, "defect_ssim": 0.1, "aligned_defect_psnr": 1.0}
        degraded = dict.fromkeys(gains, 20.0)
        restored = {figure: 20.0 + gain for figure, gain in gains.items()}
        labels = {"sample": name, "category": "brick", "defect": "pit" if defect else "good", "retention": 0.9}
        return {**labels, "degraded": degraded, "restored": restored}

    return Outcome(
        images=[image("a<b>", True), image("c", False)],
        models=[{"model": "demo@1", "score": 2.0}, {"model": "demo@2", "score": 1.0, "trials": [{}, {}]}],
        promoted="demo@1",
        through_s3=1,
        addresses=[{"name": "s3", "address": "http://127.0.0.1:8333"}],
        steps=[("Train", 60.0)],
    )


def test_gains_are_means_over_the_images_that_have_the_figure() -> None:
    assert outcome().gain("psnr") == pytest.approx(4.0)
    assert outcome(defect_gain=2.5).gain("defect_psnr") == pytest.approx(2.5)


@pytest.mark.parametrize(("gains", "named"), [((2.9, 3.0), "psnr"), ((4.0, 1.9), "defect_psnr")])
def test_the_demo_fails_when_the_images_gain_too_little(gains: tuple[float, float], named: str) -> None:
    with pytest.raises(TrainingError, match=f"dB {named}"):
        demo._check(outcome(*gains))
    demo._check(outcome(3.0, 2.0))


def test_the_report_is_one_file_that_needs_no_other(tmp_path: Path) -> None:
    picture = picture_grid([[np.zeros((8, 8), np.float32)]], ["x"], ["y"], tmp_path / "p.png")
    page = write_report(outcome(), tmp_path / "report.html", picture, 400).read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page and "href=" not in page
    assert "a&lt;b&gt;" in page and "+4.00" in page and "search of 2 trials" in page


def test_the_demo_does_not_touch_a_stack_that_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path))
    monkeypatch.setattr(demo.local, "find", lambda home: object())
    with pytest.raises(StackError, match="kintsugi down"):
        demo.demo(output=tmp_path)


def test_the_demo_needs_the_configs_that_the_checkout_holds() -> None:
    assert demo.CONFIG.is_file() and demo.SPACE.is_file()
