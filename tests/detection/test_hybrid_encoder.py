import math

import pytest
import torch
from torch.testing import assert_close

from spartan_mm.detection import HybridEncoder
from spartan_mm.detection.hybrid_encoder import RepVGGBlock, position_embedding


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


def test_starts_from_pytorchs_initialisation():
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
    neck.fuse()
    assert not any(hasattr(block, 'dense') for block in neck.modules()
                   if isinstance(block, RepVGGBlock))
    assert_close(neck(maps), expected)


@pytest.mark.parametrize('sizes', [((13, 9), (6, 4), (3, 2)), ((13, 9), (7, 5), (4, 3)),
                                   ((1, 1), (1, 1), (1, 1))])
def test_any_size(sizes):
    maps = [torch.rand(2, c, *size) for c, size in zip((8, 16, 24), sizes, strict=True)]
    assert [tuple(x.shape) for x in encoder()(maps)] == [(2, 16, *size) for size in sizes]


def test_other_channels_are_named():
    maps = [torch.rand(1, c, 4, 4) for c in (8, 16, 32)]
    with pytest.raises(ValueError, match=r'in_channels=\(8, 16, 24\).*\(8, 16, 32\)'):
        encoder()(maps)


def test_embed_dims_must_fit():
    with pytest.raises(ValueError, match='embed_dims=30'):
        HybridEncoder([8], embed_dims=30)
