"""Start, show and stop the local stack: an S3 server (SeaweedFS), a Ray head and TensorBoard, all on 127.0.0.1."""

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from kintsugi import doors, inner_tls, processes
from kintsugi.errors import StackError
from kintsugi.stack import (
    Ports,
    Stack,
    activate,
    apply,
    credentials_file,
    environment,
    find,
    home_folder,
    log_file,
    own_store,
    record_file,
    save,
    token_file,
    write_credentials,
    write_token,
)

__all__ = ["Ports", "Stack", "activate", "down", "environment", "find", "home_folder", "status", "up"]

Progress = Callable[[str], None]

BUCKET = "s3://kintsugi"
START_S = 120.0
GRACE_S = {"s3": 3.0, "ray": 20.0, "tensorboard": 5.0}
"""Between SIGTERM and SIGKILL. SeaweedFS has its volumes closed in 0.3 s, then waits 15 s for its own S3 gateway."""
FLAGS = {"s3": "--s3-port", "dashboard": "--dashboard-port", "tensorboard": "--tensorboard-port", "gcs": "--ray-port"}


def up(
    home: Path, ports: Ports | None = None, *, cpus: int | None = None, progress: Progress = lambda _: None
) -> Stack:
    """Start the stack and wait until every part answers. With `KINTSUGI_STORE` set, no S3 server is started.

    Raises:
        StackError: a stack is recorded already, a port is taken, or a part did not come up (then nothing is left).
    """
    home = home.expanduser().resolve()
    with _locked(home):
        _refuse_a_second(find(home), home)
        if (store := own_store()) is not None:
            doors.check_store(store)
        ports = _chosen(ports or Ports(), with_s3=store is None, progress=progress)
        try:
            save(home, _planned(ports, store))
            return _start(home, ports, cpus, progress)
        except BaseException as error:
            _stop(home, progress)
            if isinstance(error, OSError):
                raise StackError(
                    f"the stack cannot be started in {home} ({error}): correct that and try again"
                ) from error
            raise


def down(home: Path, progress: Progress = lambda _: None) -> list[str]:
    """Stop what `up` started, newest first, and forget it; the store's data stays. Gives the names that ran."""
    home = home.expanduser().resolve()
    if find(home) is None:
        return []
    with _locked(home):
        return _stop(home, progress)


def status(home: Path) -> list[tuple[str, str, str]]:
    """(name, state, address) of every part; empty if no stack is recorded."""
    stack = find(home)
    if stack is None:
        return []
    serves = processes.accepts(int(stack.endpoint.rpartition(":")[2]))
    s3 = stack.state("s3")
    return [
        *([("s3", s3, stack.s3_endpoint)] if stack.s3_endpoint else []),
        ("store", s3 if stack.s3_endpoint else "yours", stack.store_uri),
        ("ray", stack.state("ray"), stack.ray_address),
        ("dashboard", stack.state("ray"), stack.dashboard),
        ("dashboard token", "in file", str(token_file(home).absolute())),
        ("tensorboard", stack.state("tensorboard"), stack.tensorboard),
        ("endpoint", "running" if serves else "stopped", stack.endpoint),
        ("logs", "in folder", str((home / "logs").absolute())),
    ]


def _refuse_a_second(stack: Stack | None, home: Path) -> None:
    if stack is None:
        return
    states = {part: stack.state(part) for part in stack.parts}
    if set(states.values()) == {"running"}:
        places = f"dashboard {stack.dashboard}, TensorBoard {stack.tensorboard}, store {stack.store_uri}"
        raise StackError(f"the stack in {home} is already running ({places}): 'kintsugi down' stops it")
    told = ", ".join(f"{part} {state}" for part, state in states.items())
    raise StackError(f"a stack is recorded in {home}, but not all of it runs ({told}): run 'kintsugi down' first")


def _chosen(ports: Ports, *, with_s3: bool, progress: Progress) -> Ports:
    """`ports` with every 0 replaced.

    Raises:
        StackError: a port that was asked for is taken, or asked for twice.
    """
    asked: dict[str, int] = {field.name: getattr(ports, field.name) for field in fields(ports)}
    given = [port for port in asked.values() if port]
    if len(set(given)) < len(given):
        raise StackError(f"two parts cannot share a port (asked for {', '.join(map(str, given))}): give each its own")
    for name, flag in FLAGS.items():
        port = asked[name]
        if port and (name != "s3" or with_s3) and not processes.is_free(port):
            raise StackError(f"port {port} is taken by {processes.holder(port)}: stop it or use {flag}")
    if asked["endpoint"] and not processes.is_free(asked["endpoint"]):
        holder = processes.holder(asked["endpoint"])
        progress(f"port {asked['endpoint']} is taken by {holder}: --endpoint-port names another for 'kintsugi serve'")
    free = iter(processes.free_ports(len(asked), avoid=asked.values()))
    return Ports(**{name: port or next(free) for name, port in asked.items()})


