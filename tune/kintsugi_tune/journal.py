"""An Optuna journal in an object store: every machine that sees the store sees the study, and one process writes it."""

import json
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from kintsugi.errors import ObjectNotFound, PreconditionFailed, StoreUnavailable, TrainingError
from kintsugi.retry import persist
from kintsugi.storage import LONG, ObjectStore

_READERS = 16


class StoreJournal(BaseJournalBackend):
    """Numbered objects below `prefix`, each a list of log entries, each created only if it is absent.

    The one that writes keeps what it wrote and does not look for others': should another process write too, the next
    `flush` of one of them fails, before either has acted upon what the other does not know.

    Args:
        owner: whether this process appends; others follow what is appended.
    """

    def __init__(self, store: ObjectStore, prefix: str, *, owner: bool) -> None:
        self._store, self._prefix, self._owner = store, prefix, owner
        self._writer = uuid.uuid4().hex
        self._logs: list[dict[str, Any]] = []
        self._unsent: list[dict[str, Any]] = []
        self._objects = 0
        self._load()

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        if not self._owner:
            self._load()
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if not self._owner:
            raise TrainingError("the study is open for reading only: it is written by the search itself")
        # As a reader would find them, not sharing anything with whoever appended them.
        self._logs += json.loads(json.dumps(logs))
        self._unsent += logs

    def flush(self) -> None:
        """Send what was appended since, as one object.

        Raises:
            TrainingError: another process appends to the same study.
        """
        if not self._unsent:
            return
        body = json.dumps({"writer": self._writer, "logs": self._unsent}).encode()
        persist(lambda: self._put(body), StoreUnavailable, seconds=LONG.seconds)
        self._objects += 1
        self._unsent = []

    def _put(self, body: bytes) -> None:
        key = self._key(self._objects)
        try:
            self._store.put(key, body, if_none_match=True)
        except PreconditionFailed as error:
            if self._store.get(key) != body:  # else it was ours, and only the answer was lost
                raise TrainingError(
                    f"another process continues the search under {self._prefix}: let it, or stop it and use --resume"
                ) from error

    def _load(self) -> None:
        """Read the objects that came since."""
        if self._objects and not self._exists(self._objects):
            return
        count = sum(1 for _ in self._store.list(f"{self._prefix}/"))
        keys = [self._key(number) for number in range(self._objects, count)]
        with ThreadPoolExecutor(_READERS) as readers:
            for body in readers.map(self._store.get, keys):
                self._logs += json.loads(body)["logs"]
        self._objects = count

    def _exists(self, number: int) -> bool:
        try:
            self._store.get(self._key(number))
        except ObjectNotFound:
            return False
        return True

    def _key(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}.json"
