"""What a request asks for: its images, its parameters, its patience, and whether it came whole."""

import asyncio
import base64
import hashlib
import math
import re
from collections import OrderedDict
from dataclasses import replace
from typing import Annotated

from fastapi import Query, Request
from starlette.datastructures import Headers, UploadFile

from kintsugi_serve.jobs import Job
from kintsugi_serve.schemas import Refusal

TIMEOUT = "x-kintsugi-timeout"
# curl --data-binary says x-www-form-urlencoded of everything; what the bytes are is decided by their magic number.
_RAW_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
_KEY = re.compile(r"[\x21-\x7e]{1,128}")
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")

WhiteLevel = Annotated[
    int | None, Query(ge=1, le=65535, description="value of full scale, for example 4095 for 12-bit cameras")
]
ModelName = Annotated[
    str | None,
    Query(max_length=160, description="a published model, NAME@NUMBER or NAME@ALIAS; default: the one in service"),
]
Embed = Annotated[bool, Query(description="write model, hashes and retention into the answered PNG or TIFF")]
DefectMap = Annotated[bool, Query(description="with a JSON answer: the defect map too, where the model predicts one")]


def budget_s(headers: Headers, limit_s: float) -> float:
    """Seconds that the request may take: a client may shorten the service's limit, never lengthen it.

    Raises:
        Refusal: `bad_request` for a header that is no positive number.
    """
    given = headers.get(TIMEOUT)
    if given is None:
        return limit_s
    try:
        asked = float(given)
    except ValueError:
        asked = math.nan
    if not asked > 0:
        raise Refusal("bad_request", f"X-Kintsugi-Timeout takes seconds, for example 2.5 (got {given[:40]!r})")
    return min(asked, limit_s)


async def read_job(request: Request, job: Job) -> Job:
    """The job with the images of a raw or a multipart body.

    Raises:
        Refusal: `bad_request` for a body that lacks the image, `unsupported_format` for another content type,
            `digest_mismatch` for a body that is not what its Content-Digest says.
    """
    if "content-digest" in request.headers:
        await asyncio.to_thread(_check_digest, request.headers, await request.body())
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        if kind not in _RAW_TYPES and not kind.startswith("image/"):
            raise Refusal("unsupported_format", f"{kind} is not restored: send a PNG, TIFF, JPEG or BMP image")
        image = await request.body()
        if not image:
            raise Refusal("bad_request", "the body is empty: send the image in it")
        return replace(job, image=image)
    async with request.form(max_files=2, max_fields=2) as form:
        names = [name for name, _ in form.multi_items()]
        if sorted(names) not in (["image"], ["image", "mask"]):
            raise Refusal("bad_request", f"multipart needs one part 'image' and at most one 'mask' (got {names})")
        parts = {name: await part.read() for name, part in form.items() if isinstance(part, UploadFile)}
    if "image" not in parts or len(parts) != len(names):
        raise Refusal("bad_request", "'image' and 'mask' must be files: give each part a filename")
    return replace(job, image=parts["image"], mask=parts.get("mask"))


def _check_digest(headers: Headers, body: bytes) -> None:
    """RFC 9530; other algorithms than sha-256 are not looked at."""
    found = _DIGEST.search(headers.get("content-digest", ""))
    if found and found[1] != base64.b64encode(hashlib.sha256(body).digest()).decode():
        raise Refusal(
            "digest_mismatch", "the body differs from its Content-Digest: it was damaged on its way, try again"
        )


class Repeats:
    """Idempotency keys and what was asked with them, of one ingress process and the last `size` requests.

    Restoring has no side effect, so a repeated request is simply answered again; only a key that comes with
    something else is refused, since then one of the two images would be taken for the other.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._seen: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def check(self, tenant: str, headers: Headers, job: Job) -> None:
        """Raise Refusal for a key that is malformed or belongs to another request."""
        key = headers.get("idempotency-key")
        if key is None:
            return
        if not _KEY.fullmatch(key):
            raise Refusal("bad_request", "Idempotency-Key takes up to 128 visible ASCII characters")
        asked = await asyncio.to_thread(_fingerprint, job)
        if self._seen.setdefault((tenant, key), asked) != asked:
            raise Refusal("idempotency_mismatch", "this Idempotency-Key came with another request: take a new one")
        self._seen.move_to_end((tenant, key))
        if len(self._seen) > self._size:
            self._seen.popitem(last=False)


def _fingerprint(job: Job) -> str:
    digest = hashlib.sha256(job.image)
    digest.update(hashlib.sha256(job.mask or b"").digest())
    digest.update(repr((job.mask is None, job.white_level, job.model, job.embed)).encode())
    return digest.hexdigest()