def _planned(ports: Ports, own_store: str | None) -> Stack:
    return Stack(
        s3_endpoint=None if own_store else f"http://127.0.0.1:{ports.s3}",
        store_uri=own_store or BUCKET,
        ray_address=f"127.0.0.1:{ports.gcs}",
        dashboard=f"http://127.0.0.1:{ports.dashboard}",
        tensorboard=f"http://127.0.0.1:{ports.tensorboard}",
        endpoint=f"http://127.0.0.1:{ports.endpoint}",
        scratch=_scratch(),
    )


def _scratch() -> Path:
    """A new folder with a short name: Ray's socket paths add some 60 bytes to it and must stay below 107."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="kintsugi-", dir=base if len(base) <= 20 else "/tmp"))


def _start(home: Path, ports: Ports, cpus: int | None, progress: Progress) -> Stack:
    """Start every part of the recorded plan; Ray comes up while S3 does."""
    stack = _recorded(home)
    inner = processes.free_ports(13, avoid=astuple(ports))
    token = write_token(home)
    if stack.s3_endpoint:
        write_credentials(home)
        progress(f"starting an S3 server at {stack.s3_endpoint}")
        _launch(home, "s3", _s3_command(home, stack.scratch, ports.s3, inner[:7]), _s3_environment(stack.scratch))
    else:
        progress(f"KINTSUGI_STORE names {stack.store_uri}: no S3 server is started")
    progress(f"starting a Ray head with its dashboard at {stack.dashboard}")
    _launch(home, "ray", _ray_command(stack.scratch, ports, inner[7:11], cpus), _head_environment(stack, home, inner))
    if stack.s3_endpoint:
        _wait(home, "s3", lambda: _answers(f"{stack.s3_endpoint}/"))
        _create_bucket(stack, home)
    progress(f"starting TensorBoard at {stack.tensorboard}")
    _launch(home, "tensorboard", _tensorboard_command(stack.store_uri, ports.tensorboard), _with_stack(stack, home))
    _wait(home, "ray", lambda: _head_is_ready(stack.dashboard, ports.gcs, token))
    _wait(home, "tensorboard", lambda: _answers(f"{stack.tensorboard}/data/environment"))
    return _recorded(home)


def _s3_command(home: Path, scratch: Path, port: int, inner: Sequence[int]) -> list[str]:
    s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = inner
    data = home / "s3"
    data.mkdir(mode=0o700, exist_ok=True)
    return [
        _program("weed"),
        "server",
        f"-dir={data}",
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        # The master's and the filer's HTTP, which nothing here uses, would delete a bucket for whoever asks.
        *("-disableHttp", "-filer.disableHttp"),
        *("-master.volumeSizeLimitMB=1024", "-volume.max=0", "-volume.preStopSeconds=0"),
        *(f"-master.port={master}", f"-master.port.grpc={master_grpc}"),
        *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"),
        *(f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", f"-filer.localSocket={scratch / 'filer.sock'}"),
        *("-s3", f"-s3.port={port}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={credentials_file(home)}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.localSocket={scratch / 's3.sock'}"),
    ]


def _s3_environment(scratch: Path) -> dict[str, str]:
    """Keys without which SeaweedFS's inner ports would give and take any object without a credential.

    The certificate for those that speak gRPC is written to `scratch`.
    """
    keys = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_", "S3_"))}
    signing = {f"WEED_JWT_{key}_KEY": secrets.token_hex(32) for key in keys}
    return ours | signing | inner_tls.grpc_environment(scratch)


def _ray_command(scratch: Path, ports: Ports, inner: Sequence[int], cpus: int | None) -> list[str]:
    agent, agent_grpc, runtime_env, client = inner
    return [
        *(_program("ray"), "start", "--head", "--block", "--disable-usage-stats", "--log-color=false"),
        *("--node-ip-address=127.0.0.1", f"--port={ports.gcs}", f"--temp-dir={scratch / 'ray'}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports.dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--runtime-env-agent-port={runtime_env}", f"--ray-client-server-port={client}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *([f"--num-cpus={cpus}"] if cpus else []),
    ]


def _head_environment(stack: Stack, home: Path, inner: Sequence[int]) -> dict[str, str]:
    """`python` in a job is this Python; a stopping head does not wait for its jobs."""
    variables = _with_stack(stack, home)
    variables.pop("RAY_ADDRESS")
    if "KINTSUGI_TRACES" in variables:
        variables.setdefault("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "kintsugi_serve.traces:exporters")
        variables.setdefault("RAY_SERVE_TRACING_SAMPLING_RATIO", "1")
        variables.setdefault("OTEL_SERVICE_NAME", "kintsugi")
    return variables | {
        "AUTOSCALER_METRIC_PORT": str(inner[11]),
        "DASHBOARD_METRIC_PORT": str(inner[12]),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _tensorboard_command(store_uri: str, port: int) -> list[str]:
    """Only TensorBoard's Python loader reads S3 without TensorFlow, hence `load_fast`."""
    where = ["--host=127.0.0.1", f"--port={port}", f"--logdir={store_uri}/runs"]
    return [sys.executable, "-m", "tensorboard.main", *where, "--load_fast=false", "--reload_interval=5"]


