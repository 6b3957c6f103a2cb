from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kintsugi.data.sample import RawSample, decode_sample
from kintsugi.data.shards import SCHEMA, ShardWriters, as_row
from kintsugi.imaging import Image, encode
from kintsugi.storage import sha256

Picture = Callable[..., Image]


def row_of(image: Image, name: str = "a") -> dict[str, object]:
    raw = RawSample(name, "p", "steel", "good", "train", encode(image), None, None)
    return as_row(raw, decode_sample(raw))


def test_a_row_describes_the_image_and_carries_its_hash(picture: Picture) -> None:
    image = picture(1, size=(5, 7), bits=16, colour=True)
    row = row_of(image)
    assert set(row) == set(SCHEMA.names)
    assert (row["height"], row["width"], row["channels"], row["bit_depth"], row["white_level"]) == (5, 7, 3, 16, 65535)
    assert row["clean_sha256"] == sha256(encode(image)) and row["mask_sha256"] is None


def test_no_more_than_a_row_group_is_held_in_memory(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(picture(1))
    size = len(encode(picture(1)))
    monkeypatch.setattr("kintsugi.data.shards._ROW_GROUP_BYTES", 2 * size)
    with ShardWriters(tmp_path, rows_per_shard=100) as writers:
        for _ in range(5):
            writers.write(row)
    with pq.ParquetFile(tmp_path / "train-00000.parquet") as parquet:
        assert [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)] == [2, 2, 1]


def test_a_shard_of_large_images_ends_before_its_rows_do(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kintsugi.data.shards._SHARD_BYTES", 2 * len(encode(picture(1))))
    with ShardWriters(tmp_path, rows_per_shard=100) as writers:
        for _ in range(5):
            writers.write(row_of(picture(1)))
    assert [pq.read_metadata(path).num_rows for path in sorted(tmp_path.iterdir())] == [2, 2, 1]
