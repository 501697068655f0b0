import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch.testing import assert_close

from spartan_mm.detection import rtdetr_head
from spartan_mm.detection.denoising import DenoisingQueries

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
OURS = {'vfl': 'cls', 'bbox': 'bbox', 'giou': 'iou'}


@pytest.fixture
def head(assigner):
    return MODELS.build(dict(type='RTDETRHead', num_classes=5, embed_dims=8, num_pred_layer=3,
                             train_cfg=dict(assigner=assigner)))


def random_outputs(batch, denoising, queries, layers=2):
    """Logits and boxes of each layer, with gradients."""
    return ([torch.randn(batch, denoising + queries, 5, requires_grad=True)
             for _ in range(layers)],
            [torch.rand(batch, denoising + queries, 4, requires_grad=True)
             for _ in range(layers)],
            torch.randn(batch, queries, 5, requires_grad=True),
            torch.rand(batch, queries, 4, requires_grad=True))


def part(batch, groups, slots):
    """A denoising part of which the loss reads only the sizes."""
    return DenoisingQueries(None, torch.zeros(batch, 2 * groups * slots, 4), None, groups, slots)


def test_every_term_equals_the_official_one(head):
    meta = json.loads((GOLDEN / 'rtdetr_loss.json').read_text())['meta']
    golden = {name: torch.from_numpy(value)
              for name, value in np.load(GOLDEN / 'rtdetr_loss.npz').items()}
    samples = [
        DetDataSample(metainfo=dict(img_shape=(480, 640)), gt_instances=InstanceData(
            labels=golden[f'gt{i}_labels'].long(),
            bboxes=bbox_cxcywh_to_xyxy(golden[f'gt{i}_boxes']) * torch.tensor([640, 480] * 2)))
        for i in range(3)]

    def joined(kind):
        return [torch.cat([golden[f'dn{i}_{kind}'], golden[f'{layer}_{kind}']], 1)
                for i, layer in enumerate(('aux0', 'last'))]

    losses = head.loss_by_feat(
        joined('logits'), joined('boxes'), golden['aux1_logits'], golden['aux1_boxes'],
        part(3, meta['dn_groups'], max(meta['gt_per_image'])), samples)

    expected = {}
    for name, value in meta['losses_weighted'].items():
        _, term, *rest = name.split('_', 2)
        prefix = {'': 'loss_', 'aux_0': 'd0.loss_', 'aux_1': 'enc_loss_',
                  'dn_0': 'd0.dn_loss_', 'dn_1': 'dn_loss_'}[''.join(rest)]
        expected[prefix + OURS[term]] = torch.tensor(value)
    assert_close(losses, expected, rtol=1e-5, atol=0)


def test_terms_of_the_loss(head, make_samples):
    logits, boxes, enc_logits, enc_boxes = random_outputs(2, 12, 7)
    losses = head.loss_by_feat(logits, boxes, enc_logits, enc_boxes, part(2, 2, 3),
                               make_samples([3, 1]))
    # 3 terms of 2 layers, encoder, 2 layers' denoising.
    assert len(losses) == 3 * (2 + 1 + 2)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())


@pytest.mark.parametrize('counts', [(0, 0), (0, 3), (12, 0)])
def test_images_without_objects_and_more_objects_than_queries(head, make_samples, counts):
    outputs = random_outputs(2, 2 * max(1, *counts), 7)
    losses = head.loss_by_feat(*outputs, part(2, 1, max(1, *counts)), make_samples(counts))
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    for tensor in (*outputs[0], *outputs[1], *outputs[2:]):
        assert tensor.grad.isfinite().all()
    if not any(counts):
        assert all(value == 0 for name, value in losses.items() if 'cls' not in name)
        assert all(value > 0 for name, value in losses.items() if 'cls' in name)


def test_divisor_is_the_mean_number_of_objects_over_the_ranks(head, make_samples, monkeypatch):
    logits, boxes, *_ = random_outputs(1, 0, 7)
    samples = make_samples([3])

    def losses():
        return head.loss_by_feat(logits, boxes, logits[0], boxes[0], None, samples)

    alone = losses()
    # As if another rank had 7 objects: (3 + 7) / 2.
    monkeypatch.setattr(rtdetr_head, 'reduce_mean', lambda count: (count + 7) / 2)
    assert_close(losses(), {name: value * 3 / 5 for name, value in alone.items()})