def _with_stack(stack: Stack, home: Path) -> dict[str, str]:
    variables = dict(os.environ)
    apply(environment(stack, home), variables)
    return variables


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _launch(home: Path, name: str, command: Sequence[str], env: dict[str, str]) -> None:
    """Start one part and record it at once, so that `down` finds it even if `up` is killed now."""
    log = log_file(home, name)
    log.parent.mkdir(mode=0o700, exist_ok=True)
    log.unlink(missing_ok=True)
    record = processes.start(command, env=env, folder=home, log=log)
    stack = _recorded(home)
    save(home, stack.model_copy(update={"processes": {**stack.processes, name: record}}))


def _wait(home: Path, name: str, ready: Callable[[], bool]) -> None:
    record = _recorded(home).processes[name]
    came = processes.wait_until(lambda: processes.state(record) != "running" or ready(), START_S)
    if processes.state(record) == "running" and came:
        return
    what = f"did not answer within {START_S:.0f} s" if not came else "stopped while it was starting"
    log = log_file(home, name)
    raise StackError(f"{name} {what}: see {log}, which tells: {processes.last_lines(log)}")


def _create_bucket(stack: Stack, home: Path) -> None:
    """In a process of its own: boto3 keeps the first credentials that it finds for the life of a process."""
    code = f"from kintsugi.storage import S3Store; S3Store({BUCKET!r}).create_bucket()"
    done = subprocess.run([sys.executable, "-c", code], env=_with_stack(stack, home), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise StackError(f"the bucket {BUCKET} cannot be made ({reason}): see {log_file(home, 's3')}")


def _head_is_ready(dashboard: str, gcs: int, token: str) -> bool:
    if not processes.accepts(gcs):
        return False
    answer = doors.ask(f"{dashboard}/nodes?view=summary", token)
    return answer is not None and answer.status == 200 and b'"ALIVE"' in answer.body


def _answers(url: str) -> bool:
    """Whether an HTTP server is there and does not fail; a refusal for want of a credential is an answer."""
    answer = doors.ask(url)
    return answer is not None and answer.status < 500


def _stop(home: Path, progress: Progress) -> list[str]:
    stack = find(home)
    if stack is None:
        return []
    stopped: list[str] = []
    for name, record in reversed(stack.processes.items()):
        progress(f"stopping {name}")
        if processes.stop(record, GRACE_S.get(name, 5.0)):
            stopped.append(name)
    shutil.rmtree(stack.scratch, ignore_errors=True)
    record_file(home).unlink(missing_ok=True)
    return stopped


@contextlib.contextmanager
def _locked(home: Path) -> Generator[None]:
    """Hold the home against another `up` or `down`; the lock ends with the process."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = (home / "lock").open("w")
    except OSError as error:
        raise StackError(
            f"{home} cannot be used ({error}): set KINTSUGI_HOME to a folder that you may write"
        ) from error
    with stream as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"another 'kintsugi up' or 'down' is at work in {home}: wait until it is done") from None
        yield


def _recorded(home: Path) -> Stack:
    stack = find(home)
    if stack is None:
        raise StackError(f"{record_file(home)} was deleted while the stack was starting: run 'kintsugi up' again")
    return stack
