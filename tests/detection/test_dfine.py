"""D-FINE: what the official code computes, in training and at test, and what it doesn't do."""
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import nn
from torch.testing import assert_close

from spartan_mm.detection import ELANEncoder, distributions
from spartan_mm.detection.denoising import DenoisingQueries
from spartan_mm.detection.dfine_decoder import Gate
from spartan_mm.detection.dfine_head import unite_matches
from spartan_mm.detection.targets import gather_targets
from spartan_mm.weights.converters import rtdetr_layout

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
STAND_IN = runpy.run_path(str(GOLDEN / 'fill.py'))
TERMS = {'vfl': 'cls', 'mal': 'cls', 'bbox': 'bbox', 'giou': 'iou', 'fgl': 'fgl', 'ddf': 'ddf'}


def read_golden(case):
    """Its arrays, what its manifest says, and the stand-in weights."""
    manifest = json.loads((GOLDEN / f'{case}.json').read_text())
    arrays = {name: torch.from_numpy(value)
              for name, value in np.load(GOLDEN / f'{case}.npz').items()}
    return arrays, manifest['meta'], stand_in(manifest['shapes'])


def stand_in(shapes):
    return {name: torch.from_numpy(value)
            for name, value in STAND_IN['fill_state_dict'](shapes).items()}


def images(meta, channels):
    return [torch.from_numpy(STAND_IN['image']((meta['batch'], width, *size), seed))
            for width, size, seed in zip(channels, meta['maps'], meta['input_seeds'], strict=True)]


def golden_targets(golden, count, side=640):
    """The objects of the golden images."""
    return gather_targets([DetDataSample(
        metainfo=dict(img_shape=(side, side)), gt_instances=InstanceData(
            labels=golden[f'gt{i}_labels'],
            bboxes=bbox_cxcywh_to_xyxy(golden[f'gt{i}_boxes']) * side)) for i in range(count)])


def our_names(losses, layers):
    """Official names of terms, and what they are called here."""
    names = {}
    for name in losses:
        _, term, *rest = name.split('_', 2)
        rest = ''.join(rest)
        number = rest[-1:]
        prefix = {'': '', 'pre': 'pre_', 'enc_0': 'enc_', 'dn_pre': 'pre_dn_'}.get(rest)
        if prefix is None:
            layer = '' if int(number) == layers - 1 else f'd{number}.'
            prefix = layer + ('dn_' if rest.startswith('dn') else '')
        names[name] = f'{prefix}loss_{TERMS[term]}'
    return names


def assert_terms(losses, official, layers):
    names = our_names(official, layers)
    # The last denoising layer is its own teacher: no term here, 0 there.
    expected = {names[name]: torch.tensor(value) for name, value in official.items()
                if names[name] != 'dn_loss_ddf'}
    assert_close({name: value.detach() for name, value in losses.items()}, expected,
                 rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize('number', range(3))
def test_distributions_are_read_as_officially(number):
    golden, meta, _ = read_golden('dfine_functions')
    case = meta['cases'][number]
    golden = {name[3:]: value for name, value in golden.items() if name[:3] == f'c{number}_'}
    reg_max, reg_scale, half = case['reg_max'], case['reg_scale'], case['up']
    steps = distributions.edge_distances(reg_max, reg_scale, half)
    assert_close(steps, golden['weights'], rtol=1e-6, atol=2e-6)
    if half != 0.5:  # which all models have
        return

    index, share = distributions.edge_labels(
        golden['points'], golden['gt_xyxy'], reg_max, reg_scale)
    # Officially a bin beyond the last has the number R - 0.1.
    assert_close(index.flatten(), golden['label'].long())
    # Float32 rounds a distance of 4 by 2e-7, which is 5e-6 of the narrowest bins.
    assert_close(share.flatten(), golden['label_right'], rtol=0, atol=5e-6)
    assert_close(1 - share.flatten(), golden['label_left'], rtol=0, atol=5e-6)

    base = golden['points'].view(2, 12, 4)
    assert_close(distributions.refined_boxes(base, golden['corners'], reg_scale), golden['boxes'],
                 rtol=1e-5, atol=2e-6)
    quality = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))
    quality.load_state_dict(dict(zip(quality.state_dict(), stand_in(
        case['lqe']['shapes']).values(), strict=True)))
    scores = golden['scores'] + quality(distributions.edge_statistics(golden['corners']))
    assert_close(scores, golden['lqe_scores'], rtol=1e-5, atol=2e-6)


