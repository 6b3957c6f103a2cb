import json
from pathlib import Path

import numpy as np
import pytest

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.errors import ConfigError
from kintsugi_tune.space import Space, break_stick, load_space, mend_stick

SIMPLEX = {"loss.weights": {"simplex": ["defect", "ssim", "perceptual", "edge", "basic"]}}


def test_the_shipped_space_fits_every_shipped_config(repository: Path) -> None:
    space = load_space(repository / "tune/spaces/restoration.yaml")
    for path in sorted((repository / "platform/configs").glob("*.yaml")):
        space.check(load_config(path))
    assert {"loss.weights", "model.dropout", "model.reduction"} <= space.parameters.keys()


def test_every_point_of_the_simplex_is_a_valid_config() -> None:
    space = Space.model_validate({"parameters": SIMPLEX})
    generator = np.random.default_rng(0)
    for _ in range(200):
        flat = {f"loss.weights:{i}": float(generator.random()) for i in range(4)}
        with_values(ExperimentConfig(), space.decode(flat))
    for corner in (0.0, 1.0):
        with_values(ExperimentConfig(), space.decode({f"loss.weights:{i}": corner for i in range(4)}))


def test_stick_breaking_is_uniform_over_the_simplex() -> None:
    generator = np.random.default_rng(0)
    shares = np.array([break_stick(list(generator.random(4))) for _ in range(20_000)])
    assert np.allclose(shares.sum(1), 1)
    assert np.allclose(shares.mean(0), 1 / 5, atol=0.005)
    assert np.allclose(shares.var(0), (1 / 5) * (4 / 5) / 6, atol=0.001)


@pytest.mark.parametrize("shares", [[0.25, 0.3, 0.2, 0.15, 0.1], [1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0]])
def test_known_points_survive_the_way_to_the_searcher_and_back(shares: list[float]) -> None:
    assert np.allclose(break_stick(mend_stick(shares)), shares)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"parameters": {"model.dropout": {"uniform": [0.3, 0.1]}}}, "lower bound"),
        ({"parameters": {"model.dropout": {"uniform": [0, 1], "choice": [1]}}}, "exactly one"),
        ({"parameters": {"model.dropout": {}}}, "exactly one"),
        ({"parameters": {"model.dropout": {"normal": [0, 1]}}}, "normal"),
        ({"parameters": SIMPLEX, "start": [{"model.dropout": 0.1}]}, "start point"),
    ],
)
def test_a_space_that_cannot_work_is_refused_by_name(tmp_path: Path, space: dict[str, object], said: str) -> None:
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    with pytest.raises(ConfigError, match=said):
        load_space(tmp_path / "space.yaml")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"model.dropuot": {"uniform": [0.0, 0.3]}}, "dropuot"),
        ({"model.dropout": {"uniform": [0.0, 1.5]}}, "model.dropout"),
        ({"loss.weights": {"simplex": ["defect", "sharpness"]}}, "sharpness"),
    ],
)
def test_a_space_whose_keys_or_ends_are_no_config_is_refused_before_anything_starts(
    parameters: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Space.model_validate({"parameters": parameters}).check(ExperimentConfig())
