"""What the store holds of a batch: its rounds, its ledger, how far it is. See `kintsugi_serve.batches.batch`."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kintsugi.errors import IntegrityError, ObjectNotFound, RunInterrupted
from kintsugi.storage import LONG, ObjectStore, Patience, create, open_store, sha256
from kintsugi_serve.batches.batch import (
    READERS,
    Batch,
    Counts,
    Done,
    Input,
    Line,
    Plan,
    Progress,
    State,
    Stopped,
    as_json,
    jsonl,
    now,
    parse_lines,
    read,
)

BLOCK = 64
"""Images of a block at most, while a round has no more than `PARTS` blocks; a block is lost when its process dies."""
PARTS = 4096
SHARES = 32
"""Blocks at least, so that several actors share a small round."""
LISTED = 50_000
"""Lines of one object of a listing."""
TRIES = 3
"""How often an image may end the process that restores it."""

Listed = tuple[str, int, str]


class Records:
    """What the store holds of one batch. Keeps what it has read of the ledger, so ask one object for progress."""

    def __init__(self, store: ObjectStore, batch: Batch, patience: Patience = LONG) -> None:
        self.store, self.batch, self._patience = store, batch, patience
        self.root = f"batches/{batch.tenant}/{batch.id}"
        self._counted: dict[str, Counts] = {}

    def save(self) -> None:
        """Note that the batch exists; the first request's words stay."""
        self._create(f"batches/{self.batch.tenant}/index/{self.batch.id}.json", as_json(self.batch))

    def newest(self) -> Plan | None:
        """The plan of the last round."""
        plan = None
        while True:
            try:
                plan = read(self.store, f"{self.root}/{(plan.round if plan else 0) + 1}/plan.json", Plan)
            except ObjectNotFound:
                return plan

    def done(self, round: int) -> Done | None:
        try:
            return read(self.store, f"{self.root}/{round}/done.json", Done)
        except ObjectNotFound:
            return None

    def next_plan(self) -> Plan | None:
        """The unfinished round, else a new one; None where a new one would have nothing to do.

        Raises:
            ObjectNotFound: there is nothing under the input.
        """
        last = self.newest()
        if last is not None and self.done(last.round) is None:
            return last
        listed, lines = listing(self.batch.input), self.merged(last.round) if last else {}
        if not listed and not lines:
            raise ObjectNotFound(f"there is nothing under {self.batch.input}: check the prefix")
        settled = self._settled(lines.values()) if lines else {}
        wanted = [found for found in listed if not _is_settled(found, settled.get(found[0]))]
        return self._plan(last.round + 1 if last else 1, wanted, lines) if wanted else None

    def _settled(self, lines: Iterable[Line]) -> dict[str, Line]:
        """By key, the lines of what need not be tried again."""
        there = {info.key for info in open_store(self.batch.output, LONG).list()}
        return {
            line.key: line
            for line in lines
            if (line.key in there if line.status in ("restored", "kept") else _lies_in_the_image(line))
        }

    def _plan(self, round: int, wanted: Sequence[Listed], lines: Mapping[str, Line]) -> Plan:
        taken = {key for key, _, _ in wanted}
        plan = Plan(
            round=round,
            total=len(wanted),
            block=block_size(len(wanted)),
            inputs=tuple(self._save_listing(wanted[i : i + LISTED]) for i in range(0, len(wanted), LISTED)),
            carried=Counts.of(line for key, line in lines.items() if key not in taken),
            created=now(),
        )
        key = f"{self.root}/{round}/plan.json"
        # Another process may have planned the same round at this moment: the first one's plan holds.
        return plan if self._create(key, as_json(plan)) else read(self.store, key, Plan)

    def _save_listing(self, part: Sequence[Listed]) -> str:
        body = "".join(f"{json.dumps(item)}\n" for item in part).encode()
        self._create(f"{self.root}/inputs/{sha256(body)}.jsonl", body)
        return sha256(body)

    def inputs(self, plan: Plan) -> list[Input]:
        """The images of a round, sorted by key."""
        parts = [self.store.get(f"{self.root}/inputs/{digest}.jsonl") for digest in plan.inputs]
        if [sha256(part) for part in parts] != list(plan.inputs):
            raise IntegrityError(f"{self.store.uri}/{self.root}/inputs is damaged: begin the batch with another output")
        return [Input(n, *json.loads(line)) for n, line in enumerate(b"".join(parts).splitlines())]

    def remaining(self, plan: Plan) -> list[list[Input]]:
        """What has no line yet, block by block."""
        told = self.lines(plan.round)
        blocks: dict[int, list[Input]] = {}
        for item in self.inputs(plan):
            if item.key not in told:
                blocks.setdefault(item.number // plan.block, []).append(item)
        return list(blocks.values())

    def begin_block(self, plan: Plan, number: int) -> bool:
        """Whether nobody began this block before."""
        return self._create(f"{self.root}/{plan.round}/tries/block-{number:08d}", b"")

    def begin_image(self, plan: Plan, number: int) -> bool:
        """Whether this image was begun less than `TRIES` times."""
        tries = (f"{self.root}/{plan.round}/tries/image-{number:08d}-{n}" for n in range(1, TRIES + 1))
        return any(self._create(key, b"") for key in tries)

    def record(self, plan: Plan, first: int, lines: Sequence[Line]) -> None:
        """Write the lines of images from number `first` on. What was recorded under that number before stays."""
        self._create(self._part(plan.round, first), jsonl(lines))

    def recorded(self, plan: Plan, items: Sequence[Input]) -> set[str]:
        """The keys of those images of one block that have a line."""
        found: set[str] = set()
        for item in items:
            if item.key not in found:
                with contextlib.suppress(ObjectNotFound):
                    found |= {line.key for line in parse_lines(self.store.get(self._part(plan.round, item.number)))}
        return found

    def lines(self, round: int) -> dict[str, Line]:
        """The lines of a round by key. Of two, which a process that was thought dead may leave, the first counts."""
        keys = [info.key for info in self.store.list(f"{self.root}/{round}/ledger/")]
        found: dict[str, Line] = {}
        with ThreadPoolExecutor(READERS) as readers:
            for body in readers.map(self.store.get, keys):
                for line in parse_lines(body):
                    found.setdefault(line.key, line)
        return found

    def merged(self, round: int) -> dict[str, Line]:
        """The ledger of a round that is done, by key."""
        body, done = self.store.get(self._ledger(round)), self.done(round)
        if done is not None and sha256(body) != done.ledger_sha256:
            raise IntegrityError(f"{self.store.uri}/{self._ledger(round)} is damaged: begin with another output")
        return {line.key: line for line in parse_lines(body)}

    def finish(self, plan: Plan) -> Done:
        """Write the ledger and the totals of a round.

        Raises:
            RunInterrupted: images have no line yet.
        """
        lines = self.lines(plan.round)
        left = sum(item.key not in lines for item in self.inputs(plan))
        if left:
            raise RunInterrupted(f"{left} images of batch {self.batch.id} have no line yet: ask for the batch again")
        before = self.merged(plan.round - 1) if plan.round > 1 else {}
        merged = {**before, **lines}
        key = self._ledger(plan.round)
        self._create(key, jsonl(merged[name] for name in sorted(merged)))
        body = self.store.get(key)
        done = Done(totals=Counts.of(parse_lines(body)), ledger_sha256=sha256(body), finished=now())
        self._create(f"{self.root}/{plan.round}/done.json", as_json(done))
        return done

    def stop(self, detail: str) -> None:
        """Say why a run ended early."""
        self.store.put(f"{self.root}/stopped.json", as_json(Stopped(detail=detail, at=now())))

    def go_on(self) -> None:
        self.store.delete(f"{self.root}/stopped.json")

    def progress(self, *, alive: bool) -> Progress:
        """How far it is; `alive`: whether anything works at it, found out before this is asked."""
        plan = self.newest()
        done = self.done(plan.round) if plan else None
        counts = done.totals if done else plan.carried + self._counts(plan.round) if plan else Counts()
        total = None if plan is None else done.totals.total if done else plan.carried.total + plan.total
        status: State = "running" if alive else "done" if done else "stopped"
        asked = self.batch.model_dump(exclude={"tenant"})
        return Progress(
            **asked, **counts.model_dump(), id=self.batch.id, status=status, round=plan.round if plan else 0,
            total=total, remaining=None if total is None else max(0, total - counts.total),
            ledger=f"{self.store.uri}/{self._ledger(plan.round)}" if plan and done else None,
            detail=self._why() if status == "stopped" else None,
        )  # fmt: skip

    def _counts(self, round: int) -> Counts:
        keys = [info.key for info in self.store.list(f"{self.root}/{round}/ledger/")]
        new = [key for key in keys if key not in self._counted]
        with ThreadPoolExecutor(READERS) as readers:
            for key, body in zip(new, readers.map(self.store.get, new), strict=True):
                self._counted[key] = Counts.of(parse_lines(body))
        return sum((self._counted[key] for key in keys), Counts())

    def _why(self) -> str | None:
        try:
            return read(self.store, f"{self.root}/stopped.json", Stopped).detail
        except ObjectNotFound:
            return None

    def _create(self, key: str, data: bytes) -> bool:
        """Whether the object is new; after a lost answer an own one may count as another's."""
        return create(self.store, key, data, lambda: False, seconds=self._patience.seconds) is None

    def _part(self, round: int, first: int) -> str:
        return f"{self.root}/{round}/ledger/part-{first:08d}.jsonl"

    def _ledger(self, round: int) -> str:
        return f"{self.root}/{round}/ledger.jsonl"


def block_size(images: int) -> int:
    return max(min(BLOCK, math.ceil(images / SHARES)), math.ceil(images / PARTS))


def listing(uri: str) -> list[Listed]:
    """Key, size and stamp of every object below a prefix, sorted; without the empty ones that stand for folders."""
    found = open_store(uri, LONG).list()
    return sorted((info.key, info.size, info.stamp) for info in found if info.key and not info.key.endswith("/"))


def _is_settled(found: Listed, line: Line | None) -> bool:
    return line is not None and (line.size, line.stamp) == found[1:]


def _lies_in_the_image(line: Line) -> bool:
    return line.status == "refused" and line.code != "conflict"
