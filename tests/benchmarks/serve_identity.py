"""A replica whose model answers with the image that it was given: what is left is the service's own cost."""

from collections.abc import Sequence
from typing import Any

from kintsugi import imaging
from kintsugi.registry import ModelVersion
from kintsugi.restore.restorer import Restoration
from kintsugi.trust.report import untouched
from kintsugi_serve.jobs import LoadedModel
from kintsugi_serve.replica.replica import Replica
from kintsugi_serve.replica.serving import Loaded
from kintsugi_serve.schemas import Settings

VERSION = ModelVersion(name="identity", number=1, digest="0" * 64, created="", dataset_digest="", scores={})


class Identity:
    def restore_batch(self, images: Sequence[imaging.Image], masks: Sequence[Any], *, stop: Any) -> list[Restoration]:
        return [Restoration(image, untouched("identity")) for image in images]


class IdentitySource:
    """Holds one version of one model."""

    def find(self, reference: str) -> ModelVersion:
        return VERSION

    def load(self, version: ModelVersion) -> Loaded:
        return Loaded(Identity(), LoadedModel(version.name, version.number, version.digest))

    def fallbacks(self, reference: str) -> Sequence[ModelVersion]:
        return ()

    def keep(self, reference: str, version: ModelVersion) -> None:
        """It is always there."""


class IdentityReplica(Replica):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, source=IdentitySource())
