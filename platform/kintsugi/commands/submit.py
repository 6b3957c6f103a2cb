"""kintsugi submit."""

import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kintsugi import local, parcel
from kintsugi.commands.console import Json, note, print_json, say
from kintsugi.errors import ConfigError, StackError
from kintsugi.jobs import INTERRUPTED, Job, JobServer, RayJobs, Request, follow, sent_files, submit_once
from kintsugi.parcel import Parcel
from kintsugi.training.provenance import SENT_COMMIT, source_commit

HERE_ONLY = frozenset({"up", "down", "status", "doctor", "demo", "submit", "jobs"})
FOLDERS = frozenset({"model", "detector"})
"""Names of parameters that take a folder or something else."""
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or the local stack's."),
]


def submit(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="VERB [ARGUMENTS]...", help="What to run, after '--'.")],
    name: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Name of the job; one of that name is not begun twice.")
    ] = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Show the job's log and end with its exit code.")] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Any command, not a verb of kintsugi.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--working-dir", metavar="FOLDER", help="Send this folder too, without what .gitignore and .rayignore name."
        ),
    ] = None,
    max_mb: Annotated[float, typer.Option(min=0, max=500, help="Refuse to send more than this.")] = 100,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Pass a variable, as it is here or with a value; repeatable."),
    ] = None,
    cpus: Annotated[float, typer.Option("--entrypoint-num-cpus", min=0, help="CPUs for the command itself.")] = 0,
    gpus: Annotated[float, typer.Option("--entrypoint-num-gpus", min=0, help="GPUs for the command itself.")] = 0,
    labels: Annotated[
        list[str] | None,
        typer.Option("--entrypoint-label", metavar="KEY=VALUE", help="Label of the node for it; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a verb as a job on the Ray cluster: kintsugi submit -- train config.yaml --set train.epochs=20.

    The job runs the code that is installed here, and goes on without this process: 'kintsugi jobs logs ID' shows it
    again, 'kintsugi jobs stop ID' ends it.
    """
    paths = [] if raw else named_paths(context.find_root().command, words)
    # Before anything reads Ray, which takes its token settings when it is imported.
    chosen = choose_cluster(address)
    variables, selector = _variables(env or ()), _pairs(labels or (), "--entrypoint-label")
    with _packed(words, paths, folder, max_mb) as (command, place, inputs):
        runtime_env = _runtime_env(place, variables)
        wanted = Request(_checked(name) or _new_name(words), _entrypoint(command, raw), runtime_env, inputs)
        server = RayJobs(chosen)
        job, new = submit_once(server, _placed(wanted, cpus, gpus, selector))
    tell(server, job, new=new, wait=wait, as_json=as_json)


def choose_cluster(address: str | None) -> str:
    """`address`, else the cluster that the environment names, else the local stack, whose variables are then set.

    Raises:
        StackError: no cluster is known, or it is the local stack and has another store than KINTSUGI_STORE names.
    """
    chosen = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _http(os.environ.get("RAY_ADDRESS", ""))
    stack = local.find(local.home_folder())
    if stack is not None and (chosen or stack.dashboard).rstrip("/") == stack.dashboard:
        _refuse_another_store(stack)
        # Its token goes to no other cluster.
        local.activate(local.home_folder())
        chosen = stack.dashboard
    if not chosen:
        raise StackError(
            "no Ray cluster is known: run 'kintsugi up', or name a dashboard by --address or RAY_API_SERVER_ADDRESS, "
            "as http://127.0.0.1:8265"
        )
    return chosen


def _refuse_another_store(stack: local.Stack) -> None:
    """Its head has the credentials of its own store only."""
    store = local.own_store()
    if store not in (None, stack.store_uri):
        raise StackError(
            f"KINTSUGI_STORE names {store} and the local stack was started with {stack.store_uri}: unset the variable, "
            f"or run 'kintsugi down' and 'kintsugi up'"
        )


def tell(server: JobServer, job: Job, *, new: bool, wait: bool, as_json: bool) -> None:
    """Say what became of a job; with `wait`, follow it first, and end with its exit code."""
    if not new:
        note(f"job {job.name} is known already ({job.state.lower()}): nothing new was begun")
    if wait and not (job.ended and not new):
        note(f"job {job.name}; Ctrl-C leaves it running")
        job = followed(server, job.name)
    if as_json:
        print_json(job.to_dict())
    elif not job.ended:
        say(f"job {job.name} was submitted: 'kintsugi jobs logs {job.name}' follows it, 'kintsugi jobs stop' ends it")
    else:
        note(outcome(job))
    if job.code:
        raise typer.Exit(job.code)


def followed(server: JobServer, name: str) -> Job:
    """Show a job's log until the job has ended. An interrupt ends the showing only."""
    try:
        return follow(server, name, _write, note)
    except KeyboardInterrupt:
        note(f"job {name} runs on: 'kintsugi jobs logs {name}' follows it, 'kintsugi jobs stop {name}' ends it")
        raise typer.Exit(INTERRUPTED) from None


def outcome(job: Job) -> str:
    """How a job ended, in one line."""
    took = f" after {job.finished - job.started:.0f} s" if job.started and job.finished else ""
    if job.state == "SUCCEEDED":
        return f"job {job.name} is done{took}"
    if job.state == "STOPPED":
        return f"job {job.name} was stopped{took}"
    if job.driver_code is None:
        return f"job {job.name} failed{took} before its command could run: {job.message.strip()}"
    return f"job {job.name} failed{took} with exit code {job.code}"


def named_paths(root: Any, words: Sequence[str]) -> list[Path]:
    """The files and folders that a command names, by the command line's own parser: wrong usage ends here.

    Raises:
        ConfigError: the verb is for this machine, not for a cluster.
    """
    context: Any = root.make_context("kintsugi", list(words))
    opened, verb = [context], ""
    try:
        while isinstance(context.command, TyperGroup):
            rest = [*context._protected_args, *context.args]
            found: Any = context.command.resolve_command(context, rest)
            name, command, rest = found
            verb = verb or name
            context = command.make_context(name, rest, parent=context)
            opened.append(context)
        if verb in HERE_ONLY:
            raise ConfigError(f"'kintsugi {verb}' is about the machine on which it is typed: run it without 'submit'")
        return list(_paths(context.params))
    finally:
        for context in reversed(opened):
            context.close()


def _paths(values: Mapping[str, Any]) -> Generator[Path]:
    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path):
                yield one
            elif name in FOLDERS and isinstance(one, str) and Path(one).is_dir():
                yield Path(one)


@contextmanager
def _packed(
    words: Sequence[str], paths: Sequence[Path], folder: Path | None, max_mb: float
) -> Generator[tuple[list[str], Path, str]]:
    """The words as they read on the cluster, the folder to send, and its digest."""
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is no folder: name one that is there")
    with tempfile.TemporaryDirectory(prefix="kintsugi-job-") as scratch:
        place = folder or Path(scratch)
        packed = Parcel(list(words)) if folder else parcel.pack_named(words, paths, Path.cwd())
        parcel.lay_out(packed, Path(scratch))
        files = sent_files(place)
        if folder is not None:
            parcel.check_inside(paths, folder, [path for _, path in files])
        parcel.check_size(files, place, max_mb)
        yield packed.words, place, parcel.digest(files, place)


def _runtime_env(place: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    return {
        "working_dir": str(place.absolute()),
        "py_modules": parcel.package_folders(),
        "excludes": ["__pycache__"],
        "env_vars": dict(variables),
    }


def _placed(request: Request, cpus: float, gpus: float, labels: Mapping[str, str]) -> Request:
    return Request(request.name, request.command, request.runtime_env, request.inputs, cpus, gpus, labels)


def _entrypoint(words: Sequence[str], raw: bool) -> str:
    return shlex.join(words if raw else ["python", "-m", "kintsugi.cli", *words])


def _variables(asked: Sequence[str]) -> dict[str, str]:
    """KINTSUGI_STORE, if the user set it, never the local stack's; the commit of the code; and what was asked for."""
    known = {"KINTSUGI_STORE": local.own_store(), SENT_COMMIT: source_commit()}
    variables = {name: value for name, value in known.items() if value is not None}
    for item in asked:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise ConfigError(
                f"--env {name} passes a variable that is not set here: set it, or give --env {name}=VALUE"
            )
        variables[name] = value if equals else os.environ[name]
    return variables


def _pairs(items: Sequence[str], option: str) -> dict[str, str]:
    for item in items:
        if not item.partition("=")[2]:
            raise ConfigError(f"{option} takes KEY=VALUE, not {item}")
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def _checked(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--id {name} cannot be a name: take up to 100 letters, digits, '.', '_' and '-'")
    return name


def _new_name(words: Sequence[str]) -> str:
    verb = re.sub(r"[^A-Za-z0-9]+", "-", Path(words[0]).name).strip("-") or "job"
    return f"{verb}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _http(address: str) -> str:
    return address if address.startswith(("http://", "https://")) else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
