"""Peak memory is known to the byte where it can be worked out by hand."""

import pytest
import torch
from torch import nn

from spartan_mm.analysis.memory import peak_of_step, size_of

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
