"""kintsugi submit and jobs up to the cluster; on a cluster they are tested in tests/e2e."""

import json
import os
from collections.abc import AsyncIterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import typer

from kintsugi import cli
from kintsugi.commands import jobs as jobs_verbs
from kintsugi.commands import submit as verb
from kintsugi.errors import ConfigError, StackError
from kintsugi.jobs import Job, RayJobs, Request
from kintsugi.processes import ProcessRecord
from kintsugi.stack import Stack, save

ADDRESS = "http://127.0.0.1:9"
STACK_SETS = (
    *("RAY_DASHBOARD_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
    *("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED", "NO_PROXY", "no_proxy"),
)


class FakeJobs:
    """Runs every job at once, to the end that `ends` names."""

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.requests: list[Request] = []
        self.sent: list[dict[str, str]] = []
        self.ends: tuple[str, int | None] = ("SUCCEEDED", 0)
        self.interrupted = False

    def __call__(self, address: str) -> "FakeJobs":
        self.address = address
        return self

    def find(self, name: str) -> Job | None:
        return self.known.get(name)

    def jobs(self) -> Sequence[Job]:
        return list(self.known.values())

    def submit(self, request: Request) -> None:
        place = Path(request.runtime_env["working_dir"])
        found = [path for path in place.rglob("*") if path.is_file()]
        self.sent.append({path.relative_to(place).as_posix(): path.read_text() for path in found})
        self.requests.append(request)
        state, code = self.ends
        self.known[request.name] = Job(
            request.name, request.command, state, "no such image", request.inputs, code, 100.0, 112.0
        )

    def stop(self, name: str) -> bool:
        return True

    async def log(self, name: str) -> AsyncIterator[str]:
        if self.interrupted:
            raise KeyboardInterrupt
        yield f"the log of {name}\n"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeJobs:
    fake = FakeJobs()
    monkeypatch.setattr(verb, "RayJobs", fake)
    monkeypatch.setattr(jobs_verbs, "RayJobs", fake)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ADDRESS)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verb, "source_commit", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.yaml").write_text("train: {}")
    return fake


