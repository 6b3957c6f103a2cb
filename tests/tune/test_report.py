import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, parse_config
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.data.synthetic import write_synthetic
from kintsugi.evaluation.scorecard import evaluate
from kintsugi.manifest import put_folder
from kintsugi.models import build_model
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import LocalStore, MemoryStore, ObjectStore
from kintsugi_tune.influence import correlations, importances
from kintsugi_tune.looked import look, members_shown
from kintsugi_tune.record import SearchRecord, State, TrialRecord
from kintsugi_tune.report import write_report
from kintsugi_tune.values import axes, coordinate_label

CONFIG: dict[str, Any] = {
    "data": {"dataset": "small", "crop": 16, "batch_size": 2},
    "degradation": {"presets": {"noise": 1.0}},
    "model": {"channels": 1, "base": 4, "levels": 2, "reduction": 2, "mask": "none", "residual": True},
    "loss": {"perceptual": {"network": "vgg11", "layers": [1], "weights": "random"}},
    "train": {"workers": 1},
    "search": {"trials": 8, "epochs": 4},
}
SHARES = ("defect", "ssim", "basic")
CHECKPOINTS = (0, 3, 5)
START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="session")
def config() -> ExperimentConfig:
    return parse_config(CONFIG)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig) -> LocalStore:
    """Drawn surfaces with defects of 48 px, and a model for each of three trials."""
    store = LocalStore(tmp_path_factory.mktemp("store"))
    images = write_synthetic(tmp_path_factory.mktemp("images"), parts=9, size=48, materials=("weave", "metal"))
    build_dataset("pairs", images, "small", store)
    for number in CHECKPOINTS:
        torch.manual_seed(number)
        folder = tmp_path_factory.mktemp("checkpoint")
        manifest = save_checkpoint(folder, build_model(config.model), config, {"score": 1.0}, {})
        put_folder(store, f"runs/s/trials/t{number}/checkpoint_1", folder, manifest)
    return store


