"""What the ported backbones have in common: stages, options, and convolutions that fold."""
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..arch import check_choice
from ..layers import FoldingSequential, fold_norm, recompute
from ..staged import StagedBackbone

Norm = Callable[[int], nn.Module]


class ConvNorm(FoldingSequential):
    """Convolution that keeps the size at stride 1, norm, and an activation if there is one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1,
                 act: Callable[[], nn.Module] = nn.Identity, groups: int = 1, dilation: int = 1,
                 bias: bool = False, norm: Norm = nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2 * dilation,
            dilation, groups, bias)
        self.norm = norm(out_channels)
        self.act = act()

    def switch_to_deploy(self) -> None:
        """Fold a batch norm into the convolution."""
        if isinstance(self.norm, _BatchNorm):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class NormConv(FoldingSequential):
    """A batch norm before a 1x1 convolution, which takes it up in the form for inference."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def switch_to_deploy(self) -> None:
        """Fold the norm into the convolution."""
        self.norm = fold_norm(self.norm, self.conv)


def depthwise(channels: int, kernel_size: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A depthwise convolution that keeps the size."""
    return nn.Conv2d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2 * dilation,
                     dilation=dilation, groups=channels, bias=bias)


def make_stem(widths: Sequence[int], act: Callable[[], nn.Module], last_act: bool = False,
              **options: Any) -> nn.Sequential:
    """3x3 convolutions of stride 2 from width to width, activations between them."""
    last = len(widths) - 2
    return nn.Sequential(*(
        ConvNorm(*widths[i:i + 2], 3, 2, act if i < last or last_act else nn.Identity, **options)
        for i in range(len(widths) - 1)))


class Stage(nn.Module):
    """What halves the map, the blocks of its resolution, and a norm that some networks have.

    Args:
        embedding: Makes the stage's map of the one before; an identity where the stem has done it.
        blocks: The blocks.
        norm: What the map goes through at the end, for the next stage, too.
        with_cp: Whether the backward pass computes each block again instead of storing its maps.
    """

    def __init__(self, embedding: nn.Module, blocks: Iterable[nn.Module],
                 norm: nn.Module | None = None, with_cp: bool = False):
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H', W')."""
        x = self.embedding(x)
        for block in self.blocks:
            x = recompute(block, block, x) if self.with_cp else block(x)
        return self.norm(x)


class Neighbour(StagedBackbone):
    """A backbone of others, written anew.

    A subclass has `arch_settings`, and `out_norm_layer` if its authors give a detector normalized
    maps. Its constructor ends with `assemble`. Stages after the last of `out_indices` are not
    built; weights of a whole backbone load all the same.

    Args:
        arch: A key of `arch_settings`, or a dict like its values.
        out_indices: Stages whose maps are returned, ascending; negative ones count from the last.
        drop_path_rate: Rate that the blocks' drop rates rise to from 0, in [0, 1).
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages.
        norm_eval: Whether every batch norm stays in evaluation mode.
        with_cp: Whether blocks compute their maps again in the backward pass to save memory.
        out_norm: Whether each map that is returned goes through a norm of its own, as the authors
            have it under detectors. A classifier's weights have none of these: they start fresh.
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: An option is not legal; the message says what is.
    """

    arch_settings: dict[str, dict[str, Any]]
    out_norm_layer: Norm | None = None
    first_stride = 4

    def __init__(self, arch: str | Mapping, out_indices: int | Sequence[int] = (3, ),
                 drop_path_rate: float = 0., frozen_stages: int = -1, norm_eval: bool = False,
                 with_cp: bool = False, out_norm: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        arch = read_arch(arch, self.arch_settings)
        super().__init__(arch['channels'], self.first_stride, out_indices, drop_path_rate,
                         frozen_stages, norm_eval, init_cfg)
        if out_norm and self.out_norm_layer is None:
            raise ValueError(f'{type(self).__name__} has no out_norm')
        self.arch = arch
        self.with_cp = with_cp
        self.out_norm = out_norm
        last = max(sum(arch['depths']) - 1, 1)
        self.drop_path_rates = [drop_path_rate * i / last for i in range(last + 1)]

    def assemble(self, stem: nn.Module, stages: Iterable[nn.Module]) -> None:
        """Take the parts, of the stages those that are needed; initialize and freeze."""
        self.stem = stem
        self.stages = nn.ModuleList(islice(stages, self.out_indices[-1] + 1))
        self.out_norms = nn.ModuleList(
            map(self.out_norm_layer, self.out_channels) if self.out_norm else ())
        self.apply(self.init_parameters)
        self.freeze()

    @staticmethod
    def init_parameters(module: nn.Module) -> None:
        """Set what a module itself holds; PyTorch's default unless a subclass knows better."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps, see :class:`StagedBackbone`."""
        maps = super().forward(x)
        if self.out_norm:
            maps = tuple(norm(x) for norm, x in zip(self.out_norms, maps, strict=True))
        return maps

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not prefix:  # A backbone's own weights, not those of a detector.
            for name in [name for name in state_dict if name.startswith('stages.')]:
                if len(self.stages) <= int(name.split('.')[1]) < len(self.arch['depths']):
                    del state_dict[name]
            if not any(name.startswith('out_norms.') for name in state_dict):
                state_dict.update({name: value for name, value in self.state_dict().items()
                                   if name.startswith('out_norms.')})
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_arch(arch: str | Mapping, known: Mapping[str, Mapping]) -> dict[str, Any]:
    """Return an architecture, a key of `known` or a dict like its values, as a dict.

    Raises:
        ValueError: It is neither; the message says what is allowed.
    """
    keys = next(iter(known.values())).keys()
    if not isinstance(arch, Mapping):
        check_choice('arch', arch, known, f'or a dict with {", ".join(keys)}')
        arch = known[arch]
    elif arch.keys() != keys:
        raise ValueError(
            f'the arch dict must have the keys {", ".join(keys)}: missing '
            f'{sorted(keys - arch.keys())}, unknown {sorted(arch.keys() - keys)}')
    arch = {key: tuple(value) if isinstance(value, Sequence) else value
            for key, value in arch.items()}
    lengths = {key: len(value) for key, value in arch.items() if isinstance(value, tuple)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError('arch: each stage needs one entry in every list, '
                         f'their lengths are {lengths}')
    for key, values in arch.items():
        if not all(isinstance(value, int) and value >= (key != 'depths')
                   for value in (values if isinstance(values, tuple) else [values])):
            raise ValueError(f'arch: {key}={values} must be positive integers')
    return arch


def init_by_fan_out(conv: nn.Conv2d) -> None:
    """Normal weights of variance 2 / fan-out, biases 0."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels / conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def scale_channels(conv: nn.Conv2d, scale: Tensor) -> None:
    """Fold a scale of the output's channels, of any shape, into a convolution."""
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    if conv.bias is not None:
        conv.bias.mul_(scale.view(-1))


def embed(kernel: Tensor, size: int, dilation: int = 1) -> Tensor:
    """Centre a dilated (C, 1, k, k) kernel in a plain one of (C, 1, size, size)."""
    span = dilation * (kernel.shape[-1] - 1) + 1
    start = (size - span) // 2
    large = kernel.new_zeros(*kernel.shape[:2], size, size)
    large[..., start:start + span:dilation, start:start + span:dilation] = kernel
    return large


def as_depthwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """The depthwise convolution of these weights."""
    conv = depthwise(len(weight), weight.shape[-1]).to(weight)
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    return conv.eval().requires_grad_(False)
