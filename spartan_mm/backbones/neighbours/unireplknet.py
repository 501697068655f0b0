"""UniRepLKNet: large kernels that training splits in a large one and dilated small ones.

"UniRepLKNet: A Universal Perception Large-Kernel ConvNet", arXiv 2311.15599 and 2410.08049.
"""
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import DropPath, LayerNorm2d, call_in_turn
from ..spartan import SqueezeExcitation
from .base import ConvNorm, Neighbour, Stage, as_depthwise, depthwise, embed, make_stem

_EPS = 1e-6  # of layer norms; batch norms have PyTorch's default

# Kernel size and dilation of the branches beside a kernel of each size.
BRANCHES = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparam(nn.Module):
    """A large depthwise kernel and dilated small ones beside it, added up (2311.15599, Sec. 3.2).

    A small kernel of dilation r is a large one with zeros between: all fold into one.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        branch = partial(ConvNorm, channels, channels, groups=channels)
        self.large = branch(kernel_size)
        self.small = nn.ModuleDict({
            f'k{k}_{r}': branch(k, dilation=r) for k, r in BRANCHES[kernel_size]})

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.large(x) + sum(branch(x) for branch in self.small.values())

    def merge(self) -> nn.Conv2d:
        """The one convolution that does the same."""
        branches = [self.large, *self.small.values()]
        for branch in branches:
            branch.switch_to_deploy()
        convs = [branch.conv for branch in branches]
        size = convs[0].kernel_size[0]
        return as_depthwise(sum(embed(conv.weight, size, conv.dilation[0]) for conv in convs),
                            sum(conv.bias for conv in convs))


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its share of the response, over maps (N, H, W, C).

    As in ConvNeXt V2 (arXiv 2301.00808).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to the same shape."""
        response = x.norm(dim=(1, 2), keepdim=True)  # (N, 1, 1, C)
        share = response / (response.mean(-1, keepdim=True) + _EPS)
        x = (self.gamma * share + 1) * x
        return x if self.beta is None else x + self.beta


class Block(nn.Module):
    """Depthwise kernel, squeeze-excitation and an MLP with global response norm.

    NOTE: the second linear layer has no bias, the batch norm behind it has one.
    """

    def __init__(self, channels: int, kernel_size: int, drop_path_rate: float):
        super().__init__()
        self.dwconv = (DilatedReparam(channels, kernel_size) if kernel_size in BRANCHES
                       else depthwise(channels, kernel_size, bias=False))
        self.norm1 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, channels // 4)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.full((channels, ), 1e-6))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        y = call_in_turn((self.dwconv, self.norm1, self.se), x).permute(0, 2, 3, 1)  # (N, H, W, C)
        y = self.fc2(self.grn(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)
        y = self.norm2(y)
        return x + self.drop_path(y if self.gamma is None else self.gamma.view(-1, 1, 1) * y)

    def switch_to_deploy(self) -> None:
        """Fold kernels and norms, and the scale and GRN's bias into the second linear layer."""
        if self.gamma is None:
            return
        if isinstance(self.dwconv, DilatedReparam):
            self.dwconv = self.dwconv.merge()
        self.dwconv = fuse_conv_bn_eval(self.dwconv, self.norm1)
        slope = self.norm2.weight * (self.norm2.running_var + self.norm2.eps).rsqrt()
        bias = self.fc2.weight @ self.grn.beta.flatten() - self.norm2.running_mean
        self.fc2.bias = nn.Parameter(self.gamma * (slope * bias + self.norm2.bias), False)
        self.fc2.weight.mul_((self.gamma * slope).view(-1, 1))
        self.norm1 = self.norm2 = nn.Identity()
        self.gamma = self.grn.beta = None


@MODELS.register_module()
class UniRepLKNet(Neighbour):
    """UniRepLKNet: four stages of stride 4, 8, 16 and 32.

    Args:
        arch: 'a', 'f', or a dict with depths, channels (multiples of 4) and kernel_sizes; sizes of
            7 to 17 have branches in training, 3 and 5 have none.
        in_channels: Channels of the image.
        kwargs: See :class:`Neighbour`.

    Example:
        >>> backbone = UniRepLKNet('a', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((80, 160, 320), (8, 16, 32))
    """

    arch_settings = {
        'a': dict(depths=(2, 2, 6, 2), channels=(40, 80, 160, 320), kernel_sizes=(3, 13, 13, 13)),
        'f': dict(depths=(2, 2, 6, 2), channels=(48, 96, 192, 384), kernel_sizes=(3, 13, 13, 13)),
    }
    out_norm_layer = staticmethod(partial(LayerNorm2d, eps=_EPS))

    def __init__(self, arch: str | Mapping = 'a', in_channels: int = 3, **kwargs):
        super().__init__(arch, **kwargs)
        depths, channels = self.arch['depths'], self.arch['channels']
        for size in self.arch['kernel_sizes']:
            if size not in (3, 5, *BRANCHES):
                raise ValueError(f'arch: kernel_sizes={self.arch["kernel_sizes"]} must be of '
                                 f'{", ".join(map(str, (3, 5, *BRANCHES)))}')
        rates = iter(self.drop_path_rates)
        down = dict(bias=True, norm=self.out_norm_layer)
        self.assemble(
            make_stem((in_channels, channels[0] // 2, channels[0]), nn.GELU, **down),
            (Stage(ConvNorm(channels[i - 1], width, 3, 2, **down) if i else nn.Identity(),
                   [Block(width, size, next(rates)) for _ in range(depth)], with_cp=self.with_cp)
             for i, (depth, width, size) in enumerate(zip(
                 depths, channels, self.arch['kernel_sizes'], strict=True))))

    @staticmethod
    def init_parameters(module: nn.Module) -> None:
        """Set what `module` itself holds.

        NOTE: the authors cut the normal distribution at 100 standard deviations: it is normal.
        """
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
