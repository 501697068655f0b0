"""RT-DETR's losses."""
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class IoUAwareVarifocalLoss(nn.Module):
    """Varifocal loss whose targets are the IoUs of the matched boxes.

    Sources: `VarifocalNet <https://arxiv.org/abs/2008.13367>`_, equation 2, as RT-DETR (section
    4.3) weighs it: t for the matched class, alpha * p^gamma for all others.

    NOTE: mmdet's VarifocalLoss differs twice: it lets gradients through the weight p^gamma, which
    makes those of easy negatives three times as large, and it treats a matched pair of IoU 0 as a
    negative, where RT-DETR gives it weight 0.

    Args:
        alpha: Weight of the negatives.
        gamma: Exponent that spares easy negatives.
        loss_weight: Factor of the whole loss.
    """

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, loss_weight: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """The term of every query and class, (..., C), in float32.

        Args:
            logits: (..., C), class logits.
            labels: (...,), matched class, C where there is none.
            quality: (...,), IoU with the matched ground truth, no gradient.
        """
        logits = logits.float()
        # NOTE: F.one_hot would make the host wait for the largest label.
        matched = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        target, weight = self.of_matched(quality[..., None])
        negative = self.alpha * logits.detach().sigmoid() ** self.gamma
        return self.loss_weight * F.binary_cross_entropy_with_logits(
            logits, matched * target, torch.where(matched, weight, negative), reduction='none')

    def of_matched(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Target and weight of a matched class."""
        return quality, quality


@MODELS.register_module()
class MatchabilityAwareLoss(IoUAwareVarifocalLoss):
    """Varifocal loss that takes poor matches seriously.

    Sources: `DEIM <https://arxiv.org/abs/2412.04234>`_, section 3.3. The target of the matched
    class is q^gamma, q the IoU of the matched boxes, and its weight 1; all others weigh p^gamma.

    NOTE: A matched pair of IoU 0 is trained towards 0 with weight 1, where the varifocal loss
    leaves it out. Scores come out lower: a threshold of 0.5 tuned for that loss is about 0.4 here.

    Args:
        gamma: Exponent of the target, and of the weight of the negatives.
        alpha: Weight of the negatives beside p^gamma.
        loss_weight: Factor of the whole loss.
    """

    def __init__(self, gamma: float = 1.5, alpha: float = 1.0, loss_weight: float = 1.0):
        super().__init__(alpha, gamma, loss_weight)

    def of_matched(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Target and weight of a matched class."""
        return quality ** self.gamma, torch.ones_like(quality)


def paired_overlaps(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of each box with its target.

    NOTE: mmdet's ``bbox_overlaps`` gives the same values, one of both a call, and makes the host
    wait for the device.

    Args:
        boxes: (..., 4), (x1, y1, x2, y2) in pixels.
        targets: (..., 4).
        eps: Least area that is divided by.

    Returns:
        (...,) each.
    """
    def area(sides: Tensor) -> Tensor:
        width, height = sides.unbind(-1)
        return width * height

    low, high = boxes.split(2, -1)
    target_low, target_high = targets.split(2, -1)
    overlap = area((high.minimum(target_high) - low.maximum(target_low)).clamp(min=0))
    union = (area(high - low) + area(target_high - target_low) - overlap).clamp(min=eps)
    hull = area((high.maximum(target_high) - low.minimum(target_low)).clamp(min=0)).clamp(min=eps)
    iou = overlap / union
    return iou, iou - (hull - union) / hull


@MODELS.register_module()
class PairedGIoULoss(nn.Module):
    """`Generalized IoU <https://arxiv.org/abs/1902.09630>`_ loss of matched boxes.

    NOTE: Called as mmdet's GIoULoss, with the same values; that one makes the host wait for the
    device, once for each call.

    Args:
        eps: Least area that is divided by.
        loss_weight: Factor of the whole loss.
    """

    def __init__(self, eps: float = 1e-6, loss_weight: float = 1.0):
        super().__init__()
        self.eps = eps
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: Tensor | float = 1.,
                reduction_override: str | None = None) -> Tensor:
        """Sum over the pairs, divided by `avg_factor`.

        Args:
            pred: (P, 4), (x1, y1, x2, y2) in pixels.
            target: (P, 4).
            avg_factor: Number of objects.
            reduction_override: 'none' for every term instead of the sum, as by mmdet's losses.

        Returns:
            Scalar, or (P,) without the division if `reduction_override` is 'none'.
        """
        terms = self.loss_weight * (1 - paired_overlaps(pred, target, self.eps)[1])
        return terms if reduction_override == 'none' else terms.sum() / avg_factor
