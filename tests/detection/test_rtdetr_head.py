import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.losses import GIoULoss
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, bbox_xyxy_to_cxcywh
from mmengine.structures import InstanceData
from torch.testing import assert_close

from spartan_mm.detection import rtdetr_head
from spartan_mm.detection.denoising import DenoisingQueries
from spartan_mm.detection.targets import gather_targets

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
        part(3, meta['dn_groups'], max(meta['gt_per_image'])), gather_targets(samples))

    expected = {}
    for name, value in meta['losses_weighted'].items():
        _, term, *rest = name.split('_', 2)
        prefix = {'': 'loss_', 'aux_0': 'd0.loss_', 'aux_1': 'enc_loss_',
                  'dn_0': 'd0.dn_loss_', 'dn_1': 'dn_loss_'}[''.join(rest)]
        expected[prefix + OURS[term]] = torch.tensor(value)
    assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize('counts', [(3, 1), (0, 0), (0, 3), (12, 0)])
def test_images_without_objects_and_more_objects_than_queries(head, make_samples, counts):
    outputs = random_outputs(2, 2 * max(1, *counts), 7)
    losses = head.loss_by_feat(*outputs, part(2, 1, max(1, *counts)),
                               gather_targets(make_samples(counts)))
    # 3 terms of 2 layers, encoder, 2 layers' denoising.
    assert len(losses) == 3 * (2 + 1 + 2) and all(value.ndim == 0 for value in losses.values())
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    for tensor in (*outputs[0], *outputs[1], *outputs[2:]):
        assert tensor.grad.isfinite().all()
    if not any(counts):
        assert all(value == 0 for name, value in losses.items() if 'cls' not in name)
        assert all(value > 0 for name, value in losses.items() if 'cls' in name)


def losses_one_by_one(head, logits, boxes, enc_logits, enc_boxes, denoising, samples):
    """The terms computed set by set and image by image, with mmdet's parts."""
    giou, losses = GIoULoss(reduction='none'), {}
    num_objects = max(1, sum(len(sample.gt_instances) for sample in samples))

    def add(prefix, set_logits, set_boxes, pairs, divisor):
        cls, l1, iou = 0., 0., 0.
        for image, sample in enumerate(samples):
            height, width = sample.img_shape
            size = torch.tensor([width, height] * 2)
            truth = sample.gt_instances
            corners = bbox_cxcywh_to_xyxy(set_boxes[image]) * size
            target = torch.zeros_like(set_logits[image])
            matched = torch.zeros_like(target)
            for query, number in pairs(image, set_logits[image], corners, truth):
                box = corners[query:query + 1], truth.bboxes[number:number + 1]
                target[query, truth.labels[number]] = bbox_overlaps(*box, is_aligned=True).detach()
                matched[query, truth.labels[number]] = 1
                l1 = l1 + 5 * (set_boxes[image, query]
                               - bbox_xyxy_to_cxcywh(box[1])[0] / size).abs().sum()
                iou = iou + 2 * giou(*box).sum()
            weight = 0.75 * set_logits[image].detach().sigmoid() ** 2 * (1 - matched) + target
            cls = cls + torch.nn.functional.binary_cross_entropy_with_logits(
                set_logits[image], target, weight, reduction='sum')
        losses.update({prefix.format(name): torch.as_tensor(term / divisor) for name, term in
                       (('cls', cls), ('bbox', l1), ('iou', iou))})

    def hungarian(image, image_logits, corners, truth):
        found = head.assigner.assign(InstanceData(scores=image_logits, bboxes=corners), truth,
                                     dict(img_shape=samples[image].img_shape)).gt_inds
        return [(query, number - 1) for query, number in enumerate(found.tolist()) if number]

    def fixed(image, image_logits, corners, truth):
        return [(group * 2 * denoising.num_slots + number, number)
                for group in range(denoising.num_groups) for number in range(len(truth))]

    split = denoising.reference.shape[1]
    last = len(logits) - 1
    for layer in range(len(logits)):
        prefix = '' if layer == last else f'd{layer}.'
        add(prefix + 'loss_{}', logits[layer][:, split:], boxes[layer][:, split:], hungarian,
            num_objects)
        add(prefix + 'dn_loss_{}', logits[layer][:, :split], boxes[layer][:, :split], fixed,
            num_objects * denoising.num_groups)
    add('enc_loss_{}', enc_logits, enc_boxes, hungarian, num_objects)
    return losses


