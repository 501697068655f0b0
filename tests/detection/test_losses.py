import pytest
import torch
from torch.testing import assert_close

from spartan_mm.detection import IoUAwareVarifocalLoss


def test_value_is_the_formula():
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, 4, 2], [4, 4, 3]])
    quality = torch.rand(2, 3)
    probability, expected = logits.sigmoid(), 0.
    for image in range(2):
        for query in range(3):
            for category in range(4):
                p = probability[image, query, category]
                if labels[image, query] == category:
                    q = quality[image, query]
                    expected -= q * (q * p.log() + (1 - q) * (1 - p).log())
                else:
                    expected -= 0.75 * p ** 2 * (1 - p).log()
    loss = IoUAwareVarifocalLoss(loss_weight=2.)(logits, labels, quality, avg_factor=5.)
    assert_close(loss, 2 * expected / 5)


@pytest.mark.parametrize('p', [0.01, 0.05, 0.5, 0.9])
def test_weight_of_negatives_has_no_gradient(p):
    logits = torch.tensor([[p]]).logit().requires_grad_()
    IoUAwareVarifocalLoss()(logits, torch.tensor([1]), torch.zeros(1), 1.).backward()
    # d/dz of -log(1 - p) is p, times the constant 0.75 p^2; 9.375e-5 at p = 0.05.
    assert_close(logits.grad, torch.tensor([[0.75 * p ** 3]]))


def test_matched_pair_without_overlap_weighs_nothing():
    logits = torch.randn(1, 3, requires_grad=True)
    IoUAwareVarifocalLoss()(logits, torch.tensor([1]), torch.zeros(1), 1.).backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 0] > 0


def test_quality_pulls_the_score_to_the_iou():
    logits = torch.tensor([[0.7]]).logit().requires_grad_()
    IoUAwareVarifocalLoss()(logits, torch.tensor([0]), torch.tensor([0.7]), 1.).backward()
    assert_close(logits.grad, torch.zeros(1, 1), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32():
    logits = torch.tensor([[-20., 20.]], dtype=torch.float16)
    loss = IoUAwareVarifocalLoss()(logits, torch.tensor([0]), torch.ones(1), 1.)
    assert loss.dtype == torch.float32 and loss.isfinite()
