import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from torch.testing import assert_close

from spartan_mm.detection import IoUAwareVarifocalLoss, MatchabilityAwareLoss
from spartan_mm.detection.losses import PairedGIoULoss, paired_overlaps

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden' / 'deim_mal'
META = json.loads(GOLDEN.with_suffix('.json').read_text())['meta']


def test_value_is_the_formula():
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, 4, 2], [4, 4, 3]])
    quality = torch.rand(2, 3)
    probability, expected = logits.sigmoid(), torch.empty(2, 3, 4)
    for image in range(2):
        for query in range(3):
            for category in range(4):
                p = probability[image, query, category]
                if labels[image, query] == category:
                    q = quality[image, query]
                    value = q * (q * p.log() + (1 - q) * (1 - p).log())
                else:
                    value = 0.75 * p ** 2 * (1 - p).log()
                expected[image, query, category] = -2 * value
    assert_close(IoUAwareVarifocalLoss(loss_weight=2.)(logits, labels, quality), expected)


@pytest.mark.parametrize('p', [0.01, 0.05, 0.5, 0.9])
def test_weight_of_negatives_has_no_gradient(p):
    logits = torch.tensor([[p]]).logit().requires_grad_()
    IoUAwareVarifocalLoss()(logits, torch.tensor([1]), torch.zeros(1)).backward()
    # d/dz of -log(1 - p) is p, times the constant 0.75 p^2; 9.375e-5 at p = 0.05.
    assert_close(logits.grad, torch.tensor([[0.75 * p ** 3]]))


def test_matched_pair_without_overlap_weighs_nothing():
    logits = torch.randn(1, 3, requires_grad=True)
    IoUAwareVarifocalLoss()(logits, torch.tensor([1]), torch.zeros(1)).sum().backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 0] > 0


def test_quality_pulls_the_score_to_the_iou():
    logits = torch.tensor([[0.7]]).logit().requires_grad_()
    IoUAwareVarifocalLoss()(logits, torch.tensor([0]), torch.tensor([0.7])).backward()
    assert_close(logits.grad, torch.zeros(1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize('kind', [IoUAwareVarifocalLoss, MatchabilityAwareLoss])
def test_half_precision_is_computed_in_float32(kind):
    logits = torch.tensor([[-20., 20.]], dtype=torch.float16)
    loss = kind()(logits, torch.tensor([0]), torch.ones(1))
    assert loss.dtype == torch.float32 and loss.isfinite().all()


@pytest.mark.parametrize('case', [*META['cases'], META['vfl']],
                         ids=lambda case: case['grad'])
def test_losses_are_the_official_ones(case):
    golden = {name: torch.from_numpy(value)
              for name, value in np.load(GOLDEN.with_suffix('.npz')).items()}
    logits = golden['logits'].requires_grad_()
    labels = torch.full(logits.shape[:2], META['num_classes'])
    quality = torch.zeros(logits.shape[:2])
    for image in range(len(logits)):
        query, target = golden[f'match{image}']
        labels[image, query] = golden[f'gt{image}_labels'][target]
        quality[image, query] = paired_overlaps(*map(bbox_cxcywh_to_xyxy, (
            golden['boxes'][image, query], golden[f'gt{image}_boxes'][target])))[0]
    if 'mal_alpha' in case:
        # None is none, which multiplies by 1.
        loss = MatchabilityAwareLoss(gamma=case['gamma'], alpha=case['mal_alpha'] or 1.)
    else:
        loss = IoUAwareVarifocalLoss(case['alpha'], case['gamma'])
    total = loss(logits, labels, quality).sum() / META['num_boxes']
    total.backward()
    assert_close(total, torch.tensor(case['loss']), rtol=1e-5, atol=0)
    assert_close(logits.grad, golden[case['grad']], rtol=1e-5, atol=1e-6)


def test_overlaps_equal_mmdets_in_values_and_gradients():
    corners = torch.rand(2, 40, 2, 2).sort(2).values.flatten(2) * 50
    corners[:, :3] = corners[:, 3:6] + 60  # apart
    corners[0, 4] = corners[1, 4]
    corners[0, 5, 2:] = corners[0, 5, :2]  # no area
    grads, values = [], []
    for overlaps in (lambda *boxes: paired_overlaps(*boxes),
                     lambda *boxes: [bbox_overlaps(*boxes, mode=mode, is_aligned=True)
                                     for mode in ('iou', 'giou')]):
        boxes = corners[0].clone().requires_grad_()
        values.append(tuple(overlaps(boxes, corners[1])))
        grads.append([torch.autograd.grad(value.sum(), boxes, retain_graph=True)[0]
                      for value in values[-1]])
    assert_close(*values)
    assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_giou_loss_is_mmdets():
    boxes, targets = torch.rand(2, 9, 2, 2).sort(2).values.flatten(2) * 50
    ours, theirs = PairedGIoULoss(loss_weight=2.), GIoULoss(loss_weight=2.)
    assert_close(ours(boxes, targets, avg_factor=4.), theirs(boxes, targets, avg_factor=4.))
    assert_close(ours(boxes, targets, reduction_override='none'),
                 theirs(boxes, targets, reduction_override='none'))
