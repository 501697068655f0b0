"""Spectra that are known, the parts of the mixers, and what is collected of a backbone."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.analysis.look_inside.spectra import (
    Spectrum,
    collect,
    describe,
    draw_spectra,
    find_backbone,
    power_spectrum,
    radial_average,
    share_above,
    white_share,
)
from spartan_mm.backbones.spartan import modulate
from spartan_mm.errors import UsageError


def wave(height, width, rows, columns):
    """A wave with so many periods along either side, of variance 1/2."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.cos(2 * torch.pi * (y * rows / height + x * columns / width).double() + 0.3)


@pytest.fixture
def backbone(make_backbone):
    model = make_backbone()
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('window', ['hann', 'none'])
@pytest.mark.parametrize(('height', 'width', 'rows', 'columns', 'frequency'), [
    (32, 32, 0, 5, 5 / 16), (32, 32, 3, 4, 5 / 16), (32, 48, 0, 12, 8 / 16), (16, 64, 4, 0, 4 / 8),
    (31, 31, 12, 0, 24 / 31)])
def test_sinusoid(window, height, width, rows, columns, frequency):
    power = power_spectrum(7 + wave(height, width, rows, columns), window)
    frequencies, rings, counts = radial_average(power)
    total = rings * counts
    assert frequencies[total.argmax()].item() == pytest.approx(frequency)
    if window == 'none':
        assert_close(total.max() / total.sum(), torch.tensor(1.).double())
        assert_close(power.sum() / power.numel(), torch.tensor(0.5).double())


def test_white_noise_is_flat():
    noise = 3 * torch.randn(64, 32, 48)
    for window in ('hann', 'none'):
        power = power_spectrum(noise, window)
        frequencies, rings, counts = radial_average(power.mean(0))
        # Not the lowest, of which the average takes part away, nor the corners, which are few.
        flat = rings[(frequencies > 0.15) & (frequencies <= 1)] / 9
        assert_close(flat, torch.ones_like(flat), rtol=0, atol=0.12)
        assert_close(share_above(power).mean().item(), white_share(32, 48), rtol=0, atol=0.02)
    assert counts.sum() == 32 * 48


def test_parseval():
    maps = torch.randn(2, 3, 9, 14).double() + 5
    assert_close(power_spectrum(maps, 'none').mean((2, 3)), maps.var((2, 3), correction=0))
    weights = torch.hann_window(11, periodic=False)[1:-1, None] * torch.hann_window(
        16, periodic=False)[1:-1]
    weights = weights.double()
    average = (maps * weights).sum((2, 3), keepdim=True) / weights.sum()
    windowed = ((maps - average) * weights).square().sum((2, 3)) / weights.square().sum()
    power = power_spectrum(maps)
    assert_close(power.mean((2, 3)), windowed, rtol=1e-6, atol=1e-6)
    _, rings, counts = radial_average(power)
    assert_close((rings * counts).sum(-1), power.sum((2, 3)))
    assert_close(power[..., 0, 0], torch.zeros(2, 3).double(), rtol=0, atol=1e-12)


def test_share():
    """Amplitudes 1 and 2 below, 3 above: 9 of 14 parts of the power."""
    maps = wave(32, 32, 2, 0) + 2 * wave(32, 32, 3, 4) + 3 * wave(32, 32, 0, 11)
    assert_close(share_above(power_spectrum(maps + 4, 'none')), torch.tensor(9 / 14).double())
    assert white_share(512, 512) == pytest.approx(1 - np.pi / 16, abs=1e-3)


def test_which_maps_are_seen(backbone, monkeypatch):
    monkeypatch.setattr(Spectrum, 'add', lambda self, maps, window: vars(self).update(
        maps=maps, sizes=True))
    smixer, cmixer = backbone.stages[0].blocks[0].smixer, backbone.stages[0].blocks[0].cmixer
    spectra = collect(backbone, torch.rand(1, 3, 64, 96))
    x, high, low = (spectra[1, 1, 'smixer', part].maps for part in (
        'input', 'high-frequency branch', 'low-frequency branch'))
    y, modulated, refined = (spectra[1, 1, 'cmixer', part].maps for part in (
        'input', 'modulated wave', 'refined wave'))
    with torch.no_grad():
        assert_close(smixer.proj_out(torch.cat([high, low], 1)), smixer(x))
        assert_close(cmixer.se(cmixer.refine(modulated)), refined)
        assert_close(cmixer.proj_out(refined), cmixer(y))


def test_modulation_moves_no_power():
    """At every frequency, a pair's power is multiplied by the weight's squared absolute value."""
    wave, weight = torch.randn(2, 8, 12, 10), torch.randn(4, 2)
    before, after = (power_spectrum(maps).unflatten(1, (-1, 2)).sum(2)
                     for maps in (wave, modulate(wave, weight)))
    squared = weight.double().square().sum(1)
    assert_close(after, before * squared[:, None, None], rtol=1e-4, atol=1e-6)


