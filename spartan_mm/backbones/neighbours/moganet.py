"""MogaNet, in the order in which its paper tells it.

"MogaNet: Multi-order Gated Aggregation Network", arXiv 2211.03295. Where the released code says
more, it decides.
"""
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import DropPath
from .base import (
    ConvNorm,
    Neighbour,
    NormConv,
    Stage,
    depthwise,
    init_by_fan_out,
    make_stem,
    scale_channels,
)

_SMALL = 1e-5  # what all scales start from


class MultiOrderGate(nn.Module):
    """Multi-order gated aggregation (Sec. 4.2): a gate times contexts of three orders.

    NOTE: the depthwise 5x5 comes first and sees all channels; after it these are split in
    1/8, 3/8 and 4/8, of which two go through wider kernels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.splits = channels // 8, channels // 8 * 3, channels // 2
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.sigma = nn.Parameter(torch.full((1, channels, 1, 1), _SMALL))
        self.gate = nn.Conv2d(channels, channels, 1)
        self.contexts = nn.ModuleList([
            depthwise(channels, 5), depthwise(self.splits[1], 5, 2),
            depthwise(self.splits[2], 7, 3)])
        self.value = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.proj_in(x)
        # Feature decomposition: a step away from the average over positions.
        x = F.silu(x + self.sigma * (x - x.mean((2, 3), keepdim=True)))

        low, middle, high = self.contexts[0](x).split(self.splits, 1)
        value = torch.cat([low, self.contexts[1](middle), self.contexts[2](high)], 1)
        return self.proj_out(F.silu(self.gate(x)) * F.silu(self.value(value)))


class ChannelAggregation(nn.Module):
    """Channel aggregation (Sec. 4.3): an MLP that steps away from one map of all its channels."""

    def __init__(self, channels: int, expand_ratio: int):
        super().__init__()
        hidden = channels * expand_ratio
        self.proj_in = NormConv(channels, hidden)
        self.conv = depthwise(hidden, 3)
        self.decompose = nn.Conv2d(hidden, 1, 1)
        self.sigma = nn.Parameter(torch.full((1, hidden, 1, 1), _SMALL))
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = F.gelu(self.conv(self.proj_in(x)))
        common = F.gelu(self.decompose(x))  # (N, 1, H, W)
        return self.proj_out(x + self.sigma * (x - common))


class Block(nn.Module):
    """Spatial, then channel aggregation.

    NOTE: the spatial half adds the normalized map to what it makes of it, inside of the scale.
    """

    def __init__(self, channels: int, expand_ratio: int, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.gate = MultiOrderGate(channels)
        self.layer_scale1 = nn.Parameter(torch.full((1, channels, 1, 1), _SMALL))
        self.mlp = ChannelAggregation(channels, expand_ratio)
        self.layer_scale2 = nn.Parameter(torch.full((1, channels, 1, 1), _SMALL))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        normed = self.norm1(x)
        x = x + self.drop_path(self.layer_scale1 * (self.gate(normed) + normed))
        y = self.mlp(x)
        return x + self.drop_path(y if self.layer_scale2 is None else self.layer_scale2 * y)

    def switch_to_deploy(self) -> None:
        """Fold the second scale; the first one scales the normalized map, too, and stays."""
        if self.layer_scale2 is not None:
            scale_channels(self.mlp.proj_out, self.layer_scale2)
            self.layer_scale2 = None


@MODELS.register_module()
class MogaNet(Neighbour):
    """MogaNet: four stages of stride 4, 8, 16 and 32.

    NOTE: the batch norm after each stage is part of the main path: the next stage gets the map that
    is returned.

    Args:
        arch: 'xt', 't', or a dict with depths, channels (multiples of 8) and expand_ratios.
        in_channels: Channels of the image.
        kwargs: See :class:`Neighbour`.

    Example:
        >>> backbone = MogaNet('xt', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((64, 96, 192), (8, 16, 32))
    """

    arch_settings = {
        'xt': dict(depths=(3, 3, 10, 2), channels=(32, 64, 96, 192), expand_ratios=(8, 8, 4, 4)),
        't': dict(depths=(3, 3, 12, 2), channels=(32, 64, 128, 256), expand_ratios=(8, 8, 4, 4)),
    }

    def __init__(self, arch: str | Mapping = 'xt', in_channels: int = 3, **kwargs):
        super().__init__(arch, **kwargs)
        depths, channels = self.arch['depths'], self.arch['channels']
        for width in channels:
            if width % 8:
                raise ValueError(f'arch: channels={channels} must be multiples of 8')
        rates = iter(self.drop_path_rates)
        self.assemble(
            make_stem((in_channels, channels[0] // 2, channels[0]), nn.GELU, bias=True),
            (Stage(ConvNorm(channels[i - 1], width, 3, 2, bias=True) if i else nn.Identity(),
                   [Block(width, ratio, next(rates)) for _ in range(depth)],
                   nn.BatchNorm2d(width), self.with_cp)
             for i, (depth, width, ratio) in enumerate(zip(
                 depths, channels, self.arch['expand_ratios'], strict=True))))

    @staticmethod
    def init_parameters(module: nn.Module) -> None:
        """Set what `module` itself holds."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
