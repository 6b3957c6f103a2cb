"""What the store asks of S3, and what becomes of its answers; test_storage.py holds what every store does."""

import inspect
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.exceptions
import pytest
from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
from botocore.exceptions import BotoCoreError, ClientError
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber

from kintsugi.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from kintsugi.storage import (
    ObjectInfo,
    Patience,
    S3Store,
)

AT_ONCE = Patience(seconds=0)
ESCAPES = ["", "/", "/etc/passwd", "..", "../out", "a/../../out", "a//b", "a/./b", "a/", "a\0b"]


def _s3() -> tuple[S3Store, Stubber]:
    store = S3Store("s3://bucket/root", AT_ONCE)
    store.__dict__["_client"] = client = boto3.client(
        "s3", region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    return store, Stubber(client)


def test_s3_keys_lie_below_the_prefix_and_conditions_travel_as_headers() -> None:
    store, stub = _s3()
    with stub:
        sent = {"Bucket": "bucket", "Key": "root/a/b", "Body": b"x"}
        stub.add_response("put_object", {}, {**sent, "IfNoneMatch": "*"})
        stub.add_response("put_object", {}, {**sent, "IfMatch": '"tag"'})
        stub.add_response("put_object", {}, sent)
        store.put("a/b", b"x", if_none_match=True)
        store.put("a/b", b"x", if_match='"tag"')
        store.put("a/b", b"x")
        stub.assert_no_pending_responses()


def test_s3_sends_a_file_from_the_disk_also_under_a_condition(tmp_path: Path) -> None:
    store = S3Store("s3://bucket/root", AT_ONCE)
    sent: list[tuple[bool, bytes, str]] = []

    def put_object(**asked: Any) -> None:
        sent.append((isinstance(asked["Body"], bytes), asked["Body"].read(), asked["IfNoneMatch"]))

    store.__dict__["_client"] = SimpleNamespace(put_object=put_object)
    (tmp_path / "file").write_bytes(b"large")
    store.put("k", tmp_path / "file", if_none_match=True)
    assert sent == [(False, b"large", "*")]


def test_s3_reads_bytes_and_etag() -> None:
    store, stub = _s3()
    with stub:
        body = StreamingBody(io.BytesIO(b"content"), 7)
        stub.add_response("get_object", {"Body": body, "ETag": '"tag"'}, {"Bucket": "bucket", "Key": "root/k"})
        assert store.get_with_etag("k") == (b"content", '"tag"')


def test_s3_reads_no_more_than_the_start_that_was_asked_for() -> None:
    store, stub = _s3()
    asked = {"Bucket": "bucket", "Key": "root/k", "Range": "bytes=0-3"}
    with stub:
        stub.add_response("get_object", {"Body": StreamingBody(io.BytesIO(b"II*\0"), 4)}, asked)
        stub.add_client_error("get_object", "InvalidRange", "empty", 416, expected_params=asked)
        stub.add_client_error("get_object", "NoSuchKey", "none", 404, expected_params=asked)
        assert store.get_start("k", 4) == b"II*\0"
        assert store.get_start("k", 4) == b""
        with pytest.raises(ObjectNotFound):
            store.get_start("k", 4)


def test_s3_asks_for_the_head_of_an_object_to_know_its_size() -> None:
    store, stub = _s3()
    with stub:
        stub.add_response("head_object", {"ContentLength": 7}, {"Bucket": "bucket", "Key": "root/k"})
        assert store.size("k") == 7
        # An answer to HEAD has no body, so that the code is the status.
        stub.add_client_error("head_object", "404", "Not Found", 404)
        with pytest.raises(ObjectNotFound, match="s3://bucket/root/k"):
            store.size("k")
        stub.add_client_error("head_object", "404", "Not Found", 404)
        assert not store.exists("k")
        stub.add_client_error("head_object", "403", "Forbidden", 403)
        with pytest.raises(StoreError, match="refused the credentials"):
            store.exists("k")
        stub.assert_no_pending_responses()


def test_s3_lists_keys_without_the_prefix() -> None:
    store, stub = _s3()
    with stub:
        found = {
            "Contents": [{"Key": f"root/a/{n}", "Size": size, "ETag": f'"e{n}"'} for n, size in ((1, 3), (2, 4))],
            "IsTruncated": False,
        }
        stub.add_response("list_objects_v2", found, {"Bucket": "bucket", "Prefix": "root/a/"})
        assert list(store.list("a/")) == [ObjectInfo("a/1", 3), ObjectInfo("a/2", 4)]


def test_an_s3_store_is_opened_anew_in_another_process() -> None:
    store, _ = _s3()
    assert pickle.loads(pickle.dumps(store)).uri == "s3://bucket/root"


@pytest.mark.parametrize("key", ESCAPES)
def test_s3_refuses_the_same_keys(key: str) -> None:
    store, _ = _s3()
    with pytest.raises(StoreError, match="is not a key"):
        store.put(key, b"")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("NoSuchKey", 404, ObjectNotFound),
        ("404", 404, ObjectNotFound),
        ("NoSuchBucket", 404, StoreError),
        ("PreconditionFailed", 412, PreconditionFailed),
        ("ConditionalRequestConflict", 409, PreconditionFailed),
        ("AccessDenied", 403, StoreError),
        ("InvalidAccessKeyId", 403, StoreError),
        ("SignatureDoesNotMatch", 403, StoreError),
        ("ExpiredToken", 400, StoreError),
        ("RequestTimeout", 400, StoreUnavailable),
        ("SlowDown", 503, StoreUnavailable),
        ("InternalError", 500, StoreUnavailable),
        ("TooManyRequests", 429, StoreUnavailable),
        ("EntityTooLarge", 400, StoreError),
        ("Odd", 418, StoreError),
    ],
)
def test_every_answer_of_s3_becomes_one_of_our_errors(code: str, status: int, expected: type[StoreError]) -> None:
    store, stub = _s3()
    with stub:
        stub.add_client_error("get_object", code, "said no", status)
        with pytest.raises(StoreError) as caught:
            store.get("k")
    assert type(caught.value) is expected
    assert "s3://bucket/root" in str(caught.value)


