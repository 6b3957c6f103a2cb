import base64
import datetime
import hashlib
import hmac
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kintsugi.errors import ConfigError
from kintsugi_serve.access.keys import Key, check_keys, new_key, parse_keys, read_keys
from kintsugi_serve.ingress.callers import Caller, Callers, RateLimit, given_key
from kintsugi_serve.schemas import Refusal

SECRET = "kg_a key of the line"
HASH = hashlib.sha256(SECRET.encode()).hexdigest()
EXAMPLE = f"""
keys:
  - tenant: line-3
    sha256: {HASH}
    prefixes: [s3://plant/line-3/]
    requests_per_minute: 600
    expires: 2027-01-01
  - tenant: lab
    sha256: {"ab" * 32}
"""
DAY = datetime.date(2026, 6, 1)


def _entry(**values: Any) -> str:
    return json.dumps({"keys": [{"tenant": "a", "sha256": HASH, **values}]})


def _key(number: int, **values: Any) -> Key:
    return Key.model_validate({"tenant": f"t{number}", "sha256": hashlib.sha256(b"%d" % number).hexdigest(), **values})


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# ---------------------------------------------------------------------------- the file


def test_a_key_file_says_whose_key_is_which_and_what_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(EXAMPLE)
    path.chmod(0o644)
    first, second = read_keys(path)
    assert (first.tenant, first.sha256, first.prefixes) == ("line-3", HASH, ("s3://plant/line-3/",))
    assert (first.requests_per_minute, first.expires) == (600, datetime.date(2027, 1, 1))
    assert (second.prefixes, second.requests_per_minute, second.expires) == ((), None, None)