@pytest.mark.parametrize('counts', [(3, 1), (0, 2), (9, 0), (0, 0)])
def test_all_sets_at_once_equal_one_by_one(head, make_samples, counts):
    slots = max(1, *counts)
    samples, denoising = make_samples(counts, 40, 80), part(2, 2, slots)
    outputs = random_outputs(2, 4 * slots, 7, layers=3)
    leaves = [*outputs[0], *outputs[1], *outputs[2:]]
    found = head.loss_by_feat(*outputs, denoising, gather_targets(samples))
    expected = losses_one_by_one(head, *outputs, denoising, samples)
    assert_close(found, {name: expected[name] for name in found}, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    grads = [torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True)
             for losses in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs,
                     rtol=1e-4, atol=1e-6)


def test_divisor_has_the_joint_objects_and_the_own_groups(head, make_samples, monkeypatch):
    outputs, targets = random_outputs(1, 12, 7), gather_targets(make_samples([3]))
    alone = head.loss_by_feat(*outputs, part(1, 2, 3), targets)
    # As if another rank had 7 objects: (3 + 7) / 2.
    monkeypatch.setattr(rtdetr_head, 'reduce_mean', lambda count: (count + 7) / 2)
    assert_close(head.loss_by_feat(*outputs, part(1, 2, 3), targets),
                 {name: value * 3 / 5 for name, value in alone.items()})


def test_positives_of_every_group_get_their_object(make_samples):
    targets = gather_targets(make_samples([2, 0, 1]))
    matches = rtdetr_head.RTDETRHead.denoising_matches(targets, part(3, 2, 2), num_sets=2)
    for of_set in zip(*matches, strict=True):
        assert sorted(zip(*(part.tolist() for part in of_set), strict=True)) == [
            (0, 0, 0), (0, 1, 1), (0, 4, 0), (0, 5, 1), (2, 0, 2), (2, 4, 2)]


def test_small_boxes_have_an_unbiased_iou(head):
    """An eps of 1e-6 on normalized boxes would halve the target of a box of 0.001 x 0.001."""
    box = torch.tensor([[[.5, .5, .001, .001]]])
    sample = DetDataSample(metainfo=dict(img_shape=(640, 640)), gt_instances=InstanceData(
        labels=torch.tensor([0]), bboxes=bbox_cxcywh_to_xyxy(box[0]) * 640))
    logits = torch.full((1, 1, 5), -30.)
    logits[..., 0] = 30.
    losses = head.loss_by_feat([logits], [box], logits, box, None, gather_targets([sample]))
    assert losses['loss_cls'] < 0.05


def test_matcher_survives_nan(head, make_samples):
    logits, boxes = torch.randn(1, 6, 5), torch.rand(1, 6, 4)
    logits[0, 2], boxes[0, 3] = float('nan'), float('inf')
    image, query, target = head.match(logits[None], boxes[None],
                                      gather_targets(make_samples([3])))
    assert image.shape == (1, 3) and sorted(target[0].tolist()) == [0, 1, 2]


def test_matching_all_sets_at_once_equals_mmdets_assigner_one_by_one(head, make_samples):
    samples = make_samples([3, 0, 9], 40, 80)
    set_logits, set_boxes = torch.randn(2, 3, 6, 5), torch.rand(2, 3, 6, 4)
    matched = head.match(set_logits, set_boxes, gather_targets(samples))
    for logits, boxes, *matches in zip(set_logits, set_boxes, *matched, strict=True):
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


def test_prediction_of_a_padded_image_refers_to_the_image(head):
    head.test_cfg = dict(max_per_img=300)  # more than there are
    meta = dict(img_shape=(50, 100), batch_input_shape=(100, 100), scale_factor=(1., 1.))
    result, = head.predict_by_feat(torch.zeros(1, 1, 5), torch.tensor([[[.5, .5, .2, .2]]]), [meta])
    assert_close(result.bboxes, torch.tensor([[40., 40., 60., 50.]] * 5))
