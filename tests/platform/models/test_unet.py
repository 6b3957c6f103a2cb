import pytest
import torch

from kintsugi.config import ModelConfig
from kintsugi.models import build_model


def make(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"channels": 1, "base": 8, "levels": 2, "skips": (True, True), "reduction": (4, 4), "dropout": 0.0}
    return build_model(ModelConfig.model_validate({**settings, **options})).eval()


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (5, 3), (1, 1), (130, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_size_of_the_input(size: tuple[int, int], channels: int) -> None:
    image = torch.rand(2, channels, *size)
    assert make(channels=channels)(image).shape == image.shape


def test_mask_attention_changes_the_output() -> None:
    model, image = make(mask="given"), torch.rand(1, 1, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 8:16] = 1
    model.mask_attention[2].weight.data *= 50
    without_input_channel = model.encoder[0][0].weight.data
    without_input_channel[:, 1] = 0
    assert not torch.allclose(model(image, mask), model(image, torch.zeros_like(mask)), atol=1e-4)


def test_an_unknown_mask_differs_from_a_known_empty_one() -> None:
    model, image = make(mask="optional"), torch.rand(1, 1, 32, 32)
    empty = torch.zeros(1, 1, 32, 32)
    assert not torch.allclose(model(image), model(image, empty))
    assert torch.equal(model(image), model(image, empty, torch.zeros(1)))


def test_a_model_without_mask_ignores_one() -> None:
    model, image = make(mask="none"), torch.rand(1, 1, 32, 32)
    assert torch.equal(model(image), model(image, torch.ones(1, 1, 32, 32)))


def test_a_residual_model_starts_as_the_identity() -> None:
    image = torch.rand(1, 1, 33, 47)
    assert torch.equal(make(residual=True)(image), image)


def test_a_skip_that_is_off_passes_nothing_from_its_encoder_level() -> None:
    with_skips, without = make(), make(skips=(False, False))
    assert sum(p.numel() for p in without.parameters()) < sum(p.numel() for p in with_skips.parameters())


def test_every_parameter_is_trained() -> None:
    model = make(mask="optional").train()
    model(torch.rand(2, 1, 32, 32), torch.ones(2, 1, 32, 32)).square().mean().backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []


def test_one_image_of_a_batch_does_not_depend_on_the_others() -> None:
    model, images = make(), torch.rand(3, 1, 64, 64)
    assert torch.allclose(model(images)[1], model(images[1:2])[0], atol=1e-6)
