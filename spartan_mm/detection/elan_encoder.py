"""D-FINE's neck: RT-DETR's hybrid encoder with other blocks between the maps.

Source: `D-FINE <https://arxiv.org/abs/2410.13842>`_, appendix A, with the fusion blocks of
`GELAN <https://arxiv.org/abs/2402.13616>`_ and the downsampling of
`YOLOv10 <https://arxiv.org/abs/2405.14458>`_.
"""
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from .forms import fuse_csp, fuse_elan
from .hybrid_encoder import ConvNorm, HybridEncoder, RepVGGBlock, resized


class CSPPath(nn.Module):
    """Two 1x1 paths from a map, RepVGG blocks on one of them, summed."""

    deploy = False
    switch_to_deploy = fuse_csp

    def __init__(self, in_channels: int, channels: int, num_blocks: int):
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, act=True)
        self.conv2 = ConvNorm(in_channels, channels, act=True)
        self.blocks = nn.Sequential(*(RepVGGBlock(channels, channels) for _ in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        if self.deploy:
            left, right = F.silu(self.both(x)).chunk(2, 1)
        else:
            left, right = self.conv1(x), self.conv2(x)
        return self.blocks(left) + right


class ELANBlock(nn.Module):
    """Fuse two maps: each of two stages goes on from the one before it, all are kept.

    Args:
        channels: Channels of either map and of the output.
        hidden_channels: Channels of a stage.
        num_blocks: RepVGG blocks in a stage.
    """

    deploy = False
    switch_to_deploy = fuse_elan

    def __init__(self, channels: int, hidden_channels: int, num_blocks: int):
        super().__init__()
        self.paths = channels, channels
        self.conv1 = ConvNorm(2 * channels, 2 * channels, act=True)
        self.stages = nn.ModuleList(
            nn.Sequential(CSPPath(before, hidden_channels, num_blocks),
                          ConvNorm(hidden_channels, hidden_channels, 3, act=True))
            for before in (channels, hidden_channels))
        self.conv2 = ConvNorm(2 * (channels + hidden_channels), channels, act=True)

    def forward(self, other: Tensor, own: Tensor) -> Tensor:
        """Fuse two maps, see :meth:`CSPRepLayer.forward`."""
        if self.deploy:
            both = F.silu(self.own(own) + resized(self.other(other), own))
        else:
            both = self.conv1(torch.cat([resized(other, own), own], 1))
        maps = list(both.chunk(2, 1))
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return self.conv2(torch.cat(maps, 1))


class SCDown(nn.Module):
    """Halve a map's sides, each channel by itself after all were mixed."""

    def __init__(self, channels: int):
        super().__init__()
        self.pointwise = ConvNorm(channels, channels)
        self.depthwise = ConvNorm(channels, channels, 3, stride=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        return self.depthwise(self.pointwise(x))


@MODELS.register_module()
class ELANEncoder(HybridEncoder):
    """D-FINE's neck: AIFI on the coarsest map, then fusion by ELAN blocks.

    Args are those of :class:`HybridEncoder`, where `expansion` is the width of both stages of a
    fusion block together, and `num_blocks` counts the RepVGG blocks of each. There is no
    `block_channels`.

    Raises:
        ValueError: As HybridEncoder, or `block_channels` is given.

    Examples:
        >>> import torch
        >>> neck = ELANEncoder(in_channels=[64, 96, 192], embed_dims=64, ffn_dims=128)
        >>> maps = [torch.rand(1, c, s, s) for c, s in ((64, 16), (96, 8), (192, 4))]
        >>> [tuple(x.shape) for x in neck(maps)]
        [(1, 64, 16, 16), (1, 64, 8, 8), (1, 64, 4, 4)]
    """

    def make_block(self, expansion: float, num_blocks: int,
                   block_channels: int | None) -> nn.Module:
        """What fuses two maps."""
        if block_channels is not None:
            raise ValueError('ELANEncoder takes no block_channels: leave them out')
        hidden_channels = round(expansion * self.embed_dims // 2)
        return ELANBlock(self.embed_dims, hidden_channels, num_blocks)

    def make_lateral(self) -> nn.Module:
        """What a map goes through before it is taken down: a convolution without activation."""
        return ConvNorm(self.embed_dims, self.embed_dims)

    def make_downsample(self) -> nn.Module:
        """What halves the sides of a map."""
        return SCDown(self.embed_dims)
