"""kintsugi restore."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from kintsugi.commands.console import Json, note, print_json, say
from kintsugi.commands.lookup import find_model
from kintsugi.errors import ConfigError, DataError, KintsugiError, StoreError

# A name only, as in the table of cli.py: the library imports nothing of the service until --endpoint asks for it.
_REMOTE = "kintsugi_serve.client.command"
_KEY = "KINTSUGI_API_KEY"
_TILE = 512
_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})


@dataclass(frozen=True)
class FileJob:
    """An image to restore and the files that are written from it."""

    source: Path
    output: Path
    mask: Path | None = None
    defect_map: Path | None = None
    error_map: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.output, self.defect_map, self.error_map) if path is not None]


@dataclass(frozen=True)
class FileResult:
    """What became of a job: the model, its digest and the report in one document, or the error."""

    job: FileJob
    document: dict[str, Any] | None = None
    error: KintsugiError | None = None


def restore(
    image: Annotated[
        Path, typer.Argument(help="PNG, TIFF, JPEG or BMP; grey or RGB, 8 or 16 bit; or a folder with such images.")
    ],
    output: Annotated[Path, typer.Argument(help="Where the restored image goes, in the same format; or a folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint folder or a published model, as unet@production; default: the shipped one, "
            "or with --endpoint the service's own."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Known defects: every value but 0; for a folder, one with files of the same names."),
    ] = None,
    white_level: Annotated[int | None, typer.Option(help="Full scale, for example 4095 for 12 bit in 16.")] = None,
    defect_map: Annotated[
        Path | None, typer.Option(help="Write where the model sees defects, as PNG or TIFF of 8 bits.")
    ] = None,
    error_map: Annotated[
        Path | None,
        typer.Option(help="Write the bound of the error at each pixel, as PNG or TIFF of 16 bits of full scale."),
    ] = None,
    ensemble: Annotated[str, typer.Option(help="none, flips (4 passes) or dihedral (8).")] = "none",
    tile: Annotated[int, typer.Option(help="Side of a tile, px; changes memory and time, not the result.")] = _TILE,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Let a service restore, for example http://127.0.0.1:8000.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the key for --endpoint.")
    ] = _KEY,
    force: Annotated[bool, typer.Option(help="Replace existing outputs.")] = False,
    as_json: Json = False,
) -> None:
    """Restore one image, or all images of a folder, on this machine or by a service; a large TIFF passes in strips."""
    local = {"--error-map": error_map is not None, "--ensemble": ensemble != "none", "--tile": tile != _TILE}
    _check_options(endpoint, [name for name, given in local.items() if given], api_key_env)
    one = FileJob(image, output, mask, defect_map, error_map)
    jobs = _jobs_of_folder(one) if image.is_dir() else [one]
    _check_outputs(jobs, force)
    with _progress(len(jobs)) as (rows, images):
        if endpoint is None:
            results = _restore_here(jobs, model, white_level, {"tile": tile, "ensemble": ensemble}, rows)
        else:
            results = _restore_there(jobs, model, white_level, endpoint, os.environ.get(api_key_env))
        with contextlib.closing(results):
            if image.is_dir():
                _make_folders(jobs)
                _tell_many(images(results), len(jobs), as_json)
            else:
                _tell_one(next(results), as_json)


def _check_options(endpoint: str | None, local: Sequence[str], api_key_env: str) -> None:
    if endpoint is not None and local:
        raise ConfigError(
            f"{', '.join(local)} cannot be asked of a service: leave it out, or restore without --endpoint"
        )
    if api_key_env == _KEY:
        return
    if endpoint is None:
        raise ConfigError("--api-key-env is for a service: add --endpoint")
    if api_key_env not in os.environ:
        raise ConfigError(f"there is no environment variable {api_key_env}: export the API key under that name")


def _jobs_of_folder(given: FileJob) -> list[FileJob]:
    """A job for every image below the folder; names and sub-folders stay."""
    folder, target, masks = given.source, given.output, given.mask
    if given.defect_map or given.error_map:
        raise ConfigError("--defect-map and --error-map name one file: restore the images of the folder one by one")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file: name a folder for the images of {folder}")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{target} lies within {folder}: choose a folder beside it")
    if masks is not None and not masks.is_dir():
        raise ConfigError(f"{masks} is no folder: with a folder of images, --mask is one with files of the same names")
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if _is_image(path)]
    if not names:
        raise DataError(f"{folder} holds no PNG, TIFF, JPEG or BMP image: check the path")
    return [FileJob(folder / name, target / name, masks / name if masks else None) for name in names]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _check_outputs(jobs: Sequence[FileJob], force: bool) -> None:
    for path in (path for job in jobs for path in job.outputs):
        if path.exists() and not force:
            raise ConfigError(f"{path} exists: choose another name, or add --force to replace it")


def _make_folders(jobs: Sequence[FileJob]) -> None:
    for folder in {job.output.parent for job in jobs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made ({error.strerror}): choose another output folder") from error


def _restore_here(
    jobs: Sequence[FileJob],
    model: str | None,
    white_level: int | None,
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Generator[FileResult]:
    from kintsugi.restore.files import MapName, restore_file
    from kintsugi.restore.restorer import Restorer, RestoreSettings

    label, digest, folder = find_model(model)
    restorer = Restorer.from_checkpoint(folder, settings=RestoreSettings(**settings))
    for job in jobs:
        wanted: dict[MapName, Path | None] = {"defect_map": job.defect_map, "error_bound": job.error_map}
        maps: dict[MapName, Path] = {name: path for name, path in wanted.items() if path is not None}
        try:
            report = restore_file(
                restorer, job.source, job.output, mask=job.mask, white_level=white_level, maps=maps, progress=progress
            )
        except KintsugiError as error:
            yield FileResult(job, error=error)
        else:
            yield FileResult(job, {"model": label, "digest": digest, **report.to_dict()})


def _restore_there(
    jobs: Sequence[FileJob], model: str | None, white_level: int | None, endpoint: str, api_key: str | None
) -> Generator[FileResult]:
    return import_module(_REMOTE).restore_remotely(jobs, model, white_level, endpoint, api_key)


def _tell_one(result: FileResult, as_json: bool) -> None:
    if result.document is None:
        raise cast(KintsugiError, result.error)
    if as_json:
        print_json(result.document)
    else:
        say(_in_words(result))


def _tell_many(results: Iterator[FileResult], count: int, as_json: bool) -> None:
    """Every image as it is finished, or one document in the order of names; an error if any failed."""
    failed: list[FileResult] = []
    documents: list[dict[str, Any]] = []
    for result in results:
        files = {"image": str(result.job.source), "output": str(result.job.output)}
        if result.document is None:
            failed.append(result)
            documents.append({**files, "error": str(result.error)})
            note(f"{result.job.source}: {result.error}")
        else:
            documents.append({**files, **result.document})
            if not as_json:
                say(_in_words(result))
    if as_json:
        documents.sort(key=lambda document: document["image"])
        print_json({"restored": count - len(failed), "failed": len(failed), "images": documents})
    if failed:
        raise DataError(f"{len(failed)} of {count} images were not restored: the lines above say why")


def _in_words(result: FileResult) -> str:
    found = result.document or {}
    start = f"{result.job.output}: {found['model']}, "
    if found.get("abstained"):
        return f"{start}left as it was: {found['abstained']}"
    kept = f"{start}structure kept {found['retention']:.2f}"
    return f"{kept}  ALARM: {'; '.join(found.get('reasons', ()))}: look at this image" if found["alarm"] else kept


_Rows = Callable[[int, int], None]
_Images = Callable[[Iterator[FileResult]], Iterator[FileResult]]


@contextlib.contextmanager
def _progress(count: int) -> Generator[tuple[_Rows, _Images]]:
    """A bar on the terminal: rows of a large image, from the first call on, or images of several."""
    from rich.progress import Progress

    console = Console(stderr=True)
    # Results go to standard output, also where only the bar's own stream is a terminal.
    with Progress(console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal) as bar:
        several = count > 1
        task = bar.add_task("restoring", total=count if several else None, visible=several)

        def rows(done: int, total: int) -> None:
            if not several:
                bar.update(task, completed=done, total=total, visible=True)

        def images(results: Iterator[FileResult]) -> Iterator[FileResult]:
            for result in results:
                bar.advance(task)
                yield result

        yield rows, images
