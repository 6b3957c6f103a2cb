"""An evaluation for people: one HTML file that needs nothing else, worst images first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kintsugi.config import ExperimentConfig
from kintsugi.data.dataset import SplitReader
from kintsugi.evaluation import charts
from kintsugi.evaluation.scorecard import Figure, ImageScore, Pictured, Scorecard, pictured, worse_gain, worst_first
from kintsugi.evaluation.survival import draw_survival
from kintsugi.metrics import LOWER_IS_BETTER, SMALL_DEFECT, align
from kintsugi.page import captioned, document, strip, table, text, tile, uri
from kintsugi.pictures import overlay
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import write_atomically

AMPLIFIED = 5
"""The difference pictures show so many times the difference."""
_SHOWN_SIDE = 640
_CAPTIONS = ("degraded", "restored", "clean", f"|restored − clean| × {AMPLIFIED}", "labelled defect")


@dataclass(frozen=True)
class Shown:
    """How a figure is written: its value times `scale`, with `digits` after the point."""

    title: str
    digits: int
    scale: float = 1

    def __call__(self, value: float, sign: str = "") -> str:
        # Adding 0 takes the sign off a zero that rounding made.
        return f"{round(value * self.scale, self.digits) + 0.0:{sign}.{self.digits}f}"

    def bounds(self, low: float, high: float, sign: str = "") -> str:
        return f"[{self(low, sign)}, {self(high, sign)}]"


SHOWN: Mapping[str, Shown] = {
    "aligned_psnr": Shown("PSNR, dB", 2),
    "aligned_ssim": Shown("SSIM", 3),
    "aligned_defect_psnr": Shown("defect PSNR, dB", 2),
    "aligned_defect_ssim": Shown("defect SSIM", 3),
    "aligned_lpips": Shown("LPIPS", 3),
    "contrast_kept": Shown("defect contrast kept", 2),
    "small_contrast_kept": Shown("small-defect contrast kept", 2),
    "background_altered": Shown("background altered, %", 2, 100),
    "background_invented": Shown("background invented, %", 2, 100),
    "background_erased": Shown("background erased, %", 2, 100),
    "psnr": Shown("PSNR, dB", 2),
    "ssim": Shown("SSIM", 3),
    "defect_psnr": Shown("defect PSNR over masked pixels, dB", 2),
    "defect_ssim": Shown("defect SSIM over masked pixels", 3),
    "defect_psnr_zeroed": Shown("defect PSNR on image × mask, dB", 2),
    "defect_ssim_zeroed": Shown("defect SSIM on image × mask", 3),
    "lpips": Shown("LPIPS", 3),
}

_ALIGNED = [
    "aligned_psnr",
    "aligned_ssim",
    "aligned_defect_psnr",
    "aligned_defect_ssim",
    "aligned_lpips",
    "contrast_kept",
    "small_contrast_kept",
    "background_altered",
    "background_invented",
    "background_erased",
]
_GROUP = ("aligned_psnr", "aligned_ssim", "aligned_defect_psnr", "aligned_defect_ssim", "contrast_kept")
_PLAIN = ("psnr", "ssim", "lpips")
_CONVENTIONS = ("defect_psnr", "defect_ssim", "defect_psnr_zeroed", "defect_ssim_zeroed")


def write_report(
    card: Scorecard,
    restorer: Restorer,
    reader: SplitReader,
    config: ExperimentConfig,
    path: Path,
    *,
    count: int = 12,
    give_mask: bool = False,
) -> Path:
    """Write a scorecard with pictures of its `count` worst images.

    Those images are restored again. The file carries its pictures and curves inside and refers to nothing outside.
    Pictures of images with a side above 640 px show a window of that size around the defect, or else around the
    largest difference, at native resolution.
    """
    shown = pictured(restorer, reader, config, worst_first(card.images)[:count], give_mask=give_mask)
    title = f"{card.model} on {card.dataset.partition('@')[0]}, {card.split} split"
    body = [
        *_lead(card),
        *_headline(card),
        *_groups(card),
        *_curves(card),
        *_strips(shown, min(count, len(card.images))),
        *_all_figures(card),
        *_conventions(card),
        *_images(card),
    ]
    write_atomically(path, document(title, body).encode())
    return path


def _lead(card: Scorecard) -> Iterator[str]:
    parts = len({image.part_id for image in card.images})
    yield (
        f'<p class="soft">{len(card.images)} images of {parts} parts; dataset {text(card.dataset_digest[:12])}. '
        "Each image is scored at native resolution, then images are averaged. Intervals hold 95% of bootstrap draws "
        "over parts. Unless told otherwise, figures are taken after one global intensity fit of the output to the "
        "clean image: exposure that was lost cannot be known.</p>"
    )
    for figure, reason in card.absent.items():
        yield f'<p class="soft">Without {text(figure)}: {text(reason)}.</p>'


def _headline(card: Scorecard) -> Iterator[str]:
    yield '<div class="tiles">'
    yield tile("score", f"{card.score:+.2f} dB", "the smaller of the gains in PSNR and in defect PSNR")
    for name in ("aligned_psnr", "aligned_ssim", "aligned_defect_psnr", "aligned_defect_ssim"):
        if name in card.overall:
            yield _figure_tile(name, card.overall[name])
    yield from _pair_tile(card)
    yield from _detection_tiles(card)
    alarms = sum(image.alarm for image in card.images)
    told = f"{alarms} of {len(card.images)} images"
    if untouched := sum(bool(image.report.get("abstained")) for image in card.images):
        told += f"; {untouched} were returned untouched"
    yield tile("alarms raised", f"{alarms / len(card.images):.1%}", told)
    yield "</div>"


def _figure_tile(name: str, figure: Figure) -> str:
    show = SHOWN[name]
    return tile(
        show.title,
        show(figure.restored),
        f"{show.bounds(figure.restored_low, figure.restored_high)}; degraded {show(figure.degraded)}, "
        f"gain {show(figure.gain, '+')} {show.bounds(figure.gain_low, figure.gain_high, '+')}",
    )


def _pair_tile(card: Scorecard) -> Iterator[str]:
    invented = card.overall.get("background_invented")
    for name in ("small_contrast_kept", "contrast_kept"):
        kept = card.overall.get(name)
        if kept and invented:
            yield tile(
                f"{SHOWN[name].title} at background invented",
                f"{kept.restored:.2f} at {invented.restored:.1%}",
                f"{SHOWN[name].bounds(kept.restored_low, kept.restored_high)} at "
                f"{invented.restored_low:.1%} to {invented.restored_high:.1%}; "
                f"degraded {kept.degraded:.2f} at {invented.degraded:.1%}",
            )
            return


def _detection_tiles(card: Scorecard) -> Iterator[str]:
    found = card.detectability
    if found is None:
        return
    precision = (
        f"average precision of the detector: clean {_some(found.clean_ap)}, degraded {_some(found.degraded_ap)}, "
        f"restored {_some(found.restored_ap)}"
    )
    if found.recovered is None:
        yield tile("detectability recovered", "–", f"{precision}; degrading took nothing that could be recovered")
    else:
        bounds = found.recovered_bounds
        interval = f"{bounds.low:.0%} to {bounds.high:.0%}; " if bounds else ""
        yield tile("detectability recovered", f"{found.recovered:.0%}", interval + precision)
    if found.restored_recall is not None:
        yield tile(
            "defects found by the detector",
            f"{found.restored_recall:.0%}",
            f"degraded {_some(found.degraded_recall, '.0%')}, clean {_some(found.clean_recall, '.0%')}, of "
            f"{found.defects}, at false alarms on {found.false_alarm_share:.1%} of the clean background",
        )
    if found.restored_rise is not None:
        yield tile(
            "hallucination rate",
            f"{found.restored_rise:.1%}",
            f"of {found.defect_free_images} defect-free images have more false alarms than their clean image; "
            f"degraded {_some(found.degraded_rise, '.1%')}",
        )


def _groups(card: Scorecard) -> Iterator[str]:
    """A table for each way to group the images, the worst group first."""
    ways = {"category": card.by_category, "preset": card.by_preset}
    if len({(image.category, image.defect_type) for image in card.images}) > len(card.by_category):
        ways["defect type"] = card.by_defect_type
    for title, groups in ways.items():
        if groups:
            yield f"<h2>By {title}, worst first</h2>"
            yield _group_table(title, groups)
    yield "<p><small>Restored, and the gain over the degraded input with its interval.</small></p>"


def _group_table(title: str, groups: Mapping[str, Mapping[str, Figure]]) -> str:
    names = [name for name in (*_GROUP, "background_invented") if any(name in figures for figures in groups.values())]
    rows = [
        [text(group), str(_count(figures)), *(_cell(name, figures.get(name)) for name in names)]
        for group, figures in sorted(groups.items(), key=lambda item: _worst(item[1]))
    ]
    return table([title, "images", *(SHOWN[name].title for name in names)], rows)


def _worst(figures: Mapping[str, Figure]) -> float:
    return min(figures[name].gain for name in ("aligned_psnr", "aligned_defect_psnr") if name in figures)


def _count(figures: Mapping[str, Figure]) -> int:
    return max(figure.count for figure in figures.values())


def _cell(name: str, figure: Figure | None) -> str:
    return "" if figure is None else f"{SHOWN[name](figure.restored)}<br>{gain_cell(name, figure)}"


def gain_cell(name: str, figure: Figure) -> str:
    """The gain with its interval, coloured where the interval leaves out zero."""
    better, worse = figure.gain_low > 0, figure.gain_high < 0
    if name in LOWER_IS_BETTER:
        better, worse = worse, better
    kind, show = "up" if better else "down" if worse else "soft", SHOWN[name]
    bounds = show.bounds(figure.gain_low, figure.gain_high, "+")
    return f'<small class="{kind}">{show(figure.gain, "+")} {bounds}</small>'


def _curves(card: Scorecard) -> Iterator[str]:
    yield '<h2>Curves</h2><div class="charts">'
    yield charts.gain_chart(card.images)
    if any("contrast_kept" in image.restored for image in card.images):
        yield charts.pair_chart(card.images)
    if any(card.precision_recall.values()):
        yield charts.precision_recall_chart(card.precision_recall)
    yield "</div>"
    if card.survival is not None:
        yield (
            "<h2>Where planted defects vanish</h2><p>Spots of known diameter and contrast, planted in "
            f"{card.survival.images} defect-free images, which were then degraded and restored.</p>"
        )
        yield f'<img class="chart" alt="contrast kept by diameter and contrast" src="{uri(_drawn(card))}">'


def _drawn(card: Scorecard) -> bytes:
    assert card.survival is not None
    return draw_survival({"restored": card.survival})


def _strips(shown: Iterable[Pictured], count: int) -> Iterator[str]:
    yield f"<h2>The {count} worst images</h2>"
    yield (
        "<p>Ordered by the smaller of the gains in PSNR and in defect PSNR. Degraded and restored image are shown "
        f"after the intensity fit, their difference {AMPLIFIED} times as strong as it is. Click on a strip to enlarge "
        "it.</p>"
    )
    for picture in shown:
        yield _strip(picture)


def _strip(picture: Pictured) -> str:
    image = picture.score
    degraded, restored = (align(each, picture.clean) for each in (picture.degraded, picture.restored))
    apart = difference(restored, picture.clean)
    shown, note = window(apart, picture.mask)
    pixels = (
        degraded,
        restored,
        picture.clean,
        apart * AMPLIFIED,
        overlay(picture.clean, picture.mask),
    )
    cells = (captioned(caption, each[shown]) for each, caption in zip(pixels, _CAPTIONS, strict=True))
    return strip(f"<b>{text(image.sample_id)}</b> {_told(image)}{note}", cells)


def _told(image: ImageScore) -> str:
    words = [image.category, image.defect_type, *([image.preset] if image.preset else [])]
    for name in (*_GROUP, "background_invented"):
        if name in image.restored and name in image.degraded:
            show = SHOWN[name]
            words.append(f"{show.title} {show(image.degraded[name])} → {show(image.restored[name])}")
    if image.alarm:
        words.append("alarm")
    if reason := image.report.get("abstained"):
        words.append(f"returned untouched: {reason}")
    return f"<small>{text(' · '.join(words))}</small>"


def difference(image: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """(H, W): the absolute difference, a colour image's as the mean of its channels."""
    apart = np.abs(image - clean)
    return apart if apart.ndim == 2 else apart.mean(axis=2)


