"""Who is calling: the tenant of a request's key, and whether it may ask now."""

import base64
import datetime
import hmac
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kintsugi_serve.access.keys import Key, sha256_of
from kintsugi_serve.schemas import Refusal

LOCAL = "local"
"""The one tenant of a service without keys."""
BURST_S = 10.0
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Caller:
    """A tenant, and where its key lets it read and write in S3."""

    tenant: str = LOCAL
    prefixes: tuple[str, ...] = ()


class RateLimit:
    """Token buckets, one a tenant, in this process: each ingress process has its own.

    A bucket holds what comes in `BURST_S`, at least one request, and is full at first.
    """

    def __init__(self, per_minute: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = dict(per_minute)
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, tenant: str) -> float:
        """Seconds until the tenant may ask again; 0: it may now, and has one request less."""
        if tenant not in self._per_minute:
            return 0.0
        per_second = self._per_minute[tenant] / 60
        most = max(1.0, per_second * BURST_S)
        with self._lock:
            now = self._clock()
            held, since = self._buckets.get(tenant, (most, now))
            held = min(most, held + max(0.0, now - since) * per_second)
            granted = held >= 1 - _ROUNDING
            self._buckets[tenant] = (held - granted, now)
        return 0.0 if granted else (1 - held) / per_second


class Callers:
    """The keys that a service knows.

    Args:
        keys: none: everyone is the tenant `local`, with `prefixes`.
        compare: tells two hashes of keys apart in a time that does not depend on where they differ.
        today: the day in UTC.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        prefixes: tuple[str, ...] = (),
        *,
        compare: Callable[[str, str], bool] = hmac.compare_digest,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = tuple(keys)
        self._local = Caller(LOCAL, prefixes)
        self._compare = compare
        self._today = today
        self._rate = RateLimit({key.tenant: key.requests_per_minute for key in keys if key.requests_per_minute}, clock)

    def identify(self, headers: Mapping[str, str]) -> Caller | None:
        """The caller, by its key; None for a key that is not known, has expired, or is not there.

        Args:
            headers: with names in any case, or in lower case where the mapping tells cases apart.
        """
        if not self._keys:
            return self._local
        given = given_key(headers)
        digest, today = sha256_of(given), self._today()
        # A list, not a generator: every key is compared, so that the time tells nothing.
        same = [self._compare(digest, key.sha256) for key in self._keys]
        found = next((key for key, is_same in zip(self._keys, same, strict=True) if is_same), None)
        if not given or found is None or (found.expires is not None and today >= found.expires):
            return None
        return Caller(found.tenant, found.prefixes)

    def admit(self, headers: Mapping[str, str]) -> Caller:
        """The caller, if it may ask now.

        Raises:
            Refusal: `unauthorized` or, with the seconds to wait, `rate_limited`.
        """
        caller = self.identify(headers)
        if caller is None:
            raise Refusal("unauthorized", "send a known key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        wait = self._rate.take(caller.tenant)
        if wait:
            seconds = math.ceil(wait)
            raise Refusal("rate_limited", f"too many requests: try again in {seconds} s", retry_after_s=seconds)
        return caller


def given_key(headers: Mapping[str, str]) -> str:
    """The key that a request carries, or nothing.

    The password of HTTP Basic counts as a key too: that is what a browser can ask a person for.
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return headers.get("x-api-key", "")
