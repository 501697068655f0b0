"""Official RT-DETR weights: nothing missing, nothing left over, and the right settings."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from torch.testing import assert_close

from spartan_mm.converters.common import ConversionError
from spartan_mm.converters.rtdetr import convert_resnet_vd, convert_rtdetr

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'golden'
TOOL = ROOT / 'tools' / 'model_converters' / 'rtdetr_to_mm.py'
STAND_IN = runpy.run_path(str(GOLDEN / 'fill.py'))


@pytest.fixture
def official():
    """The official state dict of a small-headed R18."""
    shapes = json.loads((GOLDEN / 'rtdetr_r18vd.json').read_text())['shapes']
    return {name: torch.from_numpy(value)
            for name, value in STAND_IN['fill_state_dict'](shapes).items()}


def deepened(official, blocks, bottleneck):
    """The backbone's tensors as another depth has them, without contents."""
    tensors = {f'conv1.conv1_{k}.conv.weight': torch.zeros(1) for k in (1, 2, 3)}
    norms = [f'conv1.conv1_{k}.norm' for k in (1, 2, 3)]
    for stage, count in enumerate(blocks):
        for block in range(count):
            name = f'res_layers.{stage}.blocks.{block}'
            convs = [f'{name}.branch2{letter}' for letter in 'abc'[:3 if bottleneck else 2]]
            if block == 0:
                convs.append(f'{name}.short' + ('.conv' if stage else ''))
            for conv in convs:
                tensors[f'{conv}.conv.weight'] = torch.zeros(1)
                norms.append(f'{conv}.norm')
    for norm in norms:
        for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
            tensors[f'{norm}.{leaf}'] = torch.zeros(1)
    rest = {name: tensor for name, tensor in official.items() if not name.startswith('backbone.')}
    return rest | {f'backbone.{name}': tensor for name, tensor in tensors.items()}


def test_settings_are_read_from_the_shapes(official):
    _, settings = convert_rtdetr(official)
    assert settings == dict(
        backbone=dict(type='ResNetVd', depth=18, out_indices=(1, 2, 3)),
        neck=dict(in_channels=[128, 256, 512], embed_dims=256, ffn_dims=1024, expansion=0.5,
                  num_blocks=3),
        decoder=dict(in_channels=[256] * 3, embed_dims=256, num_layers=3, ffn_dims=1024),
        bbox_head=dict(num_classes=7, embed_dims=256))


@pytest.mark.parametrize('depth, blocks, bottleneck', [
    (34, (3, 4, 6, 3), False), (50, (3, 4, 6, 3), True), (101, (3, 4, 23, 3), True)])
def test_names_of_other_depths_are_those_of_the_model(official, depth, blocks, bottleneck):
    from spartan_mm.detection import ResNetVd
    converted, settings = convert_rtdetr(deepened(official, blocks, bottleneck))
    assert settings['backbone']['depth'] == depth
    assert {name.removeprefix('backbone.') for name in converted
            if name.startswith('backbone.')} == ResNetVd(depth=depth).state_dict().keys()


def test_no_other_depth(official):
    with pytest.raises(ConversionError, match=r'\(2, 2, 2, 3\) basic'):
        convert_rtdetr(deepened(official, (2, 2, 2, 3), False))


@pytest.mark.parametrize('name', [
    'backbone.conv1.conv1_2.norm.bias', 'encoder.lateral_convs.1.conv.weight',
    'encoder.fpn_blocks.0.bottlenecks.1.conv2.norm.running_mean',
    'decoder.decoder.layers.1.cross_attn.sampling_offsets.bias', 'decoder.enc_score_head.weight',
    'decoder.denoising_class_embed.weight'])
def test_missing_key_is_listed(official, name):
    del official[name]
    with pytest.raises(ConversionError, match='missing keys:\n  (backbone.)?'
                       + name.removeprefix('backbone.').replace('.', r'\.')):
        convert_rtdetr(official)


@pytest.mark.parametrize('name', ['decoder.anchors', 'backbone.extra', 'something'])
def test_leftover_key_is_listed(official, name):
    official[name] = torch.zeros(1)
    with pytest.raises(ConversionError, match='keys left over:\n  (backbone.)?'
                       + name.removeprefix('backbone.').replace('.', r'\.')):
        convert_rtdetr(official)


def test_frozen_norms_get_a_counter(official):
    """The official frozen BatchNorm has no `num_batches_tracked`."""
    without = {name: tensor for name, tensor in official.items()
               if not name.endswith('num_batches_tracked')}
    assert_close(convert_rtdetr(without)[0], convert_rtdetr(official)[0])


def test_pretrained_backbone_loads_by_init_cfg(official, tmp_path):
    from mmdet.registry import MODELS

    import spartan_mm.detection  # noqa: F401
    init_default_scope('mmdet')
    weights = {name.removeprefix('backbone.'): tensor for name, tensor in official.items()
               if name.startswith('backbone.')}
    torch.save(weights, tmp_path / 'vd.pth')
    settings = dict(type='ResNetVd', depth=18, init_cfg=dict(
        type='ConvertedPretrained', converter='resnet_vd', checkpoint=str(tmp_path / 'vd.pth')))
    backbone = MODELS.build(settings)
    backbone.init_weights()
    assert_close(dict(backbone.state_dict()), convert_resnet_vd(weights), rtol=0, atol=0)

    with pytest.raises(ValueError, match=r'vd\.pth does not fit ResNetVd'):
        MODELS.build(settings | dict(depth=34)).init_weights()
    settings['init_cfg'] = settings['init_cfg'] | dict(converter='vit')
    with pytest.raises(ValueError, match=r"converter='vit' is unknown.*resnet_vd"):
        MODELS.build(settings).init_weights()


def run_tool(*args):
    return subprocess.run([sys.executable, str(TOOL), *map(str, args)], capture_output=True,
                          text=True, env=dict(PYTHONPATH=str(ROOT)))


def test_command(official, tmp_path):
    trained = {name: tensor + 1 for name, tensor in official.items()}
    torch.save(dict(model=trained, ema=dict(module=official, updates=3), last_epoch=71),
               tmp_path / 'official.pth')
    done = run_tool(tmp_path / 'official.pth', tmp_path / 'out' / 'ours.pth')
    assert done.returncode == 0, done.stderr
    assert "'depth': 18" in done.stdout
    saved = torch.load(tmp_path / 'out' / 'ours.pth', weights_only=True)
    assert_close(saved['state_dict'], convert_rtdetr(official)[0], rtol=0, atol=0)

    del official['decoder.enc_output.0.bias']
    torch.save(official, tmp_path / 'damaged.pth')
    done = run_tool(tmp_path / 'damaged.pth', tmp_path / 'none.pth')
    assert done.returncode == 1
    assert 'decoder.enc_output.0.bias' in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'none.pth').exists()
