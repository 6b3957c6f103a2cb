"""What ingress and replicas say to each other."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from kintsugi_serve.access.addresses import S3Address

USE_A_BATCH = "restore large images in a batch, which waits as long as it takes"
"""For whose image is too large to be restored while a client waits."""


@dataclass(frozen=True)
class Job:
    """One image to restore, as the client sent it.

    Attributes:
        model: NAME@NUMBER or NAME@ALIAS; None for the one in service.
        budget_s: seconds that the client still waits; work that starts later is dropped.
        embed: write the facts into the answered file.
        defect_map: answer the defect map too.
    """

    image: bytes
    mask: bytes | None = None
    white_level: int | None = None
    model: str | None = None
    budget_s: float = 60.0
    embed: bool = False
    defect_map: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """The version that a replica answers with."""

    name: str
    number: int
    digest: str

    @property
    def label(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class RefusedModel:
    """A version that was to come into service and was found bad; the one before goes on."""

    model: str
    detail: str
    at: str


@dataclass(frozen=True)
class Serving:
    """What a replica answers with, and what it refused to."""

    version: LoadedModel
    refused: RefusedModel | None = None


@dataclass(frozen=True)
class Answer:
    """A restored image, in the format that came in.

    Attributes:
        report: `Report.to_dict()` and the figures of the defect map.
        defect_map: an 8-bit grey PNG, if asked for and the model predicts one.
        timing_ms: of decode, queue, model and encode.
        batch: images that passed the model together.
    """

    image: bytes
    format: str
    model: LoadedModel
    retention: float
    alarm: bool
    report: dict[str, Any]
    input_sha256: str = ""
    output_sha256: str = ""
    defect_map: bytes | None = None
    timing_ms: dict[str, float] = field(default_factory=dict[str, float])
    batch: int = 1


@dataclass(frozen=True)
class LargeJob:
    """An image to restore from S3 to S3 that is too large to be sent or held.

    The addresses were checked: they lie below the prefixes of `tenant`, for whom the result is kept.
    """

    tenant: str
    image: S3Address
    mask: S3Address | None = None
    target: S3Address | None = None
    white_level: int | None = None
    model: str | None = None
    budget_s: float = 60.0


@dataclass(frozen=True)
class LargeAnswer:
    """A large image that was restored.

    Attributes:
        result: where it is kept.
        facts: what is kept beside it, see `results.result_facts`.
        created: whether it was made just now.
        written: whether it was written to the job's target just now; None where there is none.
        answer: what was said of it, without the image; None where it was there.
    """

    result: str
    facts: dict[str, Any]
    created: bool
    written: bool | None = None
    answer: Answer | None = None


@dataclass(frozen=True)
class Rejection:
    """Why an image was not restored: a code of the table of problems, and a sentence."""

    code: str
    detail: str


class Backend(Protocol):
    """What the API needs of the replicas. Raises Refusal where none can answer."""

    async def restore(self, job: Job) -> Answer | Rejection: ...

    async def restore_large(self, job: LargeJob) -> LargeAnswer | Rejection: ...

    async def describe(self) -> Serving: ...

    async def resolve(self, model: str | None) -> LoadedModel:
        """The version that a request with this `model` gets now."""
        ...

    async def published(self) -> list[dict[str, Any]]:
        """Names, aliases and versions in the store."""
        ...