def test_denoising_divisor_has_the_own_groups_and_the_joint_objects(head, make_samples,
                                                                    monkeypatch):
    outputs = random_outputs(1, 12, 7)
    samples = make_samples([3])
    monkeypatch.setattr(rtdetr_head, 'reduce_mean', lambda count: count * 2)
    doubled = head.loss_by_feat(*outputs, part(1, 2, 3), samples)
    monkeypatch.undo()
    single = head.loss_by_feat(*outputs, part(1, 2, 3), samples)
    assert_close(doubled, {name: value / 2 for name, value in single.items()})


def test_positives_of_every_group_get_their_object():
    targets = [(torch.zeros(n, dtype=torch.long), torch.zeros(n, 4)) for n in (2, 0, 1)]
    image, query, target = rtdetr_head.RTDETRHead.denoising_matches(targets, part(3, 2, 2))
    assert image.tolist() == [0, 0, 0, 0, 2, 2]
    assert query.tolist() == [0, 1, 4, 5, 0, 4]
    assert target.tolist() == [0, 1, 0, 1, 2, 2]


def test_small_boxes_have_an_unbiased_iou(head):
    """An eps of 1e-6 on normalised boxes would halve the target of a box of 0.001 x 0.001."""
    box = torch.tensor([[[.5, .5, .001, .001]]])
    sample = DetDataSample(metainfo=dict(img_shape=(640, 640)), gt_instances=InstanceData(
        labels=torch.tensor([0]), bboxes=bbox_cxcywh_to_xyxy(box[0]) * 640))
    logits = torch.full((1, 1, 5), -30.)
    logits[..., 0] = 30.
    losses = head.loss_by_feat([logits], [box], logits, box, None, [sample])
    assert losses['loss_cls'] < 0.05


def test_matcher_survives_nan(head, make_samples):
    logits, boxes = torch.randn(1, 6, 5), torch.rand(1, 6, 4)
    logits[0, 2], boxes[0, 3] = float('nan'), float('inf')
    (image, query, target), = head.match([(logits, boxes)], make_samples([3]))
    assert len(image) == 3 and sorted(target.tolist()) == [0, 1, 2]


def test_matching_all_sets_at_once_equals_mmdets_assigner_one_by_one(head, make_samples):
    samples = make_samples([3, 0, 9], 40, 80)
    sets = [(torch.randn(3, 6, 5), torch.rand(3, 6, 4)) for _ in range(2)]
    for (logits, boxes), matches in zip(sets, head.match(sets, samples), strict=True):
        expected = []
        for index, sample in enumerate(samples):
            start = sum(len(other.gt_instances) for other in samples[:index])
            corners = bbox_cxcywh_to_xyxy(boxes[index]) * torch.tensor([80, 40, 80, 40])
            found = head.assigner.assign(
                InstanceData(scores=logits[index], bboxes=corners), sample.gt_instances,
                dict(img_shape=(40, 80))).gt_inds
            expected += [(index, query, target - 1 + start)
                         for query, target in enumerate(found.tolist()) if target > 0]
        assert sorted(zip(*(part.tolist() for part in matches), strict=True)) == sorted(expected)


def test_prediction_keeps_the_best_pairs_of_query_and_class(head):
    head.test_cfg = dict(max_per_img=3)
    logits = torch.full((1, 2, 5), -5.)
    logits[0, 1, 4], logits[0, 0, 2], logits[0, 1, 0] = 3., 2., 1.
    boxes = torch.tensor([[[.5, .5, .5, .5], [.1, .1, .4, .1]]])
    meta = dict(img_shape=(100, 200), batch_input_shape=(100, 200), scale_factor=(2., 0.5))
    result, = head.predict_by_feat(logits, boxes, [meta])
    assert result.labels.tolist() == [4, 2, 0]
    assert_close(result.scores, torch.tensor([3., 2., 1.]).sigmoid())
    # Clipped at the left border, then to the original size.
    narrow, wide = [0., 10., 30., 30.], [25., 50., 75., 150.]
    assert_close(result.bboxes, torch.tensor([narrow, wide, narrow]))


def test_prediction_of_fewer_pairs_than_asked_for(head):
    head.test_cfg = dict(max_per_img=300)
    meta = dict(img_shape=(10, 10), scale_factor=(1., 1.))
    result, = head.predict_by_feat(torch.randn(1, 2, 5), torch.rand(1, 2, 4), [meta])
    assert len(result) == 10


def test_prediction_of_a_padded_image_refers_to_the_image(head):
    meta = dict(img_shape=(50, 100), batch_input_shape=(100, 100), scale_factor=(1., 1.))
    result, = head.predict_by_feat(torch.zeros(1, 1, 5), torch.tensor([[[.5, .5, .2, .2]]]), [meta])
    assert_close(result.bboxes[0], torch.tensor([40., 40., 60., 50.]))
