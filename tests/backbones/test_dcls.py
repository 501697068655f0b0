"""Kernels whose weights find their places, against the formulas, and within SpaRTAN's SMixer."""
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.dcls import DCLS, DCLSConv2d
from spartan_mm.backbones.spartan import SMixer
from spartan_mm.engine import ClampPositionsHook
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters.spartan import export_spartan_backbone

from .toy import images, make


def build(version='bilinear', channels=3, size=5, count=4, spread=1.5):
    torch.manual_seed(0)
    conv = DCLSConv2d(channels, size, count, version).double()
    nn.init.uniform_(conv.positions, -spread, spread)
    if conv.widths is not None:
        nn.init.uniform_(conv.widths, -1, 1)
    return conv


@pytest.mark.parametrize('version', ['bilinear', 'gaussian'])
def test_kernel_is_that_of_the_paper(version):
    conv = build(version)
    size = conv.kernel_size[0]
    expected = torch.zeros(3, 1, size, size, dtype=torch.float64)
    for channel, i in product(range(3), range(4)):
        share = torch.zeros(size, size, dtype=torch.float64)
        for cell in product(range(size), repeat=2):
            away = [g - p.item() - size // 2 for g, p in zip(
                cell, conv.positions[channel, 0, i], strict=True)]
            if version == 'bilinear':
                share[cell] = math.prod(max(0, 1 - abs(a)) for a in away)
            else:
                widths = [abs(w.item()) + 0.27 for w in conv.widths[channel, 0, i]]
                share[cell] = math.exp(-sum(
                    (a / w) ** 2 for a, w in zip(away, widths, strict=True)) / 2)
        expected[channel, 0] += conv.weight[channel, 0, i].item() * share / (share.sum() + 1e-7)
    assert_close(conv.make_kernel(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('version', ['bilinear', 'gaussian'])
def test_gradients_of_weights_positions_and_widths(version):
    conv = build(version, channels=2, size=3, count=2, spread=0.8)
    names, parameters = zip(*conv.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(conv, dict(zip(
            names, values, strict=True)), (x, )),
        (images(1, 2, 4, 5).requires_grad_(), *parameters))


def test_positions_stay_in_the_window():
    conv = build(spread=100)
    assert conv.make_kernel().abs().sum() < 1e-3  # nothing is in there
    hook = ClampPositionsHook()
    hook.before_train(SimpleNamespace(model=nn.ModuleDict(dict(backbone=conv))))
    hook.after_train_iter(None, 0)
    assert conv.positions.abs().max() == 2
    # As at an edge, all of a weight is there.
    assert_close(conv.make_kernel().sum((2, 3)), conv.weight.sum(2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('kernel, parameters', [
    (3, 18), (5, 25), (7, 49), (11, 121), ('dcls', 18), ('dcls_gaussian', 20)])
def test_parameters_of_a_depthwise_channel(kernel, parameters):
    mixer = SMixer(16, 'depthwise', low_freq_kernel=kernel)
    convs = sum(p.numel() for name, p in mixer.low_freq.named_parameters() if 'norm' not in name)
    assert convs == 8 * parameters


@pytest.mark.parametrize('kernel, reach', [(7, 6), (11, 10), ('dcls', 4)])
def test_field_of_a_branch(kernel, reach):
    branch = SMixer(16, 'depthwise', low_freq_kernel=kernel).low_freq.double().eval()
    if kernel in DCLS:
        nn.init.uniform_(branch.conv.positions, -4, 4)
    x = images(1, 8, 25, 25).requires_grad_()
    branch(x)[..., 12, 12].sum().backward()
    reached = x.grad.abs().sum((0, 1)).nonzero()
    assert (reached.min().item(), reached.max().item()) == (12 - reach, 12 + reach)


@pytest.mark.parametrize('kernel', [5, (3, 11), 'dcls', 'dcls_gaussian'], ids=str)
def test_checkpoints_of_other_kernels_are_refused(kernel):
    other = make(low_freq_kernel=kernel).state_dict()
    with pytest.raises(RuntimeError, match=r'stage 2 has low_freq_kernel=\S+ instead of 3[;.]'):
        make().load_state_dict(other, strict=False)
    with pytest.raises(RuntimeError, match='stage 2 has low_freq_kernel=3 instead of '):
        make(low_freq_kernel=kernel).load_state_dict(make().state_dict(), strict=False)
    with pytest.raises(CheckpointError, match='the layout of the authors has names for 3'):
        export_spartan_backbone(other)


def test_deploy_form_of_both_versions():
    """Each kernel is made once; what made it is of no interest afterwards."""
    model, other = make(low_freq_kernel='dcls').eval(), make(low_freq_kernel='dcls_gaussian')
    for one in (model, other):
        one.switch_to_deploy()
        assert type(one.stages[1].blocks[0].smixer.low_freq.conv) is nn.Conv2d
    other.load_state_dict(model.state_dict())
    assert_close(other(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    with pytest.raises(RuntimeError, match="low_freq_kernel='dcls' instead of 3"):
        pair = make()
        pair.switch_to_deploy()
        pair.load_state_dict(model.state_dict())


@pytest.mark.parametrize('kernel, conv_types, kernels', [
    (7, None, (7, 7)), ('dcls', None, (3, 'dcls')), ('dcls', 'depthwise', ('dcls', 'dcls')),
    ([5, 'dcls_gaussian'], None, (5, 'dcls_gaussian'))], ids=str)
def test_kernels_of_the_stages(kernel, conv_types, kernels):
    model = make(low_freq_kernel=kernel, conv_types=conv_types)
    assert tuple(stage.blocks[0].smixer.low_freq_kernel for stage in model.stages) == kernels


@pytest.mark.parametrize('kernel, conv_types, message', [
    (9, None, 'choose from: 3, 5, 7, 11, .* or one of them for each stage'),
    ((3, 9), None, 'low_freq_kernel of stage 2=9 is not available'),
    ((3, 3, 3), None, 'has 3 entries for 2 stages'),
    (('dcls', 'dcls'), None, "'dcls' is depthwise, but the convolutions of stage 1 are full"),
    ('dcls', 'full', 'but the convolutions of stage 1 are full')], ids=str)
def test_what_there_is_not(kernel, conv_types, message):
    with pytest.raises(ValueError, match=message):
        make(low_freq_kernel=kernel, conv_types=conv_types)


def test_as_many_parameters_as_the_pair():
    count = [sum(p.numel() for p in SpaRTAN('xt', low_freq_kernel=kernel).parameters())
             for kernel in (3, 'dcls')]
    assert count[0] == count[1]
