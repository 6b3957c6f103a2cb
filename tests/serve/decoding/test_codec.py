import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
from numpy.typing import NDArray

from kintsugi import imaging
from kintsugi.errors import ImageError, KintsugiError
from kintsugi.processes import runs, wait_until
from kintsugi_serve.decoding.child import memory_needed
from kintsugi_serve.decoding.codec import Decoder

PIXELS = 1_000_000


@contextlib.asynccontextmanager
async def _decoder(*words: Any, **options: Any) -> AsyncIterator[Decoder]:
    decoder = Decoder(*words, **options)
    try:
        yield decoder
    finally:
        decoder.close()


async def _refusal(decoder: Decoder, image: bytes, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await decoder.decode(image, **{"max_pixels": PIXELS, **options})
    return caught.value


async def _pid(decoder: Decoder, image: bytes = b"plain") -> str:
    return (await decoder.decode(image, max_pixels=PIXELS))[0].tags[0][1]


def _with(test: Callable[[Decoder], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with _decoder(**{"workers": 1, **options}) as decoder:
            await test(decoder)

    asyncio.run(run())


def _wait_gone(pid: int) -> None:
    def gone() -> bool:
        try:
            return not runs(psutil.Process(pid))
        except psutil.NoSuchProcess:
            return True

    assert wait_until(gone, 30)


def _tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def _random(dtype: type[np.uint8] | type[np.uint16], *shape: int) -> imaging.Pixels:
    return np.random.default_rng(0).integers(0, 4000 if dtype is np.uint16 else 256, shape).astype(dtype)


IMAGES = {
    "png": lambda: imaging.encode(imaging.Image(_random(np.uint8, 40, 30, 3))),
    "grey png of 16 bits": lambda: imaging.encode(imaging.Image(_random(np.uint16, 40, 30), "png", 4095)),
    "jpeg": lambda: imaging.encode(imaging.Image(_random(np.uint8, 40, 30), "jpeg")),
    "bmp": lambda: imaging.encode(imaging.Image(_random(np.uint8, 40, 30, 3), "bmp")),
    "tiff, white is 0": lambda: _tiff(_random(np.uint16, 40, 30), photometric="miniswhite", compression="lzw"),
    "tiff of 16-bit colours": lambda: _tiff(_random(np.uint16, 700, 600, 3), photometric="rgb", compression="zlib"),
}


@pytest.mark.parametrize("white_level", [None, 4095])
def test_an_image_comes_back_as_imaging_reads_it(white_level: int | None) -> None:
    async def all_of_them(decoder: Decoder) -> None:
        for name, make in IMAGES.items():
            level = white_level if "16" in name else None
            wanted = imaging.decode(make(), white_level=level)
            image, mask = await decoder.decode(make(), white_level=level, max_pixels=PIXELS)
            assert mask is None
            assert image.pixels.dtype == wanted.pixels.dtype
            np.testing.assert_array_equal(image.pixels, wanted.pixels, err_msg=name)
            facts = image.format, image.white_level, image.tags
            assert facts == (wanted.format, wanted.white_level, wanted.tags)

    _with(all_of_them)


def test_a_mask_comes_back_as_booleans() -> None:
    async def one(decoder: Decoder) -> None:
        wanted = np.eye(30, 40, dtype=np.bool_)
        _, mask = await decoder.decode(IMAGES["png"](), imaging.encode_mask(wanted), max_pixels=PIXELS)
        assert mask is not None and mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, wanted)

    _with(one)


BAD: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {
    "no image": (lambda: b"GIF89a", {}),
    "nothing": (lambda: b"", {}),
    "cut off": (lambda: IMAGES["png"]()[:-40], {}),
    "too large": (IMAGES["png"], {"max_pixels": 1199}),
    "too bright": (IMAGES["grey png of 16 bits"], {"white_level": 255}),
    "a white level that is none": (IMAGES["png"], {"white_level": -7}),
    "several pages": (lambda: _tiff(_random(np.uint8, 3, 8, 8), photometric="minisblack"), {}),
}


def test_a_refusal_is_handed_on_with_its_code_and_sentence() -> None:
    async def all_of_them(decoder: Decoder) -> None:
        for make, options in BAD.values():
            with pytest.raises(ImageError) as direct:
                imaging.decode(make(), **{"max_pixels": PIXELS, **options})
            refusal = await _refusal(decoder, make(), **options)
            assert (refusal.code, str(refusal)) == (direct.value.code, str(direct.value))
        assert (await _refusal(decoder, IMAGES["png"](), mask=b"no mask")).code == "unsupported_format"

    _with(all_of_them)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"crash", "SIGSEGV"),
        (b"spin", "within 0.3 s"),
        (b"hang", "within 0.3 s"),
        (b"babble", "ended its decoder"),
        (b"exceed", "ended its decoder"),
    ],
)
def test_an_image_that_ends_its_child_is_refused_and_the_next_one_is_decoded(
    hostile: str, image: bytes, words: str
) -> None:
    async def attack(decoder: Decoder) -> None:
        before = await _pid(decoder)
        refusal = await _refusal(decoder, image, max_pixels=100)
        assert refusal.code == "undecodable"
        assert words in str(refusal)
        assert await _pid(decoder) != before
        assert not psutil.pid_exists(int(before))

    _with(attack, target=hostile, timeout_s=0.3 if b"n" in image else 60)