def test_a_verb_becomes_a_job_with_the_config_that_it_names_and_nothing_else(
    cluster: FakeJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.txt").write_text("not to be sent")
    words = ["train", "configs/a.yaml", "--set", "data.dataset=a b"]
    assert cli.main(["submit", "--id", "one", "--", *words]) == 0
    (request,) = cluster.requests
    assert request.command == "python -m kintsugi.cli train configs/a.yaml --set 'data.dataset=a b'"
    assert cluster.sent == [{"configs/a.yaml": "train: {}"}]
    assert request.runtime_env["env_vars"] == {} and request.runtime_env["excludes"] == ["__pycache__"]
    assert [Path(place).name for place in request.runtime_env["py_modules"]] == [
        "kintsugi",
        "kintsugi_tune",
        "kintsugi_serve",
    ]
    out, err = capsys.readouterr()
    assert out == "the log of one\n" and "job one is done after 12 s" in err


def test_any_command_runs_raw_with_a_folder(cluster: FakeJobs, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/x.py").write_text("print(1)")
    assert cli.main(["submit", "--raw", "--working-dir", "work", "--", "python", "x.py", "--name", "x"]) == 0
    assert cluster.requests[0].command == "python x.py --name x"
    assert cluster.requests[0].name.startswith("python-")
    assert cluster.sent == [{"x.py": "print(1)"}]


def test_the_commands_place_and_variables_are_passed_where_asked(
    cluster: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", "s3://bucket/team")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("WANTED", "yes")
    options = ["--env", "WANTED", "--env", "A=b=c", "--entrypoint-num-cpus", "2", "--entrypoint-num-gpus", "1"]
    assert cli.main(["submit", *options, "--entrypoint-label", "role=cpu", "--", "models", "list"]) == 0
    (request,) = cluster.requests
    assert request.runtime_env["env_vars"] == {"KINTSUGI_STORE": "s3://bucket/team", "WANTED": "yes", "A": "b=c"}
    assert (request.cpus, request.gpus, request.labels) == (2, 1, {"role": "cpu"})


def test_a_job_is_told_the_commit_of_the_code_that_it_takes_along(
    cluster: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "source_commit", lambda: "0123abcd-dirty")
    assert cli.main(["submit", "--", "train", "configs/a.yaml"]) == 0
    assert cluster.requests[0].runtime_env["env_vars"] == {"KINTSUGI_SOURCE_COMMIT": "0123abcd-dirty"}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--", "trian", "configs/a.yaml"], 2, "Did you mean 'train'?"),
        (["--", "train"], 2, "Missing argument"),
        (["--", "train", "configs/a.yaml", "--frob"], 2, "No such option"),
        (["--", "train", "configs/b.yaml"], 1, "configs/b.yaml does not exist"),
        (["--", "up"], 1, "'kintsugi up' is about the machine on which it is typed"),
        (["--", "jobs", "list"], 1, "'kintsugi jobs' is about the machine"),
        (["--env", "ABSENT", "--", "models", "list"], 1, "--env ABSENT passes a variable that is not set here"),
        (["--entrypoint-label", "gpu", "--", "models", "list"], 1, "--entrypoint-label takes KEY=VALUE, not gpu"),
        (["--id", "a b", "--", "models", "list"], 1, "--id a b cannot be a name"),
        (["--working-dir", "none", "--", "models", "list"], 1, "--working-dir none is no folder"),
        (["--working-dir", "configs", "--", "train", "configs/a.yaml"], 1, "paths in the command are seen from there"),
        (["--max-mb", "0.000001", "--", "train", "configs/a.yaml"], 1, "the largest: configs/a.yaml"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    cluster: FakeJobs, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *words]) == code
    assert told in " ".join(capsys.readouterr().err.split())
    assert cluster.requests == []


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        (("FAILED", 7), 7, "job one failed after 12 s with exit code 7"),
        (("FAILED", None), 1, "before its command could run: no such image"),
        (("STOPPED", None), 1, "job one was stopped"),
    ],
)
def test_submit_ends_with_the_exit_code_of_the_job(
    cluster: FakeJobs, ends: tuple[str, int | None], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.ends = ends
    assert cli.main(["submit", "--id", "one", "--", "models", "list"]) == code
    assert told in capsys.readouterr().err
    assert cli.main(["submit", "--id", "one", "--", "models", "list"]) == code
    assert "known already" in capsys.readouterr().err and len(cluster.requests) == 1


def test_a_document_for_machines_stands_alone(cluster: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--id", "one", "--json", "--", "models", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["id"] == "one" and json.loads(out)["exit_code"] == 0
    assert "the log of one" in err


def test_a_job_that_nobody_waits_for_tells_how_to_follow_it(
    cluster: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.ends = ("RUNNING", None)
    assert cli.main(["submit", "--id", "one", "--no-wait", "--", "models", "list"]) == 0
    assert "'kintsugi jobs logs one' follows it" in capsys.readouterr().out


def test_an_interrupt_leaves_the_job_running(cluster: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.interrupted = True
    assert cli.main(["submit", "--id", "one", "--", "models", "list"]) == 130
    assert "job one runs on: 'kintsugi jobs logs one' follows it" in capsys.readouterr().err


def test_jobs_are_listed_shown_and_stopped(cluster: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.known = {
        "one": Job("one", "models list", "RUNNING", started=100.0),
        "two": Job("two", "x", "FAILED", driver_code=3),
    }
    assert cli.main(["jobs", "list", "--json"]) == 0
    assert [(job["id"], job["exit_code"]) for job in json.loads(capsys.readouterr().out)] == [("one", None), ("two", 3)]
    assert cli.main(["jobs", "list"]) == 0
    assert "failed" in capsys.readouterr().out
    assert cli.main(["jobs", "logs", "two"]) == 3
    assert capsys.readouterr().out == "the log of two\n"
    assert cli.main(["jobs", "stop", "one"]) == 0
    assert capsys.readouterr().out == "job one is being stopped\n"
    assert cli.main(["jobs", "stop", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "two", "stopped": False}
    assert cli.main(["jobs", "stop", "none"]) == 1
    assert "knows no job none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "variables", "chosen"),
    [
        ("http://a:1", {"RAY_API_SERVER_ADDRESS": "http://b:1"}, "http://a:1"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://b:1", "RAY_ADDRESS": "http://c:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "http://c:1"}, "http://c:1"),
    ],
)
def test_the_cluster_is_the_one_that_is_named_first(
    address: str | None,
    variables: dict[str, str],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert verb.choose_cluster(address) == chosen


def test_the_local_stack_is_chosen_with_its_token_which_goes_to_no_other_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (*STACK_SETS, "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "KINTSUGI_STORE"):
        # Set first, so that what activation leaves is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    mine, other = "http://127.0.0.1:8265", "http://10.0.0.1:8265"
    addresses = {"ray_address": "127.0.0.1:1", "dashboard": mine, "tensorboard": mine, "endpoint": mine}
    ray = ProcessRecord(pid=os.getpid(), create_time=psutil.Process().create_time())
    stack = Stack(s3_endpoint=None, store_uri=str(tmp_path), scratch=tmp_path, processes={"ray": ray}, **addresses)
    save(tmp_path, stack)
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path))
    assert verb.choose_cluster(other) == other
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert verb.choose_cluster(None) == mine
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray-token")
    monkeypatch.setenv("KINTSUGI_STORE", "s3://another/store")
    with pytest.raises(StackError, match="names s3://another/store and the local stack was started with"):
        verb.choose_cluster(None)


def test_without_any_cluster_it_is_told_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StackError, match="run 'kintsugi up', or name a dashboard by --address"):
        verb.choose_cluster(None)


def test_the_parser_finds_the_paths_of_a_verb_and_of_one_below_another(tmp_path: Path) -> None:
    root: Any = cli.build_app()
    assert verb.named_paths(root, ["train", "a.yaml", "--name", "b"]) == [Path("a.yaml")]
    assert {*verb.named_paths(root, ["tune", "s.yaml", "--config", "c.yaml"])} == {Path("s.yaml"), Path("c.yaml")}
    assert verb.named_paths(root, ["tune", "publish", "first"]) == []
    assert verb.named_paths(root, ["evaluate", str(tmp_path)]) == [tmp_path]
    assert verb.named_paths(root, ["evaluate", "unet@production"]) == []
    with pytest.raises(ConfigError):
        verb.named_paths(root, ["-v", "down"])


class _Version(BaseHTTPRequestHandler):
    status, body = 200, b'{"version": "4", "ray_version": "2.1.0"}'

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b'{"version": "4", "ray_version": "2.9.0"}', "runs Ray 2.9.0 and this kintsugi Ray 2."),
        (404, b"", "is no Ray dashboard: name another address"),
        (200, b"{}", "is no Ray dashboard: name another address"),
        (200, b"<html>", "no Ray dashboard answers"),
        (503, b"starting", "fails (starting)"),
    ],
)
def test_what_is_no_cluster_of_ours_is_told(status: int, body: bytes, told: str) -> None:
    answers = type("Answers", (_Version,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(StackError) as refused:
            RayJobs(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert told in str(refused.value)


def test_an_exit_of_the_cluster_that_is_not_there_is_told() -> None:
    with pytest.raises(StackError, match="no Ray dashboard answers at"):
        RayJobs(ADDRESS)


def test_a_job_that_is_done_raises_no_exit(cluster: FakeJobs) -> None:
    verb.tell(cluster, Job("one", "x", "SUCCEEDED"), new=False, wait=True, as_json=False)
    with pytest.raises(typer.Exit):
        verb.tell(cluster, Job("one", "x", "FAILED"), new=False, wait=True, as_json=False)
