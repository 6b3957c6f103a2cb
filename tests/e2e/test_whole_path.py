"""The whole path through a real S3 server, a real Ray cluster and real HTTP, by the commands that users type.

One stack for the module; its data, models and endpoint are built once by fixtures that depend on each other.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx2 as httpx
import numpy as np
import pytest
import yaml

from kintsugi import doors, imaging, local
from kintsugi.data.synthetic import write_synthetic
from kintsugi.doctor import here
from kintsugi.storage import S3Store, sha256

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SMALL = [
    "data.crop=48", "model.base=8", "train.steps_per_epoch=10", "train.validation_images=6", "train.epochs=2",
    "search.trials=4", "search.screened=2", "search.epochs=2", "search.screen_epochs=1",
]  # fmt: skip


class Machine:
    """Runs `kintsugi` commands against one home folder."""

    def __init__(self, home: Path, root: Path) -> None:
        self.root = root
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "KINTSUGI_"))},
            "KINTSUGI_HOME": str(home),
            "KINTSUGI_CACHE": str(home / "cache"),
        }

    def start(self, *command: str) -> "subprocess.Popen[str]":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, "-m", "kintsugi.cli", *command], cwd=self.root, env=self.environment, **pipes
        )

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*command)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, f"kintsugi {' '.join(command)}\n{out[-2000:]}\n{err[-6000:]}"
        return subprocess.CompletedProcess(command, 0, out, err)

    def ask(self, *command: str) -> Any:
        return json.loads(self.run(*command, "--json").stdout.strip().splitlines()[-1])

    def train(self, *options: str) -> Sequence[str]:
        sets = [part for value in SMALL for part in ("--set", value)]
        return ("train", "platform/configs/demo.yaml", "--name", "unet", *sets, *options)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Generator[Machine]:
    root = Path(__file__).parents[2]
    machine = Machine(tmp_path_factory.mktemp("home"), root)
    # So that also the shortest training is seen before its gauges go with it.
    machine.environment["RAY_metrics_report_interval_ms"] = "1000"
    machine.environment["KINTSUGI_TRACES"] = f"file:{tmp_path_factory.mktemp('traces')}"
    ports = [part for name in ("s3", "dashboard", "tensorboard", "ray", "endpoint") for part in (f"--{name}-port", "0")]
    try:
        machine.run("up", *ports, "--cpus", "2")
        yield machine
    finally:
        machine.run("down")


@pytest.fixture(scope="module", autouse=True)
def prometheus(machine: Machine, tmp_path_factory: pytest.TempPathFactory, monitor: Any) -> Any:
    """Watches from before the first training; None where there is no Prometheus."""
    return monitor(Path(machine.environment["KINTSUGI_HOME"]), tmp_path_factory.mktemp("monitoring") / "prometheus")


@pytest.fixture(scope="module")
def addresses(machine: Machine) -> dict[str, str]:
    return {row["name"]: row["address"] for row in machine.ask("status")}


@pytest.fixture
def store(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The stack's store, with its credentials in this process's environment."""
    home = Path(machine.environment["KINTSUGI_HOME"])
    stack = local.find(home)
    assert stack is not None
    for name, value in local.environment(stack, home).items():
        monkeypatch.setenv(name, value)
    return S3Store(stack.store_uri)


