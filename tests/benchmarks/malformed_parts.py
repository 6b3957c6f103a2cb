"""What the makers of malformed images share: small pictures, honest files, and ways to spoil them."""

import io
import random
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as PillowImage

PIXELS = 2_000_000
"""The limit that some are over. Decode them with it."""

Make = Callable[[random.Random], bytes]
BIG = (2_000, 30_000, 65_535, 2**20, 2**31 - 1)


def grey(dice: random.Random, dtype: Any = np.uint8) -> Any:
    height, width = dice.randint(24, 60), dice.randint(24, 60)
    return np.random.default_rng(dice.getrandbits(32)).integers(1, 250, (height, width)).astype(dtype)


def rgb(dice: random.Random, dtype: Any = np.uint8) -> Any:
    return np.stack([grey(dice, dtype)] * 3, axis=2)


def either(dice: random.Random) -> Any:
    return dice.choice((grey, rgb))(dice)


@cache
def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def saved(picture: PillowImage.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str, kind: str, dice: random.Random, **options: Any) -> bytes:
    return saved(PillowImage.fromarray(rgb(dice)).convert(mode), kind, **options)


def cut(data: bytes, dice: random.Random, least: int) -> bytes:
    """Without its last bytes, `least` or more, but with its magic."""
    return data[: dice.randrange(8, len(data) - least + 1)]
