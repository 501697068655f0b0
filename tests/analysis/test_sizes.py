"""Sizes: on models whose counts are known by hand, of models by name, and memory to the byte."""

import pytest
import torch
from torch import nn

from spartan_mm.analysis import sizes
from spartan_mm.analysis.models import CannotRunError, NamedModel, build_without_numbers
from spartan_mm.analysis.sizes import (
    Complexity,
    count_model,
    forms_table,
    measure_modules,
    peak_of_step,
    size_of,
    tree,
)
from spartan_mm.backbones import SpaRTAN
from spartan_mm.errors import CheckpointError


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
    assert measure_modules(model.to_empty(device=device), 4, 8)[''] == Complexity(*expected)
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
    backbone = SpaRTAN('t')
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
    assert all(p.is_meta for p in model.parameters())


# ---- by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['timm:resnet18', 'mmpretrain:resnet18_8xb32_in1k'])
def test_resnet_whoever_builds_it(name):
    total = count_model(name).total
    assert (total.parameters, total.multiply_adds, total.flops, total.activations) == (
        11689512, 1814073344, 3628146688, 2484712)


def test_forms(user_project):
    detector = user_project / 'user_detector.py'
    trained, deployed = (count_model(detector, deploy=deploy) for deploy in (False, True))
    assert (trained.form, deployed.form) == ('training form', 'deploy form')
    total = trained.total
    lines = forms_table([trained, deployed]).splitlines()
    assert lines[2] == (f'| training form | 64 x 64 | {total.parameters:,} | '
                        f'{total.multiply_adds:,} | {2 * total.multiply_adds:,} | '
                        f'{total.activations:,} | {trained.kernels.kernels:,} | '
                        f'{trained.kernels.bytes / 1e9:.3f} |')
    assert lines[3].startswith('| deploy form |')
    assert deployed.total.multiply_adds < total.multiply_adds
    assert deployed.kernels.kernels < trained.kernels.kernels
    assert deployed.kernels.bytes < trained.kernels.bytes

    for text, depth in ((tree(deployed, 1), 1), (tree(deployed, None), None)):
        lines = text.splitlines()[1:]
        assert lines[0].startswith('user_detector (RTDETR)') and lines[0].endswith('100.0')
        shares = [float(line.split()[-1]) for line in lines
                  if len(line) - len(line.lstrip()) == 2]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert (len(lines) > 100) == (depth is None)
    content = deployed.to_dict()
    assert content['modules']['backbone']['kind'] == 'SpaRTAN'
    assert content['modules']['']['flops'] == 2 * deployed.total.multiply_adds


class ReadsNumbers(nn.Module):
    """Looks at what it computes on its way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return x if x.sum().item() < 1e9 else x + 1


def test_model_that_reads_numbers(monkeypatch):
    monkeypatch.setattr(sizes, 'load_named_model', lambda name, device='cpu': NamedModel(
        name, 'config', 'backbone', ReadsNumbers().to(device), (4, 4), None))
    found = count_model('any')
    assert found.total.multiply_adds == 4 * 4 * 6
    assert {'convolution', '_local_scalar_dense'} <= found.kernels.by_operation.keys()


def test_mistakes(user_project, tmp_path):
    with pytest.raises(CannotRunError, match='cannot be run on images of 100x100: Input height'):
        count_model('timm:vit_tiny_patch16_224', (100, 100))
    with pytest.raises(CheckpointError, match='has no deploy form'):
        count_model('timm:resnet18', deploy=True)
    path = tmp_path / 'config.py'
    base = str(user_project / 'user_classifier.py')
    path.write_text(f'_base_ = {base!r}\ntest_dataloader = dict(_delete_=True)\n')
    with pytest.raises(CannotRunError, match='give a size with --size'):
        count_model(path)
    assert count_model(path, (32, 32)).shape == (32, 32)


# ---- memory --------------------------------------------------------------------------------------

CPU = torch.device('cpu')
MEGABYTE = 10**6
LENGTH = MEGABYTE // 4  # of float32
SMALL = 100  # bytes of numbers that become tensors on the way


def test_what_is_freed_does_not_count_any_longer():
    x = torch.zeros(LENGTH)

    def step():
        first = x + 1
        second = first * 2
        del first
        return second.exp()
    assert peak_of_step(step, CPU) == pytest.approx(2 * MEGABYTE, abs=SMALL)


def test_training_holds_what_the_backward_pass_needs():
    """All four results, and while going back the gradients on both sides of a layer."""
    x, gradient = torch.zeros(LENGTH, requires_grad=True), torch.ones(LENGTH)

    def step():
        y = x
        for _ in range(4):
            y = y.exp()  # is kept for its own derivative
        y.backward(gradient)
    assert peak_of_step(step, CPU) == pytest.approx(6 * MEGABYTE, abs=SMALL)


def test_gradients_of_parameters_count_and_parameters_do_not():
    layer = nn.Linear(500, 500, bias=False)  # a megabyte
    x = torch.zeros(1, 500)
    peak = peak_of_step(lambda: layer(x).sum().backward(), CPU)
    assert MEGABYTE <= peak < 1.02 * MEGABYTE


def test_nothing():
    assert peak_of_step(lambda: None, CPU) == 0


def test_shared_memory_is_held_once():
    x = torch.zeros(LENGTH)
    assert size_of([x, x.view(2, -1), x[1:], torch.zeros(10)]) == MEGABYTE + 40
