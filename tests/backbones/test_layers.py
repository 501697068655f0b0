"""The layers that SpaRTAN takes as known, and the gradient of a superposition."""
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from spartan_mm.backbones.layers import (
    DropPath,
    GroupNorm1,
    KeepStatistics,
    LayerNorm2d,
    superpose,
)

from .toy import images

# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize('norm, axes', [(LayerNorm2d, 1), (GroupNorm1, (1, 2, 3))])
def test_norms_normalise_each_position_or_each_sample(norm, axes):
    y = norm(16)(5 * images(2, 16, 3, 4, dtype=torch.float32) + 2)
    for found, expected in ((y.mean(axes), 0.), (y.var(axes, correction=0), 1.)):
        assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_group_norm_after_what_is_frozen_has_gradients(layout):
    # PyTorch's own ends the process where the channels are last.
    norm = GroupNorm1(6).double()
    x = images(3, 6, 5, 4).contiguous(memory_format=layout)
    (norm(x) * images(3, 6, 5, 4).flip(0)).sum().backward()
    grads = norm.weight.grad.clone(), norm.bias.grad.clone()
    norm.zero_grad()
    (norm(x.contiguous().requires_grad_()) * images(3, 6, 5, 4).flip(0)).sum().backward()
    assert_close(grads, (norm.weight.grad, norm.bias.grad))


# -------------------------------------------------------------------------------------- drop path


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    y = DropPath(0.25)(torch.ones(400, 3, 2, 1))
    samples = y.flatten(1)
    assert_close(samples, samples[:, :1].expand_as(samples), rtol=0, atol=0)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('rate, training', [(0.25, False), (0, True)])
def test_drop_path_does_nothing_in_evaluation_or_at_a_rate_of_0(rate, training):
    x = images(4, 3, 2, 1)
    assert DropPath(rate).train(training)(x) is x


def test_drop_path_shows_its_rate():
    assert str(DropPath(0.1 / 3)) == 'DropPath(rate=0.03333)'


# ---------------------------------------------------------------------------- running statistics


def test_statistics_are_kept_inside_of_the_guard_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None),
                          nn.BatchNorm2d(3, track_running_stats=False))
    x = 2 * images(2, 3, 4, 4, dtype=torch.float32) + 1
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guard = KeepStatistics(model)
    for _ in range(2):
        with guard:
            kept = model(x)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert_close(model(x), kept)  # in the guard, too, batch norms look at the batch
    for norm in model[:2]:
        assert norm.num_batches_tracked == 1
        assert norm.running_mean.any()


def test_the_guard_lets_go_when_an_error_ends_it():
    # Checkpointing ends its second pass so, as soon as it has what it needs.
    norm = nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError), KeepStatistics(norm):
        norm(images(2, 3, 4, 4, dtype=torch.float32))
        raise RuntimeError
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 0


# ---------------------------------------------------------------------------------- superposition


@pytest.fixture
def waves():
    """Amplitudes and phases of 8 hidden channels, and the strongest of 4 channels."""
    amplitude, phase = images(2, 2, 8, 3, 4).requires_grad_()
    return amplitude, phase, images(2, 4, 3, 4).argmax(1, keepdim=True)


def test_the_strongest_wave_is_added_to_all(waves):
    amplitude, phase, strongest = waves
    wave = amplitude * phase
    assert_close(superpose(*waves, 4), wave + wave.gather(1, strongest))
    with torch.no_grad():
        without = superpose(*waves, 4)
    assert_close(without, superpose(*waves, 4), rtol=0, atol=0)


@pytest.mark.parametrize('check', [gradcheck, gradgradcheck])
def test_gradient_of_a_superposition(waves, check):
    amplitude, phase, strongest = waves
    assert check(lambda *maps: superpose(*maps, strongest, 4), (amplitude, phase))
