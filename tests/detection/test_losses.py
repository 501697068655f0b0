import pytest
import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures.bbox import bbox_overlaps
from torch.testing import assert_close

from spartan_mm.detection import IoUAwareVarifocalLoss
from spartan_mm.detection.losses import PairedGIoULoss, paired_overlaps


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


def test_half_precision_is_computed_in_float32():
    logits = torch.tensor([[-20., 20.]], dtype=torch.float16)
    loss = IoUAwareVarifocalLoss()(logits, torch.tensor([0]), torch.ones(1))
    assert loss.dtype == torch.float32 and loss.isfinite().all()


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
