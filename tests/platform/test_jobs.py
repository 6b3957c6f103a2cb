import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from kintsugi.errors import ClusterUnreachable, StackError
from kintsugi.jobs import Job, Request, follow, sent_files, submit_once

REQUEST = Request("nightly", "train a.yaml", {}, inputs="abc")
LOST = ClusterUnreachable("the line was cut")


class FakeServer:
    """Jobs in a dictionary. Each reading of a log plays the next of `readings`: texts, and errors to raise."""

    def __init__(self, *jobs: Job, readings: Sequence[Sequence[str | Exception]] = ()) -> None:
        self.known = {job.name: job for job in jobs}
        self.submitted: list[Request] = []
        self.on_submit: Exception | None = None
        self._readings = iter(readings)

    def find(self, name: str) -> Job | None:
        return self.known.get(name)

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def submit(self, request: Request) -> None:
        self.submitted.append(request)
        if self.on_submit:
            raise self.on_submit

    def stop(self, name: str) -> bool:
        return not self.known[name].ended

    async def log(self, name: str) -> AsyncIterator[str]:
        for item in next(self._readings, ()):
            if isinstance(item, Exception):
                raise item
            yield item


class Time:
    """A clock that only pauses move on."""

    def __init__(self, after_pause: Callable[[], None] = lambda: None) -> None:
        self.now, self.after_pause = 0.0, after_pause

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.after_pause()


def job(state: str = "RUNNING", *, command: str = "train a.yaml", inputs: str = "abc", code: int | None = None) -> Job:
    return Job("nightly", command, state, inputs=inputs, driver_code=code)


def followed(server: FakeServer, time: Time | None = None, **more: float) -> tuple[Job, str, list[str]]:
    text, notes, time = list[str](), list[str](), time or Time()
    done = follow(server, "nightly", text.append, notes.append, clock=lambda: time.now, pause=time.pause, **more)
    return done, "".join(text), notes


def test_a_job_is_submitted_where_none_of_its_name_is() -> None:
    server = FakeServer()
    assert submit_once(server, REQUEST) == (Job("nightly", "train a.yaml", "PENDING", inputs="abc"), True)
    assert server.submitted == [REQUEST]


@pytest.mark.parametrize("state", ["RUNNING", "SUCCEEDED", "FAILED"])
def test_the_same_job_is_found_and_not_begun_again(state: str) -> None:
    server = FakeServer(job(state))
    assert submit_once(server, REQUEST) == (job(state), False)
    assert server.submitted == []


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (job(command="train b.yaml"), "runs 'train b.yaml', not 'train a.yaml'"),
        (job(inputs="def"), "with other files than those here"),
    ],
)
def test_another_job_of_the_name_is_refused(known: Job, told: str) -> None:
    with pytest.raises(StackError, match=re.escape(told)):
        submit_once(FakeServer(known), REQUEST)


def test_a_submission_whose_answer_was_lost_is_found() -> None:
    server = FakeServer()
    server.on_submit = LOST
    with pytest.raises(ClusterUnreachable):
        submit_once(server, REQUEST)

    class Late(FakeServer):
        def submit(self, request: Request) -> None:
            self.known[request.name] = job()
            raise LOST

    assert submit_once(Late(), REQUEST) == (job(), False)


def test_a_submission_of_which_nothing_is_known_says_how_to_begin_it_once() -> None:
    class Gone(FakeServer):
        def find(self, name: str) -> Job | None:
            if self.submitted:
                raise LOST
            return None

    server = Gone()
    server.on_submit = LOST
    with pytest.raises(ClusterUnreachable, match="submit it again with --id nightly"):
        submit_once(server, REQUEST)


def test_a_log_is_written_as_it_comes_until_the_job_has_ended() -> None:
    server = FakeServer(job("SUCCEEDED", code=0), readings=[["a\n", "b\n"]])
    assert followed(server) == (job("SUCCEEDED", code=0), "a\nb\n", [])


def test_each_line_is_written_once_however_often_the_connection_is_cut() -> None:
    readings = [["one\n", LOST], [LOST], ["on", "e\ntw", LOST], ["one\ntwo\nthree\n"]]
    done, text, notes = followed(FakeServer(job("FAILED", code=3), readings=readings))
    assert (done.code, text) == (3, "one\ntwo\nthree\n")
    lost = "connection lost, the job goes on without it: trying again for 30 minutes"
    assert notes == [lost, "connected again", lost, "connected again"]


def test_a_log_that_ends_before_its_job_is_opened_again() -> None:
    server = FakeServer(job(), readings=[["one\n"], ["one\ntwo\n"]])
    time = Time(after_pause=lambda: server.known.update(nightly=job("SUCCEEDED")))
    assert followed(server, time)[1] == "one\ntwo\n"


def test_a_connection_that_died_in_silence_is_opened_again() -> None:
    class Silent(FakeServer):
        readings = 0

        async def log(self, name: str) -> AsyncIterator[str]:
            self.readings += 1
            yield "one\n"
            if self.readings == 1:
                await asyncio.Event().wait()
            yield "two\n"

    server = Silent(job("SUCCEEDED"))
    assert followed(server, silence_s=0.01)[1] == "one\ntwo\n"
    assert server.readings == 2


def test_following_ends_when_nothing_answers_for_long_and_says_how_to_go_on() -> None:
    server = FakeServer(job(), readings=[[LOST]] * 1000)
    time = Time()
    with pytest.raises(
        ClusterUnreachable, match="the line was cut; 'kintsugi jobs logs nightly' follows the job later"
    ):
        followed(server, time, patience_s=60.0)
    assert 60 < time.now < 80


def test_lines_that_come_between_two_losses_renew_the_patience() -> None:
    readings: list[list[str | Exception]] = []
    for lines in range(1, 20):
        readings += [["x\n" * lines, LOST], [LOST], [LOST], [LOST]]
    done, text, _ = followed(FakeServer(job("SUCCEEDED"), readings=[*readings, ["x\n" * 20]]), patience_s=30.0)
    assert (done.code, text) == (0, "x\n" * 20)


def test_a_job_that_the_cluster_forgot_is_told() -> None:
    with pytest.raises(StackError, match="knows no job nightly"):
        followed(FakeServer())


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 7, 7),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_code_of_a_job_is_what_a_shell_would_say(state: str, driver: int | None, code: int | None) -> None:
    assert job(state, code=driver).code == code


def test_what_is_sent_of_a_folder_leaves_out_what_its_ignore_files_name(tmp_path: Path) -> None:
    for name in (
        "a.yaml",
        "data/big.bin",
        "data/kept.txt",
        "below/x.log",
        ".venv/lib.py",
        "__pycache__/a.pyc",
        "out/y",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    (tmp_path / ".gitignore").write_text("*.log\nout/\n")
    (tmp_path / "data" / ".rayignore").write_text("*.bin\n")
    sent = {path.relative_to(tmp_path).as_posix(): size for size, path in sent_files(tmp_path)}
    assert sent.keys() == {"a.yaml", "data/kept.txt", "data/.rayignore", ".gitignore"}
    assert sent["a.yaml"] == 5
