"""caller.py COUNT UNTIL PROGRESS ADDRESS...: one who calls an endpoint at several addresses in turn.

Where one fails the next is asked. Sends at least COUNT images, and on until the file UNTIL is there; tells PROGRESS how
many; prints JSON: {"sent", "failed", "other_address", "wrong"}. `failed`: at every address; `other_address`: at the
first only; `wrong`: not the bytes that were answered at the beginning. The key is in KINTSUGI_KEY.
"""

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from kintsugi import imaging

AT_ONCE, LIMIT_S = 2, 30.0


def ask(client: httpx2.Client, addresses: Sequence[str], body: bytes) -> tuple[int, bytes | None]:
    """How many addresses failed first, and the answer."""
    for failed, address in enumerate(addresses):
        try:
            answer = client.post(f"{address}/v1/restore", content=body)
        except httpx2.HTTPError as error:
            sys.stderr.write(f"{address}: {error!r}\n")
            continue
        if answer.status_code == 200:
            return failed, answer.content
        sys.stderr.write(f"{address}: {answer.status_code} {answer.text[:200]}\n")
    return len(addresses), None


def main(least: int, until: Path, progress: Path, addresses: Sequence[str]) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64), np.uint16)
    body = imaging.encode(imaging.Image(pixels))
    found: list[tuple[int, bytes | None]] = []
    headers = {"Authorization": f"Bearer {os.environ['KINTSUGI_KEY']}"}
    with httpx2.Client(timeout=LIMIT_S, headers=headers) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        for turn in count():
            turned = [addresses[(turn + n) % len(addresses)] for n in range(len(addresses))]
            found += pool.map(lambda own: ask(client, own, body), [turned] * AT_ONCE)
            progress.write_text(str(len(found)))
            if len(found) >= least and until.exists():
                break
    right = next((answer for _, answer in found if answer is not None), None)
    return {
        "sent": len(found),
        "failed": sum(answer is None for _, answer in found),
        "other_address": sum(bool(failed) and answer is not None for failed, answer in found),
        "wrong": sum(answer is not None and answer != right for _, answer in found),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
