"""SpaRTAN as its formulas are written: what every fast path is compared with, for values and speed.

Complex tensors, two gathers, one operation a line of the paper, nothing shared and nothing folded.
This is the form with the released model's settings; the paper's ablations are not in it.
"""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spartan_mm.backbones import SpaRTAN

EPS = 1e-6


class ConvNormAct(nn.Module):

    def __init__(self, *args, act: type[nn.Module] = nn.GELU, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs, bias=False)
        self.norm = nn.BatchNorm2d(self.conv.out_channels, eps=EPS)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class SqueezeExcitation(nn.Module):

    def __init__(self, channels: int, squeeze_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze_channels, 1)
        self.expand = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        s = torch.relu(self.squeeze(s))
        s = torch.sigmoid(self.expand(s))
        return s * x


class SMixer(nn.Module):

    def __init__(self, channels: int, conv_type: str):
        super().__init__()
        inner = channels // 2
        groups = inner if conv_type == 'depthwise' else 1
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.gamma = nn.Parameter(torch.empty(1, inner, 1, 1))
        self.high_freq = ConvNormAct(inner, inner, 3, padding=1, groups=groups)
        self.high_se = SqueezeExcitation(inner, inner // 4)
        self.low_freq = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=2, dilation=2, groups=groups, bias=False),
            ConvNormAct(inner, inner, 3, padding=2, dilation=2, groups=groups))
        self.low_se = SqueezeExcitation(inner, inner // 4)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.proj_in(x)
        z = z + self.gamma * (z - z.mean((2, 3), keepdim=True))
        h = self.high_se(self.high_freq(z))
        l = self.low_se(self.low_freq(z))  # noqa: E741 - the formula's letter
        return self.proj_out(torch.cat([h, l], dim=1))


class CMixer(nn.Module):

    def __init__(self, channels: int, expand_ratio: int, conv_type: str):
        super().__init__()
        hidden = channels * expand_ratio
        self.theta = nn.Conv2d(channels, hidden, 1)
        self.proj = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.complex_weight = nn.Parameter(torch.empty(1, 1, 1, hidden // 2, 2))
        self.refine = ConvNormAct(hidden, hidden, 3, padding=1,
                                  groups=channels if conv_type == 'depthwise' else hidden)
        self.se = SqueezeExcitation(hidden, channels // 4)
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        k = x.argmax(dim=1, keepdim=True)
        theta = self.act(self.theta(x))
        a = self.proj(x)
        f = a * theta + a.gather(1, k) * theta.gather(1, k)

        dtype = f.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(f.device.type, enabled=False):
            f = f.to(wide).permute(0, 2, 3, 1)  # (N, H, W, R)
            f = torch.view_as_complex(f.unflatten(-1, (-1, 2)).contiguous())
            f = f * torch.view_as_complex(self.complex_weight.to(wide))
            f = torch.view_as_real(f).flatten(-2).permute(0, 3, 1, 2).contiguous()

        y = self.refine(f.to(dtype))
        return self.proj_out(self.se(y))


class Block(nn.Module):

    def __init__(self, channels: int, expand_ratio: int, conv_type: str):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, channels, eps=EPS)
        self.smixer = SMixer(channels, conv_type)
        self.layer_scale1 = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.norm2 = nn.GroupNorm(1, channels, eps=EPS)
        self.cmixer = CMixer(channels, expand_ratio, conv_type)
        self.layer_scale2 = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.drop_path_rate = 0.

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return x
        keep = 1 - self.drop_path_rate
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale1 * self.smixer(self.norm1(x)))
        x = x + self.drop_path(self.layer_scale2 * self.cmixer(self.norm2(x)))
        return x


class Stage(nn.Module):

    def __init__(self, embedding: nn.Module, blocks: list[Block]):
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.embedding(x))


class SpaRTANOracle(nn.Module):
    """Same input and outputs as the backbone whose architecture and weights it is made from."""

    def __init__(self, backbone: SpaRTAN):
        super().__init__()
        arch = backbone.arch
        self.out_indices = backbone.out_indices
        self.out_channels, self.strides = backbone.out_channels, backbone.strides
        stem, channels = arch['stem_channels'], arch['channels']
        self.stem = nn.Sequential(
            ConvNormAct(backbone.stem[0].conv.in_channels, stem, 3, stride=2, padding=1),
            ConvNormAct(stem, channels[0], 3, stride=2, padding=1))
        self.stages = nn.ModuleList()
        for i, (depth, width, ratio, conv_type) in enumerate(
                zip(arch['depths'], channels, arch['expand_ratios'], arch['conv_types'],
                    strict=True)):
            embedding = nn.Identity() if i == 0 else ConvNormAct(
                channels[i - 1], width, 2, stride=2, act=nn.SiLU)
            self.stages.append(
                Stage(embedding, [Block(width, ratio, conv_type) for _ in range(depth)]))

        for ours, theirs in zip(backbone.stages, self.stages, strict=True):
            for block, literal in zip(ours.blocks, theirs.blocks, strict=True):
                literal.drop_path_rate = block.drop_path.rate
        reference = next(backbone.parameters())
        self.to(reference.device, reference.dtype)
        self.load_state_dict(to_literal(backbone.state_dict()))
        self.train(backbone.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
            if i == self.out_indices[-1]:
                break
        return tuple(maps)


def make_oracle(backbone: SpaRTAN) -> SpaRTANOracle:
    """The literal form of a backbone in training form, with copies of its weights.

    Raises:
        RuntimeError: The backbone's options are not those of the released model.
    """
    return SpaRTANOracle(backbone)


def to_literal(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of the backbone, by the oracle's names."""
    literal = {}
    for name, value in values.items():
        if '.cmixer.proj_in.' in name:
            theta, proj = value.chunk(2)
            literal[name.replace('proj_in', 'theta')] = theta
            literal[name.replace('proj_in', 'proj')] = proj
        elif name.endswith('complex_weight'):
            literal[name] = value.reshape(1, 1, 1, *value.shape)
        else:
            literal[name] = value
    return literal
