"""SpaRTAN, in the order in which its paper tells it.

"SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition"; section,
equation and table numbers are the paper's. Where its words and the authors' released model differ,
the released model decides and a NOTE says so.

Maps are (N, C, H, W). R is the number of hidden channels of a CMixer, I of a branch of an SMixer.
"""
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .arch import (
    PRUNED_WIDTHS,
    check_arch,
    check_choice,
    check_low_freq_kernels,
    check_state_dict,
)
from .dcls import DCLS, DCLSConv2d
from .layers import (
    ACTIVATIONS,
    NORMS,
    DropPath,
    FoldingSequential,
    fold_norm,
    is_hooked,
    recompute,
    superpose,
)
from .staged import StagedBackbone

torch.fx.wrap('superpose')  # A step that tracers take as a whole.


class ConvNormAct(FoldingSequential):
    """Convolution without bias, norm, activation; `kwargs` are the convolution's."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str = 'BN',
                 act: str = 'GELU', **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **kwargs)
        self.norm = NORMS[norm](out_channels)
        self.act = ACTIVATIONS[act]()

    def switch_to_deploy(self) -> None:
        """Fold a batch norm into the convolution; other norms look at the map and stay."""
        if isinstance(self.conv, DCLSConv2d):
            self.conv = self.conv.to_conv()
        if isinstance(self.norm, _BatchNorm):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class Averaging(nn.Module):
    """What looks at the average of a whole map."""

    def average(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True)


class SqueezeExcitation(Averaging):
    """Weighs each channel by a gate from 0 to 1 that depends on the averages of all channels.

    Args:
        channels: Channels of the map.
        squeeze_channels: Width of the hidden layer between averages and gates.
    """

    def __init__(self, channels: int, squeeze_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze_channels, 1)
        self.expand = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        hidden = self.squeeze(self.average(x)).relu()  # (N, S, 1, 1)
        return x * self.expand(hidden).sigmoid()


class SMixer(Averaging):
    """Spatial mixing by two branches of different receptive field (Sec. III-B, Eqs. 3 to 6).

    NOTE: the paper describes the low-frequency kernel by its receptive field alone. As released it
    is two dilated 3x3 convolutions with neither norm nor activation between them.

    Args:
        channels: Channels of input and output, a multiple of 8; half of them in each branch.
        conv_type: 'full' or 'depthwise' 3x3 convolutions.
        norm: Norm after each branch's convolution, a key of ``NORMS``.
        act: Activation after it, a key of ``ACTIVATIONS``.
        low_freq_kernel: 3 for the stacked pair of the low-frequency branch, 5 for one dilated 5x5
            in its place (Table V). NOTE: not the paper's are 7 and 11, larger ones of that kind,
            and depthwise ones whose weights find their places, the keys of ``DCLS``.
        inner_channels: Channels of a branch, at least 2; None for half of those of the input.
    """

    def __init__(self, channels: int, conv_type: str = 'full', norm: str = 'BN', act: str = 'GELU',
                 low_freq_kernel: int | str = 3, inner_channels: int | None = None):
        super().__init__()
        inner = inner_channels or channels // 2
        groups = inner if conv_type == 'depthwise' else 1
        conv = partial(ConvNormAct, inner, inner, norm=norm, act=act, groups=groups)
        self.low_freq_kernel = low_freq_kernel
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.gamma = nn.Parameter(torch.empty(1, inner, 1, 1))
        self.high_freq = conv(3, padding=1)
        self.high_se = SqueezeExcitation(inner, channels // 8)
        if low_freq_kernel == 3:
            self.low_freq = nn.Sequential(
                nn.Conv2d(inner, inner, 3, padding=2, dilation=2, groups=groups, bias=False),
                conv(3, padding=2, dilation=2))
        elif low_freq_kernel in DCLS:
            self.low_freq = conv(1)
            self.low_freq.conv = DCLSConv2d(inner, **DCLS[low_freq_kernel])
        else:
            self.low_freq = conv(low_freq_kernel, padding=low_freq_kernel - 1, dilation=2)
        self.low_se = SqueezeExcitation(inner, channels // 8)
        self.proj_out = nn.Conv2d(2 * inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.proj_in(x)  # (N, I, H, W)

        # Feature decomposition: x + gamma * (x - average), a step away from the average (Eq. 3).
        x = torch.lerp(x, self.average(x), -self.gamma.type_as(x))

        # Small kernels for high frequencies, dilated ones for low, each gated (Eqs. 4 and 5).
        high = self.high_se(self.high_freq(x))
        low = self.low_se(self.low_freq(x))
        return self.proj_out(torch.cat([high, low], 1))  # Eq. 6


@torch.fx.wrap
def modulate(wave: Tensor, weight: Tensor) -> Tensor:
    """Multiply channels 2j and 2j + 1, as one complex number, by complex weight j (Eq. 9).

    Args:
        wave: (N, R, H, W).
        weight: (R / 2, 2), real and imaginary parts.

    Returns:
        (N, R, H, W), in the type of the wave. NOTE: computed in float32 at least, as released.
    """
    if wave.dtype in (torch.float16, torch.bfloat16):
        return modulate(wave.float(), weight.float()).to(wave.dtype)
    if torch.compiler.is_compiling():
        # Compilers and exporters know no complex numbers, but fuse real ones.
        real, imag = weight.unbind(1)
        direct = torch.stack([real, real], 1).view(-1, 1, 1)  # (R, 1, 1)
        cross = torch.stack([-imag, imag], 1).view(-1, 1, 1)
        partner = wave.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)  # 2j and 2j + 1 exchanged
        return torch.addcmul(wave * direct, partner, cross)
    pairs = wave.permute(0, 2, 3, 1).contiguous().unflatten(-1, (-1, 2))  # (N, H, W, R / 2, 2)
    pairs = torch.view_as_complex(pairs) * torch.view_as_complex(weight)
    return torch.view_as_real(pairs).flatten(-2).permute(0, 3, 1, 2)


def fold_modulation(weight: Tensor, kernel: Tensor) -> Tensor:
    """A kernel (R, an even number, k, k) that gives for waves what it gives for the modulated."""
    pairs = kernel.shape[1] // 2  # of a group; real and imag are (groups, 1, pairs, 1, 1)
    real, imag = weight.view(-1, 1, pairs, 2, 1, 1).unbind(3)
    on_real, on_imag = kernel.view(len(real), -1, pairs, 2, *kernel.shape[2:]).unbind(3)
    return torch.stack([on_real * real + on_imag * imag,
                        on_imag * real - on_real * imag], 3).view_as(kernel)


class CMixer(nn.Module):
    """Channel mixing by superposed and modulated waves (Sec. III-C, Eqs. 7 to 10).

    NOTE: sine and cosine of the phase are a 1x1 convolution and the activation, as the paper
    proposes at the end of Sec. III-C.

    NOTE: "full" is one group per hidden channel in the 3x3 convolution, "depthwise" one per *input*
    channel, as in the released model.

    Args:
        channels: Channels C of input and output, a multiple of 4.
        expand_ratio: Hidden channels per input channel, and in a group of a depthwise convolution.
        conv_type: 'full' or 'depthwise', of the stage; see the note.
        norm: Norm after the 3x3 convolution, a key of ``NORMS``.
        act: Activation of the phase and after the norm, a key of ``ACTIVATIONS``.
        hidden_channels: Hidden channels R, whole pairs and groups. The first C of them may be
            picked, and have to be there. None for what `expand_ratio` says.
    """

    #: Whether phases and amplitudes are computed apart; runtimes copy a map of both to divide it.
    #: Exports set it.
    separate = False

    def __init__(self, channels: int, expand_ratio: int, conv_type: str = 'full',
                 norm: str = 'BN', act: str = 'GELU', hidden_channels: int | None = None):
        super().__init__()
        hidden = hidden_channels or channels * expand_ratio
        group = expand_ratio if conv_type == 'depthwise' else 1
        self.proj_in = nn.Conv2d(channels, 2 * hidden, 1)  # phases, then amplitudes
        self.act = ACTIVATIONS[act]()
        # NOTE: a real (R / 2, 2) table. The released rank-5 tensor keeps the model from
        # channels_last, and a complex one from float16.
        self.complex_weight = nn.Parameter(torch.empty(hidden // 2, 2))
        self.refine = ConvNormAct(hidden, hidden, 3, norm, act, padding=1,
                                  groups=hidden // group)
        self.se = SqueezeExcitation(hidden, channels // 4)
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        strongest = x.argmax(1, keepdim=True)  # (N, 1, H, W), below C

        # Waves of an amplitude and an activated phase, the strongest added to all (Eqs. 7 and 8).
        # Apart only where a plain convolution is left: adapters and hooks have to be called.
        if self.separate and type(self.proj_in) is nn.Conv2d and not is_hooked(self.proj_in):
            weight, bias = self.proj_in.weight, self.proj_in.bias
            hidden = len(bias) // 2
            phase = F.conv2d(x, weight[:hidden], bias[:hidden])
            amplitude = F.conv2d(x, weight[hidden:], bias[hidden:])
            wave = amplitude * self.act(phase)  # (N, R, H, W)
            # One pick instead of two: runtimes rearrange a map to pick from it.
            wave = wave + wave[:, :x.shape[1]].gather(1, strongest)
        else:
            phase, amplitude = self.proj_in(x).chunk(2, 1)
            wave = superpose(amplitude, self.act(phase), strongest, x.shape[1])

        if self.complex_weight is not None:  # else `refine` has it, see below
            wave = modulate(wave, self.complex_weight)
        return self.proj_out(self.se(self.refine(wave)))  # Eq. 10

    def switch_to_deploy(self) -> None:
        """Fold the modulation, linear and pointwise, where the groups after it hold whole pairs."""
        self.refine.switch_to_deploy()
        conv = self.refine.conv
        if conv.weight.shape[1] % 2 == 0:
            conv.weight.copy_(fold_modulation(self.complex_weight, conv.weight))
            self.complex_weight = None


class Block(nn.Module):
    """The building block: spatial then channel mixing, as scaled residuals (Eqs. 1 and 2).

    Args:
        channels: Channels of input and output.
        smixer: Mixes positions.
        cmixer: Mixes channels.
        norm: Norm before either mixer, a key of ``NORMS``.
        drop_path_rate: Probability of dropping either branch for a sample, in [0, 1).
        with_cp: Whether the backward pass computes the block again instead of storing its maps.
    """

    def __init__(self, channels: int, smixer: nn.Module, cmixer: nn.Module, norm: str = 'LN',
                 drop_path_rate: float = 0., with_cp: bool = False):
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
        return recompute(self, self.mix, x) if self.with_cp else self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        """x + scale1 * smixer(norm1(x)), then the same with 2 (Eqs. 1 and 2)."""
        x = self.add(x, self.layer_scale1, self.smixer(self.norm1(x)))
        return self.add(x, self.layer_scale2, self.cmixer(self.norm2(x)))

    def add(self, x: Tensor, layer_scale: Tensor | None, branch: Tensor) -> Tensor:
        """x + drop_path(layer_scale * branch); the branch is dropped where its scale is."""
        if layer_scale is None:  # the branch has it
            return x + branch
        if self.training:
            layer_scale = layer_scale.expand(x.shape[0], -1, -1, -1)  # (N, C, 1, 1)
        return torch.addcmul(x, self.drop_path(layer_scale), branch)

    def switch_to_deploy(self) -> None:
        """Fold layer scales into the mixers, and batch norms where the mixer is linear in them."""
        for mixer, scale in ((self.smixer, self.layer_scale1), (self.cmixer, self.layer_scale2)):
            for parameter in mixer.proj_out.parameters():
                parameter.mul_(scale.view(-1, *[1] * (parameter.dim() - 1)))
        self.layer_scale1 = self.layer_scale2 = None
        self.norm1 = fold_norm(self.norm1, self.smixer.proj_in)
        if not isinstance(self.cmixer, CMixer):  # its argmax looks at what the norm gives
            self.norm2 = fold_norm(self.norm2, self.cmixer.proj_in)


class Stage(nn.Module):
    """A patch embedding, an identity in the first stage, and the blocks of its resolution."""

    def __init__(self, embedding: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H // 2, W // 2); the same size in the first stage."""
        return self.blocks(self.embedding(x))


