import pytest
import torch
from torch import Tensor

from kintsugi.config import ExperimentConfig, with_values
from kintsugi.models import Prediction, build_model
from kintsugi.restore.inference import TiledModel, reach
from kintsugi.sections import ModelConfig


def tiled(config: ModelConfig, tile: int, halo: int | None = None) -> TiledModel:
    torch.manual_seed(0)
    model = build_model(config).eval()
    model.background_head.weight.data.normal_(0, 0.1)
    return TiledModel(model, torch.device("cpu"), tile, halo, "none", 512)


def run(model: TiledModel, batch: Tensor) -> list[tuple[slice, Prediction]]:
    return list(model.bands(lambda rows: (batch[..., rows, :], None), (batch.shape[-2], batch.shape[-1])))


def test_bands_come_from_top_to_bottom_and_cover_the_batch(tiny_config: ExperimentConfig) -> None:
    bands = run(tiled(tiny_config.model, 32), torch.rand(2, 1, 70, 50))
    assert [(rows.start, rows.stop) for rows, _ in bands] == [(0, 24), (24, 48), (48, 70)]
    assert all(answer.image.shape == (2, 1, rows.stop - rows.start, 50) for rows, answer in bands)


def test_only_the_rows_of_a_band_and_its_halo_are_read(tiny_config: ExperimentConfig) -> None:
    batch, asked = torch.rand(1, 1, 400, 20), list[slice]()

    def read(rows: slice) -> tuple[Tensor, None]:
        asked.append(rows)
        return batch[..., rows, :], None

    for _ in tiled(tiny_config.model, 32, halo=16).bands(read, (400, 20)):
        pass
    assert max(rows.stop - rows.start for rows in asked) == 32 + 2 * 16


@pytest.mark.parametrize("values", [{}, {"model.attention_window": 32}, {"model.stem": 2}])
def test_beyond_the_reach_surroundings_hardly_count(tiny_config: ExperimentConfig, values: dict[str, object]) -> None:
    config = with_values(tiny_config, {"model.attention": "none", **values}).model
    model, far = tiled(config, 4096).model, reach(config)
    left = torch.rand(1, 1, 64, 2 * far)
    with torch.inference_mode():
        one, other = (model(torch.cat([left, right], 3)).image for right in (torch.rand_like(left), left * 0))
    change = (one - torch.cat([left, left], 3))[..., :far].abs().mean()
    assert (one - other)[..., :far].abs().max() < 0.3 * change / 25.5  # of a change by 0.1: 0.3 of 255 levels
    assert (one - other)[..., 2 * far - 4 : 2 * far].abs().max() > 0.1 * change