def test_gate_is_the_official_one():
    golden, meta, _ = read_golden('dfine_functions')
    gate = Gate(meta['gate']['dims'])
    gate.load_state_dict({name.removeprefix('gateway.'): value
                          for name, value in stand_in(meta['gate']['shapes']).items()})
    assert_close(gate(golden['gate_first'], golden['gate_second']), golden['gate_out'],
                 rtol=1e-5, atol=2e-6)


# -------------------------------------------------------------------------------------------- neck


@torch.no_grad()
def test_neck_is_the_official_one_and_equals_its_deploy_form():
    golden, meta, weights = read_golden('dfine_encoder')
    layout = rtdetr_layout.read_layout(weights | {'encoder.input_proj.2.0.weight': 0},
                                       rtdetr_layout.OFFICIAL)
    weights = {re.sub(r'(input_proj.\d).(conv|norm)', lambda match: '.'.join(
        (match[1], str(int(match[2] == 'norm')))), name): value for name, value in weights.items()}
    names = {ours: theirs for ours, theirs in rtdetr_layout.tensor_names(
        layout, rtdetr_layout.OFFICIAL).items() if ours.startswith('neck.')}
    neck = ELANEncoder(meta['in_channels'], meta['hidden_dim'], meta['dim_feedforward'],
                       meta['nhead'], expansion=meta['expansion'], num_blocks=layout.blocks).eval()
    neck.load_state_dict({ours.removeprefix('neck.'): value for ours, value in
                          rtdetr_layout.to_ours(weights, names).items()})
    for deploy in (False, True):
        if deploy:
            neck.switch_to_deploy()
        for level, x in enumerate(neck(images(meta, meta['in_channels']))):
            for ours, name in ((x.mean((2, 3)), 'mean'), (x[:, :8], 'first')):
                assert_close(ours, golden[f'out{level}_{name}'], rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in neck.modules())


# ------------------------------------------------------------------------------------------ losses


@pytest.fixture
def head(assigner):
    return MODELS.build(dict(type='DFINEHead', num_classes=5, embed_dims=8, num_pred_layer=4,
                             train_cfg=dict(assigner=assigner)))


def test_every_term_and_gradient_equals_the_official_one(head):
    golden, meta, _ = read_golden('dfine_loss')
    targets = golden_targets(golden, 3)
    leaves = {name: golden[name].requires_grad_() for name in golden
              if name.endswith(('_logits', '_boxes')) and not name.startswith(('gt', 'grad'))}
    for name, tensor in meta['tensors'].items():
        leaves[name] = torch.from_numpy(
            tensor['scale'] * STAND_IN['image'](tensor['shape'], tensor['seed'])).requires_grad_()

    def joined(kind, layers):
        return [torch.cat([leaves[f'{noised}_{kind}'], leaves[f'{own}_{kind}']], 1)
                for noised, own in layers]

    layers = [('dn0', 'aux0'), ('dn1', 'aux1'), ('dn2', 'last')]
    reference = torch.cat([golden['dn_ref_points'], golden['ref_points']], 1)
    boxes = joined('boxes', [*layers, ('dn_pre', 'pre')])
    slots = max(meta['gt_per_image'])
    denoising = DenoisingQueries(None, golden['dn_ref_points'], None, meta['dn_groups'], slots,
                                 targets)
    losses = head.loss_by_feat(
        joined('logits', [*layers, ('dn_pre', 'pre')]), boxes, leaves['enc_logits'],
        leaves['enc_boxes'], denoising, targets, joined('corners', layers), reference)
    assert_terms(losses, meta['losses_weighted'], 3)
    gradients = dict(zip(leaves, torch.autograd.grad(sum(losses.values()), leaves.values()),
                         strict=True))
    assert_close({name: value.norm() for name, value in gradients.items()},
                 {name: torch.tensor(meta['grad_norms'][name]) for name in gradients},
                 rtol=1e-5, atol=0)
    for name in ('last', 'aux0', 'dn0'):
        assert_close(gradients[f'{name}_corners'][0, :, :33].reshape(-1, 33),
                     golden[f'grad_{name}_corners_0'], rtol=1e-4, atol=1e-8)
    assert_close(gradients['aux0_logits'], golden['grad_aux0_logits'], rtol=1e-4, atol=1e-7)


