"""Heads of classifiers that mmpretrain has not."""
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..backbones.neighbours.pooling import NormLinear


@MODELS.register_module()
class AveragedClsHead(LinearClsHead):
    """The mean of one or several linear layers, each with a norm of its own before it.

    NOTE: the second layer of published weights learned from another classifier, the first from the
    labels. Here is no teacher: all learn from the labels, by their mean.

    Args:
        num_classes: Number of classes.
        in_channels: Channels C of the vectors.
        norm: 'BN', 'LN' (eps 1e-6), or None for none.
        num_branches: Number of linear layers.
        kwargs: See mmpretrain's LinearClsHead.
    """

    def __init__(self, num_classes: int, in_channels: int, norm: str | None = None,
                 num_branches: int = 1, **kwargs):
        super().__init__(num_classes, in_channels, **kwargs)
        del self.fc
        self.branches = nn.ModuleList(
            NormLinear(in_channels, num_classes, norm) for _ in range(num_branches))

    def forward(self, feats: tuple[Tensor]) -> Tensor:
        """Vectors (N, C), of which the last ones count, to scores (N, classes)."""
        vectors = self.pre_logits(feats)
        return sum(branch(vectors) for branch in self.branches) / len(self.branches)
