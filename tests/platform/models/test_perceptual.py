from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from kintsugi.errors import ConfigError
from kintsugi.models import PerceptualDistance
from kintsugi.sections import PerceptualConfig

# Seeded random weights stand in for ImageNet's, which tests do not download.
RANDOM = {"network": "vgg11", "layers": (1, 4), "weights": "random"}


def test_equal_images_have_distance_zero_and_different_ones_do_not() -> None:
    distance, image = PerceptualDistance(PerceptualConfig(**RANDOM)), torch.rand(2, 1, 32, 32)
    assert distance(image, image) == 0
    assert distance(image, image.flip(3)) > 0


def test_random_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = PerceptualDistance(PerceptualConfig(**RANDOM))
    assert torch.equal(torch.rand(3), expected)
    again, other = (PerceptualDistance(PerceptualConfig(**RANDOM, seed=seed)) for seed in (0, 1))
    assert torch.equal(first.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_gradients_reach_the_output_and_no_weight() -> None:
    distance, output = PerceptualDistance(PerceptualConfig(**RANDOM)), torch.rand(1, 3, 32, 32, requires_grad=True)
    distance(output, torch.rand(1, 3, 32, 32)).backward()
    assert output.grad is not None and output.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_weights_are_loaded_from_a_path(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = torchvision.models.vgg11(weights=None)
    torch.save(network.state_dict(), tmp_path / "vgg11.pth")
    distance = PerceptualDistance(PerceptualConfig(**{**RANDOM, "weights": str(tmp_path / "vgg11.pth")}))
    assert torch.equal(distance.layers[0].weight, network.features[0].weight)


def test_missing_imagenet_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    with pytest.raises(ConfigError, match="random"):
        PerceptualDistance(PerceptualConfig(network="vgg11"))


def test_layers_beyond_the_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.20"):
        PerceptualConfig(**{**RANDOM, "layers": (99,)})
