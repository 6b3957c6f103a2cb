"""The `kintsugi batch` verb: restores every image under a prefix."""

import contextlib
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kintsugi import cluster, local
from kintsugi.commands.console import Json, note, print_json, say
from kintsugi.errors import ConfigError, KintsugiError, RunInterrupted
from kintsugi.storage import open_store, store_uri_from_environment

if TYPE_CHECKING:
    from kintsugi_serve.batches.batch import Progress
    from kintsugi_serve.batches.service import RayBatchService

TENANT = "local"
_POLL_S = 0.5


def batch(
    input: Annotated[
        str | None, typer.Argument(help="s3://bucket/prefix, or a folder that every node sees.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Argument(help="Where the results go, under the same names.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME[@ALIAS|@NUMBER]", help="A published model.")] = None,
    white_level: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Full scale, for example 4095 for 12 bit in 16.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Actors at most; each holds the model and one image.")] = 2,
    cpus: Annotated[float, typer.Option(min=0.1, help="CPUs of an actor.")] = 0.5,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of an actor; above 0 the model runs on cuda.")] = 0.0,
    resume: Annotated[str | None, typer.Option(metavar="ID", help="Go on with a batch that stopped.")] = None,
    status: Annotated[str | None, typer.Option(metavar="ID", help="Say how far a batch is, and nothing else.")] = None,
    as_json: Json = False,
) -> None:
    """Restore every image under a prefix below another; the same command again goes on where the last one ended.

    Nothing is overwritten. Exit code 1 where an image was not restored: the ledger says which, and why.
    """
    _check(input, output, model, resume, status)
    local.activate(local.home_folder())
    from kintsugi_serve.batches.batch import BatchRequest, load_batch
    from kintsugi_serve.batches.run import RunOptions
    from kintsugi_serve.batches.service import RayBatchService, resolve_here

    store = store_uri_from_environment()
    service = RayBatchService(store, options=RunOptions(concurrency, cpus, gpus), resolve=resolve_here, detached=False)
    known = resume or status
    if known is not None:
        id = load_batch(open_store(store), TENANT, known).id
    else:
        request = BatchRequest(input=str(input), output=str(output), white_level=white_level, model=model)
        id = service.prepare(TENANT, request)
    cluster.connect(worker_output=False)
    progress = service.progress(TENANT, id) if status else _followed(service, service.resume(TENANT, id))
    _tell(progress, as_json)
    if not status:
        _refuse(progress)


def _check(input: str | None, output: str | None, model: str | None, resume: str | None, status: str | None) -> None:
    if resume is not None or status is not None:
        if resume is not None and status is not None:
            raise ConfigError("--resume and --status do not go together: --resume shows how far the batch is, too")
        if input is not None or model is not None:
            raise ConfigError("a batch that is named by its id has its input and model already: give the id alone")
    elif input is None or output is None:
        raise ConfigError("give an input and an output, for example kintsugi batch s3://bucket/raw s3://bucket/clean")
    elif model is None:
        raise ConfigError("--model is needed, for example --model unet@production")


def _followed(service: "RayBatchService", progress: "Progress") -> "Progress":
    """Show progress until the batch no longer runs."""
    note(f"batch {progress.id}: {progress.input} to {progress.output} with {progress.model}")
    with _bar() as show:
        while progress.status == "running":
            show(progress)
            time.sleep(_POLL_S)
            progress = service.progress(TENANT, progress.id)
    return progress


def _tell(progress: "Progress", as_json: bool) -> None:
    if as_json:
        print_json(progress.model_dump())
        return
    told = f"batch {progress.id} {progress.status}: {progress.restored} restored, {progress.kept} there already"
    others = [f"{getattr(progress, name)} {name}" for name in ("refused", "failed") if getattr(progress, name)]
    alarms = [f"{progress.alarms} with the defect alarm: look at these"] if progress.alarms else []
    left = [f"{progress.remaining} left"] if progress.remaining else []
    say(", ".join([told, *others, *left, *alarms]) + (f"; ledger {progress.ledger}" if progress.ledger else ""))


def _refuse(progress: "Progress") -> None:
    if progress.status == "stopped":
        again = f"'kintsugi batch --resume {progress.id}' goes on"
        raise RunInterrupted(f"batch {progress.id} stopped ({progress.detail or 'its process ended'}): {again}")
    lost = progress.refused + progress.failed
    if lost:
        raise KintsugiError(f"{lost} of {progress.total} images were not restored: {progress.ledger} says why of each")


@contextlib.contextmanager
def _bar() -> "Generator[Callable[[Progress], None]]":
    """A bar on the terminal."""
    from rich import progress as rich_progress

    columns = (*rich_progress.Progress.get_default_columns(), rich_progress.MofNCompleteColumn())
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("restoring", total=None)

        def show(progress: "Progress") -> None:
            done = progress.restored + progress.kept + progress.refused + progress.failed
            bar.update(task, completed=done, total=progress.total)

        yield show
