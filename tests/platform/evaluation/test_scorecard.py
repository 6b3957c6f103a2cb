from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.data.dataset import SplitReader, build_dataset, open_split
from kintsugi.errors import DataError
from kintsugi.evaluation.scorecard import (
    ImageScore,
    Scorecard,
    bootstrap,
    draw,
    evaluate,
    planted_survival,
    summarise,
    worse_gain,
    worst_first,
)
from kintsugi.imaging import Image, encode
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore


def scored(
    sample: str, part: str, gain: float, defect_gain: float | None, category: str = "a", preset: str | None = None
) -> ImageScore:
    figures = {"aligned_psnr": (20.0, 20.0 + gain)}
    if defect_gain is not None:
        figures["aligned_defect_psnr"] = (18.0, 18.0 + defect_gain)
    return ImageScore(
        sample_id=sample,
        part_id=part,
        category=category,
        defect_type="good" if defect_gain is None else "pit",
        preset=preset,
        degraded={name: pair[0] for name, pair in figures.items()},
        restored={name: pair[1] for name, pair in figures.items()},
        retention=1.0,
        added=0.0,
        alarm=False,
    )


def summary(*images: ImageScore) -> Scorecard:
    return summarise(images, dataset="d", dataset_digest="x", split="val", model="m")


