import pytest

from kintsugi.config import ExperimentConfig
from kintsugi.errors import ConfigError
from kintsugi_tune.constraints import Constraint

TREE = ExperimentConfig().model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("loss.weights.edge + loss.weights.ssim <= 0.46", True),
        ("loss.weights.edge + loss.weights.ssim <= 0.44", False),
        ("loss.weights.ssim - 2 * loss.weights.edge == 0", True),
        ("data.crop / model.base == 4", True),
        ("-loss.weights.edge < 0", True),
        ("loss.weights.edge > 0.2 and loss.weights.ssim > 0.2", False),
        ("loss.weights.edge > 0.2 or loss.weights.ssim > 0.2", True),
        ("not loss.weights.edge > 0.2", True),
        ("not (loss.weights.edge > 0.2 or loss.weights.ssim > 0.2)", False),
        ("0.1 <= loss.weights.edge < 0.2", True),
        ("0.1 <= loss.weights.edge < 0.15", False),
        ("0.2 <= loss.weights.edge < 0.3", False),
        ("model.skips[0] == 'off'", True),
        ("model.skips[3] != 'off'", False),
        ("model.reduction[0] >= model.reduction[1]", True),
        ("  data.crop >= 64  ", True),
    ],
)
def test_a_constraint_says_what_arithmetic_and_logic_say(text: str, holds: bool) -> None:
    assert Constraint(text).holds(TREE) is holds


def test_what_and_or_or_pass_over_is_not_looked_at() -> None:
    assert Constraint("train.max_minutes == train.max_minutes or train.max_minutes < 5").holds(TREE)
    assert not Constraint("data.crop < 0 and data.crop / 0 < 1").holds(TREE)


@pytest.mark.parametrize(
    "text",
    [
        "().__class__ == 1",
        "open('x') == 1",
        "model.keys() == 1",
        "[x for x in model.skips] == 1",
        "(lambda: 1) == 1",
        "f'{model}' == ''",
        "model.skips[0:1] == 'off'",
        "model.base ** 9 > 1",
        "model.base in (8, 16)",
        "model.base is 8",
        "~model.base > 1",
        "1 if model.base else 2",
    ],
)
def test_what_is_more_than_comparisons_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Constraint(text)
    assert f"constraint '{text}'" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["model.base = 8", "model.base := 8", "model.base <", "", "import os", "model.base < 8; 1 < 2", "a\0 < 1"],
)
def test_what_is_no_expression_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as") as caught:
        Constraint(text)
    assert f"constraint '{text}'" in str(caught.value)


@pytest.mark.parametrize("text", ["loss.weights.edge", "0.5", "loss.weights.edge + 1", "-loss.weights.edge"])
def test_what_compares_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="compares nothing") as caught:
        Constraint(text)
    assert f"constraint '{text}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss.weights.charm < 1", "there is no setting 'charm'"),
        ("model.__class__ == 1", "there is no setting '__class__'"),
        ("los.weights.edge < 1", "there is no setting 'los'"),
        ("model.skips[7] == 'off'", "there is no setting"),
        ("model.base.deep < 1", "not subscriptable"),
        ("train.max_minutes < 5", "not supported between"),
        ("model.base / 0 < 5", "division by zero"),
    ],
)
def test_a_key_that_is_not_there_or_does_not_fit_is_refused_by_the_text(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Constraint(text).holds(TREE)
    assert f"constraint '{text}'" in str(caught.value)


def test_an_unknown_key_is_found_where_or_passes_over_it() -> None:
    constraint = Constraint("data.crop > 0 or loss.weights.charm < 1")
    assert constraint.holds(TREE)
    with pytest.raises(ConfigError, match="there is no setting 'charm'"):
        constraint.check(TREE)
    Constraint("data.crop > 0 or model.skips[3] == 'off'").check(TREE)
