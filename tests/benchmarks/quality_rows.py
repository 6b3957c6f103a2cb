"""From judged outputs to rows: means, intervals, goals, the worst category first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from quality_judge import Judged
from rows import Row

from kintsugi.detection.detectability import Detectability
from kintsugi.evaluation.scorecard import bootstrap
from kintsugi.evaluation.survival import SurvivalCurve

SETS: Mapping[str | None, str] = {None: "assigned presets", "kla": "kla"}
FIGURES: Mapping[str, tuple[str, str]] = {
    "aligned_psnr": ("PSNR", "dB"),
    "aligned_ssim": ("SSIM", ""),
    "aligned_defect_psnr": ("defect PSNR", "dB"),
    "aligned_defect_ssim": ("defect SSIM", ""),
    "small_contrast_kept": ("small-defect contrast kept", ""),
    "background_altered": ("background altered", ""),
    "background_invented": ("background invented", ""),
    "background_erased": ("background erased", ""),
}
WORST = ("aligned_psnr", "aligned_defect_psnr")
GOALS: Mapping[tuple[str, str], tuple[str, float]] = {
    ("assigned presets", "PSNR"): (">=", 31.2),
    ("assigned presets", "SSIM"): (">=", 0.73),
    ("assigned presets", "defect PSNR"): (">=", 28.3),
    ("assigned presets", "defect SSIM"): (">=", 0.75),
    ("kla", "PSNR"): (">=", 28.9),
    ("kla", "defect PSNR"): (">=", 24.5),
    ("kla", "small-defect contrast kept"): (">=", 0.65),
    ("kla", "background invented"): ("<=", 0.03),
    ("assigned presets", "detectability recovered"): (">=", 0.5),
    ("kla", "detectability recovered"): (">=", 0.5),
    ("assigned presets", "hallucination rate"): ("<=", 0.02),
    ("kla", "hallucination rate"): ("<=", 0.02),
    ("clean input", "PSNR to the input"): (">=", 45.0),
}
"""What a learned model must reach; classical methods are shown for comparison and have no goal."""


@dataclass(frozen=True)
class Maker:
    """Makes the rows of one run; `shortened` is said in each of them."""

    learned: frozenset[str]
    shortened: str = ""

    def row(self, method: str, where: str, what: str, value: float | None, unit: str, n: int, note: str = "") -> Row:
        sign, limit = GOALS.get((where, what), ("", 0.0)) if method in self.learned else ("", 0.0)
        goal = f"{sign} {limit:g}" if sign else None
        holds = None if value is None or not sign else (value >= limit if sign == ">=" else value <= limit)
        said = "; ".join(part for part in (note, self.shortened) if part)
        return Row(f"{method}: {where}: {what}", value, unit, goal, holds, n, said)

    def fidelity(self, method: str, where: str, outputs: Sequence[Judged]) -> list[Row]:
        rows: list[Row] = []
        for name, (what, unit) in FIGURES.items():
            given = [o for o in outputs if name in o.figures]
            if not given:
                rows.append(self.row(method, where, what, None, unit, 0, "no image has this figure"))
                continue
            values, groups = _values(given, name), [o.group for o in given]
            note = _interval(*bootstrap(values, groups), len(set(groups)))
            rows.append(self.row(method, where, what, float(values.mean()), unit, len(given), note))
            if name in WORST:
                value, category, count = _worst(given, name)
                rows.append(
                    self.row(method, where, f"worst category's {what}", value, unit, count, f"category {category}")
                )
        return rows

    def clean_input(self, method: str, outputs: Sequence[Judged]) -> Row:
        values = np.array([o.clean_psnr for o in outputs if o.clean_psnr is not None])
        value = float(values.mean()) if len(values) else None
        note = f"lowest {values.min():.1f} dB; an image returned untouched counts as 100 dB" if len(values) else ""
        return self.row(method, "clean input", "PSNR to the input", value, "dB", len(values), note)

    def detectability(self, method: str, where: str, found: Detectability, trained: str) -> list[Row]:
        bounds = found.recovered_bounds
        scores = (
            f"AP clean {_said(found.clean_ap)}, degraded {_said(found.degraded_ap)}, this {_said(found.restored_ap)}"
        )
        interval = "" if bounds is None else f"; 95% interval {bounds.low:.2f} to {bounds.high:.2f}"
        recalls = f"clean {_said(found.clean_recall)}, degraded {_said(found.degraded_recall)}"
        share = f"at {found.false_alarm_share:.1%} false alarms in clean background"
        rise = f"degraded input {_said(found.degraded_rise)}"
        n, free = found.images, found.defect_free_images
        return [
            self.row(
                method, where, "detectability recovered", found.recovered, "", n, f"{scores}{interval}; {trained}"
            ),
            self.row(
                method,
                where,
                "defects found",
                found.restored_recall,
                "",
                found.defects,
                f"{recalls}; {share}; {trained}",
            ),
            self.row(method, where, "hallucination rate", found.restored_rise, "", free, f"{rise}; {share}; {trained}"),
        ]

    def survival(self, method: str, preset: str, curve: SurvivalCurve, rival: SurvivalCurve | None) -> list[Row]:
        where = f"planted spots, {preset}"
        rows: list[Row] = []
        for diameter in sorted({cell.diameter for cell in curve.cells}):
            cells = [cell for cell in curve.cells if cell.diameter == diameter]
            count = sum(cell.count for cell in cells)
            before = sum(cell.degraded_kept * cell.count for cell in cells) / count
            kept = sum(cell.kept * cell.count for cell in cells) / count
            alive = sum(cell.survived * cell.count for cell in cells) / count
            note = f"{alive:.0%} keep at least half; degraded input {before:.2f}"
            rows.append(self.row(method, where, f"contrast kept at {diameter:g} px", kept, "", count, note))
        if rival is not None:
            pairs = [(cell, rival.cell(cell.diameter, cell.contrast)) for cell in curve.cells]
            above = float(np.mean([own.kept >= other.kept for own, other in pairs]))
            note = "share of sizes and contrasts at least as well kept as by blind non-local means"
            rows.append(self.row(method, where, "not below non-local means", above, "", len(pairs), note))
        return rows


def _values(outputs: Sequence[Judged], name: str) -> np.ndarray:
    values = np.array([output.figures[name] for output in outputs])
    # A defect drawn too strongly pays for no lost one.
    return values.clip(0, 1) if name == "small_contrast_kept" else values


def _worst(outputs: Sequence[Judged], name: str) -> tuple[float, str, int]:
    by_category: dict[str, list[float]] = {}
    for output in outputs:
        by_category.setdefault(output.category, []).append(output.figures[name])
    return min((float(np.mean(values)), category, len(values)) for category, values in by_category.items())


def _interval(low: float, high: float, groups: int) -> str:
    digits = 2 if abs(high) >= 10 else 3
    return f"95% interval {low:.{digits}f} to {high:.{digits}f} over {groups} parts"


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
