from pathlib import Path

import numpy as np
import pytest
import torch

from kintsugi import imaging
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.errors import IntegrityError, KintsugiError
from kintsugi.models import build_model
from kintsugi.restore.golden import GOLDEN, TOLERANCE, check_golden, make_golden, probe
from kintsugi.restore.restorer import Restorer

TINY = {"model.levels": 2, "model.blocks": 1, "model.base": 4, "model.skips": [True, True], "model.reduction": [2, 2],
        "model.channels": 1}  # fmt: skip


def restorer(seed: int = 0, **values: object) -> Restorer:
    torch.manual_seed(seed)
    config = with_values(ExperimentConfig(), {**TINY, **{f"model.{key}": value for key, value in values.items()}})
    model = build_model(config.model).eval()
    torch.nn.init.normal_(model.background_head.weight, std=0.1)
    return Restorer(model)


def golden(folder: Path, of: Restorer) -> Path:
    answer = make_golden(of)
    assert answer is not None
    (folder / GOLDEN).write_bytes(answer)
    return folder


@pytest.mark.parametrize("values", [{}, {"channels": 3}, {"mask": "given"}, {"mask": "none"}])
def test_a_model_makes_of_the_probe_what_it_made_before(tmp_path: Path, values: dict[str, object]) -> None:
    check_golden(restorer(**values), golden(tmp_path, restorer(**values)))


def test_another_model_does_not(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="golden image differs"):
        check_golden(restorer(seed=1), golden(tmp_path, restorer()))


def test_what_another_device_rounds_is_tolerated_and_more_is_not(tmp_path: Path) -> None:
    folder, model = golden(tmp_path, restorer()), restorer()
    image = imaging.decode((folder / GOLDEN).read_bytes())
    for share, agrees in ((0.5, True), (2.0, False)):
        pixels = image.pixels.astype(np.int64)
        pixels[5, 5] += round(share * TOLERANCE * 65535) * (1 if pixels[5, 5] < 2**15 else -1)
        (folder / GOLDEN).write_bytes(imaging.encode(imaging.Image(pixels.astype(np.uint16), "png", 65535)))
        if agrees:
            check_golden(model, folder)
        else:
            with pytest.raises(IntegrityError):
                check_golden(model, folder)


def test_a_golden_image_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="shape"):
        check_golden(restorer(), golden(tmp_path, restorer(channels=3)))


def test_a_version_without_one_only_has_to_answer(tmp_path: Path) -> None:
    check_golden(restorer(), tmp_path)
    broken = restorer()
    with torch.no_grad():
        broken.model.background_head.weight.fill_(torch.nan)
    with pytest.raises(KintsugiError, match="not finite"):
        check_golden(broken, tmp_path)
    with pytest.raises(KintsugiError, match="not finite"):
        make_golden(broken)


def test_the_probe_is_always_the_same_and_shows_defects() -> None:
    image, mask = probe(1)
    assert np.array_equal(image.pixels, probe(1)[0].pixels)
    assert (image.size, image.bit_depth) == (mask.shape, 16)
    assert 0 < mask.mean() < 0.1
