"""What stands between some of the backbones and their classes."""
from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arch import check_choice
from .base import ConvNorm

VECTOR_NORMS = {'BN': nn.BatchNorm1d, 'LN': lambda channels: nn.LayerNorm(channels, 1e-6)}


@MODELS.register_module()
class PoolingNeck(BaseModule):
    """The average over a map's positions, after a batch norm (CAS-ViT) or a convolution (AFFNet).

    Args:
        in_channels: Channels C of the map.
        out_channels: Channels that a 1x1 convolution with batch norm and activation makes of them;
            None for a batch norm alone.
        act: Activation of the convolution, 'SiLU', 'GELU' or 'ReLU'.
    """

    def __init__(self, in_channels: int, out_channels: int | None = None, act: str = 'SiLU'):
        super().__init__()
        check_choice('act', act, ('SiLU', 'GELU', 'ReLU'))
        self.layer = (nn.BatchNorm2d(in_channels) if out_channels is None else
                      ConvNorm(in_channels, out_channels, act=getattr(nn, act)))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        """Maps (N, C, H, W), of which the last one counts, to its vectors (N, C')."""
        return self.layer(maps[-1]).mean((2, 3)),


class NormLinear(nn.Sequential):
    """A norm of vectors, 'BN', 'LN' (eps 1e-6) or None, and a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, norm: str | None):
        super().__init__()
        check_choice('norm', norm, (None, *VECTOR_NORMS))
        self.norm = VECTOR_NORMS[norm](in_channels) if norm else nn.Identity()
        self.fc = nn.Linear(in_channels, out_channels)
