import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kintsugi.errors import ImageError
from kintsugi_serve.decoding.codec import Decoder
from kintsugi_serve.decoding.ledger import Ledger

PIXELS = 1_000_000


async def _refusal(decoder: Decoder, image: bytes, mask: bytes | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await decoder.decode(image, mask, max_pixels=PIXELS)
    return caught.value


def _with(test: Callable[[Decoder], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        decoder = Decoder(1, **options)
        try:
            await test(decoder)
        finally:
            decoder.close()

    asyncio.run(run())


def test_an_image_that_ended_two_children_is_not_tried_again_by_any_decoder(hostile: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"

    async def attack(decoder: Decoder) -> None:
        for code in ("undecodable", "undecodable", "poison", "poison"):
            assert (await _refusal(decoder, b"crash")).code == code
        # With a mask it is another image.
        assert (await _refusal(decoder, b"crash", mask=b"")).code == "undecodable"

    async def ask_another(decoder: Decoder) -> None:
        assert (await _refusal(decoder, b"crash")).code == "poison"
        assert (await _refusal(decoder, b"other")).code == "unsupported_format"

    _with(attack, target=hostile, ledger=ledger)
    _with(ask_another, ledger=ledger)


def test_an_image_that_merely_cannot_be_decoded_is_never_called_poison(tmp_path: Path) -> None:
    async def often(decoder: Decoder) -> None:
        codes = {(await _refusal(decoder, b"GIF89a")).code for _ in range(4)}
        assert codes == {"unsupported_format"}

    _with(often, ledger=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_cannot_be_written_stops_nobody(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    async def attack(decoder: Decoder) -> None:
        for _ in range(3):
            assert (await _refusal(decoder, b"crash")).code == "undecodable"
        await decoder.decode(b"plain", max_pixels=PIXELS)

    _with(attack, target=hostile, ledger=tmp_path / "file" / "ledger")


def test_an_image_whose_caller_went_away_is_still_found_to_be_poison(hostile: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def go_away(decoder: Decoder) -> None:
        image = f"tell-and-spin {gate}".encode()
        for _ in range(2):
            gone = asyncio.create_task(decoder.decode(image, max_pixels=PIXELS))
            await asyncio.to_thread(gate.read_text)  # ends when the child has begun
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        assert (await _refusal(decoder, image)).code == "poison"

    _with(go_away, target=hostile, timeout_s=0.3, ledger=tmp_path / "ledger")


def test_the_ledger_keeps_the_latest_entries_only_and_leaves_other_files_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, limit=4)
    (tmp_path / "notes").write_text("somebody's")
    digests = [f"{number:064x}" for number in range(3)]
    for number, digest in enumerate(digests):
        for strike in (1, 2):
            ledger.record(digest, "SIGSEGV")
            os.utime(tmp_path / f"{digest}.{strike}", (number - 10 + time.time(),) * 2)
    assert [ledger.refuses(digest) for digest in digests] == [False, True, True]
    assert len(list(tmp_path.iterdir())) == 5


def test_the_ledger_forgets_what_is_old(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, keep_s=100)
    for _ in range(2):
        ledger.record("a" * 64, "timeout")
    assert ledger.refuses("a" * 64)
    for entry in tmp_path.iterdir():
        os.utime(entry, (time.time() - 101,) * 2)
    assert not ledger.refuses("a" * 64)
    ledger.record("a" * 64, "timeout")
    assert not ledger.refuses("a" * 64)
    ledger.record("a" * 64, "timeout")
    assert ledger.refuses("a" * 64)


def test_decoders_that_share_a_ledger_count_together(tmp_path: Path) -> None:
    one, another = Ledger(tmp_path / "ledger"), Ledger(tmp_path / "ledger")
    assert one.empty()
    one.record("a" * 64, "SIGSEGV")
    assert not another.empty()
    assert not another.refuses("a" * 64)
    another.record("a" * 64, "SIGSEGV")
    one.record("a" * 64, "SIGSEGV")
    assert one.refuses("a" * 64)
    assert another.refuses("a" * 64)
    assert not one.refuses("b" * 64)
