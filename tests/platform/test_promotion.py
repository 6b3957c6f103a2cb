"""The gate between real models on a store in a folder; the rule itself is tested in evaluation/test_gate.py."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kintsugi import cli
from kintsugi.checkpoint import save_checkpoint
from kintsugi.commands.promotion import compare, promote_gated, scorecard_on
from kintsugi.commands.train import publish_best
from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import build_dataset, open_split
from kintsugi.errors import DataError, GateRefused, PreconditionFailed
from kintsugi.evaluation.gate import OVERALL, Verdict
from kintsugi.evaluation.scorecard import Scorecard, evaluate
from kintsugi.imaging import Image, encode
from kintsugi.manifest import make_manifest, put_folder
from kintsugi.models import build_model
from kintsugi.registry import ModelVersion, Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.sections import Split
from kintsugi.storage import LocalStore

Save = Callable[..., Path]

WORSE = {"model.residual": False}
"""Untrained, a residual model leaves images as they are, and another one destroys them."""


@pytest.fixture
def registry(tiny_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    shutil.copytree(tiny_store.root / "datasets", tmp_path / "store" / "datasets")
    store = LocalStore(tmp_path / "store")
    monkeypatch.setenv("KINTSUGI_STORE", store.uri)
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "home"))
    return Registry(store)


@pytest.fixture
def checkpoint(tiny_config: ExperimentConfig, tmp_path: Path) -> Save:
    def save(values: Mapping[str, Any] | None = None) -> Path:
        torch.manual_seed(0)
        config = with_values(tiny_config, values or {})
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        save_checkpoint(tmp_path / "checkpoint", build_model(config.model), config, {"score": 1.0}, {})
        return tmp_path / "checkpoint"

    return save


def publish(registry: Registry, folder: Path, card: bytes = b"{}") -> ModelVersion:
    return registry.publish("unet", folder, card)


def stored_card(registry: Registry, folder: Path, config: ExperimentConfig, split: Split = "test") -> Scorecard:
    """As publishing makes it, with a mark by which it is known again."""
    restorer, reader = Restorer.from_checkpoint(folder), open_split(registry.store, "tiny", split)
    card = evaluate(restorer, reader, config, dataset="tiny", split=split, model="unet")
    return card.model_copy(update={"absent": {"mark": "carried"}})


def test_the_first_promotion_passes_with_nothing_to_compare(
    registry: Registry, checkpoint: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(registry, checkpoint())
    assert cli.main(["models", "promote", "unet@1", "--gate"]) == 0
    told = capsys.readouterr().out
    assert "nothing to compare unet@1 with" in told and "unet@production is now version 1" in told
    assert registry.aliases("unet") == {"production": 1}


def test_a_worse_model_is_refused_with_its_numbers_and_production_stays(
    registry: Registry, checkpoint: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(registry, checkpoint())
    publish(registry, checkpoint(WORSE))
    registry.promote("unet@1")
    assert cli.main(["models", "promote", "unet@2", "--gate"]) == 1
    table, said = capsys.readouterr()
    assert "unet@2 is not promoted over unet@1 on tiny/test" in said and OVERALL in said and "Traceback" not in said
    assert "(waves)" in table and " no" in table and " yes" not in table
    assert registry.aliases("unet") == {"production": 1}


def test_a_better_model_and_an_equal_one_pass_and_machines_get_the_verdict(
    registry: Registry, checkpoint: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(registry, checkpoint(WORSE))
    better = checkpoint()
    for _ in range(2):
        publish(registry, better)
    registry.promote("unet@1", "staging")
    for number in (2, 3):
        assert cli.main(["models", "promote", f"unet@{number}", "--alias", "staging", "--gate", "--json"]) == 0
        verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (verdict["candidate"], verdict["production"]) == (f"unet@{number}", f"unet@{number - 1}")
        assert verdict["passed"] and len(verdict["bounds"]) == 2
    assert registry.aliases("unet") == {"staging": 3}


def test_without_the_gate_a_worse_model_is_promoted_as_before(
    registry: Registry, checkpoint: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(registry, checkpoint())
    publish(registry, checkpoint(WORSE))
    assert cli.main(["models", "promote", "unet@1"]) == 0
    assert cli.main(["models", "promote", "unet@2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ref"] == "unet@2"
    assert registry.aliases("unet") == {"production": 2}


def test_a_refusal_is_an_error_for_other_verbs(registry: Registry, checkpoint: Save) -> None:
    first, second = publish(registry, checkpoint()), publish(registry, checkpoint(WORSE))
    assert promote_gated(registry.store, first).production is None
    with pytest.raises(GateRefused, match="unet@2 is not promoted"):
        promote_gated(registry.store, second)


def test_an_alias_that_moves_during_the_comparison_is_left_alone(registry: Registry, checkpoint: Save) -> None:
    folder = checkpoint()
    versions = [publish(registry, folder) for _ in range(3)]
    registry.promote("unet@1")

    def someone_else(verdict: Verdict) -> None:
        assert verdict.passed
        registry.promote("unet@3")

    with pytest.raises(PreconditionFailed, match="named version 1 and now names version 3"):
        promote_gated(registry.store, versions[1], tell=someone_else)
    assert registry.aliases("unet") == {"production": 3}


def test_a_carried_scorecard_of_the_same_images_and_degradation_is_used(
    registry: Registry, checkpoint: Save, tiny_config: ExperimentConfig
) -> None:
    folder, reader = checkpoint(), open_split(registry.store, "tiny", "test")
    carried = stored_card(registry, folder, tiny_config)
    version = publish(registry, folder, carried.model_dump_json().encode())
    card = scorecard_on(registry, version, reader, tiny_config)
    assert card.absent == {"mark": "carried"} and card.model == "unet@1" and card.overall == carried.overall


@pytest.mark.parametrize("change", ["nothing readable", "another split", "fewer images", "another dataset"])
def test_a_carried_scorecard_of_other_images_is_made_anew(
    registry: Registry, checkpoint: Save, tiny_config: ExperimentConfig, change: str
) -> None:
    folder, reader = checkpoint(), open_split(registry.store, "tiny", "test")
    carried = stored_card(registry, folder, tiny_config, "val" if change == "another split" else "test")
    if change == "fewer images":
        carried = carried.model_copy(update={"images": carried.images[1:]})
    if change == "another dataset":
        carried = carried.model_copy(update={"dataset_digest": "x"})
    body = b"{}" if change == "nothing readable" else carried.model_dump_json().encode()
    card = scorecard_on(registry, publish(registry, folder, body), reader, tiny_config)
    assert "mark" not in card.absent
    assert sorted(image.sample_id for image in card.images) == sorted(reader.sample_ids)
    assert (card.split, card.dataset_digest) == ("test", reader.digest)


def test_production_is_scored_under_the_candidates_degradation(registry: Registry, checkpoint: Save) -> None:
    folder = checkpoint({"degradation.presets": {"lowlight": 1.0}})
    carried = stored_card(registry, folder, load_config(folder / "config.yaml"))
    production = publish(registry, folder, carried.model_dump_json().encode())
    candidate = publish(registry, checkpoint())
    reader, config = open_split(registry.store, "tiny", "test"), load_config(registry.fetch(candidate) / "config.yaml")
    ours, theirs = (scorecard_on(registry, version, reader, config) for version in (candidate, production))
    assert [image.degraded for image in ours.images] == [image.degraded for image in theirs.images]
    assert [image.degraded for image in ours.images] != [image.degraded for image in carried.images]
    assert "mark" not in theirs.absent and compare(registry, candidate, production).passed


def test_a_dataset_without_test_images_is_told(registry: Registry, checkpoint: Save, tmp_path: Path) -> None:
    (tmp_path / "images" / "clean").mkdir(parents=True)
    for index, name in enumerate(("a", "b")):
        pixels = np.full((40, 40), 90 + index, np.uint8)
        (tmp_path / "images" / "clean" / f"{name}.png").write_bytes(encode(Image(pixels)))
    (tmp_path / "images" / "manifest.csv").write_text("name,split\na,train\nb,val\n")
    build_dataset("pairs", tmp_path / "images", "untested", registry.store)
    folder = checkpoint({"data.dataset": "untested"})
    versions = [publish(registry, folder) for _ in range(2)]
    registry.promote("unet@1")
    with pytest.raises(DataError, match="'untested' has no test images"):
        promote_gated(registry.store, versions[1])


def test_the_best_of_a_run_is_published_with_the_scorecard_of_the_split_asked_for(
    registry: Registry, checkpoint: Save
) -> None:
    folder, store = checkpoint(), registry.store
    put_folder(store, "runs/r/checkpoint_0", folder, make_manifest(folder, "checkpoint"))
    (first, val), (second, test) = publish_best(store, "unet", "r"), publish_best(store, "unet", "r", "test")
    assert (val.split, test.split) == ("val", "test")
    calibrations = [Restorer.from_checkpoint(registry.fetch(version)).calibration for version in (first, second)]
    assert calibrations[0] == calibrations[1]
    assert Scorecard.model_validate_json(registry.scorecard(second)) == test
