"""Random access to the samples of one split."""

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from kintsugi.data.cache import Copy, SplitSource, hold
from kintsugi.data.layouts import BadPair
from kintsugi.data.sample import RawSample, Sample, decode_sample
from kintsugi.data.shards import hash_fault, raw_of
from kintsugi.errors import IntegrityError


class SplitReader:
    """The good samples of a split, in the order of its shards; pickles as where they come from.

    `skipped` names those that are bad in the store: the same on every machine, as are length and order.
    """

    def __init__(self, source: SplitSource) -> None:
        self.source = source
        self._take(hold(source))
        self._fetched_anew = False

    def __len__(self) -> int:
        return len(self._copy.table)

    def __reduce__(self) -> tuple[type["SplitReader"], tuple[SplitSource]]:
        return type(self), (self.source,)

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def digest(self) -> str:
        return self.source.digest

    @property
    def skipped(self) -> tuple[BadPair, ...]:
        return self._copy.skipped

    @cached_property
    def sample_ids(self) -> list[str]:
        return self._copy.table.column("sample_id").to_pylist()

    @cached_property
    def defect_types(self) -> list[str]:
        return self._copy.table.column("defect_type").to_pylist()

    def raw(self, index: int) -> RawSample:
        """The encoded sample, checked against the hashes of its row; a damaged copy is fetched anew, once.

        Raises:
            IntegrityError: the local copy was damaged again.
        """
        row = self._row(index)
        fault = hash_fault(row)
        if fault is not None and not self._fetched_anew:
            self._take(hold(self.source, damaged=self._copy))
            self._fetched_anew = True
            row = self._row(index)
            fault = hash_fault(row)
        if fault is not None:
            raise IntegrityError(f"{row['sample_id']} in {self.path} is damaged: check that disk, and delete the file")
        return raw_of(row)

    def sample(self, index: int) -> Sample:
        """The decoded sample."""
        return decode_sample(self.raw(index))

    def _take(self, copy: Copy) -> None:
        self._copy = copy
        batches = copy.table.to_batches()
        self._starts = list(accumulate(map(len, batches[:-1]), initial=0))
        self._batches = [list(zip(copy.table.column_names, batch.columns, strict=True)) for batch in batches]

    def _row(self, index: int) -> dict[str, Any]:
        count = len(self._copy.table)
        if not 0 <= index < count:
            raise IndexError(f"sample {index} of {count}")
        batch = bisect_right(self._starts, index) - 1
        # A quarter of the time that `slice(...).to_pylist()` takes.
        return {name: column[index - self._starts[batch]].as_py() for name, column in self._batches[batch]}