def test_keys_travel_as_json() -> None:
    keys = parse_keys(EXAMPLE)
    assert tuple(Key.model_validate(json.loads(json.dumps(key.model_dump(mode="json")))) for key in keys) == keys


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o664])
def test_a_key_file_that_others_may_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(EXAMPLE)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod go-w {path}"):
        read_keys(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"keys\.yaml: cannot be read .* give the path"):
        read_keys(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold a mapping: list at least one key"),
        ("- a", "must hold a mapping"),
        ("keys:", r"keys: .*list at least one key below 'keys:'"),
        ("keys: []", r"keys: .*list at least one key below 'keys:'"),
        ("keys: [line-3]", r"keys\[0\]: must be a mapping with tenant and sha256"),
        ("key: []", r"keys is missing: list .*; key: no such setting"),
        ("keys: [{}]", r"keys\[0\]\.tenant is missing: give 1 to 63 .*keys\[0\]\.sha256 is missing: give the 64 hex"),
        (_entry(tenant="Line 3"), r"keys\[0\]\.tenant: .*'Line 3'.*: give 1 to 63 of a-z"),
        (_entry(tenant="a\n"), r"keys\[0\]\.tenant"),
        (_entry(tenant="a" * 64), r"keys\[0\]\.tenant"),
        (_entry(tenant="../b"), r"keys\[0\]\.tenant"),
        (_entry(tenant=3), r"keys\[0\]\.tenant: .*in quotes where it is a number"),
        (_entry(key="secret"), r"keys\[0\]\.key: no such setting"),
        (_entry(sha256=HASH[:63]), r"keys\[0\]\.sha256: .*printf %s KEY"),
        (_entry(sha256=HASH.upper()), r"keys\[0\]\.sha256"),
        (_entry(sha256=hashlib.sha256(b"").hexdigest()), r"keys\[0\]\.sha256: is the hash of an empty text"),
        (_entry(prefixes="s3://plant/a"), r"keys\[0\]\.prefixes: .*list them"),
        (_entry(prefixes=["s3://plant/a", "plant/b"]), r"keys\[0\]\.prefixes: 'plant/b' is not an address.*list them"),
        (_entry(prefixes=["s3://plant/../a"]), r"keys\[0\]\.prefixes"),
        (_entry(prefixes=["s3://"]), r"keys\[0\]\.prefixes"),
        (_entry(prefixes=["s3://plant/a//"]), r"keys\[0\]\.prefixes"),
        (_entry(requests_per_minute=0), r"keys\[0\]\.requests_per_minute: .*a whole number from 1"),
        (_entry(requests_per_minute="many"), r"keys\[0\]\.requests_per_minute"),
        (_entry(expires="soon"), r"keys\[0\]\.expires: .*'soon'.*such as 2027-01-01"),
        ("keys: [{tenant: a, expires: 2027-02-30}]", "days as 2027-01-01"),
        ("keys:\n - tenant: a\n  sha256: b", "is not valid YAML at line 3"),
        ("keys: \0", "is not valid YAML"),
        ("keys: !!python/object:os.system {}", "is not valid YAML at line 1"),
    ],
)
def test_what_is_wrong_with_a_key_file_is_told_with_its_place_and_the_remedy(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        parse_keys(text, "keys.yaml")
    assert str(caught.value).startswith("keys.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [_entry(sha256=SECRET), f"keys: [{{tenant: a, sha256: {SECRET}", _entry(sha256=SECRET, tenant="B")]
)
def test_a_key_that_was_written_in_place_of_its_hash_is_not_told(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_one_key_cannot_belong_to_two() -> None:
    text = json.dumps({"keys": [{"tenant": tenant, "sha256": HASH} for tenant in ("a", "b")]})
    with pytest.raises(ConfigError, match=r"keys\[1\] has the hash of keys\[0\]: take one") as caught:
        parse_keys(text)
    assert HASH not in str(caught.value)


def test_the_keys_of_a_tenant_have_one_rate() -> None:
    old, new = _key(1, tenant="a", requests_per_minute=60), _key(2, tenant="a", requests_per_minute=60)
    check_keys([old, new, _key(3, requests_per_minute=6)])
    with pytest.raises(ValueError, match=r"keys\[1\] gives tenant a another requests_per_minute than keys\[0\]"):
        check_keys([old, _key(2, tenant="a")])


def test_an_entry_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _key(1).tenant = "other"  # pyright: ignore[reportAttributeAccessIssue]


@given(st.text() | st.text().map(lambda text: f"keys:\n- {text}") | st.text().map(lambda text: EXAMPLE + text))
def test_any_text_is_a_key_file_or_a_config_error(text: str) -> None:
    try:
        keys = parse_keys(text)
    except ConfigError:
        return
    assert keys


def test_a_new_key_is_known_by_its_hash() -> None:
    made = [new_key() for _ in range(100)]
    assert len({key for key, _ in made}) == 100
    for key, digest in made:
        assert key.startswith("kg_") and len(base64.urlsafe_b64decode(key[3:] + "=")) == 32
        assert Callers([_key(1, sha256=digest)]).identify(_bearer(key)) == Caller("t1")


# ---------------------------------------------------------------------------- who calls


def test_without_keys_everyone_is_the_local_tenant() -> None:
    callers = Callers((), ("s3://plant/kintsugi",))
    for headers in ({}, _bearer("anything")):
        assert callers.identify(headers) == callers.admit(headers) == Caller("local", ("s3://plant/kintsugi",))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"bearer  {SECRET} "},
        {"x-api-key": SECRET},
        {"authorization": "Token abc", "x-api-key": SECRET},
        {"authorization": "Basic " + base64.b64encode(f"anyone:{SECRET}".encode()).decode()},
    ],
)
def test_a_known_key_tells_the_tenant_and_its_prefixes(headers: dict[str, str]) -> None:
    callers = Callers(parse_keys(EXAMPLE), ("s3://plant/kintsugi",), today=lambda: DAY)
    assert callers.identify(headers) == Caller("line-3", ("s3://plant/line-3/",))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {HASH}"},
        {"authorization": f"Token {SECRET}"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(SECRET.encode()).decode()},
        {"authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
        {"authorization": "Bearer wrong", "x-api-key": SECRET},
        {"x-api-key": ""},
        {"x-api-key": SECRET + "x"},
        {"x-api-key": SECRET.upper()},
        {"x-api-key": "\ud800"},
    ],
)
def test_any_other_key_is_nobody(headers: dict[str, str]) -> None:
    callers = Callers(parse_keys(EXAMPLE), today=lambda: DAY)
    assert callers.identify(headers) is None
    with pytest.raises(Refusal, match="Authorization: Bearer KEY") as caught:
        callers.admit(headers)
    assert (caught.value.code, caught.value.status) == ("unauthorized", 401)


def test_no_key_is_nobody_even_where_the_hash_of_nothing_is_known() -> None:
    key = Key.model_construct(tenant="a", sha256=hashlib.sha256(b"").hexdigest(), prefixes=(), expires=None)
    callers = Callers([key.model_copy(update={"requests_per_minute": None})])
    assert callers.identify({}) is None
    assert callers.identify(_bearer("")) is None


def test_a_key_opens_until_the_day_on_which_it_expires() -> None:
    last = datetime.date(2026, 12, 31)
    for day, known in ((DAY, True), (last, True), (last + datetime.timedelta(1), False), (datetime.date.max, False)):
        callers = Callers(parse_keys(EXAMPLE), today=lambda day=day: day)
        assert (callers.identify(_bearer(SECRET)) is not None) is known


def test_keys_that_have_all_expired_let_nobody_in() -> None:
    callers = Callers([_key(1, expires=DAY)], today=lambda: DAY)
    assert callers.identify({}) is None
    assert callers.identify(_bearer("1")) is None


def test_the_day_is_that_of_utc() -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    assert Callers([_key(1, expires=today - datetime.timedelta(1))]).identify(_bearer("1")) is None
    assert Callers([_key(1, expires=today + datetime.timedelta(2))]).identify(_bearer("1")) == Caller("t1")


@pytest.mark.parametrize("secret", ["0", "6", "11", "not known", ""])
def test_every_key_is_compared_wherever_the_right_one_stands(secret: str) -> None:
    compared: list[tuple[str, str]] = []

    def compare(given: str, known: str) -> bool:
        compared.append((given, known))
        return hmac.compare_digest(given, known)

    keys = [_key(number, expires=DAY if number == 6 else None) for number in range(12)]
    Callers(keys, compare=compare, today=lambda: DAY).identify(_bearer(secret))
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert compared == [(digest, key.sha256) for key in keys]


def test_what_is_compared_is_hashes_of_one_length_by_a_function_made_for_it() -> None:
    assert Callers.__init__.__kwdefaults__["compare"] is hmac.compare_digest


@given(st.dictionaries(st.sampled_from(["authorization", "x-api-key"]), st.text()))
def test_no_header_is_an_error(headers: dict[str, str]) -> None:
    assert isinstance(given_key(headers), str)
    assert Callers([_key(1)]).identify(headers) in (None, Caller("t1"))


# ---------------------------------------------------------------------------- how often


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def _granted(limit: RateLimit, tenant: str) -> int:
    return next(number for number in count() if limit.take(tenant))


@pytest.mark.parametrize(("per_minute", "burst"), [(1, 1), (6, 1), (12, 2), (600, 100), (6000, 1000)])
def test_a_burst_is_what_comes_in_ten_seconds_and_at_least_one(per_minute: int, burst: int) -> None:
    clock = Clock()
    limit = RateLimit({"a": per_minute}, clock)
    assert _granted(limit, "a") == burst
    clock.now += 60
    assert _granted(limit, "a") == min(burst, per_minute)


@pytest.mark.parametrize("per_minute", [1, 7, 60, 599, 100_000])
def test_who_waits_as_long_as_told_is_granted_and_no_sooner(per_minute: int) -> None:
    clock = Clock()
    limit = RateLimit({"a": per_minute}, clock)
    _granted(limit, "a")
    for _ in range(50):
        wait = limit.take("a")
        assert 0 < wait <= 60 / per_minute + 1e-6
        clock.now += wait / 2
        assert limit.take("a") > 0
        clock.now += wait / 2
        assert limit.take("a") == 0


def test_tenants_do_not_pay_for_each_other_and_one_without_a_rate_never_waits() -> None:
    clock = Clock()
    limit = RateLimit({"a": 6, "b": 6}, clock)
    assert (limit.take("a"), limit.take("b")) == (0, 0)
    assert limit.take("a") > 0
    assert [limit.take("free") for _ in range(1000)] == [0] * 1000


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    clock = Clock()
    limit = RateLimit({"a": 60}, clock)
    _granted(limit, "a")
    clock.now -= 100
    assert limit.take("a") > 0


@given(st.integers(1, 10_000), st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_in_no_span_of_time_more_is_granted_than_burst_and_rate_allow(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    limit = RateLimit({"a": per_minute}, clock)
    granted: list[float] = []
    for pause in pauses:
        clock.now += pause
        granted += [clock.now for _ in range(3) if limit.take("a") == 0]
    burst = max(Fraction(1), Fraction(per_minute, 6))
    for first, start in enumerate(granted):
        for last in range(first, len(granted)):
            span = Fraction(granted[last]) - Fraction(start)
            assert last - first + 1 <= burst + span * per_minute / 60 + Fraction(1, 1000)


def test_fifty_threads_share_one_bucket() -> None:
    limit, together = RateLimit({"a": 120}, Clock()), threading.Barrier(50)

    def take(_: int) -> bool:
        together.wait()
        return limit.take("a") == 0

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(take, range(50))) == 20


def test_two_keys_of_a_tenant_share_its_rate_and_the_refusal_says_how_long_to_wait() -> None:
    clock = Clock()
    keys = [_key(number, tenant="a", requests_per_minute=4) for number in (1, 2)]
    callers = Callers(keys, clock=clock)
    assert callers.admit(_bearer("1")) == Caller("a")
    with pytest.raises(Refusal, match="try again in 15 s") as caught:
        callers.admit(_bearer("2"))
    assert (caught.value.code, caught.value.status, caught.value.retry_after_s) == ("rate_limited", 429, 15)
    clock.now += 14.5
    with pytest.raises(Refusal) as caught:
        callers.admit(_bearer("1"))
    assert caught.value.retry_after_s == 1
    clock.now += 1
    assert callers.admit(_bearer("2")) == Caller("a")


def test_a_wrong_key_takes_nothing_from_anyones_rate() -> None:
    callers = Callers([_key(1, requests_per_minute=1)], clock=Clock())
    for _ in range(10):
        with pytest.raises(Refusal):
            callers.admit(_bearer("wrong"))
    assert callers.admit(_bearer("1")) == Caller("t1")


def test_who_comes_back_when_told_gets_the_whole_rate() -> None:
    clock = Clock()
    callers = Callers([_key(1, requests_per_minute=30)], clock=clock)

    def asked(seconds: float) -> Iterator[float]:
        end = clock.now + seconds
        while clock.now < end:
            try:
                callers.admit(_bearer("1"))
                yield clock.now
            except Refusal as refusal:
                clock.now += refusal.retry_after_s or 0

    times = list(asked(600))
    assert len(times) == 5 + 30 * 10 - 1
    assert all(math.isclose(later - sooner, 2) for sooner, later in pairwise(times[5:]))
