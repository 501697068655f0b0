"""SpaRTAN on images of which squares are hidden."""
import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.backbones import MaskedSpaRTAN
from spartan_mm.backbones.masked import MaskedBatchNorm2d, Visible
from spartan_mm.errors import UsageError

from .toy import make

SIDE = 8  # of a square of the toy
SHOWN = torch.tensor([[[[1, 0, 1], [0, 1, 0]]], [[[0, 1, 1], [1, 0, 0]]]]).bool()
OPTIONS = [dict(), dict(low_freq_kernel=5, conv_types='depthwise'),
           dict(spatial_mixer='conv', channel_mixer='mlp_se'), dict(block_norm='BN'),
           dict(conv_norm='LN', block_norm='LN2d'), dict(conv_norm='LN2d'), dict(with_cp=True)]


def enlarge(visible, x):
    """A mask of squares at the resolution of maps."""
    scale = x.shape[2] // visible.shape[2]
    return visible.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def step(backbone, images, *visible):
    """Maps of a pass that updates statistics, and gradients of what is visible in them."""
    maps = backbone(images, *visible)
    seen = [x * enlarge(*visible, x) if visible else x for x in maps]
    sum((x * x).sum() for x in seen).backward()
    return maps, {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('height, width', [(2, 2), (3, 4)], ids=['cut out', 'whole'])
def test_a_visible_rectangle_is_an_image_of_its_own(options, height, width):
    """Maps, running statistics and gradients, to rounding: nothing else knows what is around."""
    masked, plain = make(kind=MaskedSpaRTAN, **options), make(**options)
    images = torch.randn(2, 3, 3 * SIDE, 4 * SIDE, dtype=torch.float64)
    visible = torch.zeros(2, 1, 3, 4).bool()
    visible[..., :height, :width] = True
    maps, grads = step(masked, images, visible)
    expected, expected_grads = step(plain, images[..., :height * SIDE, :width * SIDE])
    for x, wanted in zip(maps, expected, strict=True):
        assert_close(x[..., :wanted.shape[2], :wanted.shape[3]], wanted)
    assert_close(dict(masked.named_buffers()), dict(plain.named_buffers()))
    assert_close(grads, expected_grads)


@pytest.mark.parametrize('change', [
    lambda model: model, copy.deepcopy, nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=['itself', 'copied', 'synchronized'])
def test_hidden_pixels_reach_nothing_that_is_visible(change):
    first = make(kind=MaskedSpaRTAN)
    images = torch.randn(2, 3, 2 * SIDE, 3 * SIDE, dtype=torch.float64, requires_grad=True)
    first(images, SHOWN)
    second = change(copy.deepcopy(first))
    seen = enlarge(SHOWN, images)
    others = torch.where(seen, images, 100 * torch.randn_like(images))
    maps = first(images, SHOWN)
    for x, other in zip(maps, second(others, SHOWN), strict=True):
        mask = enlarge(SHOWN, x)
        assert_close(x * mask, other * mask, rtol=0, atol=0)
    assert_close(dict(second.named_buffers()), dict(first.named_buffers()), rtol=0, atol=0)

    sum((x * enlarge(SHOWN, x)).sum() for x in maps).backward()
    assert not images.grad.masked_select(~seen).any()
    assert images.grad.masked_select(seen).all()


def test_without_a_mask_it_is_a_spartan_again():
    masked, plain = make(kind=MaskedSpaRTAN), make()
    images = torch.randn(2, 3, 2 * SIDE, 3 * SIDE, dtype=torch.float64)
    masked.eval()(images, SHOWN)
    assert_close(masked(images[..., 1:]), plain.eval()(images[..., 1:]))
    assert [*masked.state_dict()] == [*plain.state_dict()]
    masked.switch_to_deploy()
    plain.switch_to_deploy()
    assert_close(masked(images), plain(images))


def test_batch_norm_of_scattered_squares():
    norm = MaskedBatchNorm2d(5).double()
    norm.visible = Visible()
    norm.visible.show(SHOWN)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    mask = enlarge(SHOWN, x)
    number = mask.sum()
    mean = (x * mask).sum((0, 2, 3)) / number
    centred = (x - mean.view(-1, 1, 1)) * mask
    variance = centred.square().sum((0, 2, 3)) / number
    assert_close(norm(x), centred / (variance.view(-1, 1, 1) + norm.eps).sqrt())
    assert_close(norm.running_mean, 0.1 * mean)
    assert_close(norm.running_var, 0.9 + 0.1 * variance * number / (number - 1))


@pytest.mark.parametrize('size, visible, message', [
    ((20, 24), SHOWN, 'squares of 8 x 8 pixels, and images of 24 x 20 are no whole number of them'),
    ((24, 24), SHOWN, r'\(2, 1, 2, 3\), must be \(2, 1, 3, 3\) for images of 24 x 24'),
    ((16, 24), SHOWN & SHOWN[0], 'from 1 to 3 squares of an image are visible'),
    ((16, 24), SHOWN & ~SHOWN, 'from 0 to 0 squares')])
def test_masks_that_do_not_fit(size, visible, message):
    masked = make(kind=MaskedSpaRTAN)
    with pytest.raises(UsageError, match=message):
        masked(torch.rand(2, 3, *size, dtype=torch.float64), visible)
