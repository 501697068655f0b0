"""CAS-ViT: attention without products of queries and keys, linear in the pixels.

"CAS-ViT: Convolutional Additive Self-attention Vision Transformers", arXiv 2408.03703.
"""
from collections.abc import Mapping

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import DropPath
from .base import ConvNorm, Neighbour, NormConv, Stage, depthwise, make_stem


class Context(nn.Module):
    """Phi of Eq. 6: gates a map by its positions, and the result by its channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.local = ConvNorm(channels, channels, 3, act=nn.ReLU, groups=channels, bias=True)
        self.position = nn.Conv2d(channels, 1, 1, bias=False)
        self.channel = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = x * self.position(self.local(x)).sigmoid()  # gates (N, 1, H, W)
        return x * self.channel(x.mean((2, 3), keepdim=True)).sigmoid()  # gates (N, C, 1, 1)


class AdditiveAttention(nn.Module):
    """Convolutional additive attention (Sec. 3.2): (Phi(q) + Phi(k)) times v."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = NormConv(channels, 3 * channels, bias=False)
        self.context_q = Context(channels)
        self.context_k = Context(channels)
        self.conv = depthwise(channels, 3)
        self.proj = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        query, key, value = self.qkv(x).chunk(3, 1)
        return self.proj(self.conv(self.context_q(query) + self.context_k(key)) * value)


class LocalPerception(nn.Module):
    """Convolutions that bring the neighbours in before attention."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = ConvNorm(channels, channels, bias=True)
        self.conv = depthwise(channels, 3)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.proj_out(F.gelu(self.conv(self.proj_in(x))))


class MLP(nn.Module):
    """Two 1x1 convolutions with a norm before them and GELU between."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = NormConv(channels, 4 * channels)
        self.proj_out = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.proj_out(F.gelu(self.proj_in(x)))


class Block(nn.Module):
    """Three residuals. NOTE: the first has no norm before it, and is never dropped."""

    def __init__(self, channels: int, drop_path_rate: float):
        super().__init__()
        self.local = LocalPerception(channels)
        self.attention = AdditiveAttention(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = x + self.local(x)
        x = x + self.drop_path(self.attention(x))
        return x + self.drop_path(self.mlp(x))


@MODELS.register_module()
class CASViT(Neighbour):
    """CAS-ViT: four stages of stride 4, 8, 16 and 32.

    Args:
        arch: 'xs', 's', or a dict with depths and channels.
        in_channels: Channels of the image.
        kwargs: See :class:`Neighbour`.

    Example:
        >>> backbone = CASViT('xs', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((56, 112, 220), (8, 16, 32))
    """

    arch_settings = {
        'xs': dict(depths=(2, 2, 4, 2), channels=(48, 56, 112, 220)),
        's': dict(depths=(3, 3, 6, 3), channels=(48, 64, 128, 256)),
    }
    out_norm_layer = nn.BatchNorm2d

    def __init__(self, arch: str | Mapping = 'xs', in_channels: int = 3, **kwargs):
        super().__init__(arch, **kwargs)
        channels = self.arch['channels']
        rates = iter(self.drop_path_rates)
        self.assemble(
            make_stem((in_channels, channels[0] // 2, channels[0]), nn.ReLU, True, bias=True),
            (Stage(ConvNorm(channels[i - 1], width, 3, 2, bias=True) if i else nn.Identity(),
                   [Block(width, next(rates)) for _ in range(depth)], with_cp=self.with_cp)
             for i, (depth, width) in enumerate(zip(self.arch['depths'], channels, strict=True))))
