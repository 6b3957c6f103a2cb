from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from kintsugi.config import ExperimentConfig, load_config, parse_config, with_values
from kintsugi.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text("train: {epochs: 3}\n")
    return path


def test_an_empty_file_is_the_published_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == ExperimentConfig()


def test_defaults_are_the_published_recipe() -> None:
    config = ExperimentConfig()
    weights = config.loss.weights
    assert (weights.defect, weights.ssim, weights.perceptual, weights.edge, weights.basic) == (
        0.25,
        0.3,
        0.2,
        0.15,
        0.1,
    )
    assert (config.model.base, config.model.levels, config.model.reduction) == (64, 4, (16,) * 4)
    assert config.model.skips == ("off",) * 4
    assert (config.optim.learning_rate, config.model.dropout) == (1e-4, 0.15)
    assert (config.train.patience, config.data.batch_size) == (25, 8)


def test_yaml_brings_back_the_same_config(tmp_path: Path) -> None:
    config = with_values(
        ExperimentConfig(),
        {
            "model.levels": 2,
            "model.blocks": 1,
            "model.skips": True,
            "model.reduction": 4,
            "degradation.presets": {"mixed": 2},
        },
    )
    (tmp_path / "dumped.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "dumped.yaml") == config


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        ExperimentConfig().train.epochs = 2  # type: ignore[misc]


@pytest.mark.parametrize("key", ["train.epoch", "epochs", "loss.weights.charm"])
def test_an_unknown_key_is_refused_by_its_dotted_name(file: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: no such setting"):
        load_config(file, [f"{key}=1"])


def test_the_refusal_of_an_unknown_key_names_file_and_key(file: Path) -> None:
    file.write_text("train: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"experiment\.yaml: train\.epoch: no such setting"):
        load_config(file)


def test_every_fault_of_a_file_is_told_at_once(file: Path) -> None:
    file.write_text("train: {epochs: 0, patience: -1}")
    with pytest.raises(ConfigError, match=r"train\.epochs.*train\.patience"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=7", 7),
        ("optim.learning_rate=3e-4", 3e-4),
        ("data.flips=false", False),
        ("data.dataset=parts@0123", "parts@0123"),
        ("model.skips=[true, false, add, gated]", ("concat", "off", "add", "gated")),
        ("model.reduction=8", (8, 8, 8, 8)),
        ("train.steps_per_epoch=null", None),
        ("degradation.presets={noise: 1, jpeg: 3}", {"noise": 1.0, "jpeg": 3.0}),
    ],
)
def test_set_reads_its_value_as_yaml(file: Path, override: str, expected: object) -> None:
    config: object = load_config(file, [override])
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == expected


def test_the_last_set_wins_and_the_file_gives_the_rest(file: Path) -> None:
    config = load_config(file, ["train.seed=1", "train.seed=2"])
    assert (config.train.seed, config.train.epochs) == (2, 3)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.epochs", "write it as key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epochs.deep=1", "is a value, not a section"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1 \(got 0\)"),
        ("optim.learning_rate=.nan", r"optim\.learning_rate: .*finite"),
        ("loss.weights.defect=0.5", r"sum to 1 \(they sum to 1\.25\): divide each by 1\.25"),
        (
            "data.batch_size=7",
            r"data\.batch_size must be a multiple of train\.workers \* train\.micro_batches "
            r"\(got 7 and 2\): set data\.batch_size=8",
        ),
        ("model.blocks=[1, 2]", "blocks needs one entry for each of the 4 levels and one for the bottleneck"),
        ("model.attention_window=24", r"multiple of stem \* 2\*\*levels = 16 px \(got 24\)"),
        ("model.mask=predicted", "loss.mask trains the defect map of model.mask=predicted"),
        ("loss.error=0.1", "loss.error trains the bound of model.error=true"),
        ("model.encoder_weights=x.pth", "encoder_weights needs encoder"),
        ("train.curriculum=[{epochs: 2, values: {model.base: 8}}]", "'model.base' cannot change within a run"),
        ("train.curriculum=[{epochs: 2, values: {data.crop: 8}}]", "data.crop"),
        ("model.skips=[true]", "skips needs one entry for each of the 4 levels"),
        ("model.reduction=0", "reduction must be at least 1"),
        ("degradation.presets={}", "at least one preset"),
        ("degradation.presets={kla: 0}", "at least one preset"),
        ("degradation.presets={fog: 1}", "degradation.presets"),
        ("search.objectives=[]", "objectives needs one or more different names"),
        ("search.objectives=[psnr, psnr]", "objectives needs one or more different names"),
        ("search.objectives=[ssim]", r"search\.objectives"),
        ("search.screened=17", r"screened must be at most trials \(got 17 and 16\): lower it"),
        ("search.screen_epochs=13", r"screen_epochs must be at most epochs \(got 13 and 12\): lower it"),
        ("search.grace_epochs=5", r"grace_epochs must be at most screen_epochs \(got 5 and 4\), .*lower it, or raise"),
        ("search.reduction_factor=1", r"search\.reduction_factor: .*greater than or equal to 2"),
        ("search.trials=0", r"search\.trials"),
        ("search.budget_minutes=0", r"search\.budget_minutes"),
        ("search.sampler=grid", r"search\.sampler"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_remedy(file: Path, override: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        load_config(file, [override])


def test_crops_too_small_for_the_model_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"stem \* 2\*\*levels = 64 px \(got 32\)"):
        load_config(file, ["model.levels=6", "model.skips=false", "model.reduction=16", "data.crop=32"])


def test_weights_that_sum_to_one_within_rounding_are_taken(file: Path) -> None:
    thirds = {"defect": 1 / 3, "ssim": 1 / 3, "perceptual": 1 / 3, "edge": 0.0, "basic": 0.0}
    assert parse_config({"loss": {"weights": thirds}}).loss.weights.defect == 1 / 3


@pytest.mark.parametrize("content", [b"- a list", b"just words", b"train: [", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        load_config(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")


def test_with_values_leaves_the_given_config_as_it_was() -> None:
    config = ExperimentConfig()
    changed = with_values(config, {"optim.learning_rate": 0.5, "model.dropout": 0.0})
    assert (changed.optim.learning_rate, changed.model.dropout) == (0.5, 0.0)
    assert config == ExperimentConfig()


def test_with_values_checks_the_whole_tree() -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        with_values(ExperimentConfig(), {"loss.weights.defect": 0.9})


def test_the_dump_holds_every_setting_and_nothing_but_yaml() -> None:
    tree = yaml.safe_load(ExperimentConfig().to_yaml())
    assert set(tree) == set(ExperimentConfig.model_fields)
    assert tree["loss"]["weights"]["ssim"] == 0.3


def test_a_curriculum_changes_data_by_epoch_and_ends_at_the_config_itself(file: Path) -> None:
    phases = "[{epochs: 2, values: {data.crop: 64}}, {epochs: 1, values: {degradation.presets: {noise: 1}}}]"
    config = load_config(file, [f"train.curriculum={phases}"])
    first, second, third, last = (config.at_epoch(epoch) for epoch in (0, 1, 2, 3))
    assert (first.data.crop, second.data.crop) == (64, 64)
    assert third.data.crop == config.data.crop and third.degradation.presets == {"noise": 1.0}
    assert last == config
    assert first.model == config.model and first.optim == config.optim


@pytest.mark.parametrize("name", ["seed", "demo", "light", "best"])
def test_every_shipped_config_is_valid(repository: Path, name: str) -> None:
    load_config(repository / f"platform/configs/{name}.yaml")


def test_a_search_screens_half_of_its_trials_on_a_third_of_the_epochs(file: Path) -> None:
    search = load_config(file, ["search.trials=9", "search.epochs=7"]).search
    assert (search.screened, search.screen_epochs) == (4, 2)
    search = load_config(file, ["search.trials=1", "search.epochs=2"]).search
    assert (search.screened, search.screen_epochs) == (0, 1)


def test_a_search_that_screens_nothing_has_no_budgets_of_screening_to_fit(file: Path) -> None:
    sets = ["search.screened=0", "search.epochs=2", "search.screen_epochs=3", "search.grace_epochs=4"]
    assert load_config(file, sets).search.screened == 0


def test_the_ends_of_a_searchs_budgets_are_allowed(file: Path) -> None:
    sets = [
        "search.trials=4",
        "search.screened=4",
        "search.epochs=3",
        "search.screen_epochs=3",
        "search.grace_epochs=3",
    ]
    assert load_config(file, sets).search.grace_epochs == 3
