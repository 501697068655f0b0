"""Models of transformers: every tensor and every setting accounted for, in both directions.

tests/parity compares with transformers itself.
"""
import copy
from functools import partial

import pytest
import torch
from mmengine.registry import init_default_scope
from torch.testing import assert_close

import spartan_mm.detection  # noqa: F401 - registers what conversions build
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters.huggingface import (
    convert_huggingface,
    export_huggingface,
    image_processor,
    read_huggingface,
    write_huggingface,
)

# The same names, shapes, types and bits.
assert_identical = partial(assert_close, rtol=0, atol=0)
CLASSES = ['cat', 'dog', 'remote', 'sofa', 'tree']


@pytest.fixture(scope='module')
def ours():
    """A small-headed R18 of ours: its tensors and settings."""
    from spartan_mm.detection import RTDETR
    settings = dict(
        backbone=dict(type='ResNetVd', depth=18, out_indices=(1, 2, 3),
                      norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False),
        neck=dict(in_channels=[128, 256, 512], embed_dims=32, num_heads=4, ffn_dims=48,
                  expansion=0.5, num_blocks=3),
        decoder=dict(in_channels=[32] * 3, embed_dims=16, num_layers=2, num_heads=2, num_points=3,
                     ffn_dims=24),
        bbox_head=dict(num_classes=5, embed_dims=16),
        num_queries=20, dn_cfg=dict(num_queries=10, label_noise=0.2, box_noise=0.4))
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = RTDETR(**copy.deepcopy(settings) | dict(
            neck=dict(type='HybridEncoder', **settings['neck']),
            bbox_head=dict(type='RTDETRHead', **settings['bbox_head'])))
    # A number of its own for every large tensor, and for every number of a small one.
    state_dict = {
        name: torch.tensor(float(index)).expand(tensor.shape) if tensor.numel() > 10000
        else torch.rand(tensor.shape) if tensor.ndim else torch.tensor(index)
        for index, (name, tensor) in enumerate(model.state_dict().items())}
    return state_dict, settings


@pytest.fixture
def theirs(ours):
    """The same model for transformers."""
    return export_huggingface(*ours, CLASSES)


def test_there_and_back(ours, theirs):
    state_dict, settings, classes = convert_huggingface(*theirs)
    assert_identical(state_dict, ours[0])
    assert settings == ours[1]
    assert classes == CLASSES
    again = export_huggingface(state_dict, settings, classes)
    assert_identical(again[0], theirs[0])
    assert again[1] == theirs[1]


def test_names_and_places(ours, theirs):
    """What the table says, against facts that are not taken from it."""
    state_dict, config = theirs
    # The published R18 saves 526 tensors: one decoder layer more, and no counters in the backbone.
    layer = len([name for name in state_dict if name.startswith(
        ('model.decoder.layers.1.', 'model.decoder.class_embed.1.',
         'model.decoder.bbox_embed.1.'))])
    backbone_counters = len([name for name in state_dict if name.startswith('model.backbone.')
                             and name.endswith('.num_batches_tracked')])
    assert len(state_dict) + layer - backbone_counters == 526

    for theirs_name, ours_name, rows in (
            ('model.encoder.encoder.0.layers.0.self_attn.k_proj.weight',
             'neck.aifi.self_attn.in_proj_weight', slice(32, 64)),
            ('model.decoder.layers.1.self_attn.v_proj.bias',
             'decoder.layers.1.self_attn.in_proj_bias', slice(32, 48)),
            ('model.decoder.layers.0.encoder_attn_layer_norm.bias', 'decoder.layers.0.norm2.bias',
             slice(None)),
            ('model.decoder.bbox_embed.1.layers.2.bias', 'bbox_head.reg_branches.1.4.bias',
             slice(None)),
            ('model.enc_score_head.bias', 'bbox_head.cls_branches.2.bias', slice(None)),
            ('model.backbone.model.encoder.stages.0.layers.0.shortcut.normalization.bias',
             'backbone.layer1.0.downsample.1.bias', slice(None)),
            ('model.backbone.model.encoder.stages.1.layers.0.shortcut.1.normalization.running_var',
             'backbone.layer2.0.downsample.2.running_var', slice(None))):
        assert_close(state_dict[theirs_name], ours[0][ours_name][rows], rtol=0, atol=0)
    assert config['id2label'] == {str(index): name for index, name in enumerate(CLASSES)}
    assert config['freeze_backbone_batch_norms'] is False
    assert config['backbone_config']['layer_type'] == 'basic'


