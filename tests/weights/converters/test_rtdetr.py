"""Official RT-DETR weights: nothing missing, nothing left over, and the right settings."""
from functools import partial

import pytest
import torch
from mmengine.registry import init_default_scope
from torch.testing import assert_close

import spartan_mm.detection  # noqa: F401 - registers what conversions build
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters.convert import read_source
from spartan_mm.weights.converters.rtdetr import convert_resnet_vd, convert_rtdetr, export_rtdetr

# The same names, shapes, types and bits.
assert_identical = partial(assert_close, rtol=0, atol=0)


@pytest.fixture
def official(golden):
    """The official state dict of a small-headed R18, to be changed."""
    return golden('rtdetr_r18vd')


def resnet(blocks, bottleneck):
    """A backbone's tensors as another depth has them, without contents."""
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
    return tensors


# --------------------------------------------------------------------------------------- to ours


def test_settings_are_read_from_the_shapes(official):
    _, settings = convert_rtdetr(official)
    assert settings == dict(
        backbone=dict(type='ResNetVd', depth=18, out_indices=(1, 2, 3),
                      norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False),
        neck=dict(in_channels=[128, 256, 512], embed_dims=256, num_heads=8, ffn_dims=1024,
                  expansion=0.5, num_blocks=3),
        decoder=dict(in_channels=[256] * 3, embed_dims=256, num_layers=3, num_heads=8,
                     num_points=4, ffn_dims=1024),
        bbox_head=dict(num_classes=7, embed_dims=256))


@pytest.mark.parametrize('depth, blocks, bottleneck', [
    (34, (3, 4, 6, 3), False), (50, (3, 4, 6, 3), True), (101, (3, 4, 23, 3), True)])
def test_names_of_other_depths_are_those_of_the_model(depth, blocks, bottleneck):
    from spartan_mm.detection import ResNetVd
    with torch.device('meta'):
        expected = ResNetVd(depth=depth).state_dict()
    assert convert_resnet_vd(resnet(blocks, bottleneck)).keys() == expected.keys()


def test_no_other_depth(official):
    official = {name: tensor for name, tensor in official.items()
                if not name.startswith('backbone.')}
    official |= {f'backbone.{name}': tensor
                 for name, tensor in resnet((2, 2, 2, 3), False).items()}
    with pytest.raises(CheckpointError, match=r'\(2, 2, 2, 3\) basic'):
        convert_rtdetr(official)


def test_no_other_backbone(official):
    official = {name.replace('backbone.res_layers.', 'backbone.stages.'): tensor
                for name, tensor in official.items()}
    with pytest.raises(CheckpointError, match='neither a ResNet-vd, a SpaRTAN nor an HGNetv2'):
        convert_rtdetr(official)


@pytest.mark.parametrize('name', [
    'backbone.conv1.conv1_2.norm.bias', 'encoder.lateral_convs.1.conv.weight',
    'encoder.fpn_blocks.0.bottlenecks.1.conv2.norm.running_mean', 'encoder.encoder.0.layers.0.'
    'linear2.weight', 'decoder.decoder.layers.1.cross_attn.sampling_offsets.bias',
    'decoder.enc_score_head.weight', 'decoder.denoising_class_embed.weight'])
def test_missing_key_is_listed(official, name):
    del official[name]
    with pytest.raises(CheckpointError, match='missing keys:\n  ' + name.replace('.', r'\.') + '$'):
        convert_rtdetr(official)


@pytest.mark.parametrize('name', [
    'decoder.anchors', 'backbone.extra', 'something',
    'decoder.decoder.layers.9999999999.norm1.bias', f'encoder.input_proj.{"9" * 5000}.0.weight'])
def test_leftover_key_is_listed(official, name):
    official[name] = torch.zeros(1)
    with pytest.raises(CheckpointError,
                       match='keys left over:\n  ' + name.replace('.', r'\.') + '$'):
        convert_rtdetr(official)


