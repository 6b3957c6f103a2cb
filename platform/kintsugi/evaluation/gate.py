"""The promotion gate: two scorecards of the same images -> is the candidate worse than what is in production?"""

import math
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from kintsugi.errors import DataError
from kintsugi.evaluation.scorecard import Scorecard, bootstrap
from kintsugi.sections import Split

OVERALL = "overall PSNR"
WORST = "worst category's lower bound of defect PSNR"

_PSNR, _DEFECT_PSNR = "aligned_psnr", "aligned_defect_psnr"
_SAME_INPUT = 0.01
"""dB by which figures of one degraded image may differ between machines."""


class Bound(BaseModel):
    """One figure in which the candidate must not be worse, in dB; `difference` is candidate less production.

    `interval` bounds the difference in 95% of bootstrap draws over parts, for whoever reads it; only where images are
    compared in pairs. The categories are the worst ones, which need not be the same.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    candidate: float
    production: float
    difference: float
    interval: tuple[float, float] | None = None
    candidate_category: str | None = None
    production_category: str | None = None
    tolerance: float = 0.0

    @computed_field
    @property
    def holds(self) -> bool:
        return self.difference >= -self.tolerance

    def told(self) -> str:
        """The numbers in words, where it does not hold."""
        where, there = (f" ({name})" if name else "" for name in (self.candidate_category, self.production_category))
        allowed = f", {self.tolerance:g} dB are allowed" if self.tolerance else ""
        return (
            f"{self.name} {self.candidate:.2f} dB{where} against {self.production:.2f} dB{there} in production "
            f"({self.change()}{allowed})"
        )

    def change(self) -> str:
        """The difference, and its interval where there is one."""
        spread = f", 95% interval {self.interval[0]:+.2f} to {self.interval[1]:+.2f}" if self.interval else ""
        return f"{self.difference:+.3g} dB{spread}"


class Verdict(BaseModel):
    """What the gate found. `production` is None where there was nothing to compare with, which passes.

    `absent` says why a bound could not be judged, which does not pass.
    """

    model_config = ConfigDict(frozen=True)
    candidate: str
    production: str | None = None
    dataset: str | None = None
    split: Split | None = None
    bounds: tuple[Bound, ...] = ()
    absent: dict[str, str] = Field(default_factory=dict)

    @computed_field
    @property
    def passed(self) -> bool:
        return not self.absent and all(bound.holds for bound in self.bounds)

    def refusal(self) -> str:
        """Why it does not pass, with the numbers, and what to do."""
        failed = [bound.told() for bound in self.bounds if not bound.holds] + list(self.absent.values())
        shown = f"'kintsugi evaluate {self.candidate} --split {self.split} --report report.html' shows where"
        advice = (
            f"give its {self.split} split defects with masks" if self.absent else f"train on more of that ({shown})"
        )
        return (
            f"{self.candidate} is not promoted over {self.production} on {self.dataset}/{self.split}: "
            f"{'; '.join(failed)}: {advice}, or promote without --gate"
        )


def judge(candidate: Scorecard, production: Scorecard, *, tolerance: float = 0.0) -> Verdict:
    """Compare two models on the same degraded images.

    Overall PSNR holds if its mean is not below production's by more than `tolerance`, in dB. The worst category's
    defect PSNR holds if the smallest lower confidence bound among the candidate's categories is not below the
    smallest among production's. PSNR is that after one intensity fit, defect PSNR over the mask's pixels.

    Raises:
        DataError: the scorecards are of other data, or of other degraded inputs.
    """
    _check_same_images(candidate, production)
    theirs, ours = _worst_category(production), _worst_category(candidate)
    bounds, absent = [_overall(candidate, production, tolerance)], {}
    if ours is not None and theirs is not None:
        bounds.append(_worst(ours, theirs))
    else:
        absent[WORST] = "no image has a labelled defect, so nothing tells whether defects are kept"
    return Verdict(
        candidate=candidate.model,
        production=production.model,
        dataset=candidate.dataset.partition("@")[0],
        split=candidate.split,
        bounds=tuple(bounds),
        absent=absent,
    )


def _overall(candidate: Scorecard, production: Scorecard, tolerance: float) -> Bound:
    theirs = {image.sample_id: image.restored[_PSNR] for image in production.images}
    differences = np.array([image.restored[_PSNR] - theirs[image.sample_id] for image in candidate.images])
    return Bound(
        name=OVERALL,
        candidate=candidate.overall[_PSNR].restored,
        production=production.overall[_PSNR].restored,
        difference=float(differences.mean()),
        interval=bootstrap(differences, [image.part_id for image in candidate.images]),
        tolerance=tolerance,
    )


def _worst(ours: tuple[float, str], theirs: tuple[float, str]) -> Bound:
    return Bound(
        name=WORST,
        candidate=ours[0],
        production=theirs[0],
        difference=ours[0] - theirs[0],
        candidate_category=ours[1],
        production_category=theirs[1],
    )


def _worst_category(card: Scorecard) -> tuple[float, str] | None:
    """Its lower bound in dB and its name; None without any defect."""
    found = ((figures.get(_DEFECT_PSNR), name) for name, figures in card.by_category.items())
    return min(((figure.restored_low, name) for figure, name in found if figure is not None), default=None)


def _check_same_images(candidate: Scorecard, production: Scorecard) -> None:
    identity: dict[str, Callable[[Scorecard], object]] = {
        "datasets": lambda card: card.dataset_digest,
        "splits": lambda card: card.split,
        "images": lambda card: {(i.sample_id, i.category, _DEFECT_PSNR in i.restored) for i in card.images},
    }
    for what, of in identity.items():
        if of(candidate) != of(production):
            raise _incomparable(candidate, production, what)
    theirs = {image.sample_id: image.degraded[_PSNR] for image in production.images}
    if any(not math.isclose(i.degraded[_PSNR], theirs[i.sample_id], abs_tol=_SAME_INPUT) for i in candidate.images):
        raise _incomparable(candidate, production, "degraded inputs")


def _incomparable(candidate: Scorecard, production: Scorecard, what: str) -> DataError:
    return DataError(
        f"{candidate.model} and {production.model} were scored on different {what}: "
        "evaluate both on the same dataset, split and degradation"
    )
