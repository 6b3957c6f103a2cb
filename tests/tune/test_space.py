import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.errors import ConfigError
from kintsugi_tune.space import BoundSpace, Space, break_stick, load_space, mend_stick

LOSSES = ["defect", "ssim", "perceptual", "edge", "basic"]
EVERYTHING = {
    "loss.weights": {"simplex": LOSSES},
    "model.dropout": {"uniform": [0.0, 0.3]},
    "model.reduction": {"each_level": [2, 4, 16]},
    "model.skips": {"each_level": ["off", "concat", "gated"]},
    "model.base": {"choice": [8, 16, 64]},
    "model.attention": {"choice": ["channel", "none"]},
    "model.bias": {"choice": [False, True]},
    "optim.learning_rate": {"loguniform": [1e-4, 5e-3]},
}


def bound(parameters: dict[str, Any], *, config: ExperimentConfig | None = None, **more: Any) -> BoundSpace:
    space = Space.model_validate({"parameters": parameters, **more})
    return BoundSpace(space, config or ExperimentConfig())


def test_the_shipped_space_fits_every_shipped_config(repository: Path) -> None:
    space = load_space(repository / "tune/spaces/restoration.yaml")
    paths = sorted((repository / "platform/configs").glob("*.yaml"))
    for path in paths:
        BoundSpace(space, load_config(path)).check()
    assert paths and {"loss.weights", "model.dropout", "model.reduction"} <= space.parameters.keys()


def test_the_first_known_point_of_the_shipped_space_is_the_published_recipe(repository: Path) -> None:
    space = load_space(repository / "tune/spaces/restoration.yaml")
    assert with_values(ExperimentConfig(), next(iter(space.start.values()))) == ExperimentConfig()


def test_every_sampled_point_is_a_valid_config_with_the_sampled_values() -> None:
    space = bound(EVERYTHING)
    for seed in range(100):
        values = space.values(space.random(seed))
        tree = space.accepted(values).model_dump(mode="json")
        assert values.keys() == EVERYTHING.keys()
        for key, value in values.items():
            section, name = key.split(".")
            assert tree[section][name] == value


def test_random_points_are_the_same_for_the_same_seed_and_reach_the_whole_space() -> None:
    space = bound(EVERYTHING)
    assert space.random(5) == space.random(5) != space.random(6)
    points = [space.values(space.random(seed)) for seed in range(100)]
    assert {point["model.base"] for point in points} == {8, 16, 64}
    assert {point["model.bias"] for point in points} == {True, False}
    assert {skip for point in points for skip in point["model.skips"]} == {"off", "concat", "gated"}
    rates = np.log10([point["optim.learning_rate"] for point in points])
    assert rates.min() < -3.9 and rates.max() > -2.4 and -3.3 < np.median(rates) < -2.9
    assert max(point["model.dropout"] for point in points) > 0.28


def test_the_corners_of_a_simplex_are_valid_configs() -> None:
    space = bound({"loss.weights": {"simplex": LOSSES}})
    for corner in (0.0, 1.0):
        space.accepted(space.values({f"loss.weights:{i}": corner for i in range(4)}))


def test_stick_breaking_is_uniform_over_the_simplex() -> None:
    generator = np.random.default_rng(0)
    shares = np.array([break_stick(list(generator.random(4))) for _ in range(20_000)])
    assert np.allclose(shares.sum(1), 1)
    assert np.allclose(shares.mean(0), 1 / 5, atol=0.005)
    assert np.allclose(shares.var(0), (1 / 5) * (4 / 5) / 6, atol=0.001)


@pytest.mark.parametrize(
    "shares",
    [
        [0.25, 0.3, 0.2, 0.15, 0.1],
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.5, 0.5, 0.0],
        [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0],
        [0.1] * 10,
    ],
)
def test_shares_survive_the_way_to_the_searcher_and_back(shares: list[float]) -> None:
    uniforms = mend_stick(shares)
    assert all(0 <= uniform <= 1 for uniform in uniforms)
    assert np.allclose(break_stick(uniforms), shares, atol=1e-12)


def test_a_known_point_survives_the_way_to_the_searcher_and_back() -> None:
    point = {
        "loss.weights": dict(zip(LOSSES, (0.3, 0.25, 0.15, 0.2, 0.1), strict=True)),
        "model.dropout": 0.05,
        "model.reduction": [2, 4, 16, 4],
        "model.skips": ["off", "gated", "concat", "off"],
        "model.base": 16,
        "model.attention": "none",
        "model.bias": False,
        "optim.learning_rate": 0.002,
    }
    space = bound(EVERYTHING)
    found = space.values(space.params(point))
    shares = found.pop("loss.weights")
    assert shares == pytest.approx({**point.pop("loss.weights"), "charbonnier": 0, "frequency": 0})
    assert found == point


