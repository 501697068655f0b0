"""The authors' SpaRTAN checkpoints: same outputs after conversion, and no key unaccounted for."""
import json
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn

from spartan_mm.backbones import SpaRTAN
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters.names import strip_prefix
from spartan_mm.weights.converters.spartan import (
    convert_spartan,
    convert_spartan_backbone,
    export_spartan,
)

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / 'tests' / 'data' / 'golden'
STAND_IN = runpy.run_path(str(GOLDEN / 'fill.py'))
# The same names, shapes, types and bits.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)


def read_manifest(case):
    return json.loads((GOLDEN / f'{case}.json').read_text())


@pytest.fixture
def small(golden):
    """The authors' state dict of a small model with 11 classes."""
    return golden('spartan_small')


def load_backbone(converted, arch):
    backbone = SpaRTAN(arch, out_indices=(0, 1, 2, 3)).eval()
    backbone.load_state_dict(strip_prefix(converted, 'backbone.'), strict=True)
    return backbone


def assert_golden(actual, expected):
    """Agreement to 1e-5, relative to the element or to the largest one where elements cancel."""
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize('case', ['spartan_small', 'spartan_xt', 'spartan_t'])
def test_golden_outputs(case, golden):
    meta, expected = read_manifest(case)['meta'], np.load(GOLDEN / f'{case}.npz')
    converted, arch = convert_spartan(golden(case))
    backbone = load_backbone(converted, arch)

    x = torch.from_numpy(STAND_IN['image'](meta['input_shape'], meta['input_seed']))
    with torch.no_grad():
        maps = backbone(x)
    for stage, y in enumerate(maps, start=1):
        assert_golden(y.mean((2, 3)), expected[f'stage{stage}_mean'])
        assert_golden(y[:, :4], expected[f'stage{stage}_first'])
    logits = nn.functional.linear(
        maps[-1].mean((2, 3)), converted['head.fc.weight'], converted['head.fc.bias'])
    assert_golden(logits, expected['logits'])


def test_classifier_of_mmpretrain_gives_the_golden_logits(small):
    registry = pytest.importorskip('mmpretrain.registry')
    from mmpretrain.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    init_default_scope('mmpretrain')

    converted, arch = convert_spartan(small)
    classifier = registry.MODELS.build(dict(
        type='ImageClassifier',
        backbone=dict(type='SpaRTAN', arch=arch),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=11, in_channels=64))).eval()
    classifier.load_state_dict(converted, strict=True)

    meta = read_manifest('spartan_small')['meta']
    x = torch.from_numpy(STAND_IN['image'](meta['input_shape'], meta['input_seed']))
    with torch.no_grad():
        logits = classifier.head(classifier.extract_feat(x))
    assert_golden(logits, np.load(GOLDEN / 'spartan_small.npz')['logits'])


@pytest.mark.parametrize('case, name', [('spartan_xt', 'xt'), ('spartan_t', 't')])
def test_architecture_is_read_from_the_shapes(case, name):
    shapes = read_manifest(case)['shapes']
    _, arch = convert_spartan({name: torch.empty(shape) for name, shape in shapes.items()})
    assert arch == SpaRTAN.arch_settings[name]


def test_backbone_inside_a_detector():
    shapes = read_manifest('rtdetr_spartan_xt')['shapes']
    state_dict = {name: torch.zeros(shape) for name, shape in shapes.items()}
    converted, arch = convert_spartan_backbone(state_dict, prefix='backbone.net.')
    assert arch == SpaRTAN.arch_settings['xt']
    SpaRTAN('xt').load_state_dict(converted, strict=True)


def test_conversion_leaves_its_input_alone_and_keeps_counters(small):
    small['conv.0.norm.num_batches_tracked'] = torch.tensor(7)
    before = {name: value.clone() for name, value in small.items()}
    converted, _ = convert_spartan(small)
    torch.testing.assert_close(small, before, rtol=0, atol=0)
    assert converted['backbone.stem.0.norm.num_batches_tracked'] == 7


@pytest.mark.parametrize('name', [
    'conv.0.conv.weight', 'conv.1.norm.running_var', 'layers.0.cmixer.theta.bias',
    'layers.1.conv.weight', 'layers.2.scale_2', 'layers.8.cmixer.proj_out.weight', 'linear.bias'])
def test_missing_key(small, name):
    del small[name]
    with pytest.raises(CheckpointError, match=rf'missing keys:\n  {name}$'):
        convert_spartan(small)


def test_missing_layers(small):
    small = {name: value for name, value in small.items()
             if not name.startswith(('layers.5.', 'layers.6.'))}
    with pytest.raises(CheckpointError, match=r'missing keys:\n  layers\.5\.\*\n  layers\.6\.\*$'):
        convert_spartan(small)


@pytest.mark.parametrize('name', [
    'layers.2.smixer.gain', 'layers.4.conv.bias', 'layers.9999999999.norm_1.bias',
    'linear.scale', 'position', 'conv.2.conv.bias'])
def test_leftover_key(small, name):
    small[name] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=rf'keys left over:\n  {name}$'):
        convert_spartan(small)


