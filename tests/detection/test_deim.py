"""DEIM's RT-DETR: another form of the decoder, another loss."""
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch.testing import assert_close

from spartan_mm.detection import RTDETRDecoder
from spartan_mm.weights.converters import rtdetr_layout as table
from spartan_mm.weights.converters.names import rename
from spartan_mm.weights.converters.rtdetr import _without_constants

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
CASE = json.loads((GOLDEN / 'deim_rtdetrv2_decoder.json').read_text())
META = CASE['meta']
STAND_IN = runpy.run_path(str(GOLDEN / 'fill.py'))
OURS = dict(mal='cls', bbox='bbox', giou='iou')


@pytest.fixture
def golden():
    return {name: torch.from_numpy(value)
            for name, value in np.load(GOLDEN / 'deim_rtdetrv2_decoder.npz').items()}


@pytest.fixture
def model(build):
    """The golden file's model with its weights, whose backbone and neck nobody looks at."""
    model = build(
        num_queries=META['num_queries'], **{'decoder.num_layers': META['num_layers']},
        bbox_head=dict(num_classes=META['num_classes'], act='silu',
                       loss_cls=dict(type='MatchabilityAwareLoss')),
        dn_cfg=dict(num_queries=0))
    model.decoder = RTDETRDecoder(
        META['feat_channels'], META['hidden_dim'], META['num_layers'], num_heads=META['nhead'],
        num_points=META['num_points'], ffn_dims=META['dim_feedforward'], act='silu',
        query_pos_layers=3)
    weights, *_ = _without_constants({name: torch.from_numpy(value) for name, value in
                              STAND_IN['fill_state_dict'](CASE['shapes']).items()})
    layout = table.read_layout(weights, table.OFFICIAL)._replace(levels=META['num_levels'])
    assert layout.deep_position and layout.layers == META['num_layers']
    names = {ours: theirs for ours, theirs in table.tensor_names(layout, table.OFFICIAL).items()
             if theirs[0] in weights}
    report = model.load_state_dict(rename(weights, names), strict=False)
    assert not report.unexpected_keys
    assert all(name.startswith(('backbone.', 'neck.', 'dn_query_generator.'))
               for name in report.missing_keys)
    return model


@pytest.fixture
def maps():
    return [torch.from_numpy(STAND_IN['image']((META['batch'], channels, *size), seed))
            .requires_grad_() for channels, size, seed in zip(
                META['feat_channels'], META['maps'], META['input_seeds'], strict=True)]


def make_samples(golden, height=720, width=1040):
    return [DetDataSample(
        metainfo=dict(img_shape=(height, width)),
        gt_instances=InstanceData(
            labels=golden[f'gt{image}_labels'],
            bboxes=bbox_cxcywh_to_xyxy(golden[f'gt{image}_boxes'])
            * torch.tensor([width, height] * 2))) for image in range(META['batch'])]


def test_predictions_are_the_official_ones(model, maps, golden):
    model.eval()
    for deploy in (False, True):
        if deploy:
            model.switch_to_deploy()
        with torch.no_grad():
            logits, boxes = model.bbox_head(**model.forward_transformer(maps))
        assert_close(logits[-1], golden['eval_logits'], rtol=1e-5, atol=1e-5)
        assert_close(boxes[-1], golden['eval_boxes'], rtol=0, atol=2e-6)


def test_losses_and_gradients_are_the_official_ones(model, maps, golden):
    samples = make_samples(golden)
    outputs = model.forward_transformer(maps, samples)
    logits, boxes = model.bbox_head(outputs['hidden_states'], outputs['boxes'])
    assert_close(torch.stack(logits), golden['train_logits'], rtol=1e-5, atol=1e-5)
    assert_close(torch.stack(boxes), golden['train_boxes'], rtol=0, atol=2e-6)

    losses = model.bbox_head.loss(**outputs, batch_data_samples=samples)
    expected = META['losses']['own']['terms']
    assert len(losses) == len(expected)
    for name, value in expected.items():
        _, kind, *place = name.split('_')
        prefix = {'': '', 'aux': f'd{place[-1]}.' if place else '', 'enc': 'enc_'}[
            place[0] if place else '']
        assert losses[f'{prefix}loss_{OURS[kind]}'].item() == pytest.approx(value, rel=1e-5), name
    sum(losses.values()).backward()
    for level, level_map in enumerate(maps):
        assert_close(level_map.grad.sum((2, 3)), golden[f'own_grad{level}_sum'], rtol=1e-5,
                     atol=1e-6)


def test_query_positions_take_two_or_three_layers():
    with pytest.raises(ValueError, match='query_pos_layers=4 must be 2 or 3'):
        RTDETRDecoder(query_pos_layers=4)
