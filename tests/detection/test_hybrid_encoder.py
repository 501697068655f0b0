import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.detection import HybridEncoder
from spartan_mm.detection.hybrid_encoder import RepVGGBlock, position_embedding, to_tokens


def encoder(**kwargs):
    return HybridEncoder(in_channels=[8, 16, 24], embed_dims=16, ffn_dims=32, num_heads=2, **kwargs)


def test_position_embedding_of_a_token_is_that_of_its_row_and_column():
    height, width, dims = 3, 5, 8
    embedding = position_embedding(height, width, dims)
    for row in range(height):
        for column in range(width):
            expected = [f(axis * 10000 ** (-k / 2)) for axis in (row, column)
                        for f in (math.sin, math.cos) for k in range(2)]
            assert_close(embedding[row * width + column], torch.tensor(expected))


def test_legacy_position_embedding_differs_only_where_the_map_is_not_square():
    assert_close(position_embedding(4, 4, 8, legacy=True), position_embedding(4, 4, 8))
    legacy = position_embedding(3, 5, 8, legacy=True)
    # Token 4 is (row 0, column 4); the official numbering has three rows a column.
    assert_close(legacy[4], position_embedding(3, 5, 8)[1 * 5 + 1])


def test_legacy_option_reaches_the_attention():
    torch.manual_seed(0)
    fixed, legacy = encoder().aifi, encoder(legacy_position=True).aifi
    legacy.load_state_dict(fixed.state_dict())
    square, wide = torch.rand(1, 16, 4, 4), torch.rand(1, 16, 4, 8)
    assert_close(fixed(square), legacy(square))
    assert (fixed(wide) - legacy(wide)).abs().max() > 1e-2


def test_starts_from_pytorchs_initialization():
    neck = HybridEncoder(in_channels=[512, 1024, 2048])
    neck.init_weights()
    for name, std in {'input_projs.0.conv': 0.0255,
                      'top_down_blocks.0.blocks.0.dense.conv': 1 / math.sqrt(3 * 256 * 9),
                      'aifi.linear1': 0.036, 'aifi.self_attn.out_proj': 0.036}.items():
        assert_close(neck.get_submodule(name).weight.std().item(), std, rtol=0.03, atol=0)
    assert_close(neck.aifi.self_attn.in_proj_weight.std().item(), 0.0441, rtol=0.03, atol=0)


def test_fused_blocks_equal_the_branches():
    torch.manual_seed(0)
    neck = encoder(expansion=0.5)
    for norm in neck.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    neck.double().eval()
    maps = [torch.rand(1, c, s, s, dtype=torch.float64) for c, s in ((8, 16), (16, 8), (24, 4))]
    expected = neck(maps)
    neck.switch_to_deploy()
    neck.switch_to_deploy()
    assert not any(hasattr(block, 'dense') for block in neck.modules()
                   if isinstance(block, RepVGGBlock))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in neck.modules())
    assert_close(neck(maps), expected)


SIZES = [((13, 9), (6, 4), (3, 2)), ((13, 9), (7, 5), (4, 3)), ((1, 1), (1, 1), (1, 1))]


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('in_channels', [(8, 16, 24), (64, 128, 16)])
@torch.no_grad()
def test_any_size_and_width_and_their_deploy_form(in_channels, sizes):
    neck = HybridEncoder(in_channels, embed_dims=16, ffn_dims=32, num_heads=2).eval()
    maps = [torch.rand(2, c, *size) for c, size in zip(in_channels, sizes, strict=True)]
    expected = neck(maps)
    assert [tuple(x.shape) for x in expected] == [(2, 16, *size) for size in sizes]
    neck.switch_to_deploy()
    assert_close(neck(maps), expected, rtol=1e-5, atol=1e-5)
    # A projection is folded in unless that would be more to compute.
    assert [isinstance(module, torch.nn.Identity) for module in neck.input_projs] == [
        channels <= 32 for channels in in_channels[:2]] + [False]


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match='embed_dims=30'):
        HybridEncoder([8], embed_dims=30)
    maps = [torch.rand(1, c, 4, 4) for c in (8, 16, 32)]
    with pytest.raises(ValueError, match=r'in_channels=\(8, 16, 24\).*\(8, 16, 32\)'):
        encoder()(maps)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('samples', [1, 2])
def test_gradients_of_a_norm_before_tokens(samples, training):
    norm = nn.BatchNorm2d(4).double().train(training)
    nn.init.normal_(norm.weight)
    x = torch.randn(samples, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(samples, 15, 4, dtype=torch.float64)

    def gradients(lay_out):
        loss = (lay_out(norm(x)) * cotangent).sum()
        return torch.autograd.grad(loss, [x, norm.weight, norm.bias])

    def one_by_one(y):
        return torch.stack([y[:, :, row, column] for row in range(5) for column in range(3)], 1)

    assert_close(gradients(to_tokens), gradients(one_by_one))