def test_what_a_known_point_leaves_out_has_the_configs_own_value() -> None:
    config = with_values(ExperimentConfig(), {"model.dropout": 0.2, "model.base": 8, "model.reduction": [4, 4, 2, 16]})
    space = bound(EVERYTHING, config=config)
    found = space.values(space.params({"model.base": 16}))
    assert (found["model.dropout"], found["model.base"], found["model.reduction"]) == (0.2, 16, [4, 4, 2, 16])
    assert found["loss.weights"] == pytest.approx(config.loss.weights.model_dump())


def test_one_value_of_a_known_point_holds_for_every_level() -> None:
    space = bound(EVERYTHING)
    assert space.values(space.params({"model.reduction": 4}))["model.reduction"] == [4, 4, 4, 4]


@pytest.mark.parametrize("levels", [1, 3])
def test_choices_for_each_level_have_one_entry_per_level(levels: int) -> None:
    config = ExperimentConfig.model_validate({"model": {"levels": levels}})
    space = bound({"model.skips": {"each_level": ["off", "add"]}}, config=config)
    assert list(space.distributions) == [f"model.skips:{level}" for level in range(levels)]
    assert [len(space.values(space.random(seed))["model.skips"]) for seed in range(3)] == [levels] * 3


def test_ascending_numbers_are_ranks_and_other_choices_are_categories() -> None:
    kinds = bound({**EVERYTHING, "model.stem": {"choice": [4, 2]}}).distributions
    assert kinds["model.base"] == IntDistribution(0, 2)
    assert kinds["model.reduction:3"] == IntDistribution(0, 2)
    assert kinds["model.skips:0"] == CategoricalDistribution(("off", "concat", "gated"))
    assert kinds["model.bias"] == CategoricalDistribution((False, True))
    assert kinds["model.stem"] == CategoricalDistribution((4, 2))
    assert kinds["optim.learning_rate"] == FloatDistribution(1e-4, 5e-3, log=True)
    assert kinds["model.dropout"] == FloatDistribution(0.0, 0.3)
    assert kinds["loss.weights:3"] == FloatDistribution(0.0, 1.0) and "loss.weights:4" not in kinds


def test_a_rank_stands_for_its_number() -> None:
    space = bound({"model.base": {"choice": [8, 16, 64]}})
    assert [space.values({"model.base": rank})["model.base"] for rank in range(3)] == [8, 16, 64]
    assert space.params({"model.base": 64}) == {"model.base": 2}


def test_names_that_a_simplex_leaves_out_get_no_share() -> None:
    space = bound({"loss.weights": {"simplex": ["ssim", "charbonnier"]}})
    for seed in range(20):
        shares = space.accepted(space.values(space.random(seed))).loss.weights
        assert shares.ssim + shares.charbonnier == pytest.approx(1)
        assert (shares.defect, shares.perceptual, shares.edge, shares.basic, shares.frequency) == (0,) * 5


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "parameters"),
        ({"parameters": {}}, "parameters"),
        (None, "dictionary"),
        ({"parameters": EVERYTHING, "constrains": []}, "constrains"),
        ({"parameters": {"model.dropout": {"uniform": [0.3, 0.1]}}}, "model.dropout: the lower bound"),
        ({"parameters": {"optim.learning_rate": {"loguniform": [0, 0.1]}}}, "must be above 0"),
        ({"parameters": {"model.dropout": {"uniform": [0, 1], "choice": [1, 2]}}}, "exactly one"),
        ({"parameters": {"model.dropout": {}}}, "exactly one"),
        ({"parameters": {"model.dropout": {"normal": [0, 1]}}}, "normal"),
        ({"parameters": {"model.base": {"choice": [8]}}}, "model.base"),
        ({"parameters": {"model.base": {"choice": [8, 16, 8]}}}, "names a value twice"),
        ({"parameters": {"loss.weights": {"simplex": ["ssim", "ssim"]}}}, "names a value twice"),
        ({"parameters": {"model.base": {"choice": [8, 16]}}, "start": {"a": {"model.dropout": 0.1}}}, r"start\.a sets"),
    ],
)
def test_a_space_that_cannot_work_is_refused_by_name(tmp_path: Path, space: object, said: str) -> None:
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    with pytest.raises(ConfigError, match=said) as caught:
        load_space(tmp_path / "space.yaml")
    assert "space.yaml" in str(caught.value)


