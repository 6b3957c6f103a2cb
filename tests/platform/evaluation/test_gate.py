import pytest

from kintsugi.errors import DataError
from kintsugi.evaluation.gate import OVERALL, WORST, Verdict, judge
from kintsugi.evaluation.scorecard import ImageScore, Scorecard, summarise


def scored(sample: str, psnr: float, defect: float | None, category: str = "a", **more: float) -> ImageScore:
    restored = {"aligned_psnr": psnr, **({} if defect is None else {"aligned_defect_psnr": defect}), **more}
    return ImageScore(
        sample_id=sample,
        part_id=f"part-{sample}",
        category=category,
        defect_type="good" if defect is None else "pit",
        degraded=dict.fromkeys(restored, 15.0),
        restored=restored,
        retention=1.0,
        added=0.0,
        alarm=False,
    )


def card(model: str, *images: ImageScore, digest: str = "x", split: str = "test") -> Scorecard:
    return summarise(images, dataset="parts@x", dataset_digest=digest, split=split, model=model)


PRODUCTION = card(
    "unet@1",
    scored("1", 30.0, 24.0),
    scored("2", 32.0, 26.0),
    scored("3", 28.0, 20.0, "b"),
    scored("4", 29.0, 22.0, "b"),
)


def shifted(model: str, psnr: float = 0.0, a: float = 0.0, b: float = 0.0) -> Scorecard:
    """Production's images with so many dB more overall, and on the defects of the categories a and b."""
    return card(
        model,
        scored("1", 30.0 + psnr, 24.0 + a),
        scored("2", 32.0 + psnr, 26.0 + a),
        scored("3", 28.0 + psnr, 20.0 + b, "b"),
        scored("4", 29.0 + psnr, 22.0 + b, "b"),
    )


def failed(verdict: Verdict) -> list[str]:
    return [bound.name for bound in verdict.bounds if not bound.holds]


def test_a_better_model_passes_and_both_bounds_are_told() -> None:
    verdict = judge(shifted("unet@2", 0.5, 0.5, 0.5), PRODUCTION)
    assert verdict.passed and (verdict.candidate, verdict.production) == ("unet@2", "unet@1")
    assert [bound.name for bound in verdict.bounds] == [OVERALL, WORST]
    assert [bound.difference for bound in verdict.bounds] == pytest.approx([0.5, 0.5])


def test_a_model_is_not_worse_than_itself() -> None:
    assert judge(PRODUCTION, PRODUCTION).passed


def test_lower_psnr_is_refused_and_named_with_its_numbers() -> None:
    verdict = judge(shifted("unet@2", -0.5, 1.0, 1.0), PRODUCTION)
    assert not verdict.passed and failed(verdict) == [OVERALL]
    told = verdict.refusal()
    assert "overall PSNR 29.25 dB against 29.75 dB in production (-0.5 dB, 95% interval -0.50 to -0.50)" in told
    assert WORST not in told and "kintsugi evaluate unet@2" in told


def test_higher_psnr_with_a_worse_worst_category_is_refused_and_the_category_named() -> None:
    verdict = judge(shifted("unet@2", 1.0, 3.0, -0.25), PRODUCTION)
    assert failed(verdict) == [WORST]
    assert f"{WORST} 19.75 dB (b) against 20.00 dB (b) in production (-0.25 dB)" in verdict.refusal()


def test_another_category_that_becomes_the_worst_is_the_one_that_counts() -> None:
    verdict = judge(shifted("unet@2", 1.0, -5.0, 3.0), PRODUCTION)
    bound = verdict.bounds[1]
    assert failed(verdict) == [WORST]
    assert (bound.candidate_category, bound.production_category) == ("a", "b")


def test_a_category_that_got_worse_but_stays_above_productions_worst_passes() -> None:
    assert judge(shifted("unet@2", 0.0, -1.0, 0.0), PRODUCTION).passed


def test_it_is_the_lower_bound_that_counts_and_not_the_mean() -> None:
    steady = card("unet@1", *(scored(str(i), 30.0, 20.0) for i in range(8)))
    erratic = card("unet@2", *(scored(str(i), 30.0, 14.0 if i < 2 else 23.0) for i in range(8)))
    figures = [found.by_category["a"]["aligned_defect_psnr"].restored for found in (erratic, steady)]
    assert figures[0] > figures[1]
    assert failed(judge(erratic, steady)) == [WORST]


def test_images_are_compared_in_pairs_whatever_their_order() -> None:
    swapped = card("unet@2", *reversed(shifted("unet@2", -0.1).images))
    overall = judge(swapped, PRODUCTION).bounds[0]
    assert overall.interval == pytest.approx((-0.1, -0.1))
    assert overall.difference == pytest.approx(-0.1) and not overall.holds


def test_a_loss_within_the_tolerance_passes_and_one_beyond_it_does_not() -> None:
    candidate = shifted("unet@2", -0.25)
    assert judge(candidate, PRODUCTION, tolerance=0.25).passed
    verdict = judge(candidate, PRODUCTION, tolerance=0.2)
    assert failed(verdict) == [OVERALL] and "0.2 dB are allowed" in verdict.refusal()


def test_zeroed_figures_decide_nothing() -> None:
    production = card("unet@1", scored("1", 30.0, 20.0, defect_psnr_zeroed=50.0, aligned_defect_psnr_zeroed=50.0))
    flattered = card("unet@2", scored("1", 30.0, 19.0, defect_psnr_zeroed=90.0, aligned_defect_psnr_zeroed=90.0))
    modest = card("unet@2", scored("1", 30.0, 21.0, defect_psnr_zeroed=10.0, aligned_defect_psnr_zeroed=10.0))
    assert failed(judge(flattered, production)) == [WORST]
    assert judge(modest, production).passed


def test_without_a_labelled_defect_nothing_passes_however_good_it_is() -> None:
    production, candidate = card("unet@1", scored("1", 30.0, None)), card("unet@2", scored("1", 40.0, None))
    verdict = judge(candidate, production)
    assert not verdict.passed and failed(verdict) == [] and list(verdict.absent) == [WORST]
    assert "no image has a labelled defect" in verdict.refusal() and "parts/test" in verdict.refusal()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (card("unet@2", *PRODUCTION.images, digest="y"), "different datasets"),
        (card("unet@2", *PRODUCTION.images, split="val"), "different splits"),
        (card("unet@2", *PRODUCTION.images[1:]), "different images"),
        (card("unet@2", scored("1", 30.0, None), *PRODUCTION.images[1:]), "different images"),
        (
            card(
                "unet@2",
                PRODUCTION.images[0].model_copy(update={"degraded": {"aligned_psnr": 15.1}}),
                *PRODUCTION.images[1:],
            ),
            "different degraded inputs",
        ),
    ],
)
def test_scorecards_of_other_images_are_an_error_that_says_what_differs(other: Scorecard, said: str) -> None:
    with pytest.raises(DataError, match=f"unet@2 and unet@1 were scored on {said}"):
        judge(other, PRODUCTION)


def test_with_nothing_in_production_a_candidate_passes() -> None:
    assert Verdict(candidate="unet@1").passed


def test_a_verdict_for_machines_says_what_holds() -> None:
    told = judge(shifted("unet@2", -0.5), PRODUCTION).model_dump(mode="json")
    assert told["passed"] is False and [bound["holds"] for bound in told["bounds"]] == [False, True]
