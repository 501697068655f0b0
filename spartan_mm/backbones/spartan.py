"""The SpaRTAN backbone, in the order in which the paper tells it.

"SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition". Where the
paper's words and the authors' released model differ, the released model decides and a NOTE says so.
"""
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from .functional import (
    Branch,
    Scale,
    cache_parts,
    convolve,
    finish,
    fold_modulation,
    folds_modulation,
    gated_projection,
    knows,
    layer_norm,
    records,
    split,
    waves,
)
from .gradients import has_own_gradient, mix_space, mix_waves
from .opaque import Opaque

ACTIVATIONS = {'GELU': nn.GELU, 'SiLU': nn.SiLU}
CONV_TYPES = ('full', 'depthwise')

# NOTE: PyTorch's default is 1e-5; the released weights were trained with 1e-6 in every norm.
NORM_EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each position on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map.

        Args:
            x: (N, C, H, W).

        Returns:
            (N, C, H, W).
        """
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerNorm(nn.GroupNorm):
    """Layer normalisation over the channels and positions of a sample together.

    Args:
        channels: Channels of the map.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__(1, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


# NOTE: what the paper calls LayerNorm ('LN') is, in the released model, a GroupNorm with one group:
# its statistics run over channels and positions together. 'LN2d' is the per-position norm of
# ConvNeXt.
NORMS = {
    'BN': partial(nn.BatchNorm2d, eps=NORM_EPS),
    'LN': partial(LayerNorm, eps=NORM_EPS),
    'LN2d': partial(LayerNorm2d, eps=NORM_EPS),
}


class ConvNormAct(nn.Module):
    """Convolution without bias, then norm, then activation.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel.
        stride: Stride.
        padding: Zeros added on each side.
        dilation: Spacing of the kernel's taps.
        groups: Groups of the convolution.
        norm: A key of ``NORMS``.
        act: A key of ``ACTIVATIONS``.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size: int,
                 stride: int = 1,
                 padding: int = 0,
                 dilation: int = 1,
                 groups: int = 1,
                 norm: str = 'BN',
                 act: str = 'GELU'):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                              groups, bias=False)
        self.norm = NORMS[norm](out_channels)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W')."""
        return finish(self.begin(x))

    def begin(self, x: Tensor, squeeze_excitation: nn.Module | None = None) -> Branch:
        """Convolve (N, C_in, H, W), see ``convolve``."""
        return convolve(x, self.conv, self.norm, self.act, squeeze_excitation)

    def tail(self, squeeze_excitation: nn.Module | None = None) -> Branch:
        """What follows the convolution, without a map."""
        return Branch(None, self.norm, self.act, squeeze_excitation)

    def switch_to_deploy(self) -> None:
        """Fold a batch norm into the convolution; other norms look at the map and stay."""
        if isinstance(self.norm, _BatchNorm):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class SqueezeExcitation(nn.Module):
    """Gates for the channels of a map, computed from their averages.

    Args:
        channels: Channels of the map.
        squeeze_channels: Width of the hidden layer between the averages and the gates.
    """

    def __init__(self, channels: int, squeeze_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze_channels, 1)
        self.expand = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, averages: Tensor) -> Tensor:
        """Averages over the positions (N, C) to gates (N, C), from 0 to 1."""
        hidden = F.linear(averages, self.squeeze.weight.flatten(1), self.squeeze.bias).relu()
        return F.linear(hidden, self.expand.weight.flatten(1), self.expand.bias).sigmoid()


class Mixer(nn.Module):
    """What the mixers of positions and of channels have in common: ``proj_in`` and ``proj_out``.

    The deploy form of a mixer has the affine of the norm before it in the one, and the layer scale
    after it in the other.
    """

    proj_in: nn.Conv2d
    proj_out: nn.Conv2d
    #: Whether every use of the input is linear, so that an affine before it can be folded.
    linear_input = True

    def project_out(self, branches: Sequence[Branch], scale: Scale | None,
                    residual: Tensor | None) -> Tensor:
        """Concatenate the gated branches and project them, see ``gated_projection``."""
        return gated_projection(
            branches, self.proj_out.weight, self.proj_out.bias, scale, residual)

    def switch_to_deploy(self, slope: Tensor | None, offset: Tensor | None,
                         scale: Tensor) -> None:
        """Fold what precedes and follows the mixer, and what it consists of.

        Args:
            slope: The affine (C,) that the mixer's input would go through; None for none.
            offset: (C,), likewise.
            scale: What its output would be multiplied by, (C,).
        """
        for module in self.children():
            for part in module.modules():
                if isinstance(part, ConvNormAct):
                    part.switch_to_deploy()
        if slope is not None:
            self.fold_affine(slope, offset)
        self.proj_out.weight.mul_(scale.view(-1, 1, 1, 1))
        self.proj_out.bias.mul_(scale)

    def fold_affine(self, slope: Tensor, offset: Tensor) -> None:
        """Fold an affine of the input into the first projection."""
        self.proj_in.bias.add_(self.proj_in.weight.flatten(1) @ offset)
        self.proj_in.weight.mul_(slope.view(-1, 1, 1))


