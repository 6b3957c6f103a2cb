"""Where Ray Train keeps its own record of a run, with more tries than pyarrow makes by itself."""

import os
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

TRIES = 13
"""They take some three minutes; by itself pyarrow gives up after six seconds, and the run with it."""


class PatientS3(fs.S3FileSystem):  # pyright: ignore[reportUntypedBaseClass]
    """Opened anew in every process: endpoint and credentials are those of its own environment."""

    def __init__(self, tries: int = TRIES) -> None:
        # `FileSystem.from_uri` reads these variables, the constructor does not.
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
        super().__init__(
            endpoint_override=endpoint.netloc or None,
            scheme=endpoint.scheme or "https",
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=tries),
        )
        self._tries = tries

    def __reduce__(self) -> tuple[type["PatientS3"], tuple[int]]:  # type: ignore[override]
        return type(self), (self._tries,)


def run_storage(uri: str) -> dict[str, Any]:
    """`storage_path` and `storage_filesystem` of Ray's RunConfig for a folder or an S3 address."""
    if not uri.startswith("s3://"):
        return {"storage_path": uri}
    return {"storage_path": uri.removeprefix("s3://"), "storage_filesystem": PatientS3()}