def test_a_query_keeps_the_object_that_most_sets_give_it():
    # (image, query, object) of three sets, two pairs each.
    sets = np.array([[(0, 0, 1), (1, 2, 3)], [(0, 0, 1), (1, 2, 2)], [(0, 0, 0), (1, 1, 2)]])
    united = unite_matches(sets.transpose(2, 0, 1), 4)
    # 1 twice against 0; 2 and 3 are as frequent: the lowest.
    assert sorted(map(tuple, united.T.tolist())) == [(0, 0, 1), (1, 1, 2), (1, 2, 2)]
    assert unite_matches(np.zeros((3, 3, 0), int), 4).shape == (3, 0)


# ----------------------------------------------------------------------------------------- decoder


@pytest.fixture
def build_golden(build):
    """Makes the decoder and head of a golden file, whose names the converter's table translates."""
    def make(case, **head):
        golden, meta, weights = read_golden(case)
        weights = {name.replace('output.proj', 'output.0').replace('output.norm', 'output.1'): value
                   for name, value in weights.items()}
        official = rtdetr_layout.OFFICIAL
        names = {ours: theirs for ours, [theirs] in rtdetr_layout.tensor_names(
            rtdetr_layout.read_layout(weights, official), official).items() if theirs in weights}
        converted = rtdetr_layout.to_ours(weights, {ours: [name] for ours, name in names.items()})

        act = meta.get('activation', 'relu')
        model = build(
            num_queries=meta['num_queries'],
            backbone=dict(out_indices=(1, 2, 3)[:len(meta['feat_channels'])]),
            decoder=dict(_delete_=True, type='DFINEDecoder', in_channels=meta['feat_channels'],
                         embed_dims=meta['hidden_dim'], num_layers=meta['num_layers'],
                         num_heads=meta['nhead'], num_points=meta['num_points'], act=act,
                         ffn_dims=meta['dim_feedforward']),
            bbox_head=dict(_delete_=True, type='DFINEHead', num_classes=meta['num_classes'],
                           embed_dims=meta['hidden_dim'], act=act, reg_max=meta['reg_max'],
                           reg_scale=meta['reg_scale'], **head))
        missing, unexpected = model.load_state_dict(converted, strict=False)
        assert not unexpected
        assert all(name.startswith(('backbone.', 'neck.', 'dn_query_generator.'))
                   for name in missing)
        model.dn_query_generator.forward = lambda *args: None
        return model, golden, meta, names
    return make