def window(apart: np.ndarray, mask: np.ndarray, side: int = _SHOWN_SIDE) -> tuple[tuple[slice, slice], str]:
    """The part of an image larger than `side` px to be shown, and a note in HTML that says so.

    It lies around the defect, or else around the largest value of `apart`, both (H, W).
    """
    height, width = mask.shape
    if max(height, width) <= side:
        return (slice(None), slice(None)), ""
    if mask.any():
        row, column = (int(places.mean()) for places in np.nonzero(mask))
    else:
        row, column = (int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    top, left = (max(0, min(place - side // 2, length - side)) for place, length in ((row, height), (column, width)))
    note = f" <small>· window at row {top}, column {left} of {height} x {width} px</small>"
    return (slice(top, top + side), slice(left, left + side)), note


def _all_figures(card: Scorecard) -> Iterator[str]:
    yield "<h2>All figures</h2>"
    yield _figures_table("after one intensity fit", card, _ALIGNED)
    yield (
        "<p><small>Contrast kept: (mean over the defect − mean over a ring around it) of the output over that of the "
        f"clean image, clipped to 0 to 1 for each image; small: the defect covers less than {SMALL_DEFECT:.0%} of the "
        "image. Background altered: share of it whose structure of 2 to 12 px differs from the clean image's by more "
        "than 8/255; invented where the output has more structure there, erased where less. Less is better for "
        "these and for LPIPS.</small></p>"
    )
    yield _figures_table("as they are", card, _PLAIN)


def _conventions(card: Scorecard) -> Iterator[str]:
    if "defect_psnr" not in card.overall:
        return
    yield "<h2>Two conventions of defect figures</h2>"
    yield (
        "<p>Over masked pixels: the error on the defect itself. On image × mask: both images are set to zero outside "
        "the mask, where they then agree perfectly, so an image with its defect erased still scores high; for "
        "comparison with published figures only, nothing is decided on it. Both as they are, without intensity "
        "fit.</p>"
    )
    yield _figures_table("convention", card, _CONVENTIONS)


def _figures_table(title: str, card: Scorecard, names: Sequence[str]) -> str:
    rows: list[list[str]] = []
    for name in names:
        if (figure := card.overall.get(name)) is not None:
            show = SHOWN[name]
            restored = (
                f"{show(figure.restored)} <small>{show.bounds(figure.restored_low, figure.restored_high)}</small>"
            )
            rows.append([show.title, show(figure.degraded), restored, gain_cell(name, figure), str(figure.count)])
    return table([title, "degraded", "restored", "gain", "images"], rows)


def _images(card: Scorecard) -> Iterator[str]:
    names = [name for name in _ALIGNED if any(name in image.restored for image in card.images)]
    rows = [
        [
            text(image.sample_id),
            text(image.category),
            text(image.defect_type),
            text(image.preset or ""),
            f"{worse_gain(image):+.2f}",
            *(SHOWN[name](image.restored[name]) if name in image.restored else "" for name in names),
            f"{image.retention:.2f}",
            "alarm" if image.alarm else "",
        ]
        for image in worst_first(card.images)
    ]
    columns = ["image", "category", "defect", "preset", "worse gain, dB", *(SHOWN[name].title for name in names)]
    yield f"<details><summary>All {len(rows)} images, worst first</summary>"
    yield table([*columns, "retention", ""], rows)
    yield "</details>"


def _some(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)
