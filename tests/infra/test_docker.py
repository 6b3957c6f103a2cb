"""The text of the Dockerfile, and how it is read; `make image-check` runs it."""

import importlib.util
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
TARGETS = {"train-gpu", "serve-cpu", "serve-gpu"}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """infra/docker/try_install.py."""
    spec = importlib.util.spec_from_file_location("try_install", ROOT / "infra/docker/try_install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stages(builder: ModuleType) -> dict[str, Any]:
    return {stage.name: stage for stage in builder.stages(DOCKERFILE.read_text())}


def lineage(stages: dict[str, Any], name: str) -> list[Any]:
    """The steps of a target, those of the stages under it first."""
    stage = stages[name]
    return [*(lineage(stages, stage.base) if stage.base in stages else []), *stage.steps]


def sources(stages: dict[str, Any]) -> list[str]:
    copies = [step for stage in stages.values() for step in stage.steps if step.word == "COPY" and not step.flags]
    return [source for step in copies for source in step.text.split()[:-1]]


def test_the_targets_are_those_that_the_cluster_names(stages: dict[str, Any]) -> None:
    assert stages.keys() == TARGETS | {"build", "runtime"}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_target_ends_as_a_user_that_is_not_root(stages: dict[str, Any], target: str) -> None:
    steps = lineage(stages, target)
    assert [step.text for step in steps if step.word == "USER"] == ["10001:10001"]
    assert "RUN" not in [step.word for step in steps[[step.word for step in steps].index("USER") :]]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_target_holds_only_the_environment_that_was_built(stages: dict[str, Any], target: str) -> None:
    copies = [(step.flags, step.text) for step in lineage(stages, target) if step.word == "COPY"]
    assert copies == [(("--from=build",), "/opt/kintsugi /opt/kintsugi")]


def test_build_and_runtime_stand_on_the_same_pinned_base(stages: dict[str, Any]) -> None:
    assert stages["build"].base == stages["runtime"].base == "python:3.11-slim-bookworm"
    assert "latest" not in DOCKERFILE.read_text()


def test_everything_is_installed_by_its_hash_but_our_own_wheel(stages: dict[str, Any]) -> None:
    texts = [step.text for stage in stages.values() for step in stage.steps if step.word == "RUN"]
    installs = [one for text in texts for one in text.split("&&") if "install" in one]
    by_hash = [one for one in installs if "--require-hashes" in one]
    assert len(by_hash) == 2
    assert [one.split()[-2:] for one in installs if one not in by_hash] == [["--no-deps", "kintsugi-*.whl"]]
    assert not any(re.search(r"apt|curl|wget", text) for text in texts)


def test_an_image_is_given_no_secret(stages: dict[str, Any]) -> None:
    words = {step.word for stage in stages.values() for step in stage.steps}
    assert words == {"ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    settings = " ".join(step.text for stage in stages.values() for step in stage.steps if step.word == "ENV")
    assert not re.search(r"KEY|SECRET|PASSWORD|AUTH_TOKEN", settings)


def test_every_package_that_builds_the_image_is_pinned_by_hash() -> None:
    lock = (ROOT / "infra/docker/tools.lock").read_text()
    requirements = [one for one in re.split(r"^(?=\S)", lock, flags=re.MULTILINE) if one and one[0] != "#"]
    assert all(re.match(r"[a-z0-9.-]+==\S+ \\\n +--hash=sha256:", one) for one in requirements)
    wanted = [line for line in (ROOT / "infra/docker/tools.in").read_text().splitlines() if line[0] != "#"]
    assert set(wanted) <= {one.split("==")[0] for one in requirements}


def test_every_file_that_is_copied_exists_and_reaches_the_engine(stages: dict[str, Any]) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    assert sorted(line.removeprefix("!") for line in rules[1:]) == sorted(sources(stages))
    assert all((ROOT / source).is_file() for source in sources(stages) if not source.startswith("dist/"))


def test_make_wheel_builds_what_is_copied(stages: dict[str, Any], tmp_path: Path) -> None:
    recipe = re.search(r"^wheel:.*\n(?:\t.*\n)*", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None and "uv build --quiet --wheel" in recipe[0] and "--out-dir dist" in recipe[0]
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (pattern,) = [source for source in sources(stages) if source.startswith("dist/")]
    assert [fnmatchcase(f"dist/{built.name}", pattern) for built in tmp_path.iterdir()] == [True]


def test_a_dockerfile_is_read_with_its_flags_comments_and_joined_lines(builder: ModuleType) -> None:
    run = "RUN --mount=type=cache,target=/c \\\n  a && \\\n  # y\n  b\n"
    text = f"ARG BASE=a:1\n# x\nFROM ${{BASE}} AS one\n{run}FROM one AS two\n"
    one, two = builder.stages(text)
    assert (one.name, one.base, two.name, two.base) == ("one", "a:1", "two", "one")
    assert one.steps == (builder.Step("RUN", ("--mount=type=cache,target=/c",), "a && b"),)


def test_settings_may_stand_on_earlier_ones(builder: ModuleType) -> None:
    assert builder.variables('PATH=/x:$PATH EMPTY=""', {"PATH": "/bin"}) == {"PATH": "/x:/bin", "EMPTY": ""}


def test_an_instruction_that_is_not_known_is_not_passed_over(builder: ModuleType, tmp_path: Path) -> None:
    work = builder.Builder(tmp_path, tmp_path)
    work.images["base"] = builder.Image(tmp_path)
    with pytest.raises(SystemExit, match="VOLUME is not known here"):
        work.build(builder.Stage("one", "base", (builder.Step("VOLUME", (), "/x"),)))


def test_a_copy_without_its_source_says_what_to_do(builder: ModuleType, tmp_path: Path) -> None:
    work = builder.Builder(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="finds 0 files, not one: run 'make wheel'"):
        work._copy(builder.Image(tmp_path), builder.Step("COPY", (), "dist/kintsugi-*.whl ./"))