def test_spectrum_of_images():
    """Each image counts the same, whatever its contrast; one without any does not count."""
    low, high = (wave(16, 16, 0, periods).float()[None] for periods in (2, 6))
    spectrum = Spectrum()
    spectrum.add(torch.stack([low, 100 * high]), 'none')
    spectrum.add(torch.full((1, 1, 16, 16), 3.), 'none')
    assert len(spectrum.shares) == 2
    assert np.mean(spectrum.shares) == pytest.approx(0.5)
    # All power in two of 255 frequencies, and those rings have 12 and 32 of them.
    rings = np.mean(spectrum.rings, axis=0)
    counts = radial_average(torch.ones(16, 16))[2][1:].numpy()
    assert_close(rings[[1, 5]] * counts[[1, 5]], np.array([127.5, 127.5]))


def test_collect(backbone):
    images = torch.rand(3, 3, 64, 96)
    stages = describe(collect(backbone, images))
    assert json.loads(json.dumps(stages)) == stages
    assert [stage['maps'] for stage in stages] == [[[16, 24]], [[8, 12]], [[4, 6]], [[2, 3]]]
    assert 'smixer' not in stages[3]  # too small
    assert stages[3]['white_noise_share'] is None
    assert stages[0]['white_noise_share'] == white_share(16, 24)
    assert list(stages[0]['smixer']) == ['input', 'high-frequency branch', 'low-frequency branch']
    assert list(stages[0]['cmixer']) == ['input', 'modulated wave', 'refined wave']
    part = stages[1]['cmixer']['modulated wave']
    assert len(part['share_by_block']) == 2
    assert part['share_above_half_nyquist'] == pytest.approx(np.mean(part['share_by_block']))
    assert part['relative_log_amplitude'][0] == 0
    assert part['frequencies'][:4] == [0.25, 0.5, 0.75, 1.]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.modules())


def test_low_pass_and_high_pass(backbone):
    """Branches whose kernels are made low-pass and high-pass are told apart."""
    mixer = backbone.stages[0].blocks[0].smixer
    with torch.no_grad():
        kernel = torch.tensor([[0., -1, 0], [-1, 4, -1], [0, -1, 0]])
        for conv, weight in ((mixer.high_freq.conv, kernel),
                             (mixer.low_freq[0], torch.full((3, 3), 1 / 9)),
                             (mixer.low_freq[1].conv, torch.full((3, 3), 1 / 9))):
            conv.weight.zero_()
            for channel in range(conv.in_channels):
                conv.weight[channel, channel] = weight
        backbone.stem[1].norm.running_var.fill_(1e-2)  # noise that is not smooth yet
    found = describe(collect(backbone, torch.randn(2, 3, 128, 128)))[0]['smixer']
    shares = {part: values['share_above_half_nyquist'] for part, values in found.items()}
    assert shares['low-frequency branch'] < shares['input'] < shares['high-frequency branch']


def test_images_of_two_sizes(backbone):
    spectra = collect(backbone, [torch.rand(3, size, size) for size in (64, 96)])
    first = describe(spectra)[0]
    assert first['maps'] == [[16, 16], [24, 24]]
    assert len(first['smixer']['input']['frequencies']) == len(first['smixer']['input']['power'])
    assert len(spectra[1, 1, 'smixer', 'input'].shares) == 2


def test_what_is_refused(backbone, make_backbone):
    with pytest.raises(UsageError, match='net has no SpaRTAN.* Conv2d'):
        find_backbone(nn.Conv2d(3, 3, 1), 'net')
    assert find_backbone(nn.Sequential(backbone), 'net') is backbone
    backbone.switch_to_deploy()
    with pytest.raises(UsageError, match='net is in deploy form'):
        find_backbone(backbone, 'net')
    plain = make_backbone(spatial_mixer='conv', channel_mixer='mlp')
    with pytest.raises(UsageError, match='neither SMixers nor CMixers'):
        find_backbone(plain, 'net')


def test_one_kind_of_mixer(make_backbone):
    backbone = find_backbone(make_backbone(spatial_mixer='conv'), 'net')
    stages = describe(collect(backbone, torch.rand(1, 3, 64, 64)))
    assert 'smixer' not in stages[0] and 'cmixer' in stages[0]
    figure = draw_spectra(stages, 'one row')
    assert len(figure.axes) == 5


def test_drawing(backbone):
    stages = describe(collect(backbone, torch.rand(1, 3, 96, 96)))
    figure = draw_spectra(stages, 'title')
    assert len(figure.axes) == 10
    assert [axes.get_title(loc='left') for axes in figure.axes[:2]] == [
        'stage 1, 24×24', 'stage 2, 12×12']
    assert max(figure.axes[0].get_lines()[0].get_xdata()) == 1
    assert 'maps too small' in [text.get_text() for text in figure.axes[3].texts]
    with pytest.raises(UsageError, match='at most 2×2 where 4×4 is the least'):
        draw_spectra([dict(stage=1, maps=[[2, 2]])], 'title')
