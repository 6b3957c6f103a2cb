from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.data.dataset import open_split
from kintsugi.evaluation import ImageScore, bootstrap, draw, evaluate, summarise
from kintsugi.models import build_model
from kintsugi.restore import Restorer
from kintsugi.storage import LocalStore


def scored(sample: str, part: str, gain: float, defect_gain: float | None, category: str = "a") -> ImageScore:
    figures = {"aligned_psnr": (20.0, 20.0 + gain)}
    if defect_gain is not None:
        figures["aligned_defect_psnr"] = (18.0, 18.0 + defect_gain)
    return ImageScore(
        sample_id=sample,
        part_id=part,
        category=category,
        defect_type="good" if defect_gain is None else "pit",
        degraded={name: pair[0] for name, pair in figures.items()},
        restored={name: pair[1] for name, pair in figures.items()},
        retention=1.0,
        added=0.0,
        alarm=False,
    )


def summary(*images: ImageScore) -> object:
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
