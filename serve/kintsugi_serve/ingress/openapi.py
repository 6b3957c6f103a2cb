"""What the API's description says beyond what FastAPI sees: bodies, headers, examples, problems."""

from typing import Any

from kintsugi_serve.schemas import JsonResult, Problem

_IMAGES = ("image/png", "image/tiff", "image/jpeg", "image/bmp")
_FILE = {"type": "string", "format": "binary", "minLength": 1}
_PROBLEM = {
    "type": "about:blank",
    "title": "The image cannot be decoded",
    "status": 422,
    "detail": "the PNG is damaged or cut off: send it whole",
    "code": "undecodable",
    "request_id": "9f2c4e1a",
}


def _problem(description: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": Problem.model_json_schema(), "example": _PROBLEM}}
    return {"description": description, "content": content, "headers": headers or {}}


_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds until it is worth another try"}}
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": _problem("The request or its image is refused (RFC 9457); `code` never changes its meaning"),
    429: _problem("Too many requests", _RETRY_AFTER),
    "5XX": _problem("The service, a replica or the store cannot answer now"),
    503: _problem("No replica can answer now, or not in time", _RETRY_AFTER),
}

_ANSWER_HEADERS = {
    "X-Kintsugi-Model": ("string", "NAME@NUMBER of the model that answered"),
    "X-Kintsugi-Model-Digest": ("string", "SHA-256 of its manifest"),
    "X-Kintsugi-Defect-Retention": ("number", "how much of the defects' contrast is left, 0 to 1"),
    "X-Kintsugi-Alarm": ("boolean", "whether to look at the image before it is trusted"),
    "X-Kintsugi-Input-SHA256": ("string", "of the image as it came"),
    "X-Kintsugi-Output-SHA256": ("string", "of the image as it goes"),
    "X-Request-Id": ("string", "the request's own, or a new one"),
    "Server-Timing": ("string", "milliseconds of decode, queue, model and encode"),
}
_TEXT = {"type": "string"}
_ASKED_HEADERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "X-Request-Id": (
        "up to 64 of A-Z, a-z, 0-9, '.', '_', '-'; it is answered, and kept in the audit line",
        _TEXT,
        "part-7",
    ),
    "X-Kintsugi-Timeout": (
        "seconds that the client waits; it shortens the service's limit",
        {"type": "number", "exclusiveMinimum": 0},
        "2.5",
    ),
    "Idempotency-Key": (
        "one for each image, the same when it is sent again",
        {"type": "string", "pattern": "^[!-~]{1,128}$"},
        "3f1c9a60",
    ),
    "Content-Digest": (
        "RFC 9530: a body that differs is refused",
        _TEXT,
        "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:",
    ),
}


def _headers() -> dict[str, Any]:
    return {name: {"schema": {"type": kind}, "description": told} for name, (kind, told) in _ANSWER_HEADERS.items()}


def _parameters() -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "required": False, "description": told, "schema": kind, "example": example}
        for name, (told, kind, example) in _ASKED_HEADERS.items()
    ]


_RESTORE_BODY: dict[str, Any] = {
    "required": True,
    "content": {kind: {"schema": _FILE} for kind in (*_IMAGES, "application/octet-stream")}
    | {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "additionalProperties": False,
                "properties": {"image": _FILE, "mask": _FILE},
            }
        }
    },
}
RESTORE_ROUTE: dict[str, Any] = {
    "responses": {
        200: {
            "description": "The image, restored, in the format it came in; or a report with it, if JSON is accepted",
            "model": JsonResult,
            "content": {kind: {"schema": _FILE} for kind in _IMAGES},
            "headers": _headers(),
        }
    },
    "openapi_extra": {"requestBody": _RESTORE_BODY, "parameters": _parameters()},
}
S3_ROUTE: dict[str, Any] = {"responses": {200: {"headers": _headers()}}}
