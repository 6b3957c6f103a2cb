"""What a search was asked for: kept in the store, and refused before anything starts where it cannot work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi.config import with_values
from kintsugi.data.dataset import build_dataset
from kintsugi.errors import ConfigError
from kintsugi.imaging import Image, encode, encode_mask
from kintsugi.storage import MemoryStore
from kintsugi_tune.ledger import Plan, check_plan, load_plan, save_plan, trial_config

Plans = Callable[..., Plan]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Holds the datasets `flawed` and `flawless`; the latter has a defect to train with, and none to validate with."""
    monkeypatch.setenv("KINTSUGI_CACHE", str(tmp_path / "cache"))
    store = MemoryStore()
    for name, kinds in (("flawed", ("scratch", "good", "scratch")), ("flawless", ("scratch", "good", "good"))):
        rows = ["name,part,category,defect_type,split"]
        for index, (kind, split) in enumerate(zip(kinds, ("train", "val", "val"), strict=True)):
            rows.append(f"i{index},p{index},steel,{kind},{split}")
            pixels = np.random.default_rng(index).integers(0, 256, (24, 32)).astype(np.uint8)
            mask = np.zeros((24, 32), np.bool_)
            mask[4:9, 10:14] = kind != "good"
            for part, data in (("clean", encode(Image(pixels, "png", 255))), ("mask", encode_mask(mask))):
                path = tmp_path / name / part / f"i{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        (tmp_path / name / "manifest.csv").write_text("\n".join(rows))
        build_dataset("pairs", tmp_path / name, name, store)
    return store


@pytest.fixture
def flawed(plan_of: Plans) -> Plans:
    return lambda dataset="flawed", sections=None, **more: plan_of(
        sections={"data": {"dataset": dataset}, **(sections or {})}, **more
    )


def test_a_plan_is_read_back_as_it_was_saved_and_saved_once(plan_of: Plans) -> None:
    store = MemoryStore()
    plan = replace(plan_of(constraints=("model.base <= 64",)), init="models/unet/1", model="parts")
    save_plan(store, plan)
    assert load_plan(store, "s") == plan
    with pytest.raises(ConfigError, match=r"there is a search s already: continue it with --resume s"):
        save_plan(store, plan_of())
    assert load_plan(store, "s") == plan


def test_a_search_that_is_not_there_is_refused_with_those_that_are(plan_of: Plans) -> None:
    store = MemoryStore({"runs/r/checkpoint_0/manifest.json": b"{}"})
    with pytest.raises(ConfigError, match="no search nightly: there is none yet"):
        load_plan(store, "nightly")
    for name in ("two", "one"):
        save_plan(store, replace(plan_of(), name=name))
    with pytest.raises(ConfigError, match="no search nightly: there are one, two"):
        load_plan(store, "nightly")


def test_a_trial_trains_with_its_values_its_budget_and_no_patience_of_its_own(plan_of: Plans) -> None:
    sections = {"train": {"patience": 1, "workers": 4, "min_workers": 2}, "data": {"batch_size": 8}}
    config = trial_config(plan_of(sections=sections, workers_per_trial=2), {"model.dropout": 0.05}, 7)
    assert (config.model.dropout, config.train.epochs, config.train.patience) == (0.05, 7, 7)
    assert (config.train.workers, config.train.min_workers) == (2, None)


def test_a_plan_that_can_work_passes(store: MemoryStore, flawed: Plans) -> None:
    check_plan(flawed(), store)
    assert not any(info.key.startswith("runs/") for info in store.list())


def test_defects_are_no_objective_where_no_validation_image_has_one(store: MemoryStore, flawed: Plans) -> None:
    with pytest.raises(ConfigError, match=r"no validation image of flawless has a defect: set search\.objectives"):
        check_plan(flawed("flawless"), store)
    for objectives in (["psnr"], ["score"]):
        check_plan(flawed("flawless", objectives=objectives), store)


def test_models_of_different_shapes_cannot_start_from_one_model(store: MemoryStore, flawed: Plans) -> None:
    with pytest.raises(ConfigError, match=r"--init-from needs models of one shape.* varies model\.base, model\.skips:"):
        check_plan(replace(flawed(), init="models/unet/1"), store)
    shapeless = {"model.dropout": {"uniform": [0.0, 0.3]}, "optim.ema": {"uniform": [0.0, 0.9]}}
    check_plan(replace(flawed(parameters=shapeless, start={}), init="models/unet/1"), store)


@pytest.mark.parametrize("start", [{}, {"recipe": {}}])
def test_workers_that_do_not_divide_a_batch_are_refused(
    store: MemoryStore, flawed: Plans, start: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size must be a multiple of train\.workers .*got 8 and 3"):
        check_plan(flawed(start=start, workers_per_trial=3), store)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"parameters": {"model.dropuot": {"uniform": [0.0, 0.3]}}, "start": {}}, "dropuot"),
        ({"start": {"odd": {"model.base": 32}}}, r"start\.odd: model\.base: 32 is not in the space"),
        ({"constraints": ("model.base < 0",), "start": {}}, "none of .*'model.base < 0' does not hold"),
        ({"constraints": ("model.bsae < 0",)}, "'model.bsae < 0': there is no setting 'bsae'"),
    ],
)
def test_a_space_that_cannot_work_is_refused(
    store: MemoryStore, flawed: Plans, space: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_plan(flawed(**space), store)


def test_a_curriculum_of_the_config_goes_through_every_trial(plan_of: Plans) -> None:
    phases = [{"epochs": 1, "values": {"data.crop": 64}}]
    plan = plan_of(sections={"train": {"curriculum": phases}})
    config = trial_config(plan, {"model.base": 8}, 3)
    assert (config.at_epoch(0).data.crop, config.at_epoch(1).data.crop) == (64, 256)
    assert config == with_values(plan.config, {
        "model.base": 8, "train.epochs": 3, "train.patience": 3, "train.workers": 1, "train.min_workers": None,
    })  # fmt: skip
