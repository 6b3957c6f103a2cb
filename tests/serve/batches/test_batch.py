"""What a batch is, and whose: the same request is the same batch."""

from dataclasses import replace

import pytest

from kintsugi.errors import ConfigError, ObjectNotFound
from kintsugi.storage import LocalStore
from kintsugi_serve.batches.batch import Batch, list_batches, load_batch, make_batch
from kintsugi_serve.batches.records import Records
from kintsugi_serve.jobs import LoadedModel

MODEL = LoadedModel("unet", 3, "d" * 64)


def test_the_same_request_is_the_same_batch(store: LocalStore) -> None:
    def made(white_level: int | None = None, model: LoadedModel = MODEL, tenant: str = "local") -> Batch:
        return make_batch(store.uri, tenant, "s3://bucket/raw/", "s3://bucket/clean", model, white_level)

    first = made()
    assert first.id == made(model=replace(MODEL, number=9)).id
    assert first.input == "s3://bucket/raw"
    others = [made(4095), made(model=replace(MODEL, digest="e" * 64)), made(tenant="other")]
    assert len({first.id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize(
    ("input", "output", "sentence"),
    [
        ("s3://bucket/raw", "s3://bucket/raw/", "one within the other"),
        ("s3://bucket/raw", "s3://bucket/raw/clean", "one within the other"),
        ("s3://bucket/raw/a", "s3://bucket/raw", "one within the other"),
        ("s3://bucket", "s3://other/clean", "the store's own objects"),
        ("s3://bucket/raw", "s3://bucket/store/models/x", "the store's own objects"),
        ("s3://bucket/raw", "s3://bucket/store", "the store's own objects"),
        ("ftp://bucket/raw", "s3://bucket/clean", "a store is a folder or s3"),
    ],
)
def test_prefixes_that_cannot_work_are_refused(input: str, output: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_batch("s3://bucket/store", "local", input, output, MODEL)


def test_a_sibling_whose_name_begins_alike_is_no_overlap() -> None:
    made = make_batch("s3://bucket/store", "local", "s3://bucket/raw", "s3://bucket/raw-clean", MODEL)
    assert made.output == "s3://bucket/raw-clean"


def test_a_tenant_cannot_name_a_path(store: LocalStore) -> None:
    with pytest.raises(ConfigError, match="no tenant"):
        make_batch(store.uri, "../other", "s3://bucket/raw", "s3://bucket/clean", MODEL)


def test_a_batch_is_found_by_its_tenant_only(records: Records) -> None:
    assert load_batch(records.store, "local", records.batch.id) == records.batch
    for tenant, id in (("other", records.batch.id), ("local", "0" * 16), ("local", "../../models")):
        with pytest.raises(ObjectNotFound):
            load_batch(records.store, tenant, id)


def test_batches_are_listed_newest_first(store: LocalStore) -> None:
    old, new = (
        make_batch(store.uri, "local", "s3://bucket/raw", f"s3://bucket/{day}", MODEL).model_copy(
            update={"created": f"2030-01-0{day}T00:00:00+00:00"}
        )
        for day in (1, 2)
    )
    for each in (old, new):
        Records(store, each).save()
    assert list_batches(store, "local") == [new, old]
    assert list_batches(store, "other") == []
