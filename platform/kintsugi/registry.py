"""Registry: immutable model versions and movable aliases over an ObjectStore.

models/<name>/versions/<n>/{weights.safetensors, config.yaml, {card,metrics,scorecard,manifest}.json, golden.png}
models/<name>/aliases/<alias>.json
"""

import re
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, computed_field

from kintsugi.checkpoint import CARD, CONFIG, METRICS, WEIGHTS, load_checkpoint
from kintsugi.errors import ConfigError, IntegrityError, ModelNotFound, ObjectNotFound, PreconditionFailed
from kintsugi.manifest import MANIFEST, get_folder, make_manifest, put_folder, read_manifest
from kintsugi.restore.golden import GOLDEN, make_golden
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import ObjectStore, cache_folder
from kintsugi.trust.report import CALIBRATION

SCORECARD = "scorecard.json"
Expected = int | None | Literal["any"]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ModelVersion(BaseModel):
    """An immutable published model. `digest` identifies weights, config and scorecard together."""

    model_config = ConfigDict(frozen=True)
    name: str
    number: int
    digest: str
    created: str
    dataset_digest: str
    scores: dict[str, float]

    @computed_field
    @property
    def ref(self) -> str:
        return f"{self.name}@{self.number}"


class AliasMove(BaseModel):
    model_config = ConfigDict(frozen=True)
    version: int
    moved: str
    action: Literal["promote", "rollback"]


class Alias(BaseModel):
    """A pointer and where it pointed before, oldest first."""

    model_config = ConfigDict(frozen=True)
    version: int
    history: tuple[AliasMove, ...]

    def before(self) -> int | None:
        """The version that a rollback returns to: each rollback takes back one promotion."""
        stack: list[int] = []
        for move in self.history:
            if move.action == "promote":
                stack.append(move.version)
            else:
                stack.pop()
        return stack[-2] if len(stack) > 1 else None