class SMixer(Mixer):
    """Spatial mixing by two branches of different receptive field (Sec. III-B, Eqs. 3 and 6).

    NOTE: the paper describes the low-frequency kernel by its receptive field alone. As released it
    is two dilated 3x3 convolutions with neither norm nor activation between them.

    Args:
        channels: Channels of the input and the output, a multiple of 8: half of them in each
            branch, an eighth of them in each squeeze.
        conv_type: 'full' or 'depthwise' 3x3 convolutions.
        low_freq_kernel: 3 for the stacked pair of the low-frequency branch, 5 for one dilated 5x5
            in its place (Table V).
        norm: Norm after each branch's convolution, a key of ``NORMS``.
        act: Activation after it, a key of ``ACTIVATIONS``.
    """

    def __init__(self,
                 channels: int,
                 conv_type: str = 'full',
                 low_freq_kernel: int = 3,
                 norm: str = 'BN',
                 act: str = 'GELU'):
        super().__init__()
        inner = channels // 2
        groups = inner if conv_type == 'depthwise' else 1
        conv = partial(ConvNormAct, inner, inner, groups=groups, norm=norm, act=act)

        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.gamma = nn.Parameter(torch.empty(1, inner, 1, 1))

        self.high_freq = conv(3, padding=1)
        self.high_se = SqueezeExcitation(inner, inner // 4)

        if low_freq_kernel == 3:
            self.low_freq = nn.Sequential(
                nn.Conv2d(inner, inner, 3, padding=2, dilation=2, groups=groups, bias=False),
                conv(3, padding=2, dilation=2))
        else:
            self.low_freq = conv(5, padding=4, dilation=2)
        self.low_se = SqueezeExcitation(inner, inner // 4)

        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, scale: Scale | None = None,
                residual: Tensor | None = None) -> Tensor:
        """Mix the positions of a map.

        Args:
            x: (N, C, H, W).
            scale: What the result is multiplied by; None for 1.
            residual: What is added to it then, (N, C, H, W); None for 0.

        Returns:
            (N, C, H, W).
        """
        low_freq = self.low_freq if isinstance(self.low_freq, nn.Sequential) else [self.low_freq]
        *convs, last = low_freq
        tails = [self.high_freq.tail(self.high_se), last.tail(self.low_se)]
        stacks = [[self.high_freq.conv], [*convs, last.conv]]
        if has_own_gradient(tails, [*chain(*stacks)]):
            return mix_space(x, self.proj_in, self.gamma, stacks, tails, self.proj_out, scale,
                             residual)

        x = self.decompose(x)
        high = self.high_freq.begin(x, self.high_se)
        for conv in convs:
            x = conv(x)
        return self.project_out([high, last.begin(x, self.low_se)], scale, residual)

    def decompose(self, x: Tensor) -> Tensor:
        """Project to the branches' width; gamma then weighs what differs from the average (Eq. 3).

        With z = W x + b, z + gamma * (z - GAP(z)) is (1 + gamma) W x + b - gamma * W GAP(x): a
        projection, and a number for each sample and channel.

        Args:
            x: (N, C, H, W).

        Returns:
            (N, C / 2, H, W).
        """
        average, weight = x.mean((2, 3)), self.proj_in.weight
        if hasattr(self, 'shift'):
            shift = self.shift(average)
        else:
            gamma = self.gamma.flatten()
            shift = self.proj_in.bias - gamma * F.linear(average, weight.flatten(1))
            weight = weight * (1 + gamma.view(-1, 1, 1, 1))
        x = F.conv2d(x, weight)
        return x.add_(shift[:, :, None, None].to(x.dtype))

    def fold_affine(self, slope: Tensor, offset: Tensor) -> None:
        gamma, weight = self.gamma.flatten(), self.proj_in.weight.flatten(1)
        self.shift = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        self.shift.weight.copy_(-gamma[:, None] * weight * slope)
        self.shift.bias.copy_(self.proj_in.bias + weight @ offset)
        self.proj_in.weight.mul_((1 + gamma).view(-1, 1, 1, 1) * slope.view(-1, 1, 1))
        self.proj_in.bias = None
        del self.gamma


class ConvMixer(Mixer):
    """The plain convolutions that Table IV compares the SMixer with.

    NOTE: the paper says no more than "a non-linear projection using convolutions". Read here as
    what is left of the SMixer without its additions (feature decomposition, the dilated branch, the
    squeeze-excitation): the same two projections around one 3x3 convolution of the same type, norm
    and activation.

    Args:
        channels: Channels of the input and the output.
        conv_type: 'full' or 'depthwise' 3x3 convolution.
        norm: Norm after it, a key of ``NORMS``.
        act: Activation after the norm, a key of ``ACTIVATIONS``.
    """

    def __init__(self, channels: int, conv_type: str = 'full', norm: str = 'BN',
                 act: str = 'GELU'):
        super().__init__()
        inner = channels // 2
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.conv = ConvNormAct(inner, inner, 3, padding=1, norm=norm, act=act,
                                groups=inner if conv_type == 'depthwise' else 1)
        self.proj_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, scale: Scale | None = None,
                residual: Tensor | None = None) -> Tensor:
        """Mix the positions of a map, see ``SMixer.forward``."""
        return self.project_out([self.conv.begin(self.proj_in(x))], scale, residual)