def distributions() -> dict[str, BaseDistribution]:
    return {
        "loss.weights:0": FloatDistribution(0, 1),
        "loss.weights:1": FloatDistribution(0, 1),
        "model.reduction:0": CategoricalDistribution((2, 4)),
        "model.reduction:1": CategoricalDistribution((2, 4)),
        "model.skips": CategoricalDistribution(("off", "add")),
        "optim.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    }


def trial(number: int, gain: float, defect: float, *, state: State = "complete", epochs: int = 4) -> TrialRecord:
    first, rate = 0.1 + number / 20, 10 ** (-4 + number / 5)
    params = {
        "loss.weights:0": first, "loss.weights:1": (number * 5 % 8) / 8, "model.reduction:0": (2, 4)[number % 2],
        "model.reduction:1": 4, "model.skips": ("off", "add")[number // 2 % 2], "optim.learning_rate": rate,
    }  # fmt: skip
    values = {
        "loss.weights": dict(zip(SHARES, (first, 0.9 - first, 0.1), strict=True)),
        "model.reduction": [params["model.reduction:0"], 4],
        "model.skips": params["model.skips"],
        "optim.learning_rate": rate,
    }
    curve = tuple(
        {"epoch": e, "score": min(gain, defect) * e / epochs, "loss/total": 1 / e, "loss/defect": 0.5 / e,
         "val/psnr": 20 + gain * e / epochs, "val/psnr_gain": gain * e / epochs,
         "val/defect_psnr": 15 + defect * e / epochs, "val/defect_psnr_gain": defect * e / epochs}
        for e in range(1, epochs + 1)
    )  # fmt: skip
    return TrialRecord(
        number=number, state=state, screened=number > 4, label="recipe" if number == 0 else None,
        run=f"s/trials/t{number}", values=values, params=params,
        point={"psnr": 20 + gain, "defect_psnr": 15 + defect} if state == "complete" else {}, curve=curve,
        started=START, ended=START + timedelta(minutes=number),
        reason="RuntimeError: <loss> is not finite" if state == "failed" else None,
    )  # fmt: skip


def trials() -> tuple[TrialRecord, ...]:
    """0 is the recipe; 3, 4 and 5 are the front, 3 has the highest score; nobody kept the model of 4."""
    return (
        trial(0, 1, 1), trial(1, 2, 2), trial(2, 2.5, 1), trial(3, 4, 4), trial(4, 5, 2), trial(5, 2, 5),
        trial(6, 1, 0.5, state="pruned", epochs=1), trial(7, 0, 0, state="failed", epochs=0),
    )  # fmt: skip


def search(config: ExperimentConfig, found: Sequence[TrialRecord], *objectives: str) -> SearchRecord:
    origin = {"psnr": 20.0, "defect_psnr": 15.0, "score": 0.0}
    names = objectives or ("psnr", "defect_psnr")
    found = [replace(each, point={name: each.point[name] for name in names if name in each.point}) for each in found]
    return SearchRecord(
        "<s>", names, config, distributions(), tuple(found), {name: origin[name] for name in names}
    )  # fmt: skip


def visible(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, store: LocalStore, config: ExperimentConfig) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(search(config, trials()), store, path, images=2).read_text()


def points(page: str) -> dict[int, str]:
    """Trial number -> where its mark in the front's plot leads."""
    found = re.findall(r'<a class="point" href="([^"]*)" data-trial="(\d+)"', page)
    return {int(number): link for link, number in found}


def row(page: str, number: int) -> str:
    start = page.index(f'<tr><td><span id="trial-{number}"')
    return visible(page[start : page.index("</tr>", start)])


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert "http:" not in page and "https:" not in page and "@import" not in page and 'src="data:' in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert set(re.findall(r'(?:href|url)(?:="|\()([^")]?)', page)) <= {"#"}
    assert not re.search(r"fetch\(|XMLHttpRequest|<script src|<link", page)


def test_names_and_reasons_are_text_and_never_markup(page: str) -> None:
    assert "&lt;s&gt;" in page and "<s>" not in page
    assert "&lt;loss&gt; is not finite" in page and "<loss>" not in page


def test_every_link_leads_to_a_place_on_the_page_and_no_place_is_there_twice(page: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert len(ids) == len(set(ids))


def test_a_mark_leads_to_pictures_where_there_are_some_and_else_to_its_row(page: str) -> None:
    links = points(page)
    assert {0, 1, 2, 3, 4, 5} <= links.keys() and 7 not in links
    assert links[3] == "#pictures-3" and links[5] == "#pictures-5" and links[0] == "#pictures-0"
    assert links[4] == "#trial-4" and links[1] == "#trial-1"


def test_what_is_far_from_the_complete_trials_is_told_in_words_and_does_not_stretch_the_plot(
    tmp_path: Path, config: ExperimentConfig
) -> None:
    found = [trial(0, 9, 9), trial(1, 9.5, 9.5), trial(2, 1, 1, state="pruned"), trial(3, 9.2, 9.2, state="pruned")]
    page = write_report(search(config, found), MemoryStore(), tmp_path / "r.html").read_text()
    assert points(page).keys() == {0, 1, 3}
    assert "the last figures of trials that are not complete (1); the degraded images, at 20.00 / 15.00 dB" in page


def test_without_a_script_each_mark_still_tells_its_values(page: str) -> None:
    titles = re.findall(r"<title>(trial [^<]*)</title>", page)
    told = next(title for title in titles if title.startswith("trial 3,"))
    assert "PSNR, dB 24.00 (+4.00 over degraded)" in told and "weights: defect 0.25, ssim 0.65, basic 0.1" in told
    assert "reduction: 4, 4" in told


def test_the_epochs_spent_stand_against_those_of_full_trials(page: str) -> None:
    words = visible(page)
    assert "8 trials: 6 complete, 1 stopped early, 1 failed" in words
    assert "25 epochs were trained, 78% of the 32 that 8 full trials take" in words


def test_the_chosen_trial_is_compared_with_the_recipe_over_the_same_images(
    page: str, store: LocalStore, config: ExperimentConfig
) -> None:
    reader = open_split(store, "small", "val")
    means: list[float] = []
    for number in (0, 3):
        torch.manual_seed(number)
        restorer = Restorer(build_model(config.model).eval())
        card = evaluate(restorer, reader, config, dataset="small", split="val", model="m")
        means.append(card.overall["aligned_psnr"].restored)
    table = page[page.index("<h2>Chosen against recipe") : page.index("<h2>Before and after")]
    line = next(visible(each) for each in table.split("<tr>") if "PSNR, dB" in each)
    assert f" {means[0]:.2f} {means[1]:.2f} {means[1] - means[0]:+.2f} [" in re.sub(r"\s+", " ", line)


def test_fewer_images_are_taken_from_all_over_the_split(store: LocalStore, config: ExperimentConfig) -> None:
    whole, some = (look(search(config, trials()), store, 1, scored).cards[3].images for scored in (60, 2))
    assert [image.sample_id for image in some] == [whole[0].sample_id, whole[len(whole) // 2].sample_id]


def test_the_worst_images_are_shown_as_every_member_left_restores_them(page: str) -> None:
    strips = page[page.index("<h2>Before and after") : page.index("<h2>How the front grew")].split('class="strip"')[1:]
    captions = [re.findall(r"<figcaption>([^<]*)", each) for each in strips]
    wanted = ["degraded", "trial 3, chosen", "trial 5", "trial 0 (recipe)", "clean", "labelled defect"]
    assert captions == [wanted, wanted]


def test_a_checkpoint_that_is_gone_is_named_and_the_rest_is_shown(page: str) -> None:
    assert "Without the checkpoint of trial 4: run s/trials/t4 has no whole checkpoint" in visible(page)


def test_every_trial_has_its_row_with_state_figures_values_and_reason(page: str) -> None:
    assert "complete, on the front 4 24.00 19.00 4.00 weights: defect 0.25" in row(page, 3)
    assert "stopped early 1 21.00 15.50 0.50" in row(page, 6)
    assert "failed 0" in row(page, 7) and "is not finite" in row(page, 7) and "s/trials/t7" in row(page, 7)


def test_curves_importance_and_all_values_are_drawn(page: str) -> None:
    words = visible(page)
    for title in ("loss: defect", "loss: total", "hypervolume, dB²", "Importance", "rank correlation", "learning rate"):
        assert title in words
    assert page.count('class="line member"') == 3 and page.count('class="line"') == 3


@pytest.mark.parametrize("objectives", [("psnr",), ("psnr", "defect_psnr", "score")])
def test_one_objective_and_three_are_told_as_well(
    tmp_path: Path, config: ExperimentConfig, objectives: tuple[str, ...]
) -> None:
    found = [replace(t, point=t.point and {**t.point, "score": t.best["score"]}) for t in trials()]
    page = write_report(search(config, found, *objectives), MemoryStore(), tmp_path / "r.html").read_text()
    assert points(page).keys() >= {0, 1, 2, 3, 4, 5}
    assert ("What each trial reached" in page) == (len(objectives) == 1)
    assert ("the plot shows the first two" in page) == (len(objectives) == 3)
    assert "hypervolume, dB" in visible(page)


def test_without_the_dataset_the_page_says_so_and_is_written(tmp_path: Path, config: ExperimentConfig) -> None:
    empty: ObjectStore = MemoryStore()
    words = visible(write_report(search(config, trials()), empty, tmp_path / "r.html").read_text())
    assert "Without the validation images: there is no dataset" in words
    assert "small, which is not in the store any more" in words and "All trials" in words


def test_before_any_trial_is_complete_curves_and_table_are_there(
    tmp_path: Path, store: LocalStore, config: ExperimentConfig
) -> None:
    found = [trial(1, 2, 2, state="running", epochs=2), trial(6, 1, 1, state="pruned", epochs=1)]
    page = write_report(search(config, found), store, tmp_path / "r.html").read_text()
    words = visible(page)
    assert "No trial is complete yet" in words and "from 0 complete trials" in words
    assert "loss: defect" in words and "stopped early 1" in row(page, 6)
    assert not points(page) and "Before and after" not in words


def test_a_search_without_a_trial_has_a_page(tmp_path: Path, store: LocalStore, config: ExperimentConfig) -> None:
    words = visible(write_report(search(config, ()), store, tmp_path / "r.html").read_text())
    assert "0 trials: none. 0 epochs were trained." in words


def test_three_complete_trials_are_too_few_for_importance(
    tmp_path: Path, store: LocalStore, config: ExperimentConfig
) -> None:
    page = write_report(search(config, trials()[:3]), store, tmp_path / "r.html", images=1).read_text()
    assert "from 3 complete trials: it takes at least 4" in visible(page)
    assert page.count('class="strip"') == 1


def test_what_decides_an_objective_has_the_largest_share_and_the_sign_of_its_effect(config: ExperimentConfig) -> None:
    found = [replace(trial(n, 1, 1), point={"psnr": 20.0 + n, "defect_psnr": 15.0 - n}) for n in range(8)]
    record = search(config, found)
    shares = importances(record, "psnr")
    assert sum(shares.values()) == pytest.approx(1)
    assert set(list(shares)[:2]) == {"learning rate", "weights: defect"}
    assert correlations(record, "psnr")["weights: defect"] == pytest.approx(1)
    assert correlations(record, "defect_psnr")["weights: defect"] == pytest.approx(-1)
    assert "weights: basic" not in correlations(record, "psnr")


def test_a_known_point_outside_the_ranges_takes_no_part_in_importance(config: ExperimentConfig) -> None:
    found = [trial(n, n, n) for n in range(5)]
    outside = [replace(each, params={**each.params, "optim.learning_rate": 9.0}) for each in found[:2]]
    assert importances(search(config, found), "psnr")
    assert importances(search(config, [*outside, *found[2:]]), "psnr") == {}


def test_a_share_is_named_with_those_drawn_before_it_and_a_level_by_its_number(config: ExperimentConfig) -> None:
    record = search(config, trials())
    assert [coordinate_label(key, record) for key in ("loss.weights:0", "loss.weights:1", "model.reduction:1")] == [
        "weights: defect", "weights: ssim | defect", "reduction: level 1",
    ]  # fmt: skip


def test_choices_stand_evenly_apart_and_a_learning_rate_by_its_logarithm(config: ExperimentConfig) -> None:
    record = search(config, trials()[:5])
    found = {axis.label: axis.places() for axis in axes(record, record.trials)}
    assert found["learning rate"][2] == pytest.approx(0.5)
    assert found["reduction: level 0"] == {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0}
    assert set(found["skips"].values()) == {0.0, 1.0}


def test_of_a_long_front_the_ends_and_the_chosen_are_shown(config: ExperimentConfig) -> None:
    record = search(config, [trial(0, 0.5, 0.5), *(trial(n, n, 10 - n) for n in range(1, 9))])
    assert [each.number for each in members_shown(record)] == [8, 7, 5, 1, 0]