def test_an_update_of_an_object_that_s3_lost_is_a_failed_precondition() -> None:
    store, stub = _s3()
    with stub:
        stub.add_client_error("put_object", "NoSuchKey", http_status_code=404, expected_params=ANY_PUT)
        with pytest.raises(PreconditionFailed):
            store.put("k", b"x", if_match='"tag"')


ANY_PUT = {"Bucket": ANY, "Key": ANY, "Body": ANY, "IfMatch": ANY}


def _foreign_errors() -> list[type[Exception]]:
    """Every exception class that botocore and boto3 raise."""
    classes = [kind for _, kind in inspect.getmembers(botocore.exceptions, inspect.isclass)]
    return [k for k in classes if issubclass(k, BotoCoreError | ClientError)] + [
        Boto3Error,
        RetriesExceededError,
        S3UploadFailedError,
    ]


def _made(kind: type[Exception]) -> Exception:
    if issubclass(kind, ClientError):
        return kind({"Error": {"Code": "Odd"}}, "GetObject")
    error = kind.__new__(kind)
    Exception.__init__(error, kind.__name__)
    return error


@pytest.mark.parametrize("kind", _foreign_errors(), ids=lambda kind: kind.__name__)
def test_no_exception_of_boto_gets_past_the_store(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def get_object(self, **_: Any) -> None:
            raise _made(kind)

    store = S3Store("s3://bucket", AT_ONCE)
    store.__dict__["_client"] = Client()
    with pytest.raises(StoreError):
        store.get("k")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (botocore.exceptions.EndpointConnectionError(endpoint_url="somewhere"), StoreUnavailable),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="somewhere"), StoreUnavailable),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailable),
        (RetriesExceededError(OSError("again")), StoreUnavailable),
        (botocore.exceptions.NoCredentialsError(), StoreError),
        (botocore.exceptions.ParamValidationError(report="bad bucket"), StoreError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_only_faults_that_may_pass_say_try_again(error: Exception, expected: type[StoreError]) -> None:
    class Client:
        def download_file(self, *_: Any) -> None:
            raise error

    store = S3Store("s3://bucket", AT_ONCE)
    store.__dict__["_client"] = Client()
    with pytest.raises(StoreError) as caught:
        store.download("k", Path("unused"))
    assert type(caught.value) is expected


def test_a_refused_upload_of_a_file_is_told_by_its_cause(tmp_path: Path) -> None:
    store, stub = _s3()
    (tmp_path / "file").write_bytes(b"content")
    with stub:
        stub.add_client_error("put_object", "AccessDenied", http_status_code=403)
        with pytest.raises(StoreError, match="refused the credentials") as caught:
            store.put("k", tmp_path / "file")
    assert not isinstance(caught.value, StoreUnavailable)
