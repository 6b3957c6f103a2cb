"""`kintsugi restore --endpoint`: the images of a command line, restored by a service."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from kintsugi import imaging
from kintsugi.commands.restore import FileJob, FileResult
from kintsugi.errors import ConfigError, KintsugiError, StoreError
from kintsugi.storage import write_atomically
from kintsugi_serve.client.client import Client
from kintsugi_serve.client.values import Outcome, RestoredImage


def restore_remotely(
    jobs: Sequence[FileJob], model: str | None, white_level: int | None, endpoint: str, api_key: str | None
) -> Generator[FileResult]:
    """Each job's result as it is finished and its files are written; existing ones are replaced.

    Raises:
        ConfigError: the endpoint is no address, or a map's name says no format.
    """
    wants_map = any(job.defect_map for job in jobs)
    for job in jobs:
        if job.defect_map is not None:
            _map_format(job.defect_map)
    sources = [(job.source, job.mask) for job in jobs]
    with Client(endpoint, api_key) as client:
        outcomes = client.restore_many(sources, report=True, defect_map=wants_map, model=model, white_level=white_level)
        for outcome in outcomes:
            yield _result(jobs[outcome.index], outcome)


def _result(job: FileJob, outcome: Outcome) -> FileResult:
    if outcome.image is None:
        return FileResult(job, error=outcome.error)
    try:
        _write(job, outcome.image)
    except KintsugiError as error:
        return FileResult(job, error=error)
    found = outcome.image
    document = {"model": found.model, "digest": found.digest, "request_id": found.request_id}
    return FileResult(job, {**document, **(found.report or {})})


def _write(job: FileJob, restored: RestoredImage) -> None:
    if job.defect_map is None:
        restored.save(job.output, overwrite=True)
        return
    levels = restored.defect_map
    left_alone = restored.report is not None and restored.report.get("abstained") is not None
    if levels is None and not left_alone:
        raise ConfigError("the service's model predicts no defect map: ask for none, or for another with --model")
    restored.save(job.output, overwrite=True)
    if levels is not None:
        pixels = np.rint(levels * 255).astype(np.uint8)
        _save(job.defect_map, imaging.encode(imaging.Image(pixels, _map_format(job.defect_map))))


def _save(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}): check the folder and its free space") from error


def _map_format(path: Path) -> imaging.Format:
    suffix = path.suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise ConfigError(f"{path}: a map is a PNG or a TIFF: name it with .png or .tiff")
    return "png" if suffix == ".png" else "tiff"
