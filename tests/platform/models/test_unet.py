import pytest
import torch
from torch import nn

from kintsugi.errors import ConfigError
from kintsugi.models import RestorationUNet, build_model
from kintsugi.models.encoder import load_encoder_weights
from kintsugi.sections import ModelConfig


def make(**options: object) -> RestorationUNet:
    torch.manual_seed(0)
    settings = {"channels": 1, "base": 8, "levels": 2, "skips": True, "reduction": 4, "dropout": 0.0}
    return build_model(ModelConfig.model_validate({**settings, **options})).eval()


def lively(**options: object) -> RestorationUNet:
    """Without the zeros that a residual model's heads start from."""
    model = make(**options)
    for head in (model.background_head, getattr(model, "defect_head", None)):
        if head is not None:
            nn.init.normal_(head.weight, std=0.1)
    return model


@pytest.mark.parametrize("size", [(64, 64), (37, 51), (5, 3), (1, 1), (130, 16)])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("stem", [1, 2])
def test_output_has_the_size_of_the_input(size: tuple[int, int], channels: int, stem: int) -> None:
    image = torch.rand(2, channels, *size)
    prediction = make(channels=channels, stem=stem, mask="predicted", error=True, attention_window=16)(image)
    assert prediction.image.shape == image.shape
    assert prediction.defect is not None and prediction.error is not None
    assert prediction.defect.shape == prediction.error.shape == (2, 1, *size)


OPTIONS = [
    {"block": "residual"},
    {"block": "naf"},
    {"blocks": (2, 1, 3)},
    {"norm": "group"},
    {"norm": "none", "bias": False},
    {"attention": "channel_spatial"},
    {"attention": "none"},
    {"attention_window": 8},
    {"skips": "add"},
    {"skips": "gated"},
    {"skips": ("off", "gated")},
    {"downsample": "conv", "upsample": "shuffle"},
    {"max_channels": 12},
    {"stem": 2},
    {"mask": "none"},
    {"mask": "optional"},
    {"mask": "predicted", "error": True},
    {"encoder": "resnet18"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_changes_the_output_and_trains_every_parameter(options: dict[str, object]) -> None:
    image, mask = torch.rand(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    mask[..., 8:16, 8:16] = 1
    model, plain = make(**options).train(), make()
    assert model(image, mask).image.shape == image.shape
    assert not torch.equal(make(**options)(image, mask).image, plain(image, mask).image)
    prediction = model(image, mask, torch.tensor([1.0, 0.0]))
    sum(part.square().mean() for part in prediction if part is not None).backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []


@pytest.mark.parametrize("kind", ["given", "predicted"])
def test_the_mask_changes_the_output_through_mask_attention_alone(kind: str) -> None:
    model, image = lively(mask=kind, residual=True), torch.rand(1, 1, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 8:16] = 1
    if kind == "given":
        model.mask_attention[2].weight.data *= 50
        model.encoder.stages[0][0][0].weight.data[:, 1] = 0
    with_mask, without = model(image, mask).image, model(image, torch.zeros_like(mask)).image
    assert not torch.allclose(with_mask, without, atol=1e-4)
    assert torch.allclose(with_mask[..., 20:, 20:], without[..., 20:, 20:], atol=1e-6), "far from the mask"


def test_a_predicted_mask_weighs_the_heads_where_none_is_known() -> None:
    model, image = lively(mask="predicted", residual=True), torch.rand(1, 1, 32, 32)
    model.mask_head[2].bias.data.fill_(50)
    sure = model(image)
    assert sure.defect is not None and sure.defect.min() > 20
    assert torch.allclose(sure.image, model(image, torch.ones_like(image)).image, atol=1e-6)
    unknown = model(image, torch.zeros_like(image), torch.zeros(1))
    assert torch.equal(sure.image, unknown.image)


def test_an_unknown_mask_differs_from_a_known_empty_one() -> None:
    model, image = make(mask="optional"), torch.rand(1, 1, 32, 32)
    empty = torch.zeros(1, 1, 32, 32)
    assert not torch.allclose(model(image).image, model(image, empty).image)
    assert torch.equal(model(image).image, model(image, empty, torch.zeros(1)).image)


def test_a_model_without_mask_ignores_one() -> None:
    model, image = make(mask="none"), torch.rand(1, 1, 32, 32)
    assert torch.equal(model(image).image, model(image, torch.ones(1, 1, 32, 32)).image)


@pytest.mark.parametrize("mask", ["given", "predicted", "none"])
def test_a_residual_model_starts_as_the_identity(mask: str) -> None:
    image = torch.rand(1, 1, 33, 47)
    assert torch.equal(make(residual=True, mask=mask)(image).image, image)


def test_a_skip_that_is_off_passes_nothing_from_its_encoder_level() -> None:
    with_skips, without = make(), make(skips=False)
    assert sum(p.numel() for p in without.parameters()) < sum(p.numel() for p in with_skips.parameters())


def test_without_bias_and_norm_the_output_scales_with_the_input() -> None:
    options = {"norm": "none", "bias": False, "attention": "none", "block": "residual", "mask": "none"}
    model, image = lively(residual=True, **options), torch.rand(1, 1, 32, 32)
    assert torch.allclose(model(image / 4).image * 4, model(image).image, atol=1e-5)
    biased = lively(residual=True, **{**options, "bias": True})
    assert not torch.allclose(biased(image / 4).image * 4, biased(image).image, atol=1e-3)


def test_one_image_of_a_batch_does_not_depend_on_the_others() -> None:
    model, images = make(), torch.rand(3, 1, 64, 64)
    assert torch.allclose(model(images).image[1], model(images[1:2]).image[0], atol=1e-6)


def test_the_error_bound_does_not_train_the_restoration() -> None:
    model = make(mask="none", error=True)
    error = model(torch.rand(1, 1, 32, 32)).error
    assert error is not None
    error.sum().backward()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"error_head"}


def test_a_timm_encoder_starts_from_the_weights_of_a_file(tmp_path: pytest.TempPathFactory) -> None:
    import timm

    torch.manual_seed(7)
    file = f"{tmp_path}/resnet18.pth"
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(weights, file)
    model = make(encoder="resnet18", encoder_weights=file)
    load_encoder_weights(model.encoder, model.config)
    assert torch.equal(model.encoder.trunk.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    other = make(encoder="resnet34", encoder_weights=file)
    with pytest.raises(ConfigError, match=r"fits .* of the .* tensors of resnet34"):
        load_encoder_weights(other.encoder, other.config)
    gone = make(encoder="resnet18", encoder_weights=f"{tmp_path}/none.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_encoder_weights(gone.encoder, gone.config)


@pytest.mark.parametrize("name", ["no_such_model", "vit_tiny_patch16_224"])
def test_an_encoder_that_cannot_be_had_is_told_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match="take another convolutional timm model"):
        make(encoder=name)
