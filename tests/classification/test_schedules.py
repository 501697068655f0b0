"""The learning rate of each epoch."""

import math

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch.testing import assert_close

import spartan_mm.classification  # noqa: F401


def rates(steps, **settings):
    """The learning rate in each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.pop('lr', 1.))
    scheduler = PARAM_SCHEDULERS.build(
        dict(type='WarmupCosineLR', **settings), default_args=dict(optimizer=optimizer))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_replaces_the_beginning_of_the_cosine():
    found = rates(10, warmup=4, start_factor=0.2, eta_min=0.1, end=10)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(4, 10)]
    assert_close(found, [0.2, 0.4, 0.6, 0.8, *cosine])


def test_nothing_changes_after_the_end():
    found = rates(12, warmup=0, start_factor=1., eta_min=0., end=10)
    assert found[0] == 1.
    assert found[9] == found[10] == found[11]


def test_the_warm_up_scales_with_the_learning_rate():
    settings = dict(warmup=4, start_factor=0.2, eta_min=0., end=10)
    assert_close(rates(10, lr=0.5, **settings), [0.5 * rate for rate in rates(10, **settings)])


def test_continues_where_it_was():
    def build(optimizer):
        return PARAM_SCHEDULERS.build(dict(
            type='WarmupCosineLR', warmup=4, start_factor=0.2, eta_min=0., end=10,
            optimizer=optimizer))

    def steps(optimizer, scheduler, count):
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]['lr']

    first, second = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.) for _ in range(2))
    scheduler, resumed = build(first), build(second)
    list(steps(first, scheduler, 5))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert list(steps(second, resumed, 4)) == list(steps(first, scheduler, 4))


@pytest.mark.parametrize('warmup', [-1, 10])
def test_bad_warm_up(warmup):
    with pytest.raises(ValueError, match=f'warmup={warmup} must be .* less than end=10'):
        rates(1, warmup=warmup, start_factor=1., eta_min=0., end=10)
