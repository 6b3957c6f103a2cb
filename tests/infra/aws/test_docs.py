"""The commands of the pages on clusters, read by the programs that they call, without an account or an engine."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import cli as ray
from ray.serve.scripts import cli as serve

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The command lines of a page, without the variables set for them and the path to the program."""
    lines = [line for block in BLOCK.findall((ROOT / "docs" / page).read_text()) for line in block.splitlines()]
    split = [[word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)] for line in lines]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in split]


def parse(group: Any, words: list[str]) -> None:
    """As click reads a command line, down to the command, without running it."""
    name, *rest = words
    command = group.commands[name]
    if hasattr(command, "commands"):
        parse(command, rest)
    else:
        command.make_context(name, rest)


def test_the_page_on_aws_calls_programs_as_they_are(creator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    readers: dict[str, Callable[[list[str]], object]] = {
        "ray": lambda words: parse(ray, words),
        "serve": lambda words: parse(serve, words),
        "make": is_target,
        "chmod": is_the_token,
        "python": lambda words: creator.main([*words[1:], "--store", "s3://inspection/kintsugi", "--print"]),
    }
    called = commands("cluster-aws.md")
    for program, *words in called:
        readers[program](words)
    assert {words[0] for words in called} == readers.keys()
    assert "head-policy" in capsys.readouterr().out


def test_the_page_on_images_builds_every_target() -> None:
    built = [words for words in commands("images.md") if words[:2] == ["docker", "build"]]
    targets = re.findall(r"^FROM runtime AS (\S+)", (ROOT / "infra/docker/Dockerfile").read_text(), re.MULTILINE)
    assert sorted(words[words.index("--target") + 1] for words in built) == sorted(targets)
    assert all(words[words.index("-t") + 1] == f"kintsugi:{words[words.index('--target') + 1]}" for words in built)
    is_target(["wheel"])


def test_the_page_names_the_machines_of_the_cluster_file(cluster_file: dict[str, Any]) -> None:
    page = (ROOT / "docs/cluster-aws.md").read_text()
    for name, kind in cluster_file["available_node_types"].items():
        market = "spot" if kind["labels"]["ray.io/market-type"] == "spot" else "on demand"
        most = kind.get("max_workers", 1)
        row = rf"^\| `{name}` \| {kind['node_config']['InstanceType']}\b.* \| {market} \| {most} \| `{name}` \|"
        assert re.search(row, page, re.MULTILINE), name


def test_the_page_on_costs_has_a_row_for_each_machine(cluster_file: dict[str, Any]) -> None:
    rows = re.findall(r"^\| ([a-z0-9]+\.[a-z0-9]+)\b", (ROOT / "docs/costs.md").read_text(), re.MULTILINE)
    machines = {kind["node_config"]["InstanceType"] for kind in cluster_file["available_node_types"].values()}
    assert set(rows) == machines


def is_target(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def is_the_token(words: list[str]) -> None:
    assert words == ["600", "~/.ray/auth_token"]


def test_what_is_deployed_is_a_file_of_serve() -> None:
    assert yaml.safe_load((ROOT / "serve/application.yaml").read_text())["applications"]