def test_a_model_that_does_nothing_scores_zero(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    torch.manual_seed(0)
    reader = open_split(tiny_store, "tiny", "val")
    identity = Restorer(build_model(tiny_config.model).eval())
    card = evaluate(identity, reader, tiny_config, dataset="tiny", split="val", model="identity")
    assert card.score == 0
    assert len(card.images) == len(reader) == 2
    assert all(figure.gain == 0 for figure in card.overall.values())
    assert card.dataset_digest == reader.digest


def test_evaluation_gives_the_same_figures_every_time(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    torch.manual_seed(0)
    config = with_values(tiny_config, {"model.residual": False})
    restorer, reader = Restorer(build_model(config.model).eval()), open_split(tiny_store, "tiny", "val")
    first, again = (evaluate(restorer, reader, config, dataset="tiny", split="val", model="m") for _ in range(2))
    assert first == again and first.score < 0


def test_the_score_is_the_smaller_mean_gain() -> None:
    card = summary(scored("1", "p1", 4.0, 1.0), scored("2", "p2", 6.0, None))
    assert card.score == pytest.approx(1.0)
    assert card.overall["aligned_psnr"].gain == pytest.approx(5.0)
    assert card.overall["aligned_defect_psnr"].count == 1


def test_images_without_any_defect_are_scored_by_psnr_alone() -> None:
    assert summary(scored("1", "p1", 2.0, None)).score == pytest.approx(2.0)


def test_categories_and_defect_types_are_summed_apart() -> None:
    card = summary(scored("1", "p1", 1.0, 1.0, "a"), scored("2", "p2", 3.0, None, "b"))
    assert {name: part["aligned_psnr"].gain for name, part in card.by_category.items()} == {"a": 1.0, "b": 3.0}
    assert set(card.by_defect_type) == {"pit", "good"}


def test_the_interval_widens_when_images_belong_to_one_part() -> None:
    values = np.random.default_rng(0).normal(size=60)
    apart = bootstrap(values, [str(i) for i in range(60)])
    together = bootstrap(np.sort(values), [str(i // 20) for i in range(60)])
    assert apart[0] < values.mean() < apart[1]
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_the_picture_of_the_worst_images_is_drawn(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    reader = open_split(tiny_store, "tiny", "val")
    restorer = Restorer(build_model(tiny_config.model).eval())
    card = evaluate(restorer, reader, tiny_config, dataset="tiny", split="val", model="m")
    path = draw(restorer, reader, tiny_config, card, tmp_path / "worst.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_presets_are_summed_apart_and_an_unknown_one_is_in_no_group() -> None:
    card = summary(
        scored("1", "p1", 1, 1, preset="kla"), scored("2", "p2", 3, 2, preset="noise"), scored("3", "p3", 5, 5)
    )
    assert {name: part["aligned_psnr"].gain for name, part in card.by_preset.items()} == {"kla": 1.0, "noise": 3.0}
    assert card.overall["aligned_psnr"].count == 3


def test_the_mean_of_the_restored_has_an_interval_too() -> None:
    figure = summary(*(scored(str(i), f"p{i}", float(i), 1.0) for i in range(8))).overall["aligned_psnr"]
    assert 20 < figure.restored_low < figure.restored < figure.restored_high < 27
    assert figure.restored_low - figure.degraded == pytest.approx(figure.gain_low)


def test_a_defect_drawn_too_strongly_does_not_pay_for_one_that_was_lost() -> None:
    def kept(sample: str, value: float) -> ImageScore:
        image = scored(sample, sample, 0, 0)
        restored, degraded = ({**side, "contrast_kept": value} for side in (image.restored, image.degraded))
        return image.model_copy(update={"restored": restored, "degraded": degraded})

    card = summary(kept("1", 3.0), kept("2", 0.0), kept("3", -2.0))
    assert card.overall["contrast_kept"].restored == pytest.approx(1 / 3)
    assert card.images[0].restored["contrast_kept"] == 3.0


def test_the_worst_image_is_the_one_whose_worse_gain_is_smallest() -> None:
    images = [scored("a", "p", 3, None), scored("b", "p", 5, -1), scored("c", "p", 1, 9)]
    assert [image.sample_id for image in worst_first(images)] == ["b", "c", "a"]
    assert [worse_gain(image) for image in images] == [3, -1, 1]


def darkness(image: Image) -> np.ndarray:
    """A detector of the planted squares, which are darker than their surroundings."""
    return 1 - image.to_unit()


def test_a_detector_judges_the_same_images_in_three_states(
    tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    reader = open_split(tiny_store, "tiny", "val")
    identity = Restorer(build_model(tiny_config.model).eval())
    card = evaluate(identity, reader, tiny_config, dataset="tiny", split="val", model="m", detector=darkness)
    found = card.detectability
    assert found is not None and found.clean_ap is not None and found.degraded_ap is not None
    assert found.restored_ap == found.degraded_ap < found.clean_ap
    assert found.recovered == 0 and found.restored_rise is None and found.images == 2
    assert set(card.precision_recall) == {"clean", "degraded", "restored"}
    curve = np.array(card.precision_recall["clean"])
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(found.clean_ap, abs=0.05)
    assert curve[-1, 0] == 1 and (np.diff(curve[:, 0]) >= 0).all()
    assert Scorecard.model_validate_json(card.model_dump_json()) == card


def test_what_is_missing_is_said_with_its_reason(
    tmp_path: Path, tiny_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    card = evaluate(
        Restorer(build_model(tiny_config.model).eval()), plain(tmp_path, None), tiny_config,
        dataset="plain", split="val", model="m", detector=darkness,
    )  # fmt: skip
    assert card.detectability is None and set(card.absent) == {"lpips", "detectability"}
    assert not any("defect" in name or "contrast" in name for name in card.overall)
    assert set(card.by_defect_type) == {"unlabelled"} and set(card.by_preset) == {"noise"}


def test_the_preset_of_a_given_degraded_image_reaches_the_score(tmp_path: Path, tiny_config: ExperimentConfig) -> None:
    reader = plain(tmp_path, "blurred")
    restorer = Restorer(build_model(tiny_config.model).eval())
    card = evaluate(restorer, reader, tiny_config, dataset="plain", split="val", model="m")
    assert set(card.by_preset) == {"blurred"}
    own = with_values(tiny_config, {"degradation.use_given": False})
    assert set(evaluate(restorer, reader, own, dataset="plain", split="val", model="m").by_preset) == {"noise"}


def test_an_image_carries_all_that_the_restorer_reported(tiny_store: LocalStore, tiny_config: ExperimentConfig) -> None:
    reader = open_split(tiny_store, "tiny", "val")
    restorer = Restorer(build_model(tiny_config.model).eval())
    card = evaluate(restorer, reader, tiny_config, dataset="tiny", split="val", model="m", limit=1)
    assert card.images[0].report.keys() >= {"retention", "added", "alarm"}
    assert card.images[0].report["retention"] == card.images[0].retention


def test_defects_are_planted_in_defect_free_images_only(
    tmp_path: Path, tiny_store: LocalStore, tiny_config: ExperimentConfig
) -> None:
    restorer = Restorer(build_model(tiny_config.model).eval())
    with pytest.raises(DataError, match="defect-free"):
        planted_survival(restorer, open_split(tiny_store, "tiny", "val"), tiny_config)
    curve = planted_survival(restorer, plain(tmp_path, None, kind="good"), tiny_config, limit=1)
    assert curve.images == 1
    assert all(cell.kept == pytest.approx(cell.degraded_kept) for cell in curve.cells)


def plain(folder: Path, preset: str | None, kind: str = "") -> SplitReader:
    """Two flat images in the split val, with degraded ones if there is a `preset`."""
    rows = ["name,split,defect_type,preset"]
    for index, name in enumerate("ab"):
        pixels = np.full((64, 72), 100 + index, np.uint8)
        pixels[::7] += 20
        for part in ("clean", *(["degraded"] if preset else [])):
            (folder / "plain" / part).mkdir(parents=True, exist_ok=True)
            (folder / "plain" / part / f"{name}.png").write_bytes(encode(Image(pixels, "png", 255)))
        rows.append(f"{name},val,{kind},{preset or ''}")
    (folder / "plain" / "manifest.csv").write_text("\n".join(rows))
    store = LocalStore(folder / "store")
    build_dataset("pairs", folder / "plain", "plain", store)
    return open_split(store, "plain", "val")
