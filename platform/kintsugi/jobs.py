"""Jobs on a Ray cluster, by Ray's Jobs API: submit one once, follow its log across lost connections, stop it."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from kintsugi.errors import ClusterUnreachable, StackError

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
INTERRUPTED = 130
ADDRESS = "RAY_API_SERVER_ADDRESS"
INPUTS = "kintsugi_inputs"
SILENCE_S = 120.0
"""A log that is silent for so long is opened anew: the connection may be dead with nobody to say so."""
PATIENCE_S = 1800.0
_ANSWER_S = (10, 120)
"""Limits for a connection and for an answer; Ray's client alone would wait for ever."""


@dataclass(frozen=True)
class Request:
    """A job to be. `name` is its submission id; `inputs` tells the files that it takes along from others."""

    name: str
    command: str
    runtime_env: Mapping[str, Any]
    inputs: str = ""
    cpus: float = 0.0
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it. `state` is Ray's; times in seconds since 1970."""

    name: str
    command: str
    state: str
    message: str = ""
    inputs: str = ""
    driver_code: int | None = None
    started: float | None = None
    finished: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def code(self) -> int | None:
        """What a shell would say of the command: 128 + n if signal n ended it, 1 if it never began; None before."""
        if not self.ended:
            return None
        if self.state == "SUCCEEDED":
            return 0
        code = self.driver_code or 1
        return code if code > 0 else 128 - code

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "state": self.state.lower(),
            "exit_code": self.code,
            "command": self.command,
            "started": self.started,
            "finished": self.finished,
        }


class JobServer(Protocol):
    """What runs jobs. Every method raises ClusterUnreachable where trying again may help."""

    def find(self, name: str) -> Job | None: ...
    def jobs(self) -> Sequence[Job]: ...
    def submit(self, request: Request) -> None: ...
    def stop(self, name: str) -> bool: ...
    def log(self, name: str) -> AsyncIterator[str]:
        """The whole log from its beginning, and then what comes, until the job has ended."""
        ...


def submit_once(server: JobServer, request: Request) -> tuple[Job, bool]:
    """Submit the job unless one of its name is there; the job, and whether it is new.

    Raises:
        StackError: a job of that name runs another command, or takes other files along.
    """
    known = server.find(request.name)
    if known is None:
        try:
            server.submit(request)
        except StackError:
            # Somebody was quicker, or only the answer was lost.
            known = _found_after_all(server, request.name)
            if known is None:
                raise
        else:
            return Job(request.name, request.command, "PENDING", inputs=request.inputs), True
    _refuse_another(known, request)
    return known, False


def _found_after_all(server: JobServer, name: str) -> Job | None:
    try:
        return server.find(name)
    except ClusterUnreachable as error:
        raise ClusterUnreachable(
            f"{error}; whether job {name} was begun is not known: submit it again with --id {name}, which begins it "
            f"once at most"
        ) from error


def _refuse_another(known: Job, request: Request) -> None:
    if known.command != request.command:
        raise StackError(
            f"job {known.name} runs '{known.command}', not '{request.command}': choose another --id for another job"
        )
    if known.inputs != request.inputs:
        raise StackError(
            f"job {known.name} runs '{known.command}' with other files than those here: choose another --id"
        )


class _Log:
    """Writes a log once, however often it is read from its beginning."""

    def __init__(self, write: Callable[[str], None], note: Callable[[str], None]) -> None:
        self.write, self.note, self.written, self.lost = write, note, 0, False

    async def read(self, parts: AsyncIterator[str], silence_s: float) -> bool:
        """Whether it was read to its end; False after a silence."""
        at = 0
        while True:
            try:
                part = await asyncio.wait_for(anext(parts), silence_s)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            if self.lost:
                self.note("connected again")
                self.lost = False
            if new := part[max(self.written - at, 0) :]:
                self.write(new)
            at += len(part)
            self.written = max(self.written, at)


