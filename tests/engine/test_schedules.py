"""The learning rate of each iteration."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch.testing import assert_close

from spartan_mm.engine import FlatCosineLR

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden' / 'deim_flatcosine'
CASES = json.loads(GOLDEN.with_suffix('.json').read_text())['meta']['cases']


def make_optimizer(lr=1.):
    groups = [dict(params=[torch.zeros(1, requires_grad=True)], lr=rate) for rate in (lr, lr / 10)]
    return torch.optim.SGD(groups)


def build(optimizer, **settings):
    return PARAM_SCHEDULERS.build(dict(
        type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, epoch_length=10,
        optimizer=optimizer, **settings))


def rates(optimizer, scheduler, count):
    """The learning rates of each group in each of the next steps."""
    for _ in range(count):
        yield [group['lr'] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize('number', range(len(CASES)))
def test_rates_are_the_official_ones(number):
    case = CASES[number]
    optimizer = make_optimizer(case['lr'])
    scheduler = PARAM_SCHEDULERS.build(dict(
        type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, optimizer=optimizer,
        epoch_length=case['iters_per_epoch'], warmup=1e9, max_warmup=case['warmup_iters'],
        flat=case['flat_epochs'], tail=case['no_aug_epochs'], gamma=case['lr_gamma'],
        end=case['epochs']))
    found = np.array([*rates(optimizer, scheduler, case['iters_per_epoch'] * case['epochs'])])
    expected = np.load(GOLDEN.with_suffix('.npz'))
    steps, values = expected[f'it{number}'], expected[f'lr{number}'] / 1e4
    # Without a warm-up, the official first rate is 0 / 0.
    known = np.isfinite(values)
    assert_close(found[steps][known], values[known].astype(float), rtol=1e-5, atol=0)
    assert found[0] == pytest.approx([case['lr'], case['lr'] / 10] if not case['warmup_iters']
                                     else 0)


def test_the_warm_up_takes_epochs_where_these_are_short():
    assert build(make_optimizer(), warmup=3, max_warmup=2000, flat=8, end=20).warmup == 30
    assert build(make_optimizer(), warmup=3, max_warmup=25, flat=8, end=20).warmup == 25


def test_continues_where_it_was():
    settings = dict(warmup=1, flat=2, tail=1, warmup_power=1., end=5)
    optimizer, other = make_optimizer(), make_optimizer()
    scheduler, resumed = build(optimizer, **settings), build(other, **settings)
    first = [*rates(optimizer, scheduler, 27)]
    assert_close(first[5], [0.5, 0.05])  # linear
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert [*rates(other, resumed, 23)] == [*rates(optimizer, scheduler, 23)]


@pytest.mark.parametrize('settings, words', [
    (dict(by_epoch=True), 'convert_to_iter_based=True'),
    (dict(warmup=20), 'warmup=20 must be at least 0 and at most flat=10'),
])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        FlatCosineLR(make_optimizer(), flat=10, **settings)
