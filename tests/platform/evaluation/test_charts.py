import re

from kintsugi.evaluation.charts import gain_chart, pair_chart, precision_recall_chart
from kintsugi.evaluation.scorecard import ImageScore


def image(name: str, gain: float, kept: float | None) -> ImageScore:
    more = {} if kept is None else {"contrast_kept": kept, "background_invented": 0.01}
    return ImageScore(
        sample_id=name, part_id=name, category="a", defect_type="pit", degraded={"aligned_psnr": 20.0, **more},
        restored={"aligned_psnr": 20.0 + gain, **more}, retention=1, added=0, alarm=False,
    )  # fmt: skip


def test_charts_take_the_colour_of_the_page_and_refer_to_nothing_outside() -> None:
    images = [image("a", 1.0, 0.5), image("b", -2.0, None)]
    curves = {"clean": ((0.5, 1.0), (1.0, 0.4)), "degraded": (), "restored": ((1.0, 0.1),)}
    for svg in (gain_chart(images), pair_chart(images), precision_recall_chart(curves)):
        assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
        assert "currentColor" in svg and "http" not in svg and "#010203" not in svg


def test_the_same_images_give_the_same_chart_and_charts_share_no_clip_path() -> None:
    images = [image("a", 1.0, 0.5), image("b", -2.0, 0.2)]
    gain, pair = gain_chart(images), pair_chart(images)
    assert gain == gain_chart(images)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in (gain, pair)]
    assert all(clips) and not clips[0] & clips[1]