@pytest.mark.parametrize('name, shape, message', [
    ('decoder.dec_score_head.1.weight', (9, 256),
     r'cls_branches\.1\.weight: \(9, 256\) instead of \(7, 256\)'),
    ('backbone.res_layers.1.blocks.0.branch2a.conv.weight', (128, 64, 1, 1),
     r'layer2\.0\.conv1\.weight: \(128, 64, 1, 1\) instead of \(128, 64, 3, 3\)'),
    ('decoder.denoising_class_embed.weight', (7, 256),
     r'label_embedding\.weight: \(7, 256\) instead of \(8, 256\)'),
    ('decoder.decoder.layers.0.cross_attn.attention_weights.bias', (90, ),
     'the 90 attention weights .* not equally many for each of 8 heads and 3 maps'),
    ('encoder.encoder.0.layers.0.linear2.weight', (), 'the shapes are not those of an RT-DETR'),
])
def test_shapes_that_do_not_fit(official, name, shape, message):
    official[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        convert_rtdetr(official)


def test_frozen_norms_get_a_counter(official):
    """The official frozen BatchNorm has no `num_batches_tracked`."""
    frozen = {name: tensor for name, tensor in official.items()
              if not (name.startswith('backbone.') and name.endswith('num_batches_tracked'))}
    converted, settings = convert_rtdetr(frozen)
    assert converted['backbone.stem.1.num_batches_tracked'] == 0
    assert settings['backbone']['norm_cfg'] == dict(type='BN', requires_grad=False)
    assert_identical(export_rtdetr(converted, settings)[0], frozen)


def test_pretrained_backbone_loads_by_init_cfg(official, tmp_path):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    weights = {name.removeprefix('backbone.'): tensor for name, tensor in official.items()
               if name.startswith('backbone.')}
    torch.save(weights, tmp_path / 'vd.pth')
    settings = dict(type='ResNetVd', depth=18, init_cfg=dict(
        type='ConvertedPretrained', converter='resnet_vd', checkpoint=str(tmp_path / 'vd.pth')))
    backbone = MODELS.build(settings)
    backbone.init_weights()
    assert_close(dict(backbone.state_dict()), convert_resnet_vd(weights), rtol=0, atol=0)

    with pytest.raises(CheckpointError, match=r'vd\.pth does not fit ResNetVd'):
        MODELS.build(settings | dict(depth=34)).init_weights()
    settings['init_cfg'] = settings['init_cfg'] | dict(converter='vit')
    with pytest.raises(ValueError, match=r"converter='vit' is unknown.*resnet_vd"):
        MODELS.build(settings).init_weights()


# -------------------------------------------------------------------------------------- version 2


@pytest.fixture
def version_2(official):
    """The same model as version 2 names it, with its constants."""
    renamed = {}
    for name, tensor in official.items():
        for level in range(3):
            name = name.replace(f'encoder.input_proj.{level}.0.',
                                f'encoder.input_proj.{level}.conv.')
            name = name.replace(f'encoder.input_proj.{level}.1.',
                                f'encoder.input_proj.{level}.norm.')
        name = name.replace('enc_output.0.', 'enc_output.proj.')
        renamed[name.replace('enc_output.1.', 'enc_output.norm.')] = tensor
    for layer in range(3):
        renamed[f'decoder.decoder.layers.{layer}.cross_attn.num_points_scale'] = \
            torch.full((12, ), 0.25)
    return renamed | {'decoder.anchors': torch.zeros(1, 8400, 4),
                      'decoder.valid_mask': torch.ones(1, 8400, 1, dtype=torch.bool)}


def test_version_2_is_the_same_model(official, version_2):
    converted, settings = convert_rtdetr(version_2)
    expected, expected_settings = convert_rtdetr(official)
    assert_identical(converted, expected)
    assert settings == expected_settings


@pytest.mark.parametrize('change, message', [
    (lambda weights: weights.update({
        'decoder.decoder.layers.1.cross_attn.num_points_scale':
            torch.tensor([1 / count for count in (2, 4, 6) for _ in range(count)])}),
     r'layers\.1\.cross_attn\.num_points_scale has \(2, 4, 6\)'),
    (lambda weights: weights.update({
        'decoder.decoder.layers.1.cross_attn.num_points_scale': torch.full((12, ), 0.3)}),
     r'layers\.1\.cross_attn\.num_points_scale has \(3, 3, 3, 3\)'),
    (lambda weights: weights['decoder.decoder.layers.1.cross_attn.num_points_scale'].zero_(),
     r'layers\.1\.cross_attn\.num_points_scale does not hold, for each sampling point'),
    (lambda weights: weights.update({'decoder.tgt_embed.weight': torch.zeros(50, 256)}),
     'learnt contents'),
    (lambda weights: weights.update({'decoder.enc_score_head.weight': torch.zeros(1, 256),
                                     'decoder.enc_score_head.bias': torch.zeros(1)}),
     'without regard to classes'),
    (lambda weights: weights.pop('decoder.enc_output.norm.weight'),
     r'missing keys:\n  decoder\.enc_output\.1\.weight$')])
def test_version_2_with_what_is_not_here(version_2, change, message):
    change(version_2)
    with pytest.raises(CheckpointError, match=message):
        convert_rtdetr(version_2)


def filled(model):
    """A state dict in which every tensor has a number of its own, which takes no memory."""
    return {name: torch.tensor(float(index)).expand(tensor.shape) if tensor.ndim
            else torch.tensor(1) for index, (name, tensor) in enumerate(model.state_dict().items())}


def build_on_meta(**model):
    from mmdet.registry import MODELS
    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(dict(dict(type='RTDETR'), **model))


def dfine(**changes):
    """The settings of a small D-FINE on an HGNetv2."""
    return dict(
        backbone=dict(type='TIMMFeatures', model_name='hgnetv2_b0', out_indices=(1, 2, 3)),
        neck=dict(type='ELANEncoder', embed_dims=32, ffn_dims=48, expansion=0.5, num_blocks=2),
        decoder=dict(type='DFINEDecoder', in_channels=[32] * 3, embed_dims=32, num_layers=2,
                     num_points=[3, 6, 3], ffn_dims=48),
        bbox_head=dict(type='DFINEHead', num_classes=5, embed_dims=32, reg_scale=8.)) | changes


# --------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize('frozen', [False, True])
def test_dfine_there_and_back(frozen, tmp_path):
    """Constants and names are D-FINE's, and all bits come back."""
    settings = dfine()
    ours = filled(build_on_meta(**settings))
    if frozen:
        settings['backbone']['norm_eval'] = True
        ours |= {name: torch.tensor(0) for name in ours
                 if name.startswith('backbone.') and name.endswith('num_batches_tracked')}
    exported, exported_settings = export_rtdetr(ours, settings)
    assert exported['decoder.decoder.reg_scale'].tolist() == [8.]
    assert exported['decoder.decoder.up'].tolist() == [.5]
    assert exported['decoder.decoder.layers.1.cross_attn.num_points_scale'].tolist() == \
        pytest.approx([1 / 3] * 3 + [1 / 6] * 6 + [1 / 3] * 3)
    assert exported['decoder.anchors'].shape == (1, 8400, 4)
    for name in ('backbone.stages.2.blocks.1.layers.2.conv2.lab.scale',
                 'encoder.pan_blocks.1.cv3.0.bottlenecks.1.conv2.norm.running_mean',
                 'encoder.downsample_convs.0.0.cv2.conv.weight', 'encoder.input_proj.2.norm.bias',
                 'decoder.decoder.layers.1.gateway.gate.weight', 'decoder.enc_output.proj.weight',
                 'decoder.decoder.lqe_layers.1.reg_conf.layers.1.bias',
                 'decoder.pre_bbox_head.layers.2.weight'):
        assert name in exported
    assert not any('norm2' in name for name in exported if name.startswith('decoder'))
    assert ('backbone.stem.stem1.bn.num_batches_tracked' in exported) != frozen
    names = dict.fromkeys(exported, torch.zeros(1))
    torch.save(dict(model=names), tmp_path / 'official.pth')
    assert read_source(tmp_path / 'official.pth').kind == 'official'
    converted, found = convert_rtdetr(exported)
    assert_identical(converted, ours)
    assert found == exported_settings
    assert (found['bbox_head']['reg_scale'], found['decoder']['num_points']) == (8., [3, 6, 3])


def test_dfine_without_its_config_is_refused():
    with pytest.raises(CheckpointError, match='num_points and reg_scale of a D-FINE'):
        export_rtdetr(filled(build_on_meta(**dfine())))


@pytest.mark.parametrize('changes', [
    dict(neck=dict(type='HybridEncoder', embed_dims=32)),
    dict(decoder=dict(dfine()['decoder'], gate=False, project_values=True))])
def test_what_no_official_code_has_is_refused(changes):
    settings = dfine(**changes)
    with pytest.raises(CheckpointError, match='no official code has such a model'):
        export_rtdetr(filled(build_on_meta(**settings)), settings)


def test_anchors_are_those_of_the_model():
    from spartan_mm.detection.rtdetr import make_anchors
    from spartan_mm.weights.converters.rtdetr import _anchors
    for levels in (2, 3):
        anchors, valid = _anchors(levels)
        expected, expected_valid = make_anchors(
            tuple((side, side) for side in (80, 40, 20)[-levels:]))
        assert_identical(anchors[0].nan_to_num(posinf=1e4), expected)
        assert_identical(valid[0], expected_valid)


def test_version_2_with_other_points_on_each_map_there_and_back():
    settings = dict(
        backbone=dict(type='ResNetVd', depth=18, out_indices=(1, 2, 3)),
        neck=dict(type='HybridEncoder', embed_dims=32, ffn_dims=48, num_blocks=1),
        decoder=dict(in_channels=[32] * 3, embed_dims=32, num_layers=1, num_points=[2, 4, 6]),
        bbox_head=dict(type='RTDETRHead', num_classes=5, embed_dims=32))
    ours = filled(build_on_meta(**settings))
    exported, _ = export_rtdetr(ours, settings)
    assert 'encoder.input_proj.0.conv.weight' in exported and 'decoder.up' not in exported
    converted, found = convert_rtdetr(exported)
    assert_identical(converted, ours)
    assert found['decoder']['num_points'] == [2, 4, 6]


@pytest.mark.parametrize('case', ['rtdetr_r18vd', 'rtdetr_spartan_xt'])
def test_there_and_back(case, golden):
    official = golden(case)
    converted, settings = convert_rtdetr(official)
    exported, exported_settings = export_rtdetr(converted, settings)
    assert_identical(exported, official)
    assert exported_settings == settings
    # The weights alone say the same.
    assert export_rtdetr(converted)[0].keys() == official.keys()


@pytest.mark.parametrize('case, counters', [('frozen', 0), ('trained', 1)])
def test_r50_there_and_back(case, counters):
    """With counters at 0 the BatchNorms are frozen, and officially have none."""
    from spartan_mm.detection import RTDETR
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = RTDETR(
            backbone=dict(type='ResNetVd', depth=50, out_indices=(1, 2, 3)),
            neck=dict(type='HybridEncoder', in_channels=[512, 1024, 2048], embed_dims=32,
                      ffn_dims=48, num_blocks=2),
            decoder=dict(in_channels=[32] * 3, embed_dims=32, num_layers=2, num_points=3,
                         ffn_dims=48),
            bbox_head=dict(type='RTDETRHead', num_classes=5, embed_dims=32))
    # Every tensor has a number of its own, which takes no memory.
    ours = {name: torch.tensor(float(index)).expand(tensor.shape) if tensor.ndim
            else torch.tensor(counters)
            for index, (name, tensor) in enumerate(model.state_dict().items())}
    exported, settings = export_rtdetr(ours)
    assert settings['backbone']['depth'] == 50
    assert settings['decoder']['num_points'] == 3
    assert 'encoder.fpn_blocks.0.conv3.conv.weight' not in exported
    assert exported['backbone.res_layers.0.blocks.0.short.conv.weight'].shape == (256, 64, 1, 1)
    kept = 'backbone.res_layers.0.blocks.0.short.norm.num_batches_tracked' in exported
    assert kept == (case == 'trained')
    assert_identical(convert_rtdetr(exported)[0], ours)


@pytest.mark.parametrize('change, message', [
    (lambda ours: ours.pop('decoder.layers.1.norm2.bias'),
     r'missing keys:\n  decoder\.layers\.1\.norm2\.bias$'),
    (lambda ours: ours.pop('backbone.layer2.1.bn1.weight'),
     r'missing keys:\n  backbone\.layer2\.1\.bn1\.weight$'),
    (lambda ours: ours.update({'query_embedding.weight': torch.zeros(1)}),
     r'keys left over:\n  query_embedding\.weight$'),
    (lambda ours: ours.update({'backbone.fc.bias': torch.zeros(1)}),
     r'keys left over:\n  backbone\.fc\.bias$'),
    (lambda ours: ours.update({'memory_trans_fc.bias': torch.zeros(2)}),
     r'memory_trans_fc\.bias: \(2,\) instead of \(256,\)'),
    (lambda ours: ours.update(
        {'neck.top_down_blocks.0.blocks.0.fused.weight': torch.zeros(1)}), 'is fused'),
    (lambda ours: [ours.pop(name) for name in list(ours) if name.startswith('backbone.')],
     'neither a ResNetVd, a SpaRTAN nor an HGNetv2')])
def test_ours_that_do_not_fit(official, change, message):
    ours = convert_rtdetr(official)[0]
    change(ours)
    with pytest.raises(CheckpointError, match=message):
        export_rtdetr(ours)