@pytest.mark.parametrize('case', ['dfine_decoder', 'deim_dfine_decoder'])
@torch.no_grad()
def test_decoder_predicts_as_officially(build_golden, case):
    model, golden, meta, _ = build_golden(case)
    model.eval()
    for deploy in (False, True):
        if deploy:
            model.decoder.switch_to_deploy()
            model.bbox_head.switch_to_deploy(model.decoder.eval_idx)
        (logits, ), (boxes, ) = model.bbox_head(**model.forward_transformer(
            images(meta, meta['feat_channels'])))
        assert_close(logits, golden['eval_logits'], rtol=0, atol=1e-5)
        assert_close(boxes, golden['eval_boxes'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('case, tag', [
    ('dfine_decoder', 'nodn'), ('dfine_decoder', 'dn'), ('deim_dfine_decoder', '')])
def test_decoder_is_trained_as_officially(build_golden, monkeypatch, case, tag):
    head = dict(loss_cls=dict(type='MatchabilityAwareLoss')) if not tag else {}
    model, golden, meta, names = build_golden(case, **head)
    targets = golden_targets(golden, meta['batch'])
    monkeypatch.setattr('spartan_mm.detection.rtdetr.gather_targets', lambda samples: targets)
    if tag == 'dn':
        model.dn_query_generator.forward = lambda *args: DenoisingQueries(
            golden['dn_content'], golden['dn_boxes_logit'], golden['dn_attn_mask'],
            meta['dn']['dn_num_group'], max(targets.counts), targets)
    maps = [x.requires_grad_() for x in images(meta, meta['feat_channels'])]
    found = model.train().forward_transformer(tuple(maps), [None])
    losses = model.bbox_head.loss(**found, batch_data_samples=None)
    sum(losses.values()).backward()

    official = meta['losses']
    assert_terms(losses, official[tag] if tag else official, meta['num_layers'])
    prefix = f'{tag}_' if tag else ''
    for level, x in enumerate(maps):
        expected = golden[f'{prefix}grad{level}_sum']
        assert_close(x.grad.sum((2, 3)), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    if not tag:
        return
    norms = {name: torch.tensor(value) for name, value in official[f'{tag}_grad_norms'].items()
             if 'denoising' not in name}
    norms = {name.replace('output.proj', 'output.0').replace('output.norm', 'output.1'): value
             for name, value in norms.items()}
    gradients = {theirs: model.get_parameter(ours).grad.norm() for ours, theirs in names.items()
                 if theirs in norms}
    assert_close(gradients, norms, rtol=1e-4, atol=1e-6)
    if tag == 'nodn':
        assert_close(torch.stack(found['boxes']), golden['train_boxes'], rtol=0, atol=1e-6)
        assert_close(found['base_boxes'], golden['pre_boxes'], rtol=0, atol=1e-6)
        assert_close(torch.stack(found['corners'])[..., :33], golden['corners_first_edge'],
                     rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------ whole models

DFINE = {'neck.type': 'ELANEncoder', 'decoder.type': 'DFINEDecoder', 'bbox_head.type': 'DFINEHead',
         'decoder.num_points': [2, 4, 1], 'decoder.num_layers': 3}


@pytest.fixture
def dfine(build):
    """A small model whose boxes differ from layer to layer."""
    model = build(**DFINE)
    for branch in (*model.bbox_head.reg_branches, model.bbox_head.base_branch):
        nn.init.normal_(branch[-1].weight, std=0.2)
    return model


@pytest.mark.parametrize('counts', [(3, 1), (0, 2), (0, 0), (30, 0)])
def test_every_weight_has_a_gradient_whatever_the_objects(dfine, make_samples, counts):
    losses = dfine(torch.rand(2, 3, 64, 64), make_samples(counts), mode='loss')
    # 3 terms of 3 layers, base and encoder; those of layers and base again for denoising; FGL of
    # 3 layers, DDF of 2, twice.
    assert len(losses) == 3 * (5 + 4) + 2 * (3 + 2)
    if not any(counts):
        assert all(value == 0 for name, value in losses.items()
                   if name.endswith(('bbox', 'iou', 'fgl')))
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in dfine.parameters()
               if parameter.requires_grad)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_boxes_stay_float32_under_autocast(dfine, make_samples, dtype):
    with torch.autocast('cpu', dtype):
        found = dfine.forward_transformer(
            dfine.extract_feat(torch.rand(2, 3, 64, 64)), make_samples([2, 1]))
        losses = dfine.bbox_head.loss(**found, batch_data_samples=None)
    for boxes, corners in zip(found['boxes'], found['corners'], strict=True):
        assert boxes.dtype == corners.dtype == torch.float32
        assert_close(boxes, distributions.refined_boxes(found['base_boxes'], corners, 4.),
                     rtol=0, atol=0)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_a_nan_stays_one_and_is_called_by_its_name(dfine, make_samples):
    """Where the official code makes it 0 and trains on."""
    with torch.no_grad():
        dfine.bbox_head.reg_branches[2][-1].bias[40] = torch.nan
    losses = dfine(torch.rand(2, 3, 64, 64), make_samples([2, 1]), mode='loss')
    broken = {name for name, value in losses.items() if value.isnan()}
    # The last layer's own terms, and what it teaches.
    assert broken == {*('loss_cls', 'loss_bbox', 'loss_iou', 'loss_fgl', 'd0.loss_ddf',
                        'd1.loss_ddf'),
                      *('dn_loss_cls', 'dn_loss_bbox', 'dn_loss_iou', 'dn_loss_fgl',
                        'd0.dn_loss_ddf', 'd1.dn_loss_ddf')}


def test_distributions_start_from_an_rtdetr(build):
    changes = {'decoder.type': 'DFINEDecoder', 'bbox_head.type': 'DFINEHead',
               'decoder.gate': False, 'decoder.project_values': True}
    weights, model = build().state_dict(), build(**changes)
    own = model.state_dict()
    fits = {name for name, value in weights.items()
            if name in own and own[name].shape == value.shape}
    assert {*weights} - fits == {f'bbox_head.reg_branches.{layer}.4.{leaf}'
                                 for layer in range(2) for leaf in ('weight', 'bias')}
    assert all(re.search('base_branch|quality_branches|reg_branches', name)
               for name in {*own} - fits)


def test_settings_that_cannot_be(build):
    for changes, words in (
            ({'bbox_head.reg_max': 31}, r'reg_max=31 must be even'),
            ({'decoder.num_points': [3, 6]}, r'num_points=\(3, 6\) must have a number for each of'),
            ({'neck.block_channels': 8}, 'ELANEncoder takes no block_channels')):
        with pytest.raises(ValueError, match=words):
            build(**(DFINE | changes))
