"""A toy SpaRTAN for the tests of its forms, an adapter, and what a training step gives."""
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.arch import PRUNED_WIDTHS

# A block of either type: compilers take a while.
TOY = dict(stem_channels=8, depths=(1, 1), channels=(16, 24), expand_ratios=(4, 2),
           conv_types=('full', 'depthwise'))
# What the forms are compared under: each option, and mixers and norms that fold differently.
OPTIONS = [
    dict(), dict(low_freq_kernel=5), dict(conv_types='full'), dict(conv_types='depthwise'),
    dict(conv_types='depthwise', expand_ratios=(3, 1)), dict(spatial_mixer='conv'),
    dict(channel_mixer='mlp'), dict(channel_mixer='mlp_se'),
    dict(spatial_mixer='conv', channel_mixer='mlp'), dict(block_norm='BN'),
    dict(block_norm='BN', channel_mixer='mlp'), dict(block_norm='LN2d'), dict(conv_norm='LN'),
    dict(conv_norm='LN2d'), dict(block_act='SiLU', stem_act='SiLU', patch_act='GELU'),
    dict(hidden_channels=(22, 30), inner_channels=(5, 7))]


def make(dtype=torch.float64, kind=SpaRTAN, **options):
    """A toy in training mode that returns both maps, with options of SpaRTAN or parts of an arch.
    """
    torch.manual_seed(0)
    arch = TOY | {key: options.pop(key) for key in ('depths', 'expand_ratios', *PRUNED_WIDTHS)
                  if key in options}
    options = dict(out_indices=(0, 1), drop_path_rate=0.) | options
    return randomise(kind(arch, **options)).to(dtype).train()


def randomise(model):
    """Give weights near 0 or 1, and statistics, values at which an error behind them would show."""
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or name.endswith('gamma'):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith('squeeze.bias'):
            nn.init.uniform_(parameter, 1, 2)  # of two hidden units both are dead all too often
        elif 'norm' in name or name.endswith('bias'):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith('complex_weight'):
            nn.init.normal_(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


class LowRank(nn.Module):
    """A projection that stays as it is, and an addend of low rank that is trained."""

    def __init__(self, conv, rank=2):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, 1, bias=False, dtype=conv.weight.dtype)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False, dtype=conv.weight.dtype)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def images(*size, dtype=torch.float64):
    """The same random numbers, whatever was drawn before, and in every type."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)


def step(model, x):
    """Maps, and the gradients of the input and of all parameters, by name."""
    torch.manual_seed(2)  # of the drop path
    x = x.clone().requires_grad_()
    maps = model(x)
    model.zero_grad()
    sum((y * images(*y.shape, dtype=y.dtype)).sum() for y in maps).backward()
    grads = {name.removeprefix('_orig_mod.'): parameter.grad
             for name, parameter in model.named_parameters()}
    return {f'map {index}': y.detach() for index, y in enumerate(maps)} | {'input': x.grad} | grads


def assert_near(actual, expected, tolerance=1e-10, name=''):
    """Differences as a part of the largest value, unless that is all but 0."""
    largest = max(expected.abs().max().item(), 1e-3)
    assert_close(actual / largest, expected / largest, rtol=0, atol=tolerance,
                 msg=lambda message: f'{name} {message}')


def compare_steps(actual, expected, x, tolerance=1e-10):
    """Two models take a step alike: maps, gradients, running statistics."""
    values, wanted = step(actual, x), step(expected, x)
    assert values.keys() == wanted.keys()
    for name, value in values.items():
        if wanted[name] is None:  # of a frozen parameter
            assert value is None, name
        else:
            assert_near(value, wanted[name], tolerance, name)
    for (name, buffer), other in zip(actual.named_buffers(), expected.buffers(), strict=True):
        assert_near(buffer, other, tolerance, name)
