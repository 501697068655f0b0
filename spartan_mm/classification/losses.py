"""The loss of the ImageNet recipe."""

import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class HardLabelSmoothLoss(nn.Module):
    """Cross entropy that smooths hard labels and takes the labels of mixed images as they are.

    NOTE: mmpretrain's ``LabelSmoothLoss`` smooths both. In the recipe every batch of the training
    is mixed, so that nothing is smoothed unless mixing is switched off (``model.train_cfg=None``).

    Args:
        label_smooth_val: The share of a label that is spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: If the share is outside of this range.
    """

    def __init__(self, label_smooth_val: float):
        super().__init__()
        if not 0 <= label_smooth_val < 1:
            raise ValueError(f'label_smooth_val={label_smooth_val} is not in [0, 1)')
        self.label_smooth_val = label_smooth_val

    def forward(self, cls_score: Tensor, label: Tensor, avg_factor: int | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            cls_score: (N, classes).
            label: Indices of the classes, (N, ), or a share for each class, (N, classes).
            avg_factor: What the sum over the batch is divided by; None for N.

        Returns:
            The loss, a scalar.
        """
        smoothing = self.label_smooth_val if label.dim() == 1 else 0.
        loss = F.cross_entropy(cls_score.float(), label, reduction='sum', label_smoothing=smoothing)
        return loss / (avg_factor or len(cls_score))