@pytest.mark.parametrize("content", [b"parameters: [", b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "space.yaml").write_bytes(content)
    for path in (tmp_path / "space.yaml", tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match=rf"{path.name}: cannot be read"):
            load_space(path)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"model.dropuot": {"uniform": [0.0, 0.3]}}, "dropuot"),
        ({"model.dropout": {"uniform": [0.0, 1.5]}}, r"model\.dropout.*1\.5"),
        ({"model.dropout": {"uniform": [-0.1, 0.5]}}, r"model\.dropout.*-0\.1"),
        ({"loss.mask": {"loguniform": [0.1, 1]}}, r"loss\.mask"),
        ({"model.attention": {"choice": ["channel", "chanel"]}}, r"model\.attention.*chanel"),
        ({"model.reduction": {"each_level": [0, 2]}}, "reduction must be at least 1"),
        ({"loss.weights": {"simplex": ["defect", "sharpness"]}}, "sharpness"),
        ({"model.dropout": {"simplex": ["defect", "ssim"]}}, r"model\.dropout"),
        ({"model.base": {"uniform": [8, 64]}}, r"none of .*model\.base.*integer"),
    ],
)
def test_a_space_whose_keys_or_ends_are_no_config_is_refused_before_anything_starts(
    parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        bound(parameters).check()


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"model.dropout": 0.5}, r"model\.dropout: 0\.5 is outside of the space"),
        ({"model.base": 32}, r"model\.base: 32 is not in the space"),
        ({"model.skips": ["off", "off"]}, r"skips"),
        ({"model.skips": "add"}, r"model\.skips: add is not in the space"),
        ({"loss.weights": {"defect": 0.5, "ssim": 0.4}}, "sum to 1"),
        ({"loss.weights": dict.fromkeys(LOSSES, 0.3)}, "sum to 1"),
        ({"loss.weights": {"defect": 0.5, "charbonnier": 0.5}}, r"loss\.weights"),
        ({"optim.learning_rate": 1e-4, "model.dropout": 0.3}, "the constraint .* does not hold"),
    ],
)
def test_a_known_point_that_is_not_in_the_space_is_refused_by_its_name(point: dict[str, Any], said: str) -> None:
    space = bound(EVERYTHING, start={"odd": point}, constraints=["model.dropout <= 0.2"])
    with pytest.raises(ConfigError, match=said) as caught:
        space.check()
    assert str(caught.value).startswith("start.odd: ")


def test_a_config_that_no_point_of_the_space_has_is_refused_as_a_known_point() -> None:
    """A known point that leaves a key out takes the config's own value, which may lie elsewhere."""
    space = bound({"model.base": {"choice": [8, 16]}}, start={"own": {}})
    with pytest.raises(ConfigError, match=r"start\.own: model\.base: 64 is not in the space"):
        space.check()
    space = bound({"loss.weights": {"simplex": ["ssim", "edge"]}}, start={"own": {}})
    with pytest.raises(ConfigError, match=r"start\.own: loss\.weights: .* is not in the space"):
        space.check()


def test_sampled_points_are_accepted_only_where_every_constraint_holds() -> None:
    texts = ["loss.weights.edge + loss.weights.ssim <= 0.5", "model.skips[0] == 'off' or model.base < 64"]
    space, free = bound(EVERYTHING, constraints=texts), bound(EVERYTHING)
    space.check()
    outcomes: list[bool] = []
    for seed in range(100):
        values = space.values(space.random(seed))
        weights, skips = values["loss.weights"], values["model.skips"]
        allowed = weights["edge"] + weights["ssim"] <= 0.5 and (skips[0] == "off" or values["model.base"] < 64)
        outcomes.append(allowed)
        free.accepted(values)
        if allowed:
            space.accepted(values)
        else:
            with pytest.raises(ConfigError, match=r"the constraint .* does not hold"):
                space.accepted(values)
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["model.dropout < 0.1", "model.dropout > 0.2"], r"none of .*'model\.dropout"),
        (["model.dropout > 1"], r"none of .*'model\.dropout > 1' does not hold"),
        (["model.dropuot < 1"], "'model.dropuot < 1': there is no setting 'dropuot'"),
        (["model.dropout < 1 or model.dropuot < 1"], "there is no setting 'dropuot'"),
        (["model.dropout < 1", "train.max_minutes < 5"], "'train.max_minutes < 5': .*not supported"),
    ],
)
def test_constraints_that_cannot_work_are_refused_before_anything_starts(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bound({"model.dropout": {"uniform": [0.0, 0.3]}}, constraints=texts).check()


def test_a_constraint_that_cannot_be_read_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"constraint 'open\('x'\) == 1'"):
        bound({"model.dropout": {"uniform": [0.0, 0.3]}}, constraints=["open('x') == 1"])
