"""RT-DETR's classification loss."""
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class IoUAwareVarifocalLoss(nn.Module):
    """Varifocal loss whose targets are the IoUs of the matched boxes.

    Sources: `VarifocalNet <https://arxiv.org/abs/2008.13367>`_, equation 2, as RT-DETR (section
    4.3) weighs it: t for the matched class, alpha * p^gamma for all others.

    NOTE mmdet's VarifocalLoss differs twice: it lets gradients through the weight p^gamma, which
    makes those of easy negatives three times as large, and it treats a matched pair of IoU 0 as a
    negative, where RT-DETR gives it weight 0.

    Args:
        alpha: Weight of the negatives.
        gamma: Exponent that spares easy negatives.
        loss_weight: Factor of the whole loss.
    """

    use_sigmoid = True  # asked for by mmdet's heads

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, loss_weight: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor,
                avg_factor: Tensor | float) -> Tensor:
        """Sum over queries and classes, divided by `avg_factor`.

        Args:
            logits: (..., C), class logits.
            labels: (...,), matched class, C where there is none.
            quality: (...,), IoU with the matched ground truth, no gradient.
            avg_factor: Number of objects.

        Returns:
            Scalar.
        """
        logits = logits.float()
        matched = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits)
        target = matched * quality[..., None]
        weight = self.alpha * logits.detach().sigmoid() ** self.gamma * (1 - matched) + target
        loss = F.binary_cross_entropy_with_logits(logits, target, weight, reduction='sum')
        return self.loss_weight * loss / avg_factor