class Registry:
    """Publish, resolve, promote and roll back models in one store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def publish(self, name: str, checkpoint: Path, scorecard: bytes) -> ModelVersion:
        """Publish a checkpoint folder with its scorecard as the next version.

        A number is claimed by creating its first file (If-None-Match), so two publishers never share one;
        a version exists for readers once its manifest does. Its answer to a probe goes with it (`restore.golden`).

        Raises:
            KintsugiError: the model does not restore.
        """
        _check_name(name)
        found = load_checkpoint(checkpoint)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            calibrated = (CALIBRATION,) if (checkpoint / CALIBRATION).exists() else ()
            for part in (WEIGHTS, CONFIG, CARD, METRICS, *calibrated):
                shutil.copyfile(checkpoint / part, folder / part)
            (folder / SCORECARD).write_bytes(scorecard)
            golden = make_golden(Restorer.from_checkpoint(checkpoint))
            if golden is not None:
                (folder / GOLDEN).write_bytes(golden)
            meta: dict[str, JsonValue] = {
                "name": name,
                "dataset_digest": str(found.card.get("dataset_digest", "")),
                "scores": dict(found.metrics),
            }
            manifest = make_manifest(folder, "model", meta)
            number = self._next_number(name)
            while True:
                try:
                    put_folder(self.store, version_key(name, number), folder, manifest, create_only=True)
                    return self.version(name, number)
                except PreconditionFailed:
                    number += 1

    def names(self) -> list[str]:
        """Every name with at least one complete version."""
        keys = (info.key.split("/") for info in self.store.list("models/"))
        return sorted({key[1] for key in keys if len(key) == 5 and key[4] == MANIFEST})

    def versions(self, name: str) -> list[ModelVersion]:
        """All complete versions, oldest first."""
        prefix = f"models/{_check_name(name)}/versions/"
        numbers = [
            int(parts[3])
            for parts in (info.key.split("/") for info in self.store.list(prefix))
            if parts[-1] == MANIFEST and parts[3].isdecimal()
        ]
        return [self.version(name, number) for number in sorted(numbers)]

    def version(self, name: str, number: int) -> ModelVersion:
        try:
            manifest = read_manifest(self.store, version_key(_check_name(name), number))
        except ObjectNotFound:
            raise ModelNotFound(
                f"there is no model {name}@{number}: 'kintsugi models list' shows what exists"
            ) from None
        return ModelVersion.model_validate(
            {**manifest.meta, "number": number, "digest": manifest.digest, "created": manifest.created}
        )

    def aliases(self, name: str) -> dict[str, int]:
        prefix = f"models/{_check_name(name)}/aliases/"
        found = (info.key for info in self.store.list(prefix) if info.key.endswith(".json"))
        return {key.removeprefix(prefix).removesuffix(".json"): self._alias(key)[0].version for key in found}

    def alias_history(self, name: str, alias: str) -> tuple[AliasMove, ...]:
        return self._alias(_alias_key(name, alias))[0].history

    def resolve(self, ref: str) -> ModelVersion:
        """`name@alias`, `name@number`, or `name` for the newest version.

        Raises:
            ModelNotFound: and what exists instead.
        """
        name, _, which = ref.partition("@")
        if which.isdecimal():
            return self.version(name, int(which))
        if which:
            try:
                return self.version(name, self._alias(_alias_key(name, which))[0].version)
            except ObjectNotFound:
                raise ModelNotFound(
                    f"{name} has no alias '{which}': run 'kintsugi models promote {name}@NUMBER --alias {which}'"
                ) from None
        versions = self.versions(name)
        if not versions:
            raise ModelNotFound(f"there is no model '{name}': 'kintsugi models list' shows what exists")
        return versions[-1]

    def before(self, ref: str) -> ModelVersion | None:
        """The version that a rollback of `name@alias` would return to; None if there is none, or `ref` is no alias."""
        name, _, alias = ref.partition("@")
        if not alias or alias.isdecimal():
            return None
        number = self._alias(_alias_key(name, alias))[0].before()
        return None if number is None else self.version(name, number)

    def promote(self, ref: str, alias: str = "production", *, expected: Expected = "any") -> ModelVersion:
        """Point `alias` at a version.

        Args:
            expected: the version that `alias` must still name, None where it must not exist yet.

        Raises:
            PreconditionFailed: someone moved the alias at the same moment, or since it named `expected`; look, then
                decide again.
        """
        version = self.resolve(ref)
        self._move(version.name, alias, version.number, "promote", expected)
        return version

    def rollback(self, name: str, alias: str = "production") -> ModelVersion:
        """Take back the last promotion that was not taken back yet."""
        try:
            current, _ = self._alias(_alias_key(name, alias))
        except ObjectNotFound:
            raise ModelNotFound(f"{name} has no alias '{alias}': there is nothing to roll back") from None
        number = current.before()
        if number is None:
            raise ModelNotFound(f"{name}@{alias} never named another version: there is nothing to roll back to")
        version = self.version(name, number)
        self._move(name, alias, number, "rollback")
        return version

    def scorecard(self, version: ModelVersion) -> bytes:
        return self.store.get(f"{version_key(version.name, version.number)}/{SCORECARD}")

    def fetch(self, version: ModelVersion, cache: Path | None = None) -> Path:
        """A verified local folder for `Restorer.from_checkpoint`; fetched once for each digest.

        `cache` defaults to `storage.cache_folder()`.
        """
        folder = (cache or cache_folder()) / "models" / version.digest
        if _is_whole(folder, version.digest):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".kintsugi-"))
        try:
            manifest = get_folder(self.store, version_key(version.name, version.number), scratch)
            if manifest.digest != version.digest:
                raise IntegrityError(f"{version.ref} changed in the store since it was resolved: publish it anew")
            return _place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _next_number(self, name: str) -> int:
        keys = (info.key.split("/")[3] for info in self.store.list(f"models/{name}/versions/"))
        return 1 + max((int(part) for part in keys if part.isdecimal()), default=0)

    def _alias(self, key: str) -> tuple[Alias, str]:
        data, etag = self.store.get_with_etag(key)
        try:
            return Alias.model_validate_json(data), etag
        except ValidationError as error:
            raise IntegrityError(
                f"{self.store.uri}/{key} is damaged: promote a version again after removing it"
            ) from error

    def _move(
        self, name: str, alias: str, number: int, action: Literal["promote", "rollback"], expected: Expected = "any"
    ) -> None:
        key = _alias_key(name, alias)
        move = AliasMove(version=number, moved=datetime.now(UTC).isoformat(timespec="seconds"), action=action)
        try:
            current, etag = self._alias(key)
        except ObjectNotFound:
            _check_expected(f"{name}@{alias}", None, expected)
            first = Alias(version=number, history=(move,))
            self.store.put(key, first.model_dump_json(indent=1).encode(), if_none_match=True)
            return
        _check_expected(f"{name}@{alias}", current.version, expected)
        moved = Alias(version=number, history=(*current.history, move))
        self.store.put(key, moved.model_dump_json(indent=1).encode(), if_match=etag)


def _check_expected(name: str, found: int | None, expected: Expected) -> None:
    if expected not in ("any", found):
        was, now = ("nothing" if number is None else f"version {number}" for number in (expected, found))
        raise PreconditionFailed(f"{name} named {was} and now names {now}: look at it, then decide again")


def _place(scratch: Path, folder: Path) -> Path:
    """Move a verified folder to its place; whoever comes second keeps the first one's."""
    try:
        scratch.rename(folder)
    except OSError:
        if not _is_whole(folder, load_checkpoint(scratch).digest):
            shutil.rmtree(folder)
            scratch.rename(folder)
    return folder


def _is_whole(folder: Path, digest: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return load_checkpoint(folder).digest == digest
    except IntegrityError:
        return False


def version_key(name: str, number: int) -> str:
    """The version's prefix in the store."""
    return f"models/{name}/versions/{number}"


def _alias_key(name: str, alias: str) -> str:
    return f"models/{_check_name(name)}/aliases/{_check_name(alias)}.json"


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"'{name}' is not a name: use lower-case letters, digits, '.', '_' and '-'")
    return name
