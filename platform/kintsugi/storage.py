"""ObjectStore: bytes under keys, in a folder, in S3 or in memory, with conditional writes.

This is the only place that touches boto3.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kintsugi.errors import ConfigError, ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.objects import (
    MemoryStore,
    ObjectInfo,
    ObjectStore,
    changed,
    check_condition,
    checked_key,
    checked_prefix,
    create,
    missing,
    sha256,
)
from kintsugi.retry import persist

__all__ = [
    "LONG",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "ObjectStore",
    "Patience",
    "S3Store",
    "cache_folder",
    "checked_key",
    "checked_prefix",
    "create",
    "open_store",
    "sha256",
    "store_uri_from_environment",
    "write_atomically",
]

T = TypeVar("T")

# The session that all clients come from is not for many threads at once, as the clients are (boto3's guide to clients).
_MAKING_CLIENTS = threading.Lock()
_OWN = ".kintsugi-"  # names of the store's own files in a folder
# S3 answers 400 to these (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
_CREDENTIAL_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed")
_TRANSIENT_CODES = ("RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "SlowDown")


class LocalStore(ObjectStore):
    """A store in a folder. Writes are atomic; conditions hold between processes of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = str(self.root)

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        with self._errors(key):
            data = self._path(key).read_bytes()
        return data, sha256(data)

    def get_start(self, key: str, count: int) -> bytes:
        with self._errors(key), self._path(key).open("rb") as stream:
            return stream.read(count)

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                current = None if not path.exists() else b"" if if_match is None else path.read_bytes()
                check_condition(current, key, if_none_match, if_match)
                write_atomically(path, data)
        except OSError as error:
            raise StoreError(f"cannot write {path} ({error}): check the folder's permissions and free space") from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = self.root / checked_prefix(prefix).rpartition("/")[0]
        for key, path in sorted((path.relative_to(self.root).as_posix(), path) for path in base.rglob("*")):
            if key.startswith(prefix) and not path.name.startswith(_OWN):
                with contextlib.suppress(FileNotFoundError):  # deleted by someone else since
                    if path.is_file():
                        found = path.stat()
                        yield ObjectInfo(key, found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")

    def size(self, key: str) -> int:
        with self._errors(key):
            found = self._path(key).stat()
        if not stat.S_ISREG(found.st_mode):
            raise ObjectNotFound(missing(self.uri, key))
        return found.st_size

    def delete(self, key: str) -> None:
        with contextlib.suppress(ObjectNotFound), self._errors(key):
            self._path(key).unlink()

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            shutil.copyfile(self._path(key), path)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Generator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFound(missing(self.uri, key)) from error
        except OSError as error:
            raise StoreError(f"cannot use {self.uri}/{key} ({error}): check the folder's permissions") from error

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        with (self.root / f"{_OWN}lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Patience:
    """How long S3 is tried.

    A request that fails or stalls is repeated by botocore, at most `requests` times in all, with its pauses; a
    transfer that fails nevertheless, or halfway, is begun anew while no more than `seconds` have passed.
    """

    seconds: float = 10.0
    requests: int = 8
    connect_s: float = 5.0
    stall_s: float = 30.0


LONG = Patience(seconds=900.0)
"""For work that costs more to lose than to keep waiting: a training run outlives a store that is away for minutes."""


class S3Store(ObjectStore):
    """A store under `s3://bucket/prefix`; endpoint and credentials come from the standard AWS variables.

    A conditional write is sent again only by botocore: after a lost answer nobody can tell who wrote.
    """

    def __init__(self, uri: str, patience: Patience | None = None) -> None:
        parts = urlsplit(uri)
        if not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"{uri}: write a store as s3://bucket/prefix")
        self.bucket = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self.patience = patience or Patience()

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        retries = {"mode": "standard", "total_max_attempts": self.patience.requests}
        timeouts = {"connect_timeout": self.patience.connect_s, "read_timeout": self.patience.stall_s}
        with _MAKING_CLIENTS:
            return boto3.client("s3", config=Config(retries=retries, **timeouts))

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, Patience]]:
        return type(self), (self.uri, self.patience)

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        def read() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
            return answer["Body"].read(), answer["ETag"]

        return self._persist(key, read)

    def get_start(self, key: str, count: int) -> bytes:
        from botocore.exceptions import ClientError

        def read() -> bytes:
            asked = {"Bucket": self.bucket, "Key": self._key(key), "Range": f"bytes=0-{count - 1}"}
            try:
                return self._client.get_object(**asked)["Body"].read(count)
            except ClientError as error:
                if error.response["Error"]["Code"] == "InvalidRange":
                    return b""  # an empty object has no first byte
                raise

        return self._persist(key, read)

    def put(self, key: str, data: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None) -> None:
        if isinstance(data, Path) and not if_none_match and if_match is None:
            self._persist(key, lambda: self._client.upload_file(str(data), self.bucket, self._key(key)))
            return
        condition = {"IfNoneMatch": "*"} if if_none_match else {} if if_match is None else {"IfMatch": if_match}
        if not condition:
            self._persist(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data))
            return
        # Not by upload_file, which takes no condition; S3 takes up to 5 GiB in one request.
        opened = data.open("rb") if isinstance(data, Path) else contextlib.nullcontext(data)
        try:
            with self._errors(key), opened as body:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=body, **condition)
        except ObjectNotFound as error:  # S3 answers 404, not 412, where IfMatch names an object that is gone
            raise PreconditionFailed(changed(key)) from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        request = {"Bucket": self.bucket, "Prefix": self._prefix + checked_prefix(prefix)}
        while True:
            page = self._persist(prefix, lambda: self._client.list_objects_v2(**request))
            for found in page.get("Contents", ()):
                yield ObjectInfo(found["Key"][len(self._prefix) :], found["Size"], found.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, key: str) -> int:
        answer = self._persist(key, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(key)))
        return answer["ContentLength"]

    def delete(self, key: str) -> None:
        self._persist(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def download(self, key: str, path: Path) -> None:
        self._persist(key, lambda: self._client.download_file(self.bucket, self._key(key), str(path)))

    def create_bucket(self) -> None:
        """Make the bucket if it is not there."""
        with self._errors(""):
            if self.bucket not in {b["Name"] for b in self._client.list_buckets()["Buckets"]}:
                self._client.create_bucket(Bucket=self.bucket)

    @property
    def endpoint(self) -> str:
        """The URL that requests go to, whichever variable or file named it."""
        with self._errors(""):
            return self._client.meta.endpoint_url

    def _key(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _persist(self, key: str, work: Callable[[], T]) -> T:
        """For work that does no harm when it is done twice."""

        def once() -> T:
            with self._errors(key):
                return work()

        started = time.monotonic()
        try:
            return persist(once, StoreUnavailable, seconds=self.patience.seconds)
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{error} (tried for {time.monotonic() - started:.0f} s)") from error

    @contextlib.contextmanager
    def _errors(self, key: str) -> Generator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, ResponseParserError) as error:
            raise _from_boto(error, self.uri, key) from error


def open_store(uri: str, patience: Patience | None = None) -> ObjectStore:
    """The store at a folder path or an `s3://bucket/prefix`; `patience` is for S3."""
    if uri.startswith("s3://"):
        return S3Store(uri, patience)
    if "://" in uri:
        raise ConfigError(f"{uri}: a store is a folder or s3://bucket/prefix")
    return LocalStore(Path(uri))


def cache_folder() -> Path:
    """Where verified copies of the store's objects are kept: `KINTSUGI_CACHE`, else ~/.cache/kintsugi."""
    return Path(os.environ.get("KINTSUGI_CACHE") or Path.home() / ".cache" / "kintsugi")


def store_uri_from_environment() -> str:
    """The root URI that `KINTSUGI_STORE` names.

    Raises:
        ConfigError: the variable is not set.
    """
    uri = os.environ.get("KINTSUGI_STORE", "")
    if not uri:
        raise ConfigError("KINTSUGI_STORE is not set: run 'kintsugi up', or set it to s3://bucket/prefix or a folder")
    return uri


def write_atomically(path: Path, data: bytes | Path) -> None:
    """Write bytes, or what a file holds, beside `path` and rename, so that no reader sees half a file."""
    part = path.with_name(f"{_OWN}{uuid.uuid4().hex}")
    try:
        with part.open("xb") as stream:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, stream, 2**20)
            else:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _from_boto(error: Exception, uri: str, key: str) -> StoreError:
    """Map whatever boto3 raises; an upload hides the store's answer in the exception's context."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as core
    from botocore.parsers import ResponseParserError

    if isinstance(error, Boto3Error) and isinstance(error.__context__, core.ClientError):
        error = error.__context__
    if isinstance(error, core.ClientError):
        return _from_client_error(error, uri, key)
    torn = (core.IncompleteReadError, core.FlexibleChecksumError, core.ChecksumError, ResponseParserError)
    if isinstance(error, (Boto3Error, core.ConnectionError, core.HTTPClientError, *torn)):
        return StoreUnavailable(f"{uri} did not answer ({error}): check AWS_ENDPOINT_URL, then try again")
    return StoreError(f"{uri} cannot be used ({error}): check KINTSUGI_STORE, the AWS variables and the credentials")


def _from_client_error(error: Any, uri: str, key: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in ("NoSuchKey", "404", "NotFound"):
        return ObjectNotFound(missing(uri, key))
    if code == "NoSuchBucket":
        return StoreError(f"{uri}: there is no such bucket: create it, or correct KINTSUGI_STORE")
    if status in (409, 412):
        return PreconditionFailed(f"{uri}/{key} exists already, or was changed by someone else")
    if status in (401, 403) or code in _CREDENTIAL_CODES:
        return StoreError(f"{uri} refused the credentials ({code}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if status == 429 or status >= 500 or code in _TRANSIENT_CODES:
        return StoreUnavailable(f"{uri} failed ({code or status}): try again")
    return StoreError(f"{uri}/{key}: the store refused ({code or status}): {error}")
