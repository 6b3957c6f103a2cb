"""Prometheus's config, rules and alerts, and Grafana's dashboards, without a cluster. tests/e2e asks a running one."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

FOLDER = Path(__file__).parents[2] / "infra/monitoring"
DEBIAN = FOLDER.parents[1] / ".kintsugi/debian/usr/bin"
DASHBOARDS = sorted((FOLDER / "grafana/dashboards").glob("*.json"))
UNITS = frozenset(["Bps", "bytes", "dB", "percent", "percentunit", "reqps", "s", "sci", "short"])


def _rules(kind: str) -> list[dict[str, Any]]:
    files = sorted((FOLDER / "prometheus/rules").glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in _rules("alert")}
RECORDED = {rule["record"]: rule["expr"] for rule in _rules("record")}


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:{DEBIAN}")
    if found is None:
        pytest.skip(f"there is no {name}: run 'make prometheus', or install it")
    return found


@pytest.mark.parametrize("file", sorted((FOLDER / "prometheus/tests").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_alerts_fire_for_their_cause_and_are_silent_otherwise(file: Path) -> None:
    done = subprocess.run([_program("promtool"), "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_where_it_fires_and_one_where_it_does_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for file in (FOLDER / "prometheus/tests").glob("*.yaml"):
        for case in yaml.safe_load(file.read_text())["tests"]:
            for asked in case.get("alert_rule_test", ()):
                (fires if asked["exp_alerts"] else silent).add(asked["alertname"])
    assert fires == silent == ALERTS.keys()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Of `start`, for a cluster that is not there."""
    (tmp_path / "token").write_text("secret")
    (tmp_path / "ray").mkdir()
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KINTSUGI_"))}
    return ours | {
        "RAY_TEMP_DIR": str(tmp_path / "ray"),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "KINTSUGI_ENDPOINTS": "10.0.0.1:8000,10.0.0.2:8000",
        "MONITORING_FOLDER": str(tmp_path / "here"),
    }


def test_prometheus_takes_the_config_with_its_rules_and_the_cluster_it_is_told_of(
    settings: dict[str, str], tmp_path: Path
) -> None:
    _program("promtool")
    (tmp_path / "ray/prom_metrics_service_discovery.json").write_text('[{"labels": {"job": "ray"}, "targets": []}]')
    done = subprocess.run([str(FOLDER / "start"), "check"], env=settings, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    targets = yaml.safe_load((tmp_path / "here/targets/endpoint.yaml").read_text())
    assert targets == [{"targets": ["10.0.0.1:8000", "10.0.0.2:8000"]}]
    assert (tmp_path / "here/ray-token").resolve() == tmp_path / "token"


def test_without_a_token_nothing_starts(settings: dict[str, str], tmp_path: Path) -> None:
    _program("promtool")
    (tmp_path / "token").unlink()
    done = subprocess.run([str(FOLDER / "start"), "check"], env=settings, capture_output=True, text=True)
    assert done.returncode == 1 and "set RAY_AUTH_TOKEN_PATH" in done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_compares_recorded_series_and_says_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    for part in alert["expr"].split(" and "):
        compared = re.fullmatch(r"(kintsugi:[\w:]+) (?:>|>=|<) [\d.]+", part)
        assert compared is not None and compared[1] in RECORDED
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"].keys() == {"summary", "runbook_url"}
    assert re.fullmatch(r"docs/operations\.md#[a-z-]+", alert["annotations"]["runbook_url"])


def test_every_anchor_of_an_alert_is_a_heading_of_the_runbook(repository: Path) -> None:
    headings = re.findall(r"^#+ (.*)$", (repository / "docs/operations.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    wanted = {alert["annotations"]["runbook_url"].partition("#")[2] for alert in ALERTS.values()}
    assert wanted <= anchors


def test_there_is_a_dashboard_for_training_search_endpoint_and_fidelity() -> None:
    assert [path.stem for path in DASHBOARDS] == ["endpoint", "fidelity", "search", "training"]
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    source, *variables = board["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    known = {variable["name"] for variable in (source, *variables)}
    cells: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in board["panels"]}) == len({panel["title"] for panel in board["panels"]})
    for panel in board["panels"]:
        assert panel["title"] and panel["description"].endswith(".") and panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        used = {name for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
        assert used <= known
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells
        cells |= own


def test_dashboards_draw_only_recorded_series_that_there_are() -> None:
    for path in DASHBOARDS:
        assert set(re.findall(r"kintsugi:[\w:]+", path.read_text())) <= RECORDED.keys()


def test_grafana_is_told_of_prometheus_and_of_the_dashboards() -> None:
    provisioning = FOLDER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "${KINTSUGI_PROMETHEUS}")
    (provider,) = yaml.safe_load((provisioning / "dashboards/kintsugi.yaml").read_text())["providers"]
    assert provider["options"] == {"path": "${KINTSUGI_DASHBOARDS}"}


@pytest.mark.parametrize(
    ("metric", "source"),
    [
        ("ray_node_gpus_utilization", "dashboard/modules/reporter/reporter_agent.py"),
        ("ray_node_gram_used", "dashboard/modules/reporter/reporter_agent.py"),
        ("ray_serve_health_check_failures_total", "serve/_private/deployment_state.py"),
        ("ray_node_failure_total", "core/src/ray/gcs/gcs_server"),
    ],
)
def test_a_metric_that_comes_only_with_a_gpu_or_a_failure_is_named_as_ray_names_it(metric: str, source: str) -> None:
    files = (*DASHBOARDS, *(FOLDER / "prometheus/rules").glob("*.yaml"))
    assert any(metric in path.read_text() for path in files)
    assert metric.removeprefix("ray_").encode() in (Path(ray.__file__).parent / source).read_bytes()
