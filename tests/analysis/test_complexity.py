"""Counting: on models whose counts are known by hand."""

import pytest
import torch
from torch import nn

from spartan_mm.analysis.complexity import (
    Complexity,
    build_without_numbers,
    measure_complexity,
    measure_modules,
)
from spartan_mm.backbones import SpaRTAN


class Attention(nn.Module):
    """Attention of an image's pixels as tokens of 3 channels; one projection in, one out."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True, bias=False)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens + 1, tokens, need_weights=False)[0]


class Twice(nn.Module):
    """Parts in a container that is never called itself, one of them called from another part."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 5, 1, bias=False)])
        self.caller = Caller(self.convs[0])

    def forward(self, x):
        return self.convs[1](self.caller(self.convs[0](x)))


class Caller(nn.Module):
    """Calls a module that it doesn't own, and computes something itself."""

    def __init__(self, module):
        super().__init__()
        self.call = lambda x: module(x)

    def forward(self, x):
        return (self.call(x).transpose(1, 3) @ torch.ones(3, 3, device=x.device)).transpose(1, 3)


class SelfAttention(nn.Module):
    """Attention for which PyTorch has a kernel that does all at once, on a CPU."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = x.new_zeros(1, x[0, 0].numel(), 4)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('model, expected', [
    (nn.Conv2d(3, 8, 3, stride=2, padding=1),
     (3 * 8 * 9 + 8, 3 * 8 * 9 * 8, 3 * 8 * 9 * 8, 8 * 2 * 4)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
     (6 + 20, 15, 15 + 2 * 3 * 32 + 3 * 32, 5)),
    # Three projections in and one out, scores and sums of 32 x 32 pairs.
    (Attention(), (36, 4 * 32 * 9 + 2 * 32 * 32 * 3, 4 * 32 * 9 + 2 * 32 * 32 * 3,
                   4 * 32 * 3 + 32 * 32 + 32 * 3)),
    (SelfAttention(), (80, 4 * 32 * 16 + 2 * 32 * 32 * 4, 4 * 32 * 16 + 2 * 32 * 32 * 4,
                       4 * 32 * 4 + 2 * 32 * 32 + 32 * 4)),
])
def test_counts(model, expected, device):
    assert measure_complexity(model.to_empty(device=device), 4, 8) == Complexity(*expected)
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_counts_by_module():
    """Each operation counts where the module stands that does it, whoever calls it."""
    model = Twice()
    sizes = measure_modules(model, 4, 8)
    assert {name: (size.parameters, size.multiply_adds / 32, size.flops / 64)
            for name, size in sizes.items()} == {
        '': (24, 42, 42), 'convs': (24, 33, 33), 'convs.0': (9, 18, 18), 'convs.1': (15, 15, 15),
        'caller': (0, 9, 9)}
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


@pytest.mark.parametrize('deploy', [False, True])
def test_counts_in_a_block(deploy):
    """Each projection has its own, of a stage of 64 channels on 8x8 positions."""
    backbone = SpaRTAN('t').requires_grad_(False)
    if deploy:
        backbone.switch_to_deploy()
    sizes = measure_modules(backbone, 64, 64)
    found = {name: sizes[f'stages.1.blocks.0.{name}'].multiply_adds / 64 for name in (
        'smixer.proj_in', 'smixer.high_freq', 'smixer.low_freq', 'smixer.proj_out',
        'cmixer.proj_in', 'cmixer.refine', 'cmixer.proj_out')}
    assert found == {
        'smixer.proj_in': 64 * 32, 'smixer.high_freq': 9 * 32**2, 'smixer.low_freq': 18 * 32**2,
        'smixer.proj_out': 64**2, 'cmixer.proj_in': 64 * 512, 'cmixer.refine': 9 * 256,
        'cmixer.proj_out': 256 * 64}


@pytest.mark.parametrize('build', [
    lambda: nn.Linear(2, int(torch.ones(1).item())),  # reads a number while it is built
    lambda: nn.ParameterList([nn.Parameter(torch.Tensor(3))]),  # made where the default isn't asked
])
def test_builds_without_numbers(build):
    model = build_without_numbers(build)
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
