"""Whether a graph answers as the Restorer does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kintsugi.errors import KintsugiError
from kintsugi.imaging import Image
from kintsugi.restore import Restorer

TOLERANCE = 1e-4
"""How far the graph's answers may be from the Restorer's, of full scale."""
_WHITE = 65535
_Map = NDArray[np.float32]


def check_parity(
    data: bytes, restorer: Restorer, sizes: Sequence[tuple[int, int]], *, masked: bool = False
) -> float | None:
    """The largest difference of a graph's answers from the Restorer's, over pairs of 16-bit images of some sizes.

    Args:
        restorer: one that takes these images in one piece.
        masked: the graph takes the mask.

    Returns:
        In parts of full scale, the Restorer's rounding to 16 bit included; None where onnxruntime is not installed.

    Raises:
        KintsugiError: it is above `TOLERANCE`.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    worst = float(np.max([_difference(session, restorer, size, masked) for size in sizes]))
    # Written so that NaN is refused too.
    if not worst <= TOLERANCE:
        raise KintsugiError(
            f"the graph's answers differ from the model's by up to {worst:.2g} of full scale, more than {TOLERANCE:g}: "
            "nothing is written; try another --opset, or restore with kintsugi itself"
        )
    return worst


def _difference(session: Any, restorer: Restorer, size: tuple[int, int], masked: bool) -> float:
    random = np.random.default_rng(0)
    images = [_picture(random, size, restorer.model.config.channels) for _ in range(2)]
    masks = [_patch(random, size) if masked else None for _ in images]
    feeds = {"image": np.stack([_planes(image.to_unit()) for image in images])}
    if masked:
        feeds["mask"] = np.stack([_planes(np.asarray(mask, np.float32)) for mask in masks])
    names = [output.name for output in session.get_outputs()]
    found: dict[str, _Map] = dict(zip(names, session.run(names, feeds), strict=True))
    gaps: list[float] = []
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        answer = restorer.restore(image, mask)
        maps = {"defect_map": answer.defect_map, "error_bound": answer.error_bound}
        wanted = {"restored": answer.image.to_unit()} | {name: part for name, part in maps.items() if part is not None}
        gaps += [float(np.abs(found[name][index] - _planes(part)).max()) for name, part in wanted.items()]
    return float(np.max(gaps))


def _picture(random: np.random.Generator, size: tuple[int, int], channels: int) -> Image:
    """Waves, an edge and noise."""
    rows, columns = np.mgrid[: size[0], : size[1]][..., None]
    waves = 0.5 + 0.2 * np.sin(columns / 7 + np.arange(channels)) * np.cos(rows / 5) + 0.1 * (columns > size[1] / 2)
    unit = np.clip(waves + random.normal(0, 0.05, waves.shape), 0, 1)
    pixels = np.rint(unit * _WHITE).astype(np.uint16)
    return Image(pixels[..., 0] if channels == 1 else pixels, "png", _WHITE)


def _patch(random: np.random.Generator, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(size, np.bool_)
    top, left = (int(random.integers(0, side // 2 + 1)) for side in size)
    mask[top : top + 8, left : left + 8] = True
    return mask


def _planes(part: _Map) -> _Map:
    """(H, W) or (H, W, C) as (C, H, W)."""
    return part[None] if part.ndim == 2 else part.transpose(2, 0, 1)