def test_frozen_backbone_has_no_counters(ours):
    state_dict, settings = ours
    settings = settings | dict(backbone=dict(
        settings['backbone'], norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True))
    exported, config = export_huggingface(state_dict, settings)
    assert config['freeze_backbone_batch_norms'] is True
    assert not any(name.startswith('model.backbone.') and name.endswith('num_batches_tracked')
                   for name in exported)
    _, found, classes = convert_huggingface(exported, config)
    assert found == settings
    assert classes is None
    assert_identical(export_huggingface(*convert_huggingface(exported, config)[:2])[0], exported)


@pytest.mark.parametrize('decoder, model', [(True, True), (False, True)],
                         ids=['twice', 'in the model alone'])
def test_heads_may_stand_in_two_places(ours, theirs, decoder, model):
    state_dict, config = theirs
    for name, tensor in list(state_dict.items()):
        if name.startswith(('model.decoder.class_embed.', 'model.decoder.bbox_embed.')):
            state_dict[name.removeprefix('model.decoder.')] = tensor
            if not decoder:
                del state_dict[name]
    assert_identical(convert_huggingface(state_dict, config)[0], ours[0])


def test_heads_that_differ(theirs):
    state_dict, config = theirs
    state_dict['class_embed.1.bias'] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r'differ:\n  class_embed\.1\.bias, model\.decoder'):
        convert_huggingface(state_dict, config)


def test_version_2_has_constants(ours, theirs):
    state_dict, config = theirs
    for layer in range(2):
        state_dict[f'model.decoder.layers.{layer}.encoder_attn.n_points_scale'] = \
            torch.full((9, ), 1 / 3)
    config |= dict(model_type='rt_detr_v2', decoder_method='default')
    assert_identical(convert_huggingface(state_dict, config)[0], ours[0])
    with pytest.raises(CheckpointError, match="decoder_method='discrete'"):
        convert_huggingface(state_dict, config | dict(decoder_method='discrete'))
    state_dict['model.decoder.layers.1.encoder_attn.n_points_scale'][0] = 1
    with pytest.raises(CheckpointError, match=r'layers\.1\..*n_points_scale .* other numbers'):
        convert_huggingface(state_dict, config)


@pytest.mark.parametrize('change, message', [
    (dict(model_type='detr'), "model_type='detr'; this converts rt_detr and rt_detr_v2"),
    (dict(learn_initial_query=True, eval_size=[640, 640]),
     r'eval_size=\[640, 640\] \(only None\)\n  learn_initial_query=True \(only False\)$'),
    (dict(with_box_refine=False), 'with_box_refine=False'),
    (dict(encode_proj_layers=[1, 2]), r'encode_proj_layers=\[1, 2\]'),
    (dict(decoder_activation_function='silu'), "decoder_activation_function='silu'"),
    (dict(backbone='resnet50', use_timm_backbone=True), "backbone='resnet50'"),
    (dict(backbone_config=dict(model_type='resnet')), r"backbone_config\.model_type='resnet'"),
    (dict(backbone_config=dict(out_features=['stage1', 'stage2', 'stage3'])), 'out_features'),
    (dict(backbone_config=dict(out_indices=[1, 2, 3])), "out_features=.'stage1', 'stage2'"),
    (dict(backbone_config=dict(downsample_in_bottleneck=True)), 'downsample_in_bottleneck=True'),
    (dict(decoder_layers=3), 'decoder_layers=3, but the weights have 2'),
    (dict(d_model=256, hidden_expansion=1.0), 'hidden_expansion=1.0, but the weights have 0.5'),
    (dict(backbone_config=dict(depths=[3, 4, 6, 3])), r'depths=\[3, 4, 6, 3\], but'),
    (dict(num_queries='20', decoder_n_points=-1),
     r"where one belongs:\n  decoder_n_points=-1\n  num_queries='20'$"),
    (dict(decoder_attention_heads=0), 'not equally many for each of 0 heads'),
    (dict(decoder_attention_heads=4), 'not equally many for each of 4 heads'),
    (dict(decoder_attention_heads=1), 'decoder_n_points=3, but the weights have 6'),
    (dict(id2label={'0': 'cat'}), 'names 1 classes in id2label, but the weights have 5'),
    (dict(id2label=['cat']), 'id2label that is none'),
])
def test_config_of_another_model(theirs, change, message):
    state_dict, config = theirs
    with pytest.raises(CheckpointError, match=message):
        convert_huggingface(state_dict, config | change)