class CMixer(Mixer):
    """Channel mixing by superposed and modulated waves (Sec. III-C, Eqs. 7 to 10).

    Every hidden channel is a wave of an amplitude and a phase. At each position the wave whose
    index is that of the strongest input channel is added to all; pairs of channels are then
    modulated as complex numbers, and a 3x3 convolution refines the result.

    NOTE: the sine and cosine of the phase are replaced by a 1x1 convolution and the activation, as
    the paper proposes at the end of its Sec. III-C; Table VI's activation of the building block
    covers it.

    NOTE: the paper's "full and depthwise" is, in the released model, one group per hidden channel
    where the SMixer is full, and one group per *input* channel (expand_ratio hidden channels each)
    where it is depthwise.

    Args:
        channels: Channels C of the input and the output, a multiple of 4.
        expand_ratio: Hidden channels per input channel, an integer from 1 upwards.
        conv_type: 'full' or 'depthwise', of the stage; see the note.
        norm: Norm after the 3x3 convolution, a key of ``NORMS``.
        act: Activation of the phase and after the norm, a key of ``ACTIVATIONS``.
    """

    linear_input = False  # its argmax

    def __init__(self,
                 channels: int,
                 expand_ratio: int,
                 conv_type: str = 'full',
                 norm: str = 'BN',
                 act: str = 'GELU'):
        super().__init__()
        hidden = channels * expand_ratio
        # The phases' hidden channels first, then the amplitudes'.
        self.proj_in = nn.Conv2d(channels, 2 * hidden, 1)
        self.act = ACTIVATIONS[act]()
        # NOTE: a real (pairs, 2) table of real and imaginary parts. The released rank-5 tensor
        # keeps the model from being moved to channels_last, and a complex one from float16.
        self.complex_weight = nn.Parameter(torch.empty(hidden // 2, 2))
        self.refine = ConvNormAct(hidden, hidden, 3, padding=1, norm=norm, act=act,
                                  groups=channels if conv_type == 'depthwise' else hidden)
        self.se = SqueezeExcitation(hidden, channels // 4)
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, scale: Scale | None = None,
                residual: Tensor | None = None) -> Tensor:
        """Mix the channels of a map.

        Args:
            x: (N, C, H, W).
            scale: What the result is multiplied by; None for 1.
            residual: What is added to it then, (N, C, H, W); None for 0.

        Returns:
            (N, C, H, W).
        """
        strongest = x.argmax(dim=1, keepdim=True)  # (N, 1, H, W), values below C
        conv, tail = self.refine.conv, self.refine.tail(self.se)
        if knows(self.act) and has_own_gradient([tail], [conv]):
            return mix_waves(x, strongest, self.proj_in, self.act, self.complex_weight, conv, tail,
                             self.proj_out, scale, residual)

        # The modulation costs nothing where the weights of the convolution can take it.
        kernel, complex_weight = conv.weight, getattr(self, 'complex_weight', None)
        if complex_weight is not None and folds_modulation(kernel):
            kernel, complex_weight = fold_modulation(complex_weight, kernel), None
        wave = waves(x, strongest, self.proj_in.weight, self.proj_in.bias, self.act,
                     complex_weight)
        branch = convolve(wave.to(x.dtype), conv, tail.norm, tail.act, self.se, kernel)
        return self.project_out([branch], scale, residual)

    def switch_to_deploy(self, slope: Tensor | None, offset: Tensor | None,
                         scale: Tensor) -> None:
        super().switch_to_deploy(slope, offset, scale)
        conv = self.refine.conv
        if folds_modulation(conv.weight):
            conv.weight.copy_(fold_modulation(self.complex_weight, conv.weight))
            del self.complex_weight


class MLP(Mixer):
    """The plain MLP, with or without squeeze-excitation, that Table IV compares the CMixer with.

    NOTE: "vanilla" is taken at its word: two 1x1 convolutions and the activation between them, no
    3x3. The squeeze-excitation acts on the hidden channels and is as wide as the CMixer's.

    Args:
        channels: Channels C of the input and the output, a multiple of 4.
        expand_ratio: Hidden channels per input channel, an integer from 1 upwards.
        squeeze_excitation: Whether the hidden channels are gated.
        act: Activation, a key of ``ACTIVATIONS``.
    """

    def __init__(self, channels: int, expand_ratio: int, squeeze_excitation: bool = False,
                 act: str = 'GELU'):
        super().__init__()
        hidden = channels * expand_ratio
        self.proj_in = nn.Conv2d(channels, hidden, 1)
        self.act = ACTIVATIONS[act]()
        self.se = SqueezeExcitation(hidden, channels // 4) if squeeze_excitation else None
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, scale: Scale | None = None,
                residual: Tensor | None = None) -> Tensor:
        """Mix the channels of a map, see ``CMixer.forward``."""
        branch = convolve(x, self.proj_in, nn.Identity(), self.act, self.se)
        return self.project_out([branch], scale, residual)


class DropPath(nn.Module):
    """Drop a residual branch for some samples of a batch and scale up the others to compensate.

    Args:
        rate: Probability of dropping a sample's branch, in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, layer_scale: Tensor, samples: int) -> Scale:
        """Draw what each sample's branch is multiplied by.

        Args:
            layer_scale: (1, C, 1, 1).
            samples: N.

        Returns:
            The layer scale and the factors of the samples.
        """
        if not self.training or self.rate == 0:
            return Scale(layer_scale)
        keep = 1 - self.rate
        return Scale(layer_scale, layer_scale.new_empty(samples).bernoulli_(keep).div_(keep))

    def extra_repr(self) -> str:
        return f'rate={self.rate:.4g}'


class _KeepStatistics:
    """Context, free to enter again, in which batch norms leave their running statistics alone."""

    def __init__(self, module: nn.Module):
        self.norms = [m for m in module.modules()
                      if isinstance(m, _BatchNorm) and m.track_running_stats]

    def __enter__(self):
        # Not track_running_stats: without it a norm saves fewer tensors, which checkpoint refuses.
        self.saved = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.

    def __exit__(self, *exception):
        for norm, (momentum, num_batches_tracked) in zip(self.norms, self.saved, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)


class Block(nn.Module):
    """The building block: spatial then channel mixing, as scaled residuals (Eqs. 1 and 2).

    Args:
        channels: Channels of the input and the output.
        smixer: Module that mixes positions, (N, C, H, W) to the same shape.
        cmixer: Module that mixes channels, (N, C, H, W) to the same shape.
        norm: Norm before either mixer, a key of ``NORMS``.
        drop_path_rate: Probability of dropping either branch for a sample, in [0, 1).
        with_cp: Whether to recompute the block in the backward pass instead of storing its
            activations.
    """

    def __init__(self,
                 channels: int,
                 smixer: nn.Module,
                 cmixer: nn.Module,
                 norm: str = 'LN',
                 drop_path_rate: float = 0.,
                 with_cp: bool = False):
        super().__init__()
        self.norm1 = NORMS[norm](channels)
        self.smixer = smixer
        self.layer_scale1 = nn.Parameter(torch.empty(1, channels, 1, 1))

        self.norm2 = NORMS[norm](channels)
        self.cmixer = cmixer
        self.layer_scale2 = nn.Parameter(torch.empty(1, channels, 1, 1))

        self.drop_path = DropPath(drop_path_rate)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if self.with_cp and torch.is_grad_enabled():
            # A second pass over the same batch must not count twice in the running statistics.
            contexts = (nullcontext(), _KeepStatistics(self))
            return checkpoint(self._mix, x, use_reentrant=False, context_fn=lambda: contexts)
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        for norm, mixer, layer_scale in (
                (self.norm1, self.smixer, self.layer_scale1),
                (self.norm2, self.cmixer, self.layer_scale2)):
            # The mixer multiplies by the scale and adds the residual in its last projection.
            scale = None if layer_scale is None else self.drop_path(layer_scale, len(x))
            x = mixer(norm(x), scale, x)
        return x

    def switch_to_deploy(self) -> None:
        """Fold norms, layer scales and the mixers' parts."""
        self.norm1 = self._fold(self.norm1, self.smixer, self.layer_scale1)
        self.norm2 = self._fold(self.norm2, self.cmixer, self.layer_scale2)
        self.layer_scale1 = self.layer_scale2 = None

    @staticmethod
    def _fold(norm: nn.Module, mixer: Mixer, layer_scale: Tensor) -> nn.Module:
        """Fold what surrounds a mixer into it; what is left of the norm before it is returned."""
        slope, offset = norm.weight, norm.bias
        if not mixer.linear_input:
            slope = offset = None
        elif isinstance(norm, _BatchNorm):
            slope = norm.weight * (norm.running_var + norm.eps).rsqrt()
            offset = norm.bias - norm.running_mean * slope
            norm = nn.Identity()
        else:
            norm.weight = norm.bias = None
        mixer.switch_to_deploy(slope, offset, layer_scale.flatten())
        return norm


class Blocks(Opaque, nn.Sequential):
    """Blocks one after the other, in evaluation on parts of a batch that fit a CPU's cache."""

    def run(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if self.training or records():
            return nn.Sequential.forward(self, x)
        # In evaluation no sample depends on another.
        widest = max(block.cmixer.proj_in.out_channels for block in self)
        parts = [nn.Sequential.forward(self, part) for part in split(x, cache_parts(x, widest))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Stage(nn.Module):
    """A patch embedding, where the stage has one, and the blocks that work at its resolution.

    Args:
        embedding: Module that halves height and width; an identity in the first stage, which
            follows the stem.
        blocks: The blocks, in order.
    """

    def __init__(self, embedding: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.embedding = embedding
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H // 2, W // 2); the same size in the first stage."""
        return self.blocks(self.embedding(x))


@MODELS.register_module()
class SpaRTAN(BaseModule):
    """SpaRTAN, a lightweight convolutional backbone with four stages of stride 4, 8, 16 and 32.

    A PyTorch implementation of `SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for
    Visual Recognition`. The defaults are those of the released models. The paper's ablations are
    options: Table IV is `spatial_mixer` and `channel_mixer`, Table V `low_freq_kernel`, Table VI
    `stem_act`, `patch_act` and `block_act`, Table VII `conv_norm` and `block_norm`, Table VIII
    `conv_types`.

    NOTE: the parameters are initialised on construction: convolutions normal with variance 2 /
    fan-out, every bias zero, complex weights standard normal, gamma and the layer scales 1e-5.
    ``init_weights`` has only `init_cfg` left to apply.

    NOTE: the drop rate of block i of n, counted from 0 over the whole network, is drop_path_rate *
    i / n as in the released model, so the last block stays below `drop_path_rate`.

    Args:
        arch: 'xt', 't', or a dict with the keys stem_channels (width of the stem's first
            convolution; its second gives the first stage's width) and, with one entry for each
            stage, depths (number of blocks), channels (multiples of 8), expand_ratios (hidden
            channels of the channel mixer per channel) and conv_types ('full' or 'depthwise', see
            ``CMixer`` for what it means there).
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, in ascending order, counted from 0; negative
            values count from the last. Stages after the last of these are not computed.
        spatial_mixer: 'smixer', or 'conv' for ``ConvMixer``.
        channel_mixer: 'cmixer', or 'mlp' or 'mlp_se' for ``MLP`` without or with
            squeeze-excitation.
        low_freq_kernel: 3 for the SMixer's stacked 3x3 pair, 5 for one 5x5.
        conv_types: 'full' or 'depthwise', one for all stages or one for each, in place of what
            `arch` says.
        stem_act: Activation in the stem: 'GELU' or 'SiLU'. NOTE: the paper has SiLU in every patch
            embedding; the released weights were trained with GELU in this one.
        patch_act: Activation of the embeddings between stages: 'GELU' or 'SiLU'.
        block_act: Activation inside the mixers: 'GELU' or 'SiLU'.
        conv_norm: Norm after the convolutions of the stem, the embeddings and the mixers: 'BN',
            'LN' (GroupNorm with one group, the paper's layer norm) or 'LN2d' (over each position's
            channels).
        block_norm: Norm before the mixers, from the same three.
        drop_path_rate: Rate that the blocks' drop rates rise to, in [0, 1).
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages: their
            parameters get no gradient and they stay in evaluation mode.
        norm_eval: Whether every batch norm stays in evaluation mode.
        with_cp: Whether the blocks recompute their activations in the backward pass to save memory.
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint='spartan.pth',
            prefix='backbone.')``.

    Raises:
        ValueError: If an option is not among the legal ones; the message lists these.

    Example:
        >>> import torch
        >>> from spartan_mm.backbones import SpaRTAN
        >>> backbone = SpaRTAN(arch='xt', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((64, 96, 192), (8, 16, 32))
        >>> with torch.no_grad():
        ...     maps = backbone(torch.rand(1, 3, 64, 96))
        >>> [tuple(x.shape) for x in maps]
        [(1, 64, 8, 12), (1, 96, 4, 6), (1, 192, 2, 3)]
    """

    # Table I; Sec. III-B for the convolution types.
    arch_settings = {
        'xt': dict(
            stem_channels=16,
            depths=(3, 3, 10, 2),
            channels=(32, 64, 96, 192),
            expand_ratios=(4, 4, 2, 2),
            conv_types=('full', 'full', 'depthwise', 'depthwise')),
        't': dict(
            stem_channels=16,
            depths=(3, 3, 12, 2),
            channels=(32, 64, 128, 256),
            expand_ratios=(4, 4, 2, 2),
            conv_types=('full', 'full', 'depthwise', 'depthwise')),
    }

    def __init__(self,
                 arch: str | Mapping = 'xt',
                 in_channels: int = 3,
                 out_indices: int | Sequence[int] = (3, ),
                 spatial_mixer: str = 'smixer',
                 channel_mixer: str = 'cmixer',
                 low_freq_kernel: int = 3,
                 conv_types: str | Sequence[str] | None = None,
                 stem_act: str = 'GELU',
                 patch_act: str = 'SiLU',
                 block_act: str = 'GELU',
                 conv_norm: str = 'BN',
                 block_norm: str = 'LN',
                 drop_path_rate: float = 0.1,
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        self.arch = self._check_arch(arch, conv_types)
        depths, channels = self.arch['depths'], self.arch['channels']

        _check_choice('spatial_mixer', spatial_mixer, ('smixer', 'conv'))
        _check_choice('channel_mixer', channel_mixer, ('cmixer', 'mlp', 'mlp_se'))
        _check_choice('low_freq_kernel', low_freq_kernel, (3, 5))
        for name, act in (('stem_act', stem_act), ('patch_act', patch_act),
                          ('block_act', block_act)):
            _check_choice(name, act, ACTIVATIONS)
        for name, norm in (('conv_norm', conv_norm), ('block_norm', block_norm)):
            _check_choice(name, norm, NORMS)
        _check_choice('frozen_stages', frozen_stages, range(-1, len(depths) + 1))
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} is not in [0, 1)')

        self.out_indices = self._check_out_indices(out_indices, len(depths))
        strides = [4 * 2**i for i in range(len(depths))]
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(strides[i] for i in self.out_indices)
        self.min_size = strides[-1]
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deploy = False

        make_smixer = {
            'smixer': partial(SMixer, low_freq_kernel=low_freq_kernel),
            'conv': ConvMixer,
        }[spatial_mixer]

        def make_cmixer(channels, expand_ratio, conv_type):
            if channel_mixer == 'cmixer':
                return CMixer(channels, expand_ratio, conv_type, norm=conv_norm, act=block_act)
            return MLP(channels, expand_ratio, channel_mixer == 'mlp_se', act=block_act)

        self.stem = nn.Sequential(
            ConvNormAct(in_channels, self.arch['stem_channels'], 3, stride=2, padding=1,
                        norm=conv_norm, act=stem_act),
            ConvNormAct(self.arch['stem_channels'], channels[0], 3, stride=2, padding=1,
                        norm=conv_norm, act=stem_act))

        self.stages = nn.ModuleList()
        for i, (depth, width, expand_ratio, conv_type) in enumerate(
                zip(depths, channels, self.arch['expand_ratios'], self.arch['conv_types'],
                    strict=True)):
            embedding = nn.Identity() if i == 0 else ConvNormAct(
                channels[i - 1], width, 2, stride=2, norm=conv_norm, act=patch_act)
            blocks = [
                Block(
                    width,
                    smixer=make_smixer(width, conv_type, norm=conv_norm, act=block_act),
                    cmixer=make_cmixer(width, expand_ratio, conv_type),
                    norm=block_norm,
                    drop_path_rate=drop_path_rate * (sum(depths[:i]) + j) / sum(depths),
                    with_cp=with_cp) for j in range(depth)
            ]
            self.stages.append(Stage(embedding, blocks))

        self.apply(_init_parameters)
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the stages in `out_indices`.

        Args:
            x: Images (N, in_channels, H, W), H and W at least 32 and otherwise free.

        Returns:
            One (N, C, H', W') map for each of `out_indices`. The stem rounds H / 4 up, each later
            stage rounds the half of the one before down.

        Raises:
            ValueError: If H or W is too small for the last stage.
        """
        height, width = x.shape[-2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f'the input is {height} x {width} pixels (height x width), SpaRTAN needs at least '
                f'{self.min_size} x {self.min_size}: enlarge or pad it')

        if x.device.type == 'cpu':
            # Twice as fast there; elsewhere the caller decides.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
            if i == self.out_indices[-1]:
                break
        return tuple(maps)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Take the form for inference: the same function with less to compute, for good.

        Batch norms, layer scales, feature decompositions, modulations and the affines of the norms
        before spatial mixers are folded into convolutions. What looks at its input stays: group and
        layer norms, and the affine before a ``CMixer``, whose argmax depends on it. A second call
        changes nothing.
        """
        if self.deploy:
            return
        self.eval()
        for module in [*self.stem, *self.stages.children()]:
            for part in module.modules():
                if isinstance(part, Block):
                    part.switch_to_deploy()
            embedding = module.embedding if isinstance(module, Stage) else module
            if isinstance(embedding, ConvNormAct):
                embedding.switch_to_deploy()
        self.requires_grad_(False)
        self.deploy = True

    def train(self, mode: bool = True) -> 'SpaRTAN':
        """Switch between training and evaluation, except for what is frozen or under `norm_eval`.

        Args:
            mode: True for training.

        Returns:
            The backbone.

        Raises:
            RuntimeError: If training is asked of the deploy form.
        """
        if mode and self.deploy:
            raise RuntimeError('SpaRTAN is in deploy form, whose folded weights cannot be trained: '
                               'build it anew and load the checkpoint of the training')
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.stem, *self.stages][:self.frozen_stages + 1]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # mmengine loads pretrained weights leniently and only logs what did not fit: weights of
        # another architecture would leave most of the backbone random without stopping anybody.
        given = {name[len(prefix):]: tuple(getattr(value, 'shape', ()))
                 for name, value in state_dict.items() if name.startswith(prefix)}
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if not prefix and given and not given.keys() & expected.keys():
            raise RuntimeError(
                f'no tensor of the state dict belongs to SpaRTAN, it begins with '
                f'{next(iter(given))!r}. Convert a checkpoint of the authors with '
                'tools/model_converters/spartan_to_mm.py; for the checkpoint of a classifier or '
                "detector give init_cfg the prefix 'backbone.'")

        # A folded convolution has a bias, which no other form has.
        deploy = 'stem.0.conv.bias' in given
        if given and 'stem.0.conv.weight' in given and deploy != self.deploy and (
                'stem.0.norm.running_mean' in expected or self.deploy):
            forms = ['training form', 'deploy form']
            raise RuntimeError(
                f'the state dict is that of SpaRTAN in {forms[deploy]}, the model is in '
                f'{forms[self.deploy]}: '
                + ('call switch_to_deploy() before loading it' if deploy
                   else 'load it before switch_to_deploy() is called'))

        differences = [
            f'stage {i + 1} has {found} blocks instead of {depth}'
            for i, depth in enumerate(self.arch['depths'])
            if (found := len({name.split('.')[3] for name in given
                              if name.startswith(f'stages.{i}.blocks.')})) not in (0, depth)
        ]
        differences += [f'{prefix}{name} is {given[name]} instead of {shape}'
                        for name, shape in expected.items() if given.get(name, shape) != shape]
        if differences:
            more = f' (and {len(differences) - 5} more)' if len(differences) > 5 else ''
            raise RuntimeError(
                f'the state dict is of another SpaRTAN than this one: {"; ".join(differences[:5])}'
                f'{more}. Give `arch` and the other options that the weights were trained with')

        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _check_arch(cls, arch: str | Mapping, conv_types: str | Sequence[str] | None) -> dict:
        """The architecture as a dict of tuples, with `conv_types` put in."""
        keys = cls.arch_settings['xt'].keys()
        if not isinstance(arch, Mapping):
            _check_choice('arch', arch, cls.arch_settings, f'or a dict with {", ".join(keys)}')
            arch = cls.arch_settings[arch]
        elif arch.keys() != keys:
            raise ValueError(
                f'the arch dict must have the keys {", ".join(keys)}: '
                f'missing {sorted(keys - arch.keys())}, unknown {sorted(arch.keys() - keys)}')

        arch = {key: arch[key] if key == 'stem_channels' else tuple(arch[key]) for key in keys}
        if isinstance(conv_types, str):
            arch['conv_types'] = (conv_types, ) * len(arch['depths'])
        elif conv_types is not None:
            arch['conv_types'] = tuple(conv_types)

        lengths = {key: len(arch[key]) for key in keys if key != 'stem_channels'}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError('arch: each stage needs one entry in every list, '
                             f'their lengths are {lengths}')
        for key in ('depths', 'channels', 'expand_ratios', 'stem_channels'):
            values = (arch[key], ) if key == 'stem_channels' else arch[key]
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(f'arch: {key}={arch[key]} must be positive integers')
        for stage, width in enumerate(arch['channels'], start=1):
            if width % 8:
                below = width // 8 * 8
                nearest = f'{below} or {below + 8}' if below else '8'
                raise ValueError(f'arch: stage {stage} has {width} channels, which is not '
                                 f'divisible by 8; take {nearest}')
        for stage, conv_type in enumerate(arch['conv_types'], start=1):
            _check_choice(f'conv_types of stage {stage}', conv_type, CONV_TYPES)
        return arch

    @staticmethod
    def _check_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
        """The indices as non-negative, ascending numbers."""
        given = (out_indices, ) if isinstance(out_indices, int) else tuple(out_indices)
        indices = tuple(i + num_stages if i < 0 else i for i in given)
        if (not indices or list(indices) != sorted(set(indices))
                or not set(indices) <= set(range(num_stages))):
            raise ValueError(f'out_indices={out_indices} must be different stages in ascending '
                             f'order, each from {-num_stages} to {num_stages - 1}')
        return indices


def _check_choice(name: str, value: Any, choices: Iterable, alternative: str = '') -> None:
    choices = list(choices)  # a value that cannot be hashed can be looked up in a list
    if value not in choices:
        allowed = f'{", ".join(map(repr, choices))} {alternative}'.rstrip()
        raise ValueError(f'{name}={value!r} is not available, choose from: {allowed}')


def _init_parameters(module: nn.Module) -> None:
    """Set the parameters that `module` itself holds (norms are right as PyTorch makes them)."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SMixer):
        nn.init.constant_(module.gamma, 1e-5)
    elif isinstance(module, CMixer):
        nn.init.normal_(module.complex_weight)
        # Two projections in one: each has its own half of the fan-out.
        nn.init.normal_(module.proj_in.weight, std=math.sqrt(4 / module.proj_in.out_channels))
    elif isinstance(module, Block):
        nn.init.constant_(module.layer_scale1, 1e-5)
        nn.init.constant_(module.layer_scale2, 1e-5)
