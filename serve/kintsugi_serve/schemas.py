"""What crosses the service's boundaries: settings, jobs, answers, and the table of problems."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kintsugi.errors import KintsugiError
from kintsugi.imaging import MAX_PIXELS
from kintsugi.storage import store_uri_from_environment
from kintsugi_serve.access.addresses import is_root
from kintsugi_serve.access.keys import Key, check_keys, read_keys

# code -> (status, title). Clients branch on the code: it never changes its meaning.
PROBLEMS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request is malformed"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden": (403, "Not allowed"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "conflict": (409, "Another object is there already"),
    "too_large": (413, "Too large"),
    "unsupported_format": (415, "This format is not restored"),
    "unsupported_mode": (415, "This kind of image is not restored"),
    "undecodable": (422, "The image cannot be decoded"),
    "over_white_level": (422, "The image is brighter than the white level"),
    "mismatch": (422, "Image and mask do not fit together"),
    "idempotency_mismatch": (422, "This key belongs to another request"),
    "poison": (422, "This image ended its reader before"),
    "digest_mismatch": (400, "The body is not what its digest says"),
    "mask_required": (422, "This model needs a defect mask"),
    "rate_limited": (429, "Too many requests"),
    "internal": (500, "The service failed"),
    "store_failed": (502, "The object store refused"),
    "overloaded": (503, "Too many requests wait already"),
    "unavailable": (503, "No replica can answer now"),
    "store_unavailable": (503, "The object store did not answer"),
    "timeout": (503, "The answer took too long"),
}


class Refusal(KintsugiError):
    """A request that is answered with a problem; `code` is a key of PROBLEMS."""

    def __init__(self, code: str, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.status, self.title = PROBLEMS[code]
        self.retry_after_s = 1 if retry_after_s is None and self.status in (429, 503) else retry_after_s


class Problem(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str


class Settings(BaseModel):
    """What the ingress and the replicas need to know; the rest of Args is for Ray."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(default_factory=store_uri_from_environment, description="root of the models")
    s3_roots: tuple[str, ...] | None = Field(
        default=None, description="s3://bucket/prefix that the S3 route may read and write; default: the store"
    )
    keys: tuple[Key, ...] = Field(default=(), description="hashes of the keys that open it; none: for its machine only")
    audit_folder: str | None = Field(default=None, description="takes a JSON line a request; none: standard output")
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    max_streamed_bytes: int = Field(
        default=2**32, ge=1024, le=5 * 10**9, description="of a larger TIFF in S3, and of its pixels, unpacked"
    )
    max_streamed_pixels: int = Field(
        default=2**30, ge=0, description="of a larger TIFF in S3, which is restored in strips; 0: none is"
    )
    decoders: int = Field(default=2, ge=1, description="processes of a replica that decode, for nothing else")
    decode_timeout_s: float = Field(default=20, gt=0, description="for one image, before its process is ended")
    timeout_s: float = Field(default=60, gt=0, description="until the ingress gives up on a replica")
    max_batch_pixels: int = Field(default=2**22, ge=1, description="that pass the model together, on a GPU at once")
    batch_wait_s: float = Field(default=0.0, ge=0)
    follow_s: float = Field(default=5, ge=0, description="between two looks at where the alias points; 0: never")
    other_models: int = Field(default=2, ge=1, description="that a replica holds for requests which name a model")
    threads: int = Field(default=1, ge=1, description="torch threads of a replica")
    device: str = Field(default="cpu", description="where the model runs: cpu or cuda")

    @property
    def roots(self) -> tuple[str, ...]:
        """The S3 addresses under which the S3 route works."""
        if self.s3_roots is not None:
            return self.s3_roots
        return (self.store,) if self.store.startswith("s3://") else ()

    @field_validator("keys")
    @classmethod
    def _keys_agree(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        check_keys(keys)
        return keys

    @field_validator("store")
    @classmethod
    def _folder_is_absolute(cls, store: str) -> str:
        # Replicas have another working directory than the process that wrote the setting.
        return store if "://" in store else str(Path(store).resolve())

    @model_validator(mode="after")
    def _roots_are_addresses(self) -> "Settings":
        for root in self.s3_roots or ():
            if not is_root(root):
                raise ValueError(f"s3_roots: {root!r} is not an address: write it as s3://bucket/prefix")
        return self


class Args(Settings):
    """Arguments of the application: `kintsugi_serve.app:build`."""

    model: str = Field(default="unet@production", min_length=1, description="NAME@ALIAS, NAME@NUMBER or NAME")
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=2, ge=1)
    ingress_replicas: int = Field(default=1, ge=1, description="processes that speak HTTP with the proxies")
    num_cpus: float = Field(default=0.5, gt=0, description="of a replica")
    ingress_num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0, description="of a replica; above 0 the model runs on cuda")
    target_ongoing_requests: float = Field(default=4, gt=0, description="of a replica, before another is started")
    max_ongoing_requests: int = Field(default=8, ge=1, description="that a replica works on at a time")
    max_queued_requests: int = Field(default=32, ge=1, description="that wait for a replica; more are refused with 503")
    upscale_delay_s: float = Field(default=5, ge=0, description="of too much load, before a replica is added")
    downscale_delay_s: float = Field(default=120, ge=0, description="of too little, before one is taken away")
    keys_file: str | None = Field(default=None, description="YAML file in place of `keys`, read when it is deployed")

    @model_validator(mode="after")
    def _bounds_agree(self) -> "Args":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self

    @model_validator(mode="after")
    def _keys_have_one_source(self) -> "Args":
        if self.keys and self.keys_file is not None:
            raise ValueError("keys and keys_file are both given: take one of the two out")
        return self

    def settings(self) -> Settings:
        """The part for ingress and replicas.

        Raises:
            ConfigError: `keys_file` cannot be read, or is wrong.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in Settings.model_fields}
        if self.num_gpus > 0 and "device" not in self.model_fields_set:
            values["device"] = "cuda"
        if self.keys_file is not None:
            values["keys"] = read_keys(self.keys_file)
        return Settings(**values)


class S3Request(BaseModel):
    """Body of POST /v1/restore/s3; without `output` the result stays where results are kept."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"input": "s3://plant/line-3/in/part-7.tif", "output": "s3://plant/line-3/out/part-7.tif"}]
        },
    )

    input: str
    output: str | None = None
    mask: str | None = None
    white_level: int | None = None
    model: str | None = None


class S3Result(BaseModel):
    """Answer of POST /v1/restore/s3; `created` is false where the same bytes were there already."""

    output: str
    created: bool
    model: str
    digest: str
    report: dict[str, Any]
    result: str = Field(description="where the result is kept: by input, model and parameters")
    input_sha256: str
    output_sha256: str
    request_id: str


class JsonResult(BaseModel):
    """Answer of POST /v1/restore with Accept: application/json."""

    image: str = Field(description="base64")
    format: str
    model: str
    digest: str
    report: dict[str, Any]
    input_sha256: str
    output_sha256: str
    timing_ms: dict[str, float]
    defect_map: str | None = Field(None, description="base64 of an 8-bit grey PNG: probability of a defect, 255 is 1")
    request_id: str
