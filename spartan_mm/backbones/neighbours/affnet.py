"""AFFNet: filters in the frequency domain that the map itself predicts.

"Adaptive Frequency Filters As Efficient Global Token Mixers", arXiv 2307.14008.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arch import check_choice
from ..layers import DropPath, GroupNorm1
from .base import ConvNorm, Neighbour, Stage

ACTS = {'SiLU': nn.SiLU, 'GELU': nn.GELU, 'ReLU': nn.ReLU}
_GROUPS = 8  # of channels, within which a filter is predicted
_SPARSITY = 0.01  # of what is predicted, so much goes to 0


class StdLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each position.

    NOTE: it divides by the standard deviation plus eps, not by the root of the variance plus eps.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True).sqrt() + self.eps)
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


LAYER_NORMS = {'LN': StdLayerNorm, 'GN': partial(GroupNorm1, eps=1e-5)}


class InvertedResidual(nn.Module):
    """1x1, 3x3 depthwise and 1x1 convolutions; the map is added where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, ratio: int, act: type[nn.Module],
                 stride: int = 1):
        super().__init__()
        hidden = (in_channels * ratio + 4) // 8 * 8
        self.expand = ConvNorm(in_channels, hidden, act=act)
        self.conv = ConvNorm(hidden, hidden, 3, stride, act, groups=hidden)
        self.reduce = ConvNorm(hidden, out_channels)
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        y = self.reduce(self.conv(self.expand(x)))
        return x + y if self.skips else y


class FrequencyFilter(nn.Module):
    """Adaptive frequency filter (Sec. 3.2): the spectrum times a mask that is made of it.

    The mask comes from two complex layers, block-diagonal over groups of channels. The product of
    spectra is a circular convolution with a kernel as large as the map.

    NOTE: computed in float32, in which the transform takes any size.
    """

    def __init__(self, channels: int, act: type[nn.Module]):
        super().__init__()
        width = channels // _GROUPS
        self.weight1, self.weight2 = (  # real and imaginary parts, (2, groups, in, out)
            nn.Parameter(torch.empty(2, _GROUPS, width, width)) for _ in range(2))
        self.bias1, self.bias2 = (
            nn.Parameter(torch.empty(2, _GROUPS, width)) for _ in range(2))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        device = x.device.type
        with (torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device)
              else nullcontext()):
            size, full = x.shape[-2:], x.float()
            spectrum = torch.fft.rfft2(full, norm='ortho')  # (N, C, H, W // 2 + 1)
            parts = [part.unflatten(1, (_GROUPS, -1)) for part in (spectrum.real, spectrum.imag)]
            parts = [self.act(part) for part in _complex_layer(*parts, self.weight1, self.bias1)]
            parts = _complex_layer(*parts, self.weight2, self.bias2)
            mask = torch.complex(*(F.softshrink(part, _SPARSITY).flatten(1, 2) for part in parts))
            filtered = torch.fft.irfft2(spectrum * mask, size, norm='ortho')
            return (filtered + full).to(x.dtype)


def _complex_layer(real: Tensor, imag: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """A linear layer of complex numbers along the channels of each group, (N, G, C, H, W)."""
    def product(x: Tensor, part: Tensor) -> Tensor:
        return torch.einsum('ngihw,gio->ngohw', x, part.float())

    shift = bias.float()[..., None, None]  # (2, G, C, 1, 1)
    return [product(real, weight[0]) - product(imag, weight[1]) + shift[0],
            product(imag, weight[0]) + product(real, weight[1]) + shift[1]]


class Unit(nn.Module):
    """An inverted residual and a filter, each after a norm, around which the map is added."""

    def __init__(self, channels: int, act: type[nn.Module], norm: Callable[[int], nn.Module],
                 drop_path_rate: float):
        super().__init__()
        self.norm1 = norm(channels)
        self.mlp = InvertedResidual(channels, channels, 2, act)
        self.norm2 = norm(channels)
        self.filter = FrequencyFilter(channels, act)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x + self.drop_path(self.filter(self.norm2(self.mlp(self.norm1(x)))))


class AFFBlock(nn.Module):
    """Units, and a fusion of what they make with what they got."""

    def __init__(self, channels: int, act: type[nn.Module], norm: Callable[[int], nn.Module],
                 drop_path_rates: Sequence[float]):
        super().__init__()
        self.units = nn.Sequential(*(Unit(channels, act, norm, rate) for rate in drop_path_rates))
        self.norm = norm(channels)
        self.proj = ConvNorm(channels, channels)
        self.fuse = ConvNorm(2 * channels, channels, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.fuse(torch.cat([x, self.proj(self.norm(self.units(x)))], 1))


@MODELS.register_module()
class AFFNet(Neighbour):
    """AFFNet: four stages of stride 4, 8, 16 and 32; the last three have filters.

    NOTE: the stem is the original's first convolution and its layer 1; stages are layers 2 to 5.
    NOTE: the configs of the published trainings are not public. Activation and norm are what the
    code's defaults and its origin, MobileViT, imply; the other choice is for whose weights differ.

    Args:
        arch: 'et', 't', 'base', or a dict with stem_channels (of two layers), channels (multiples
            of 8), depths (inverted residuals, then units) and mobile_ratio.
        in_channels: Channels of the image.
        act: 'SiLU', 'GELU' or 'ReLU'.
        norm: 'LN' (over the channels of a position) or 'GN' (over a whole sample), in the units.
        kwargs: See :class:`Neighbour`.

    Example:
        >>> backbone = AFFNet('et', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((64, 104, 144), (8, 16, 32))
    """

    arch_settings = {
        name: dict(stem_channels=32, depths=(2, 2, 4, 3), channels=channels, mobile_ratio=ratio)
        for name, channels, ratio in (
            ('et', (48, 64, 104, 144), 2), ('t', (48, 96, 160, 192), 4),
            ('base', (64, 128, 256, 320), 4))}

    def __init__(self, arch: str | Mapping = 'et', in_channels: int = 3, act: str = 'SiLU',
                 norm: str = 'LN', **kwargs):
        super().__init__(arch, **kwargs)
        check_choice('act', act, ACTS)
        check_choice('norm', norm, LAYER_NORMS)
        depths, channels = self.arch['depths'], self.arch['channels']
        for width in channels:
            if width % _GROUPS:
                raise ValueError(f'arch: channels={channels} must be multiples of {_GROUPS}')
        make_act, make_norm = ACTS[act], LAYER_NORMS[norm]
        ratio, before = self.arch['mobile_ratio'], (self.arch['stem_channels'], *channels)

        def make_blocks(stage: int) -> list[nn.Module]:
            width, first = channels[stage], sum(depths[:stage])
            if stage == 0:
                return [InvertedResidual(width, width, ratio, make_act) for _ in range(depths[0])]
            rates = self.drop_path_rates[first:first + depths[stage]]
            return [AFFBlock(width, make_act, make_norm, rates)]

        self.assemble(
            nn.Sequential(ConvNorm(in_channels, before[0] // 2, 3, 2, make_act),
                          InvertedResidual(before[0] // 2, before[0], ratio, make_act)),
            (Stage(InvertedResidual(before[i], width, ratio, make_act, 2), make_blocks(i),
                   with_cp=self.with_cp) for i, width in enumerate(channels)))

    @staticmethod
    def init_parameters(module: nn.Module) -> None:
        """Set the filters; all else keeps PyTorch's default."""
        if isinstance(module, FrequencyFilter):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)
