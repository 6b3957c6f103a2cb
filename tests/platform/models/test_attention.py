import torch

from kintsugi.models.attention import ChannelAttention, MaskAttention, SpatialAttention


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


def test_pooling_in_cells_gives_a_part_the_same_weights_as_the_whole() -> None:
    torch.manual_seed(0)
    features, attention = torch.rand(1, 8, 64, 64), ChannelAttention(8, 4, cell=8)
    whole, part = attention(features), attention(features[..., 16:56, 16:56])
    # Half a cell at the part's border lies between a middle that it has and one that it has not.
    assert torch.allclose(whole[..., 20:52, 20:52], part[..., 4:-4, 4:-4], atol=1e-6)
    globally = ChannelAttention(8, 4)
    globally.load_state_dict(attention.state_dict())
    assert not torch.allclose(
        globally(features)[..., 20:52, 20:52], globally(features[..., 16:56, 16:56])[..., 4:-4, 4:-4]
    )


def test_spatial_attention_scales_all_channels_of_a_position_alike() -> None:
    features = torch.rand(2, 8, 9, 7) + 0.1
    ratio = SpatialAttention()(features) / features
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-6)
    assert ratio.std((2, 3)).min() > 0
