import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import spartan_mm.engine  # noqa: F401


@pytest.fixture
def model():
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.head = nn.Linear(4, 2)
    model.table = nn.Parameter(torch.zeros(2))
    return model


def groups(model, *rules):
    wrapper = build_optim_wrapper(model, dict(
        constructor='RuleOptimWrapperConstructor', paramwise_cfg=dict(rules=list(rules)),
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.01)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (round(group['lr'], 9), round(group['weight_decay'], 9))
            for group in wrapper.optimizer.param_groups for p in group['params'] if p in names}


def test_the_first_rule_that_fits_decides(model):
    assert groups(model,
                  dict(pattern='^backbone', norm=True, lr_mult=0.5, decay_mult=0.),
                  dict(pattern='^backbone', lr_mult=0.5),
                  dict(pattern='bias', decay_mult=0.)) == {
        'backbone.0.weight': (0.05, 0.01), 'backbone.0.bias': (0.05, 0.01),
        'backbone.1.weight': (0.05, 0.), 'backbone.1.bias': (0.05, 0.),
        'head.weight': (0.1, 0.01), 'head.bias': (0.1, 0.), 'table': (0.1, 0.01)}


def test_norm_false_spares_norms(model):
    found = groups(model, dict(norm=False, decay_mult=0.))
    assert {name for name, (_, decay) in found.items() if decay} == {
        'backbone.1.weight', 'backbone.1.bias'}


def test_one_group_for_each_pair_of_factors(model):
    wrapper = build_optim_wrapper(model, dict(
        constructor='RuleOptimWrapperConstructor',
        paramwise_cfg=dict(rules=[dict(pattern='bias', decay_mult=0.)]),
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01)))
    sizes = sorted(len(group['params']) for group in wrapper.optimizer.param_groups)
    assert sizes == [3, 4]


def test_frozen_parameters_are_left_out(model):
    model.backbone.requires_grad_(False)
    assert set(groups(model, dict(pattern='bias', decay_mult=0.))) == {
        'head.weight', 'head.bias', 'table'}


@pytest.mark.parametrize('rule, message', [
    (dict(pattern='bakbone', lr_mult=0.1), 'bakbone'),
    (dict(pattern='head', decay=0.), r"unknown entries \['decay'\]"),
])
def test_slips_of_the_pen_are_errors(model, rule, message):
    with pytest.raises(ValueError, match=message):
        groups(model, rule)


def test_optional_rule_may_fit_nothing(model):
    assert len(groups(model, dict(pattern='neck', lr_mult=0.1, optional=True))) == 7


def test_other_settings_are_refused(model):
    with pytest.raises(ValueError, match='norm_decay_mult'):
        build_optim_wrapper(model, dict(
            constructor='RuleOptimWrapperConstructor', paramwise_cfg=dict(norm_decay_mult=0.),
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01)))