@pytest.mark.parametrize("image", [b"swallow", b"nibble"])
def test_an_image_that_wants_more_memory_than_it_may_is_too_large_and_its_child_lives(
    hostile: str, image: bytes
) -> None:
    async def attack(decoder: Decoder) -> None:
        before = await _pid(decoder)
        refusal = await _refusal(decoder, image)
        assert (refusal.code, "memory" in str(refusal)) == ("too_large", True)
        assert await _pid(decoder, b"keep 0") == before

    _with(attack, target=hostile, memory_bytes=2**28, timeout_s=60)


def test_what_imaging_did_not_foresee_is_a_refusal_too(hostile: str) -> None:
    async def attack(decoder: Decoder) -> None:
        before = await _pid(decoder)
        refusal = await _refusal(decoder, b"fail")
        assert (refusal.code, "ZeroDivisionError" in str(refusal)) == ("undecodable", True)
        assert await _pid(decoder) == before

    _with(attack, target=hostile)


def test_the_answer_to_a_caller_that_went_away_is_given_to_nobody_else(hostile: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def go_away(decoder: Decoder) -> None:
        before = await _pid(decoder)
        gone = asyncio.create_task(decoder.decode(f"wait {gate}".encode(), max_pixels=PIXELS))
        writer = await asyncio.to_thread(gate.open, "w")  # returns when the child has begun
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        others = [asyncio.create_task(decoder.decode(b"x" * length, max_pixels=PIXELS)) for length in (3, 5, 7)]
        others[1].cancel()
        writer.close()
        first, _, last = await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(first, tuple) and isinstance(last, tuple)
        assert [int(image.pixels[0, 0]) for image, _ in (first, last)] == [3, 7]
        assert await _pid(decoder) == before

    _with(go_away, target=hostile, timeout_s=60)


def test_many_images_at_once_each_get_their_own_answer(hostile: str) -> None:
    async def crowd(decoder: Decoder) -> None:
        await decoder.start()
        lengths = range(1, 41)
        words = [b"crash" if length % 10 == 0 else b"x" * length for length in lengths]
        answers = await asyncio.gather(
            *(decoder.decode(word, max_pixels=PIXELS) for word in words), return_exceptions=True
        )
        for length, answer in zip(lengths, answers, strict=True):
            if length % 10 == 0:
                assert isinstance(answer, ImageError)
            else:
                assert isinstance(answer, tuple)
                assert int(answer[0].pixels[0, 0]) == length

    _with(crowd, target=hostile, workers=3)


def test_a_child_is_replaced_after_its_share_of_images(hostile: str) -> None:
    async def count(decoder: Decoder) -> None:
        pids = [await _pid(decoder) for _ in range(6)]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]

    _with(count, target=hostile, images_per_child=2)


def test_a_child_that_keeps_memory_is_replaced(hostile: str) -> None:
    async def fill(decoder: Decoder) -> None:
        first = await _pid(decoder, b"keep 1000")
        assert await _pid(decoder, b"keep 400000000") == first
        assert await _pid(decoder) != first

    _with(fill, target=hostile)


def test_a_child_knows_no_secret_and_has_no_torch_and_one_thread(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "KINTSUGI_API_KEY", "RAY_ADDRESS", "SOMEBODYS_TOKEN"):
        monkeypatch.setenv(name, "secret")

    async def describe(decoder: Decoder) -> None:
        facts = json.loads(str(await _refusal(decoder, b"describe")))
        assert "secret" not in facts["environment"].values()
        assert {"torch", "ray", "boto3"}.isdisjoint(facts["modules"])
        assert facts["limits"] == {"RLIMIT_CORE": [0, 0], "RLIMIT_FSIZE": [0, 0]}
        assert facts["threads"] == 1

    _with(describe, target=hostile)


