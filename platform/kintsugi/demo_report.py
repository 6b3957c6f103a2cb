"""The demo's report: one HTML file that needs nothing else."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kintsugi.storage import write_atomically

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
img { width: 100%; background: #fff; border-radius: 6px; }
details { margin-top: 1rem; } code { font-size: .9em; }
"""

FIGURES = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "defect_psnr": ("masked defect PSNR, dB", 2),
    "defect_ssim": ("masked defect SSIM", 3),
    "aligned_psnr": ("PSNR after one intensity fit, dB", 2),
    "aligned_defect_psnr": ("masked defect PSNR after one intensity fit, dB", 2),
}
"""Figure -> (title, digits). The fitted ones show what is left of a gain once brightness is no part of it."""


@dataclass(frozen=True)
class Outcome:
    """What the demo found: one row of figures for each held-out image, the models, the addresses."""

    images: list[dict[str, Any]]
    models: list[dict[str, Any]]
    promoted: str
    through_s3: int
    addresses: list[dict[str, str]]
    steps: list[tuple[str, float]]

    def mean(self, figure: str, side: str) -> float:
        values = [image[side][figure] for image in self.images if figure in image[side]]
        return sum(values) / len(values)

    def gain(self, figure: str) -> float:
        return self.mean(figure, "restored") - self.mean(figure, "degraded")


def write_report(outcome: Outcome, path: Path, picture: Path, seconds: float) -> Path:
    """Write the report with the picture inside."""
    image = base64.b64encode(picture.read_bytes()).decode()
    body = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>kintsugi demo</title><style>{_STYLE}</style></head><body>
<h1>kintsugi demo</h1>
<p class="lead">{len(outcome.images)} held-out images, degraded, restored over HTTP by
{html.escape(outcome.promoted)}, {outcome.through_s3} of them also through S3 with the same bytes;
{seconds / 60:.1f} minutes from nothing. The model was not told where the defects are.</p>
<h2>Degraded against restored</h2>{_summary(outcome)}
<h2>Before and after</h2><img alt="degraded, restored, clean, planted defect" src="data:image/png;base64,{image}">
<h2>Models by validation score</h2>{_models(outcome)}
<p class="lead">The score is the smaller of the gains in PSNR and in masked defect PSNR on the validation split
after one global intensity fit, in dB.</p>
<h2>Steps</h2>{_table(("step", "seconds"), [(title, f"{spent:.0f}") for title, spent in outcome.steps])}
<h2>Addresses while it ran</h2>{_table(("", ""), [(row["name"], row["address"]) for row in outcome.addresses])}
<details><summary>All images</summary>{_images(outcome)}</details>
</body></html>
"""
    write_atomically(path, body.encode())
    return path


def _summary(outcome: Outcome) -> str:
    rows: list[tuple[str, ...]] = []
    for figure, (title, digits) in FIGURES.items():
        before, after = outcome.mean(figure, "degraded"), outcome.mean(figure, "restored")
        rows.append((title, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}"))
    return _table(("mean over images", "degraded", "restored", "gain"), rows)


def _models(outcome: Outcome) -> str:
    rows: list[tuple[str, ...]] = []
    for model in outcome.models:
        kind = f"search of {len(model['trials'])} trials" if "trials" in model else "training"
        mark = "production" if model["model"] == outcome.promoted else ""
        rows.append((model["model"], kind, f"{model['score']:+.2f} dB", mark))
    return _table(("model", "from", "score", ""), rows)


def _images(outcome: Outcome) -> str:
    rows = [
        (
            image["sample"],
            image["defect"],
            *(_pair(image, figure, digits) for figure, (_, digits) in FIGURES.items()),
            f"{image['retention']:.2f}",
        )
        for image in outcome.images
    ]
    return _table(("image", "defect", *(title for title, _ in FIGURES.values()), "retention"), rows)


def _pair(image: dict[str, Any], figure: str, digits: int) -> str:
    if figure not in image["restored"]:
        return ""
    return f"{image['degraded'][figure]:.{digits}f} → {image['restored'][figure]:.{digits}f}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
