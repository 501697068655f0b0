"""Smaller models of trained ones: what is left computes what it did, and can be trained."""
import copy
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.testing import assert_close

import spartan_mm
from spartan_mm.backbones import SpaRTAN
from spartan_mm.cli import main
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.weights.pruning import Pruning, prune_checkpoint
from spartan_mm.weights.saving import deploy_checkpoint

DATA = Path(__file__).parents[1] / 'data'
ARCH = dict(stem_channels=8, depths=(2, 1), channels=(16, 24), expand_ratios=(4, 2),
            conv_types=('full', 'depthwise'))


def make_model(**settings):
    """A model that is a backbone, all its weights random, and its config."""
    torch.manual_seed(0)
    settings = dict(arch=ARCH, out_indices=(0, 1)) | settings
    model = nn.ModuleDict(dict(backbone=SpaRTAN(**settings)))
    return randomize(model), Config(dict(model=dict(backbone=dict(type='SpaRTAN', **settings))))


def randomize(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2)
    return model.double().eval()


def cut_off(number, *columns):
    """Let columns of weights, equally many, be 0 at random places: what leads there is idle."""
    chosen = torch.randperm(columns[0].shape[1])[:number]
    for weight in columns:
        weight.data[:, chosen] = 0


def idle_waves(model, share):
    """Let a share of the waves behind the first C do nothing, in pairs or whole groups."""
    for mixer in (block.cmixer for stage in model.backbone.stages for block in stage.blocks):
        channels, group = mixer.proj_in.in_channels, mixer.refine.conv.weight.shape[1]
        unit = math.lcm(2, group)
        places = [weight.data.unflatten(1, (-1, unit))[:, -(-channels // unit):]
                  for weight in (mixer.proj_out.weight, mixer.se.squeeze.weight)]
        cut_off(int(share * places[0].shape[1] + 0.5), *places)


def idle_channels(model, share):
    """Let a share of the SMixers' inner channels do nothing, at each place of its own if it may."""
    for mixer in (block.smixer for stage in model.backbone.stages for block in stage.blocks):
        number = round(share * mixer.proj_in.out_channels)
        cut_off(number, *mixer.proj_out.weight.chunk(2, 1), mixer.high_se.squeeze.weight,
                mixer.low_se.squeeze.weight)
        if mixer.high_freq.conv.groups == 1:
            convs = [part.weight for part in mixer.low_freq.modules() if isinstance(part, nn.Conv2d)]
            cut_off(number, mixer.high_freq.conv.weight, convs[0])
            for weight in convs[1:]:
                cut_off(number, weight)


def build_smaller(pruning, config):
    settings = {key: value for key, value in config.model.backbone.items() if key != 'type'}
    smaller = nn.ModuleDict(dict(backbone=SpaRTAN(**settings))).double().eval()
    smaller.load_state_dict(pruning.state_dict)
    return smaller


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
@pytest.mark.parametrize('settings, waves', [
    ({}, (16 + 24, 24 + 12)), (dict(low_freq_kernel=5), (40, 36)),
    (dict(conv_types='full'), (40, 36)),
    (dict(conv_types='depthwise'), (40, 36)),
    (dict(conv_types='depthwise', arch=dict(ARCH, expand_ratios=(3, 1))), (30, 24)),
    (dict(arch=dict(ARCH, hidden_channels=(56, 36), inner_channels=(6, 10))), (36, 30))],
    ids=str)
def test_without_what_does_nothing_a_model_computes_the_same(settings, waves, deploy):
    model, config = make_model(**settings)
    idle_waves(model, 0.5)
    idle_channels(model, 0.5)
    pruning = Pruning(model, config)
    pruning.narrow('waves', 0.5)
    pruning.narrow('inner', 0.5)
    inner = model.backbone.arch.get('inner_channels', (8, 12))
    assert config.model.backbone.arch.inner_channels == tuple(width // 2 for width in inner)
    assert config.model.backbone.arch.get('hidden_channels') == waves
    smaller, images = build_smaller(pruning, config), torch.randn(2, 3, 64, 48).double()
    if deploy:
        switch_to_deploy(smaller)
    assert_close(smaller.backbone(images), model.backbone(images), rtol=1e-10, atol=1e-10)


def test_only_waves_that_no_argmax_can_pick_are_left_out():
    model, config = make_model()
    before = model.state_dict()
    for stage in model.backbone.stages:  # as the least of all
        for block in stage.blocks:
            channels = block.cmixer.proj_in.in_channels
            block.cmixer.proj_out.weight.data[:, :channels] = 0
    pruning = Pruning(model, config)
    pruning.narrow('waves', 1)
    assert config.model.backbone.arch.hidden_channels == ARCH['channels']
    for name, tensor in pruning.state_dict.items():
        if '.cmixer.refine.' in name and tensor.dim():
            assert_close(tensor, before[name][:len(tensor)], rtol=0, atol=0)
    with torch.no_grad():
        build_smaller(pruning, config).backbone(torch.randn(1, 3, 32, 32).double())


def test_nothing_left_out_changes_nothing():
    model, config = make_model()
    pruning = Pruning(model, config)
    for kind in ('waves', 'inner'):
        pruning.narrow(kind, 0)
    pruning.drop_blocks(0)
    assert not pruning.changes and config.model.backbone.arch == ARCH
    assert [*pruning.state_dict] == [*model.state_dict()]
    assert all(torch.equal(tensor, model.state_dict()[name])
               for name, tensor in pruning.state_dict.items())


@pytest.mark.parametrize('wanted', [1, ['backbone.stages.0.blocks.0']], ids=str)
def test_a_block_that_adds_nothing(wanted):
    model, config = make_model()
    block = model.backbone.stages[0].blocks[0]
    for part in (block.layer_scale1, block.layer_scale2):
        part.data.zero_()
    pruning = Pruning(model, config)
    pruning.drop_blocks(wanted)
    assert pruning.changes == {'backbone.arch.depths': ((2, 1), (1, 1))}
    images = torch.randn(1, 3, 48, 32).double()
    assert_close(build_smaller(pruning, config).backbone(images), model.backbone(images))


@pytest.mark.parametrize('prune, message', [
    (lambda it: it.narrow('inner', 0.95), '--inner 0.95 leaves less than two of the 8 channels of '
                                          'backbone.stages.0.blocks.0.smixer'),
    (lambda it: it.narrow('ffn', 0.5), '--ffn: the model has no feed-forward network'),
    (lambda it: it.drop_blocks(2), '--blocks 2: SpaRTAN has 3 blocks here, of which 1 may go'),
    (lambda it: it.drop_blocks(['backbone.stages.0.blocks.2']), 'there is no block backbone.stages'),
    (lambda it: it.drop_blocks(['backbone.stages.1.blocks.0']), 'stages.1 would lose all its'),
])
def test_what_cannot_be_left_out(prune, message):
    with pytest.raises(UsageError, match=message):
        prune(Pruning(*make_model()))