# Constructors of the mixers by name; ``baselines.py`` adds those of Table IV.
SPATIAL_MIXERS = {'smixer': SMixer}
CHANNEL_MIXERS = {'cmixer': CMixer}


@MODELS.register_module()
class SpaRTAN(StagedBackbone):
    """SpaRTAN, a light convolutional backbone with four stages of stride 4, 8, 16 and 32.

    The defaults are those of the released models; the paper's ablations are options.

    Images are at least 32 pixels high and wide: the stem rounds a quarter of that up, later stages
    round down.

    NOTE: block i of n, from 0, drops at drop_path_rate * i / n as released: the last below it.

    Args:
        arch: 'xt', 't', or a dict with stem_channels (width of the stem's first convolution) and,
            one entry for each stage, depths, channels (multiples of 8), expand_ratios (hidden
            channels of the CMixer per channel) and conv_types ('full' or 'depthwise'). A pruned
            one also has hidden_channels (all hidden channels of the CMixer) or inner_channels (of
            a branch of the SMixer).
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, ascending; negative values count from the last.
            Stages after the last of these are not computed.
        spatial_mixer: 'smixer', or 'conv' (Table IV).
        channel_mixer: 'cmixer', or 'mlp' or 'mlp_se' (Table IV).
        low_freq_kernel: 3 for the SMixer's stacked 3x3 pair, 5 for one 5x5 (Table V), or another of
            ``LOW_FREQ_KERNELS``, see :class:`SMixer`; for all stages or one for each. 'dcls' and
            'dcls_gaussian' for all stages means those of depthwise convolutions; full ones keep
            the pair.
        conv_types: In place of what `arch` says, for all stages or one for each (Table VIII).
        stem_act: Activation in the stem (Table VI), 'GELU' or 'SiLU'. NOTE: the paper has SiLU in
            every patch embedding; the released weights were trained with GELU in this one.
        patch_act: Activation of the embeddings between stages.
        block_act: Activation inside the mixers.
        conv_norm: Norm after the convolutions: 'BN', 'LN' (over a sample's channels and positions,
            the paper's) or 'LN2d' (over each position's channels) (Table VII).
        block_norm: Norm before the mixers, from the same three.
        drop_path_rate: Rate that the blocks' drop rates rise to, in [0, 1).
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages: no
            gradients, and evaluation mode.
        norm_eval: Whether every batch norm stays in evaluation mode.
        with_cp: Whether blocks compute their maps again in the backward pass to save memory.
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint='spartan.pth',
            prefix='backbone.')``.

    Raises:
        ValueError: An option is not among the legal ones; the message lists these.

    Example:
        >>> from spartan_mm.backbones import SpaRTAN
        >>> backbone = SpaRTAN(arch='xt', out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((64, 96, 192), (8, 16, 32))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 64, 8, 12), (1, 96, 4, 6), (1, 192, 2, 3)]
    """

    # Table I; Sec. III-B for the convolution types.
    arch_settings = {
        'xt': dict(stem_channels=16, depths=(3, 3, 10, 2), channels=(32, 64, 96, 192),
                   expand_ratios=(4, 4, 2, 2),
                   conv_types=('full', 'full', 'depthwise', 'depthwise')),
        't': dict(stem_channels=16, depths=(3, 3, 12, 2), channels=(32, 64, 128, 256),
                  expand_ratios=(4, 4, 2, 2),
                  conv_types=('full', 'full', 'depthwise', 'depthwise')),
    }

    def __init__(self, arch: str | Mapping = 'xt', in_channels: int = 3,
                 out_indices: int | Sequence[int] = (3, ), spatial_mixer: str = 'smixer',
                 channel_mixer: str = 'cmixer',
                 low_freq_kernel: int | str | Sequence[int | str] = 3,
                 conv_types: str | Sequence[str] | None = None, stem_act: str = 'GELU',
                 patch_act: str = 'SiLU', block_act: str = 'GELU', conv_norm: str = 'BN',
                 block_norm: str = 'LN', drop_path_rate: float = 0.1, frozen_stages: int = -1,
                 norm_eval: bool = False, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        arch = check_arch(arch, conv_types, self.arch_settings)
        depths, channels = arch['depths'], arch['channels']
        super().__init__(channels, 4, out_indices, drop_path_rate, frozen_stages, norm_eval,
                         init_cfg)
        self.arch = arch
        check_choice('spatial_mixer', spatial_mixer, SPATIAL_MIXERS)
        check_choice('channel_mixer', channel_mixer, CHANNEL_MIXERS)
        kernels = check_low_freq_kernels(low_freq_kernel, arch['conv_types'])
        for name, act in dict(stem_act=stem_act, patch_act=patch_act, block_act=block_act).items():
            check_choice(name, act, ACTIVATIONS)
        for name, norm in dict(conv_norm=conv_norm, block_norm=block_norm).items():
            check_choice(name, norm, NORMS)

        options = dict(norm=conv_norm, act=block_act)
        make_smixer = partial(SPATIAL_MIXERS[spatial_mixer], **options)
        low_freq = [dict(low_freq_kernel=kernel) if spatial_mixer == 'smixer' else {}
                    for kernel in kernels]
        make_cmixer = partial(CHANNEL_MIXERS[channel_mixer], **options)

        down = partial(ConvNormAct, stride=2, norm=conv_norm)
        widths = in_channels, self.arch['stem_channels'], channels[0]
        self.stem = nn.Sequential(*(
            down(*widths[i:i + 2], 3, padding=1, act=stem_act) for i in range(2)))
        rates = iter([drop_path_rate * i / sum(depths) for i in range(sum(depths))])
        pruned = [self.arch.get(key, [None] * len(depths)) for key in PRUNED_WIDTHS]
        self.stages = nn.ModuleList()
        for i, (depth, width, ratio, conv_type, kernel, hidden, inner) in enumerate(zip(
                depths, channels, self.arch['expand_ratios'], self.arch['conv_types'], low_freq,
                *pruned, strict=True)):
            embedding = down(channels[i - 1], width, 2, act=patch_act) if i else nn.Identity()
            self.stages.append(Stage(embedding, [
                Block(width, make_smixer(width, conv_type, inner_channels=inner, **kernel),
                      make_cmixer(width, ratio, conv_type, hidden_channels=hidden),
                      block_norm, next(rates), with_cp) for _ in range(depth)]))
        self.apply(init_parameters)
        self.freeze()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def init_parameters(module: nn.Module) -> None:
    """Set what `module` itself holds: convolutions normal with variance 2 / fan-out, biases 0."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight.numel() / module.in_channels
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