def follow(
    server: JobServer,
    name: str,
    write: Callable[[str], None],
    note: Callable[[str], None],
    *,
    silence_s: float = SILENCE_S,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Job:
    """Write a job's log as it grows, each line once, until the job has ended; the job as it ended.

    Raises:
        StackError: the cluster does not know the job, or did not answer for `patience_s`. The job itself may run on.
    """
    log, last, delay = _Log(write, note), clock(), 0.5
    while True:
        before = log.written
        try:
            job, whole = _read_once(server, name, log, silence_s)
        except ClusterUnreachable as error:
            if log.written > before:
                last, delay = clock(), 0.5
            if clock() - last > patience_s:
                raise ClusterUnreachable(f"{error}; 'kintsugi jobs logs {name}' follows the job later") from error
            if not log.lost:
                note(f"connection lost, the job goes on without it: trying again for {patience_s / 60:.0f} minutes")
            log.lost = True
        else:
            if job.ended and whole:
                return job
            last, delay = clock(), 0.5
        pause(delay)
        delay = min(2 * delay, 10.0)


def _read_once(server: JobServer, name: str, log: _Log, silence_s: float) -> tuple[Job, bool]:
    find_job(server, name)
    whole = asyncio.run(log.read(server.log(name), silence_s))
    return find_job(server, name), whole


def find_job(server: JobServer, name: str) -> Job:
    """The job of that name.

    Raises:
        StackError: there is none.
    """
    job = server.find(name)
    if job is None:
        raise StackError(f"the cluster knows no job {name}: 'kintsugi jobs list' shows those that it does")
    return job


class RayJobs:
    """The jobs of a cluster behind the dashboard at `address`, with the token that Ray's own variables name."""

    def __init__(self, address: str) -> None:
        self.address = address
        with self._told():
            self._client = _ray_client(address)
        _check_version(address, self._client.ray_version)

    def find(self, name: str) -> Job | None:
        with self._told():
            found = self._client.get_job_info_or_none(name)
        return None if found is None or found.submission_id is None else _job(found)

    def jobs(self) -> list[Job]:
        """Those that were submitted, oldest first."""
        with self._told():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0)

    def submit(self, request: Request) -> None:
        with self._told():
            self._client.submit_job(
                entrypoint=request.command,
                submission_id=request.name,
                runtime_env=dict(request.runtime_env),
                metadata={INPUTS: request.inputs},
                entrypoint_num_cpus=request.cpus or None,
                entrypoint_num_gpus=request.gpus or None,
                entrypoint_label_selector=dict(request.labels) or None,
            )

    def stop(self, name: str) -> bool:
        with self._told():
            return bool(self._client.stop_job(name))

    async def log(self, name: str) -> AsyncIterator[str]:
        with self._told():
            async for text in self._client.tail_job_logs(name):
                yield text

    @contextlib.contextmanager
    def _told(self) -> Generator[None]:
        """Ray's, its HTTP client's and its web socket client's errors, as ours."""
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise StackError(_refused(self.address, str(error))) from error
        except (OSError, aiohttp.ClientError) as error:
            raise ClusterUnreachable(
                f"no Ray dashboard answers at {self.address}: start the cluster ('kintsugi up' on one machine), "
                f"or open the tunnel to it"
            ) from error
        except (RuntimeError, ValueError, LookupError) as error:
            if "WebSocket" in str(error):
                raise ClusterUnreachable(f"the connection to {self.address} was lost") from error
            if isinstance(error, LookupError) or "Version check" in str(error):
                raise StackError(f"what answers at {self.address} is no Ray dashboard: name another address") from error
            raise StackError(f"the cluster at {self.address} refuses: {_last_line(str(error))}") from error


def sent_files(folder: Path) -> list[tuple[int, Path]]:
    """Size in bytes and path of each file that Ray sends of a folder: not those that .gitignore or .rayignore name."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    found: list[tuple[int, Path]] = []

    def take(path: Path) -> None:
        if path.is_file():
            found.append((path.stat().st_size, path))

    unwanted: Any = packaging._get_excludes(folder, [*get_runtime_env_default_excludes(), "__pycache__"])  # pyright: ignore[reportPrivateUsage]
    packaging._dir_travel(folder.absolute(), [unwanted], take, include_gitignore=True)  # pyright: ignore[reportPrivateUsage]
    return found


def _ray_client(address: str) -> Any:
    # Not at the top: Ray reads its token settings when it is imported.
    from ray.job_submission import JobDetails, JobSubmissionClient

    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Waits for no answer for ever, and tells a failing server from a refusal."""

        @property
        def ray_version(self) -> str:
            return self._server_ray_version or ""

        def get_job_info_or_none(self, name: str) -> Any:
            answer = self._do_request("GET", f"/api/jobs/{quote(name, safe='')}")
            if answer.status_code == 404:
                return None
            return JobDetails(**answer.json()) if answer.status_code == 200 else self._raise_error(answer)

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            answer = super()._do_request(method, endpoint, timeout=_ANSWER_S, **more)
            if answer.status_code >= 500:
                reason = _last_line(answer.text)
                raise ClusterUnreachable(f"the cluster at {address} fails ({reason}): look at its logs, or try again")
            return answer

    with _preferred(address):
        return Client(address)


@contextlib.contextmanager
def _preferred(address: str) -> Generator[None]:
    """Ray prefers this variable to the address that it is given."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS)
        os.environ |= {} if before is None else {ADDRESS: before}


def _check_version(address: str, theirs: str) -> None:
    ours = version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise StackError(
            f"the cluster at {address} runs Ray {theirs or '(unknown)'} and this kintsugi Ray {ours}: submit with the "
            f"kintsugi that the cluster was made from, or make the cluster anew"
        )


def _job(details: Any) -> Job:
    metadata: dict[str, str] = details.metadata or {}
    started, finished = (None if t is None else t / 1000 for t in (details.start_time, details.end_time))
    return Job(
        name=details.submission_id,
        command=details.entrypoint,
        state=str(details.status.value),
        message=details.message or "",
        inputs=metadata.get(INPUTS, ""),
        driver_code=details.driver_exit_code,
        started=started or None,
        finished=finished or None,
    )


def _refused(address: str, reason: str) -> str:
    if reason.startswith("Authentication required"):
        return (
            f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token and put the cluster's token into "
            f"~/.ray/auth_token, or name its file by RAY_AUTH_TOKEN_PATH"
        )
    return (
        f"the cluster at {address} refuses the token: put this cluster's own into ~/.ray/auth_token, or name its file "
        f"by RAY_AUTH_TOKEN_PATH"
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].rstrip(".")
