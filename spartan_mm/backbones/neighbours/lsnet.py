"""LSNet: small kernels that each position gets from a view of its wider surroundings.

"LSNet: See Large, Focus Small", arXiv 2503.23135. CB is a convolution without bias and its norm.
"""
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import DropPath
from ..spartan import SqueezeExcitation
from .base import ConvNorm, Neighbour, Stage, as_depthwise, embed, make_stem

_SHARED = 8  # channels that have a kernel together
_HEADS, _KEYS = 4, 16  # of attention


class LocalMixer(nn.Module):
    """3x3 and 1x1 depthwise CB and the map itself, added, with squeeze-excitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvNorm(channels, channels, 3, groups=channels)
        self.point = ConvNorm(channels, channels, 1, groups=channels)
        # NOTE: a quarter of the channels, rounded to the nearest multiple of 8.
        self.se = SqueezeExcitation(channels, max(8, (channels // 4 + 4) // 8 * 8))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.se(self.conv(x) if self.point is None else self.conv(x) + self.point(x) + x)

    def switch_to_deploy(self) -> None:
        """Fold the three into one convolution."""
        if self.point is None:
            return
        for part in (self.conv, self.point):
            part.switch_to_deploy()
        conv, point = self.conv.conv, self.point.conv
        self.conv = as_depthwise(conv.weight + embed(point.weight + 1, 3), conv.bias + point.bias)
        self.point = None


class LSConv(nn.Module):
    """LS convolution (Sec. 3.2): a 7x7 kernel sees large and predicts 3x3 kernels, one a position.

    NOTE: the 8 channels that share a kernel are those of the same c mod C / 8. The released code
    has a GPU kernel for what nine shifted products do here.
    """

    def __init__(self, channels: int):
        super().__init__()
        half, kernels = channels // 2, channels // _SHARED
        self.squeeze = ConvNorm(channels, half, act=nn.ReLU)
        self.see = ConvNorm(half, half, 7, groups=half)
        self.mix = ConvNorm(half, half, act=nn.ReLU)
        self.predict = nn.Conv2d(half, 9 * kernels, 1)
        self.kernel_norm = nn.GroupNorm(kernels, 9 * kernels)
        self.out_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        height, width = x.shape[-2:]
        kernels = self.kernel_norm(self.predict(self.mix(self.see(self.squeeze(x)))))
        kernels = kernels.unflatten(1, (1, -1, 9))  # (N, 1, C / 8, 9, H, W)
        padded = F.pad(x, (1, 1, 1, 1)).unflatten(1, (_SHARED, -1))  # (N, 8, C / 8, H + 2, W + 2)
        out = sum(padded[..., i // 3:i // 3 + height, i % 3:i % 3 + width] * kernels[:, :, :, i]
                  for i in range(9))
        return self.out_norm(out.flatten(1, 2)) + x


class Attention(nn.Module):
    """Attention of four heads with a bias for each distance between positions.

    NOTE: the table of biases has the size that the network was trained at; for other maps it is
    interpolated. The authors' detector interpolates the matrix of all pairs instead, which mixes
    biases of unlike distances.

    Args:
        channels: Channels C of the map.
        bias_size: Height and width of the table.
    """

    def __init__(self, channels: int, bias_size: int):
        super().__init__()
        self.bias_size = bias_size, bias_size
        self.sizes = _HEADS * _KEYS, _HEADS * _KEYS, channels
        self.qkv = ConvNorm(channels, sum(self.sizes))
        self.query = ConvNorm(self.sizes[0], self.sizes[0], 3, groups=self.sizes[0])
        self.proj = ConvNorm(channels, channels)
        self.biases = nn.Parameter(torch.zeros(_HEADS, bias_size**2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        query, key, value = self.qkv(x).split(self.sizes, 1)
        query, key, value = (part.flatten(2).unflatten(1, (_HEADS, -1)).transpose(2, 3)
                             for part in (self.query(query), key, value))  # (N, heads, HW, D)
        pairs = query @ key.transpose(2, 3) / _KEYS**0.5 + self.bias_of_pairs(*x.shape[-2:])
        out = (pairs.softmax(-1) @ value).transpose(2, 3).reshape(x.shape)
        return x + self.proj(out.relu())

    def bias_of_pairs(self, height: int, width: int) -> Tensor:
        """(heads, HW, HW): the bias of each pair of positions."""
        table = self.biases.unflatten(1, self.bias_size)
        if (height, width) != self.bias_size:
            table = F.interpolate(table[None], (height, width), mode='bilinear',
                                  align_corners=True)[0]
        rows, columns = (torch.arange(size, device=table.device) for size in (height, width))
        rows, columns = ((at[:, None] - at).abs() for at in (rows, columns))
        # (heads, H, W, H, W)
        pairs = table[:, rows[:, None, :, None], columns[None, :, None, :]]
        return pairs.flatten(3).flatten(1, 2)


class Block(nn.Module):
    """A mixer and an MLP of CB, whose last norm starts at 0."""

    def __init__(self, channels: int, mixer: nn.Module, drop_path_rate: float):
        super().__init__()
        self.mixer = mixer
        self.proj_in = ConvNorm(channels, 2 * channels, act=nn.ReLU)
        self.proj_out = ConvNorm(2 * channels, channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.mixer(x)
        return x + self.drop_path(self.proj_out(self.proj_in(x)))


@MODELS.register_module()
class LSNet(Neighbour):
    """LSNet: four stages of stride 8, 16, 32 and 64.

    RT-DETR's strides are ``out_indices=(0, 1, 2)``, which leaves stage 4 out.

    NOTE: of a stage's blocks every second one sees large; in stage 4 it is attention. Drop path,
    which the authors do not use, drops the MLPs alone.

    Args:
        arch: 't', 's', or a dict with depths and channels (multiples of 16).
        in_channels: Channels of the image.
        bias_size: Height and width of the map of stage 4 at the size of the training: 4 at 224.
        kwargs: See :class:`Neighbour`.

    Example:
        >>> backbone = LSNet('t', out_indices=(0, 1, 2)).eval()
        >>> backbone.out_channels, backbone.strides
        ((64, 128, 256), (8, 16, 32))
    """

    arch_settings = {
        't': dict(depths=(0, 2, 8, 10), channels=(64, 128, 256, 384)),
        's': dict(depths=(1, 2, 8, 10), channels=(96, 192, 320, 448)),
    }
    first_stride = 8

    def __init__(self, arch: str | Mapping = 't', in_channels: int = 3, bias_size: int = 4,
                 **kwargs):
        super().__init__(arch, **kwargs)
        depths, channels = self.arch['depths'], self.arch['channels']
        for width in channels:
            if width % 16:
                raise ValueError(f'arch: channels={channels} must be multiples of 16')
        rates = iter(self.drop_path_rates)

        def make_mixer(stage: int, block: int) -> nn.Module:
            width = channels[stage]
            if block % 2 == 0:
                return LocalMixer(width)
            return Attention(width, bias_size) if stage == len(depths) - 1 else LSConv(width)

        stem = (in_channels, channels[0] // 4, channels[0] // 2, channels[0])
        self.assemble(make_stem(stem, nn.ReLU), (
            Stage(nn.Sequential(
                      ConvNorm(channels[i - 1], channels[i - 1], 3, 2, groups=channels[i - 1]),
                      ConvNorm(channels[i - 1], width)) if i else nn.Identity(),
                  [Block(width, make_mixer(i, block), next(rates)) for block in range(depth)],
                  with_cp=self.with_cp)
            for i, (depth, width) in enumerate(zip(depths, channels, strict=True))))

    @staticmethod
    def init_parameters(module: nn.Module) -> None:
        """Let residuals start at 0."""
        if isinstance(module, Attention):
            nn.init.zeros_(module.proj.norm.weight)
        elif isinstance(module, Block):
            nn.init.zeros_(module.proj_out.norm.weight)