@pytest.mark.parametrize('change, message', [
    (lambda theirs: theirs.pop('model.decoder.layers.1.self_attn.k_proj.bias'),
     r'missing keys:\n  model\.decoder\.layers\.1\.self_attn\.k_proj\.bias$'),
    (lambda theirs: theirs.pop('model.denoising_class_embed.weight'),
     r'missing keys:\n  model\.denoising_class_embed\.weight$'),
    (lambda theirs: theirs.update({'model.weight_embedding.weight': torch.zeros(20, 16)}),
     r'keys left over:\n  model\.weight_embedding\.weight$'),
    (lambda theirs: theirs.update({'model.enc_score_head.bias': torch.zeros(4)}),
     r'cls_branches\.2\.bias: \(4,\) instead of \(5,\)')])
def test_weights_that_do_not_fit(theirs, change, message):
    state_dict, config = theirs
    change(state_dict)
    with pytest.raises(CheckpointError, match=message):
        convert_huggingface(state_dict, config)


def test_what_transformers_cannot_hold_is_listed(ours):
    state_dict, settings = ours
    settings = settings | dict(decoder=dict(settings['decoder'], eval_idx=0))
    with pytest.raises(CheckpointError, match=r'decoder\.eval_idx=0: .* last layer, 1\n'
                                              r'  3 names of classes for 5 classes$'):
        export_huggingface(state_dict, settings, ['a', 'b', 'c'])


def test_spartan_has_no_place_in_transformers():
    from spartan_mm.detection import RTDETR
    init_default_scope('mmdet')
    arch = dict(stem_channels=8, depths=(1, ) * 4, channels=(8, 16, 24, 32),
                expand_ratios=(2, ) * 4, conv_types=('full', ) * 4)
    model = RTDETR(
        backbone=dict(type='SpaRTAN', arch=arch, out_indices=(1, 2, 3)),
        neck=dict(type='HybridEncoder', in_channels=[16, 24, 32], embed_dims=32, ffn_dims=32,
                  num_blocks=1),
        decoder=dict(in_channels=[32] * 3, embed_dims=32, num_layers=1, ffn_dims=32),
        bbox_head=dict(type='RTDETRHead', num_classes=2, embed_dims=32))
    with pytest.raises(CheckpointError, match='backbone SpaRTAN: only ResNetVd has a place there\n'
                                              '  neck.num_blocks=1: it has 3'):
        export_huggingface(model.state_dict())


# ------------------------------------------------------------------------------------- the folder


def test_folder_is_read_again(tmp_path, theirs):
    write_huggingface(tmp_path / 'model', *theirs, image_processor(160, 320))
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == [
        'config.json', 'model.safetensors', 'preprocessor_config.json']
    state_dict, config = read_huggingface(tmp_path / 'model')
    assert_identical(state_dict, theirs[0])
    assert config == theirs[1]


@pytest.mark.parametrize('files, message', [
    ({}, r'config\.json does not exist; a saved model of transformers is a folder'),
    ({'config.json': '{'}, r'config\.json cannot be read'),
    ({'config.json': '[' * 100_000}, r'config\.json cannot be read'),
    ({'config.json': '\ufeff[]'}, r'config\.json holds no JSON object'),
    ({'config.json': '[]'}, r'config\.json holds no JSON object'),
    ({'config.json': '{}'}, r'model\.safetensors does not exist'),
    ({'config.json': '{}', 'model.safetensors.index.json': '{}'}, 'has no weight_map'),
    ({'config.json': '{}', 'model.safetensors.index.json':
      '{"weight_map": {"weight": "../other/model.safetensors"}}'}, 'outside of its folder'),
    ({'config.json': '{}', 'model.safetensors.index.json':
      '{"weight_map": {"weight": "model-1.safetensors"}}'}, r'model-1\.safetensors does not exist'),
])
def test_folder_without_what_it_needs(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_huggingface(tmp_path)


def test_image_processor_follows_the_preprocessor():
    assert not image_processor()['do_normalize']
    found = image_processor(data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True))
    assert found['do_normalize']
    assert found['image_mean'] == pytest.approx([0.485, 0.456, 0.406])
    assert found['image_std'] == pytest.approx([0.229, 0.224, 0.225])
    with pytest.raises(CheckpointError, match='bgr_to_rgb is not set'):
        image_processor(data_preprocessor=dict(mean=[0] * 3, std=[255] * 3))
