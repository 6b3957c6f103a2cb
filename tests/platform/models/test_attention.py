import torch

from kintsugi.models.attention import ChannelAttention, MaskAttention


def test_channel_attention_scales_whole_channels_between_zero_and_one() -> None:
    features = torch.rand(2, 8, 6, 7) + 0.1
    ratio = ChannelAttention(8, 4)(features) / features
    assert torch.allclose(ratio, ratio.mean((2, 3), keepdim=True).expand_as(ratio), atol=1e-6)
    assert ratio.min() > 0 and ratio.max() < 1


def test_reduction_sets_the_hidden_units_and_never_reaches_zero() -> None:
    assert ChannelAttention(32, 4).mlp[0].out_channels == 8
    assert ChannelAttention(4, 16).mlp[0].out_channels == 1


def test_mask_attention_is_a_weight_map() -> None:
    weight = MaskAttention()(torch.rand(2, 1, 9, 5))
    assert weight.shape == (2, 1, 9, 5)
    assert weight.min() > 0 and weight.max() < 1