@pytest.fixture(scope="module")
def dataset(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_synthetic(tmp_path_factory.mktemp("images"), parts=20, size=96)
    return machine.ask("data", "build", "pairs", str(folder), "--name", "demo")


@pytest.fixture(scope="module")
def trained(machine: Machine, dataset: dict[str, Any]) -> dict[str, Any]:
    return machine.ask(*machine.train("--run", "first"))


@pytest.fixture(scope="module")
def endpoint(machine: Machine, trained: dict[str, Any]) -> str:
    machine.run("models", "promote", trained["model"])
    return machine.ask("serve", "--model", "unet@production")["address"]


def test_images_become_a_dataset_in_s3(machine: Machine, store: S3Store, dataset: dict[str, Any]) -> None:
    assert dataset["samples"] == 60 and not dataset["bad"]
    assert set(dataset["counts"]["splits"]) == {"train", "val", "test"}
    keys = [info.key for info in store.list(f"datasets/demo/{dataset['digest']}/")]
    assert any(key.endswith("manifest.json") for key in keys)


def test_training_on_two_workers_publishes_a_model_with_its_origin(
    machine: Machine, dataset: dict[str, Any], trained: dict[str, Any]
) -> None:
    shown = machine.ask("models", "show", trained["model"])
    assert shown["dataset_digest"] == dataset["digest"]
    assert shown["card"]["workers"] == [{"epoch": 0, "step": 0, "world_size": 2}]
    assert shown["card"]["perceptual"] == "vgg11, random weights"
    assert shown["scores"]["epoch"] in (1.0, 2.0)


def test_a_run_whose_driver_was_killed_continues_under_its_name(
    machine: Machine, store: S3Store, trained: dict[str, Any]
) -> None:
    command = machine.train("--run", "killed", "--set", "train.epochs=5")
    process = machine.start(*command)
    deadline = time.monotonic() + 240
    # Once the second checkpoint is under way, the first is whole, whether or not Ray has noted it by now.
    while sum(info.key.endswith("manifest.json") for info in store.list("runs/killed/")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.2)  # polls the store
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = machine.run(*command, "--json")
    epochs = [line.split("epoch")[1].split("/")[0].strip() for line in again.stderr.splitlines() if " epoch " in line]
    assert epochs and "1" not in epochs and epochs[-1] == "5"


@pytest.fixture(scope="module")
def searched(machine: Machine, trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four trials at once, each a worker that wants one of two CPUs, and one whose loss does not stay finite."""
    space = {
        "parameters": {"model.dropout": {"uniform": [0.0, 0.3]}, "optim.learning_rate": {"choice": [0.002, 1e30]}},
        "constraints": ["optim.learning_rate < 1 or model.dropout == 0.25"],
        "start": {
            "usual": {"model.dropout": 0.0, "optim.learning_rate": 0.002},
            "broken": {"model.dropout": 0.25, "optim.learning_rate": 1e30},
        },
    }
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    sets = [part for value in (*SMALL, "train.workers=1", "train.cpus_per_worker=1") for part in ("--set", value)]
    options = ("--config", "platform/configs/demo.yaml", "--name", "unet", "--search", "found", *sets)
    return machine.ask("tune", str(path), *options, "--max-concurrent", "4")


def test_a_search_of_more_trials_than_cpus_ends_and_publishes_its_best(
    machine: Machine, searched: dict[str, Any]
) -> None:
    states = {trial["number"]: trial["state"] for trial in searched["trials"]}
    assert searched["done"] and states[0] == "complete" and states[1] == "failed"
    assert [states[number] for number in (2, 3)] == ["complete", "complete"]
    assert "finite" in searched["trials"][1]["reason"]
    assert searched["model"] in [version["ref"] for version in machine.ask("models", "list")]


def test_tensorboard_shows_the_trials_of_a_search(addresses: dict[str, str], searched: dict[str, Any]) -> None:
    runs = [trial["run"] for trial in searched["trials"] if trial["state"] == "complete"]
    deadline = time.monotonic() + 60
    asked = f"{addresses['tensorboard'].rstrip('/')}/data/runs"
    while not all(any(run in shown for shown in httpx.get(asked, timeout=30).json()) for run in runs):
        assert time.monotonic() < deadline, "TensorBoard does not show the trials"
        time.sleep(0.5)  # polls TensorBoard


def test_the_dashboard_shows_the_trainings_of_a_search(
    machine: Machine, addresses: dict[str, str], searched: dict[str, Any]
) -> None:
    token = Path(addresses["dashboard token"]).read_text().strip()
    runs = f"{addresses['dashboard'].rstrip('/')}/api/train/v2/runs/v1"
    shown = httpx.get(runs, headers={"Authorization": f"Bearer {token}"}, timeout=60).json()["train_runs"]
    assert {trial["run"].rpartition("/")[2] for trial in searched["trials"]} <= {run["name"] for run in shown}


def test_a_search_that_is_done_is_resumed_only_for_more_trials(machine: Machine, searched: dict[str, Any]) -> None:
    again = machine.ask("tune", "--resume", "found", "--trials", "5")
    assert again["trials"][:4] == searched["trials"] and again["trials"][4]["state"] == "complete"
    refused = machine.start("tune", "tune/spaces/restoration.yaml", "--resume", "found")
    assert "--resume takes the space and the config from the search" in refused.communicate()[1]


def test_the_best_of_a_search_goes_into_production_through_the_gate_and_is_reported(
    machine: Machine, searched: dict[str, Any], tmp_path: Path
) -> None:
    published = machine.ask("tune", "publish", "found", "--promote", "searched")
    aliases = machine.ask("models", "show", published["model"])["aliases"]
    assert [move["version"] for move in aliases["searched"]] == [int(published["model"].rpartition("@")[2])]
    machine.run("tune", "report", "found", "--output", str(tmp_path / "found.html"), "--images", "2")
    page = (tmp_path / "found.html").read_text()
    assert "Pareto front" in page and "not finite" not in page and "no longer finite" in page


def test_optuna_dashboard_shows_both_studies_of_a_search(machine: Machine, searched: dict[str, Any]) -> None:
    process = machine.start("tune", "dashboard", "found", "--port", "0")
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        deadline = time.monotonic() + 60
        while True:
            try:
                studies = httpx.get(f"{address}/api/studies", timeout=30).json()
                break
            except httpx.ConnectError:
                assert process.poll() is None and time.monotonic() < deadline, "optuna-dashboard does not answer"
                time.sleep(0.2)  # polls the dashboard
    finally:
        process.terminate()
        process.communicate()
    assert sorted(study["study_name"] for study in studies["study_summaries"]) == ["full", "screen"]


@pytest.mark.parametrize(("kind", "dtype"), [("png", np.uint8), ("png", np.uint16), ("tiff", np.uint16)])
def test_an_image_comes_back_over_http_in_its_own_format_size_and_depth(
    endpoint: str, trained: dict[str, Any], kind: imaging.Format, dtype: type
) -> None:
    top = int(np.iinfo(dtype).max)
    pixels = (np.random.default_rng(0).random((75, 110)) * top).astype(dtype)
    image = imaging.Image(pixels, kind, top)
    answer = httpx.post(f"{endpoint}/v1/restore", content=imaging.encode(image), timeout=60)
    assert answer.status_code == 200, answer.text
    back = imaging.decode(answer.content)
    assert (back.format, back.size, back.pixels.dtype) == (kind, image.size, pixels.dtype)
    assert not np.array_equal(back.pixels, pixels)
    assert answer.headers["X-Kintsugi-Model-Digest"] == trained["digest"]
    assert 0 <= float(answer.headers["X-Kintsugi-Defect-Retention"]) <= 1


def test_the_endpoint_and_the_command_line_give_the_same_bytes(machine: Machine, endpoint: str, tmp_path: Path) -> None:
    pixels = (np.random.default_rng(1).random((64, 90)) * 255).astype(np.uint8)
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    source.write_bytes(imaging.encode(imaging.Image(pixels)))
    machine.run("restore", str(source), str(target), "--model", "unet@production")
    answer = httpx.post(f"{endpoint}/v1/restore", content=source.read_bytes(), timeout=60)
    assert answer.content == target.read_bytes()


def test_an_image_in_s3_is_restored_to_s3(endpoint: str, store: S3Store) -> None:
    pixels = (np.random.default_rng(2).random((40, 50)) * 65535).astype(np.uint16)
    body = imaging.encode(imaging.Image(pixels, "tiff", 65535))
    store.put("inputs/line-1/a.tiff", body)
    request = {"input": f"{store.uri}/inputs/line-1/a.tiff", "output": f"{store.uri}/outputs/line-1/a.tiff"}
    answer = httpx.post(f"{endpoint}/v1/restore/s3", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    direct = httpx.post(f"{endpoint}/v1/restore", content=body, timeout=60)
    assert store.get("outputs/line-1/a.tiff") == direct.content


def test_each_request_is_in_the_audit_trail(machine: Machine, endpoint: str) -> None:
    body = imaging.encode(imaging.Image(np.full((32, 32), 90, np.uint8)))
    answer = httpx.post(f"{endpoint}/v1/restore", content=body, headers={"X-Request-Id": "part-77"}, timeout=60)
    folder = Path(machine.environment["KINTSUGI_HOME"]) / "audit"
    deadline = time.monotonic() + 30
    # A line is written once its answer is sent.
    while not (found := [line for file in folder.glob("*.jsonl") for line in file.open() if "part-77" in line]):
        assert time.monotonic() < deadline, "no line came"
        time.sleep(0.1)  # polls the files
    (line,) = map(json.loads, found)
    assert line["request_id"] == "part-77"
    assert line["output_sha256"] == answer.headers["x-kintsugi-output-sha256"] == sha256(answer.content)


def test_everything_below_a_prefix_is_restored_by_a_batch(endpoint: str, store: S3Store) -> None:
    bodies = [imaging.encode(imaging.Image(np.full((40, 40 + i), 50 * i, np.uint8))) for i in range(3)]
    for number, body in enumerate(bodies):
        store.put(f"inputs/lot/{number}.png", body)
    store.put("inputs/lot/notes.txt", b"not an image")
    job = {"input": f"{store.uri}/inputs/lot/", "output": f"{store.uri}/outputs/lot/"}
    begun = httpx.post(f"{endpoint}/v1/batches", json=job, timeout=120)
    assert begun.status_code == 202, begun.text
    deadline = time.monotonic() + 240
    while (progress := httpx.get(f"{endpoint}/v1/batches/{begun.json()['id']}", timeout=60).json())["status"] != "done":
        assert time.monotonic() < deadline and progress["status"] == "running", progress
        time.sleep(0.5)
    assert (progress["total"], progress["restored"], progress["refused"]) == (4, 3, 1)
    for number, body in enumerate(bodies):
        direct = httpx.post(f"{endpoint}/v1/restore", content=body, timeout=60)
        assert store.get(f"outputs/lot/{number}.png") == direct.content


def test_bad_input_is_told_and_restarts_nothing(endpoint: str) -> None:
    before = httpx.get(f"{endpoint}/v1/models", timeout=30).json()
    truncated = imaging.encode(imaging.Image(np.zeros((64, 64), np.uint8)))[:60]
    for body, status in ((b"not an image", 415), (truncated, 422), (b"", 400)):
        answer = httpx.post(f"{endpoint}/v1/restore", content=body, timeout=30)
        assert answer.status_code in (status, 415, 422), answer.text
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert answer.json()["code"]
    assert httpx.get(f"{endpoint}/readyz", timeout=30).status_code == 200
    assert httpx.get(f"{endpoint}/v1/models", timeout=30).json() == before


def test_evaluation_writes_scorecard_and_picture(machine: Machine, trained: dict[str, Any], tmp_path: Path) -> None:
    card, picture = tmp_path / "card.json", tmp_path / "worst.png"
    files = ("--output", str(card), "--picture", str(picture))
    machine.run("evaluate", trained["model"], "--split", "test", *files)
    figures = json.loads(card.read_text())["overall"]
    assert {"psnr", "ssim", "defect_psnr", "defect_ssim", "defect_psnr_zeroed", "defect_ssim_zeroed"} <= figures.keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_standard_platform_module_works_in_a_ray_task_with_the_root_as_working_directory(
    machine: Machine, store: S3Store
) -> None:
    code = textwrap.dedent("""
        import os, ray
        excludes = [".venv", ".git", ".kintsugi", "**/*.png"]
        ray.init(log_to_driver=False, runtime_env={"working_dir": os.getcwd(), "excludes": excludes})
        @ray.remote(num_cpus=0.1)
        def look():
            import platform
            from ray import serve, tune
            return platform.system(), sorted(os.listdir("."))
        print(ray.get(look.remote()))
    """)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.root, env={**os.environ}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "'Linux'" in found.stdout and "'platform'" in found.stdout and "'serve'" in found.stdout


def test_no_port_of_the_stack_answers_from_beyond_this_machine_or_without_a_secret(
    machine: Machine, addresses: dict[str, str], unlocked: Any
) -> None:
    """But TensorBoard and the endpoint, which have none on 127.0.0.1, metrics, and two pages without data."""
    stack = local.find(Path(machine.environment["KINTSUGI_HOME"]))
    assert stack is not None
    found = here.listens(here.family(stack))
    assert len(found) > 15 and [host for host, _ in found if not doors.is_loopback(host)] == []
    by_design = {urlsplit(url).port for url in (addresses["tensorboard"], addresses["endpoint"])}
    told = {port: paths for _, port in found if port not in by_design and (paths := unlocked.paths(port))}
    assert told == {}
    calls = [call for _, port in found for call in unlocked.calls(port).items()]
    assert [call for call, code in calls if code == grpc.StatusCode.OK] == []
    assert {call for call, code in calls if code == grpc.StatusCode.UNAUTHENTICATED} == set(unlocked.ray_calls)


def test_the_dashboard_answers(addresses: dict[str, str]) -> None:
    assert httpx.get(addresses["dashboard"], timeout=30).status_code == 200


@pytest.mark.usefixtures("trained", "searched")
def test_every_query_of_every_dashboard_and_rule_has_data(
    prometheus: Any, monitored: dict[str, str], endpoint: str
) -> None:
    if prometheus is None:
        pytest.skip("there is no prometheus: run 'make prometheus', or install it")
    flat = imaging.encode(imaging.Image(np.full((64, 64), 90, np.uint8)))
    answers = [httpx.post(f"{endpoint}/v1/restore", content=flat, timeout=60) for _ in range(3)]
    assert {answer.headers["X-Kintsugi-Alarm"] for answer in answers} == {"true"}
    assert httpx.post(f"{endpoint}/v1/restore", content=b"not an image", timeout=60).status_code == 415
    assert prometheus.unanswered({**monitored, "an alarm": "kintsugi_alarms_total > 0"}) == {}
    assert {target["health"] for target in prometheus.get("targets")["activeTargets"]} == {"up"}
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"} and len(rules) > 30


def test_a_request_leaves_a_trace_of_its_stages(machine: Machine, endpoint: str) -> None:
    body = imaging.encode(imaging.Image(np.full((32, 32), 90, np.uint8)))
    httpx.post(f"{endpoint}/v1/restore", content=body, headers={"X-Request-Id": "part-78"}, timeout=60)
    files = Path(machine.environment["KINTSUGI_TRACES"].removeprefix("file:"))
    deadline = time.monotonic() + 30
    while True:
        spans = [json.loads(line) for file in files.iterdir() for line in file.read_text().splitlines()]
        ours = {span["context"]["span_id"] for span in spans if span["attributes"].get("request_id") == "part-78"}
        stages = [span["name"] for span in spans if span["parent_id"] in ours and " " not in span["name"]]
        if stages == ["decode", "queue", "model", "encode"]:
            return
        assert time.monotonic() < deadline, stages
        time.sleep(0.2)  # polls the files