def test_missing_and_leftover_keys_are_listed_together(small):
    small['layers.0.norm_3.weight'] = small.pop('layers.0.norm_1.weight')
    with pytest.raises(CheckpointError, match='missing keys:\n  layers.0.norm_1.weight\n'
                                              '  keys left over:\n  layers.0.norm_3.weight$'):
        convert_spartan(small)


def test_key_errors_inside_a_detector_carry_the_prefix(small):
    small.pop('linear.weight'), small.pop('linear.bias'), small.pop('layers.0.scale_1')
    small = {f'net.{name}': value for name, value in small.items()}
    with pytest.raises(CheckpointError, match=r'missing keys:\n  net\.layers\.0\.scale_1$'):
        convert_spartan_backbone(small, prefix='net.')


@pytest.mark.parametrize('name, shape, message', [
    ('layers.0.smixer.gamma', (1, 9, 1, 1), r'gamma: \(1, 9, 1, 1\) instead of \(1, 8, 1, 1\)'),
    ('layers.3.cmixer.theta.weight', (48, 24, 1, 1), r'proj_in\.weight: \(144, 24, 1, 1\) instead'),
    ('linear.weight', (11, 32), r'head\.fc\.weight: \(11, 32\) instead of \(11, 64\)'),
    ('conv.1.conv.weight', (18, 8, 3, 3), r'stem\.1\.conv\.weight: \(18, 8, 3, 3\) instead'),
    ('conv.0.conv.weight', (8, ), r'conv\.0\.conv\.weight of shape \(8,\)'),
])
def test_shapes_that_do_not_fit(small, name, shape, message):
    small[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        convert_spartan(small)


def test_another_model():
    with pytest.raises(CheckpointError, match='not a whole SpaRTAN checkpoint'):
        convert_spartan(nn.Linear(2, 2).state_dict())


# --------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize('case', ['spartan_small', 'spartan_xt'])
def test_there_and_back(case, golden):
    state_dict = golden(case)
    converted, arch = convert_spartan(state_dict)
    exported, exported_arch = export_spartan(converted)
    assert_identical(exported, state_dict)
    assert exported_arch == arch


@pytest.mark.parametrize('arch, in_channels', [
    # As the authors' S, one with nothing in common with theirs, and images of one channel.
    (dict(stem_channels=24, depths=(2, 3, 4, 2), channels=(24, 48, 80, 160),
          expand_ratios=(4, 4, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise')), 3),
    (dict(stem_channels=8, depths=(1, 12), channels=(16, 8), expand_ratios=(1, 3),
          conv_types=('depthwise', 'full')), 3),
    (dict(stem_channels=8, depths=(1, ) * 4, channels=(16, 24, 32, 48), expand_ratios=(3, ) * 4,
          conv_types=('full', ) * 4), 1),
    (dict(stem_channels=8, depths=(1, ) * 4, channels=(16, 24, 32, 48), expand_ratios=(3, ) * 4,
          conv_types=('depthwise', ) * 4), 1)])
def test_back_and_there(arch, in_channels):
    model = SpaRTAN(arch, in_channels, out_indices=-1)
    state_dict = {f'backbone.{name}': torch.randn(value.shape) if value.ndim else value
                  for name, value in model.state_dict().items()}
    state_dict |= {'head.fc.weight': torch.randn(7, arch['channels'][-1]),
                   'head.fc.bias': torch.randn(7)}
    exported, exported_arch = export_spartan(state_dict)
    assert exported['linear.bias'].shape == (7, )
    assert exported['conv.0.conv.weight'].shape[1] == in_channels
    last = sum(arch['depths']) + len(arch['depths']) - 2
    kind = exported[f'layers.{last}.smixer.h_conv.conv.weight'].shape[1]
    assert (kind == 1) == (arch['conv_types'][-1] == 'depthwise')
    assert exported['layers.0.cmixer.complex'].shape[:3] == (1, 1, 1)
    converted, converted_arch = convert_spartan(exported)
    assert_identical(converted, state_dict)
    assert converted_arch == exported_arch == arch


@pytest.mark.parametrize('change, message', [
    (lambda ours: ours.pop('backbone.stages.1.blocks.0.layer_scale1'),
     r'missing keys:\n  stages\.1\.blocks\.0\.layer_scale1$'),
    (lambda ours: ours.pop('head.fc.bias'), r'missing keys:\n  head\.fc\.bias$'),
    (lambda ours: ours.update({'neck.weight': torch.zeros(1)}),
     r'keys left over:\n  neck\.weight$'),
    (lambda ours: ours.update({'backbone.stem.2.bias': torch.zeros(1)}),
     r'keys left over:\n  stem\.2\.bias$'),
    (lambda ours: ours.update({'head.fc.weight': torch.zeros(11, 3)}),
     r'head\.fc\.weight: \(11, 3\) instead of \(11, 64\)'),
    (lambda ours: ours.update({'backbone.stem.0.norm.bias': torch.zeros(3)}),
     r'stem\.0\.norm\.bias: \(3,\) instead of \(8,\)')])
def test_ours_that_do_not_fit(small, change, message):
    ours = convert_spartan(small)[0]
    change(ours)
    with pytest.raises(CheckpointError, match=message):
        export_spartan(ours)


def test_ours_without_a_spartan():
    with pytest.raises(CheckpointError, match='not a whole SpaRTAN checkpoint'):
        export_spartan(dict(weight=torch.zeros(1)))