def test_an_image_of_the_largest_size_in_the_most_demanding_file_fits_into_the_memory() -> None:
    pixels = np.zeros((4096, 4096, 3), np.uint16)
    data = _tiff(pixels, photometric="rgb", byteorder=">", rowsperstrip=4096, compression="zlib", predictor=True)

    async def one(decoder: Decoder) -> None:
        image, mask = await decoder.decode(data, data, max_pixels=4096 * 4096)
        assert (image.pixels.shape, mask is not None) == (pixels.shape, True)

    _with(one, memory_bytes=memory_needed(4096 * 4096), timeout_s=120)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_image_for_which_its_childs_memory_does_not_suffice_is_too_large(kind: imaging.Format) -> None:
    data = imaging.encode(imaging.Image(np.zeros((4000, 4000, 3), np.uint16), kind, 65535))

    async def one(decoder: Decoder) -> None:
        for mask in (None, data):
            refusal = await _refusal(decoder, data if mask is None else IMAGES["png"](), mask=mask, max_pixels=4000**2)
            assert (refusal.code, "memory" in str(refusal)) == ("too_large", True)

    _with(one, memory_bytes=2**25)


def test_images_are_decoded_again_after_the_nursery_was_killed(hostile: str) -> None:
    async def kill(decoder: Decoder) -> None:
        before = await _pid(decoder)
        nursery = psutil.Process(int(before)).parent()
        assert nursery is not None
        nursery.kill()
        _wait_gone(int(before))
        assert await _pid(decoder) != before

    _with(kill, target=hostile)


def test_an_image_whose_nursery_was_killed_is_tried_again_and_not_blamed(hostile: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def kill(decoder: Decoder) -> None:
        nursery = psutil.Process(int(await _pid(decoder))).parent()
        assert nursery is not None
        waiting = asyncio.create_task(decoder.decode(f"wait {gate}".encode(), max_pixels=PIXELS))
        with await asyncio.to_thread(gate.open, "w"):
            child = nursery.children()[0].pid
            nursery.kill()
            _wait_gone(child)
        await asyncio.to_thread(gate.write_text, "")
        await waiting

    _with(kill, target=hostile, ledger=tmp_path / "ledger", timeout_s=60)
    assert not (tmp_path / "ledger").exists()


def test_a_child_that_ended_while_it_was_idle_is_no_images_fault(hostile: str, tmp_path: Path) -> None:
    async def kill(decoder: Decoder) -> None:
        before = await _pid(decoder)
        os.kill(int(before), signal.SIGKILL)
        _wait_gone(int(before))
        assert await _pid(decoder) != before

    _with(kill, target=hostile, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_a_decoder_that_cannot_start_says_so() -> None:
    async def start(decoder: Decoder) -> None:
        with pytest.raises(KintsugiError, match="do not start"):
            await decoder.start()

    _with(start, target="kintsugi_serve.decoding.child:no_such_function")


def test_nothing_is_left_of_a_closed_decoder(hostile: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    async def close_while_decoding() -> None:
        decoder = Decoder(2, target=hostile, ledger=tmp_path / "ledger")
        child = int(await _pid(decoder))
        spinning = asyncio.create_task(decoder.decode(f"tell-and-spin {gate}".encode(), max_pixels=PIXELS))
        await asyncio.to_thread(gate.read_text)  # ends when the child has begun
        decoder.close()
        for image in (spinning, decoder.decode(b"plain", max_pixels=PIXELS)):
            with pytest.raises(KintsugiError, match="closed"):
                await image
        _wait_gone(child)

    asyncio.run(close_while_decoding())
    assert not (tmp_path / "ledger").exists()


ORPHANED = """
import asyncio, os, signal, sys
from kintsugi_serve.decoding.codec import Decoder
import psutil

async def main():
    decoder = Decoder(2, target="hostile_target:decode")
    await decoder.start()
    task = asyncio.create_task(decoder.decode(b"tell-and-spin " + sys.argv[1].encode(), max_pixels=10))
    (await asyncio.to_thread(open, sys.argv[1])).close()
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_no_child_outlives_a_parent_that_was_killed_not_even_one_that_spins(hostile: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", ORPHANED, str(gate)], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    for pid in pids:
        _wait_gone(pid)
