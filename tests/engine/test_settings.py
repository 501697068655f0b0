"""Settings that mmengine or torch would stumble over are settled, or refused in a line."""

import re

import pytest
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from torch import nn

from spartan_mm.engine.explain import explain
from spartan_mm.engine.settings import check_run, settle
from spartan_mm.errors import UsageError

SAMPLER = dict(type='DefaultSampler', shuffle=True)


def settled(**loader):
    cfg = Config(dict(val_dataloader=dict(dict(sampler=SAMPLER), **loader)))
    settle(cfg)
    return dict(cfg.val_dataloader)


@pytest.mark.parametrize('setting', [
    dict(persistent_workers=True), dict(prefetch_factor=2), dict(timeout=9),
    dict(multiprocessing_context='fork')], ids=str)
def test_without_workers_there_is_nothing_to_keep(setting):
    assert settled(num_workers=0, **setting) == dict(sampler=SAMPLER, num_workers=0)
    assert settled(**setting) == dict(sampler=SAMPLER)
    assert settled(num_workers=1, **setting).keys() == {'sampler', 'num_workers', *setting}


@pytest.mark.parametrize('own, drop_last, found', [
    ({}, True, dict(drop_last=True)), (dict(drop_last=False), True, dict(drop_last=False)),
    ({}, False, {})])
def test_the_last_batch_is_the_batch_sampler_s(own, drop_last, found):
    loader = settled(batch_sampler=dict(type='Batches', **own), drop_last=drop_last, batch_size=2)
    assert loader == dict(sampler=SAMPLER, batch_size=2,
                          batch_sampler=dict(type='Batches', **found))
    assert settled(batch_sampler=dict(type='Batches'))['batch_size'] == 1


def test_shuffle():
    assert settled(shuffle=True) == dict(sampler=SAMPLER)
    assert settled(shuffle=True, sampler=None) == dict(sampler=SAMPLER)
    with pytest.raises(UsageError, match=r'val_dataloader\.shuffle=False stands beside .*sampler='):
        settled(shuffle=False)


@pytest.mark.parametrize('loader, words', [
    (dict(samples_per_gpu=2), 'samples_per_gpu=2 is .* mmdet 2; today it is .*batch_size'),
    (dict(workers_per_gpu=2), 'today it is val_dataloader.num_workers'),
    (dict(batch_size=0), 'batch_size=0 must be a whole number, at least 1'),
    (dict(batch_size='four'), "batch_size='four' must be"),
    (dict(num_workers=-1), 'num_workers=-1 must be a whole number, at least 0'),
    (dict(dataset=[dict(type='A'), dict(type='B')]), "dataset is a list; .*'ConcatDataset'"),
    (dict(dataset='images/'), "val_dataloader.dataset='images/' must be a dict with a type"),
    (dict(sampler='DefaultSampler', shuffle=True), "sampler='DefaultSampler' must be a dict"),
    (dict(batch_sampler=dict(drop_last=True)), 'val_dataloader.batch_sampler has no type'),
])
def test_data_loaders(loader, words):
    with pytest.raises(UsageError, match=words):
        settled(**loader)


@pytest.mark.parametrize('settings, words', [
    (dict(optimizer=dict(type='SGD', lr=0.1)),
     r"nobody reads optimizer=.*, which is a setting of mmdet 2 .*; today: optim_wrapper\.optim"),
    (dict(data=dict(samples_per_gpu=2, train=dict(type='CocoDataset'))), 'today: train_dataload'),
    (dict(data=dict(samples_per_gpu=2), train_dataloader=dict()), 'today: train_dataload'),
    (dict(lr_config=dict(policy='step'), param_scheduler=[]), 'today: param_scheduler'),
    (dict(runner=dict(type='EpochBasedRunner', max_epochs=9)), 'today: train_cfg'),
    (dict(lr_config=dict(policy='step', step=[8])), 'today: param_scheduler'),
    (dict(evaluation=dict(interval=1, metric='bbox')), r'today: val_evaluator, train_cfg\.val_int'),
    (dict(train_cfg=dict(by_epoch=True, max_epochs=1, assigner=dict(type='MaxIoUAssigner'))),
     r'train_cfg has assigner, .*model\.train_cfg'),
    (dict(train_cfg=dict(max_epochs=0)), r'train_cfg\.max_epochs=0 must be .* at least 1'),
    (dict(train_cfg=dict(by_epoch=False, max_iters=0.5)), r'train_cfg\.max_iters=0.5 must be'),
    (dict(custom_hooks=dict(type='EMAHook')), 'custom_hooks=.* must be a list of dicts'),
    (dict(custom_hooks=['EMAHook']), r"custom_hooks\[0\]='EMAHook' must be a dict with a type"),
    (dict(custom_hooks=[dict(momentum=0.1)]), r'custom_hooks\[0\] has no type'),
    (dict(default_hooks=[dict(type='LoggerHook')]), 'default_hooks=.* must be a dict'),
    (dict(default_hooks=dict(logger=dict(interval=1))), 'default_hooks.logger has no type'),
    (dict(default_hooks=dict(logger=5)), 'default_hooks.logger=5 must be a dict with a type'),
    (dict(param_scheduler='cosine'), "param_scheduler='cosine' must be a dict or a list of dicts"),
    (dict(val_evaluator=['bbox']), r"val_evaluator\[0\]='bbox' must be a dict with a type"),
    (dict(train_dataloader=[dict()]), 'train_dataloader=.* must be a dict'),
    (dict(model='RTDETR'), "model='RTDETR' must be a dict"),
    (dict(resume='epoch_1.pth'), "resume='epoch_1.pth' must be True or False"),
])
def test_wrong_forms(settings, words):
    with pytest.raises(UsageError, match=words) as error:
        settle(Config(settings))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('settings, words', [
    (dict(total_epochs=12), r'total_epochs=12.* today: train_cfg\.max_epochs'),
    (dict(seed=3, cudnn_benchmark=True),
     r'are settings .* today: randomness\.seed; env_cfg\.cudnn_benchmark'),
    # A variable, and a flag that changes what was made of it.
    (dict(optimizer=dict(lr=0.1), optim_wrapper=dict(optimizer=dict(lr=0.3))), 'today: optim_wrap'),
    (dict(data=dict(root='here'), train_dataloader=dict()), 'today: train_dataloader'),
], ids=str)
def test_what_may_be_a_variable_is_a_warning(settings, words, monkeypatch):
    said = []
    monkeypatch.setattr('spartan_mm.engine.settings.print_log', lambda text, *_: said.append(text))
    settle(Config(settings))
    assert re.search(words, *said)


@pytest.mark.parametrize('settings', [
    dict(optimizer=dict(lr=0.1), optim_wrapper=dict(optimizer=dict(lr=0.1))),
    dict(data=dict(type='A'), train_dataloader=dict(dataset=dict(type='A'))),
    dict(total_epochs=12, train_cfg=dict(max_epochs=12)),
    dict(seed=None, resume_from=None, custom_hooks=None, param_scheduler=None, train_cfg=None),
    dict(train_cfg=dict(type='OwnLoop', rounds=3)),
    dict(default_hooks=dict(logger=None), param_scheduler=dict(type='ConstantLR')),
], ids=str)
def test_what_is_used_stays(settings):
    cfg = Config(settings)
    settle(cfg)
    assert cfg.to_dict() == Config(settings).to_dict()


def test_whole_numbers_may_be_written_as_powers():
    cfg = Config(dict(train_cfg=dict(by_epoch=False, max_iters=9e4)))
    settle(cfg)
    assert cfg.train_cfg.max_iters == 90000 and isinstance(cfg.train_cfg.max_iters, int)


@pytest.mark.parametrize('settings, words', [
    ({}, 'the config has no test_dataloader, test_cfg, test_evaluator: '),
    (dict(val_cfg={}), 'has no val_dataloader, val_evaluator: .* or all to None'),
    (dict(test_dataloader=dict(batch_size=1)), 'test_dataloader has no sampler; .*shuffle=False'),
])
def test_what_a_test_needs(settings, words):
    given = settings and dict(test_dataloader=dict(sampler=SAMPLER), test_cfg={}, test_evaluator={})
    with pytest.raises(UsageError, match=words):
        check_run(Config(dict(given, **settings)), 'test')


@HOOKS.register_module()
class OwnHook(LoggerHook):
    def __init__(self, inner=None, **settings):
        if inner is not None:
            nn.Linear(bias=3, inner=4)
        super().__init__(**settings)


class TestExplain:

    @pytest.mark.parametrize('registry, settings, words', [
        (HOOKS, dict(type='EMAHookk'), 'EMAHookk is not in the mmengine::hook registry'),
        (HOOKS, dict(momentum=1), 'must contain the key "type"'),
        (HOOKS, dict(type='LoggerHook', a=1), "unexpected keyword argument 'a'"),
        (HOOKS, dict(type='OwnHook', a=1), "LoggerHook.__init__() got an unexpected keyword arg"),
    ])
    def test_faults_of_a_config(self, registry, settings, words):
        with pytest.raises((KeyError, TypeError, ValueError)) as error:
            registry.build(settings)
        assert words in explain(error.value) and 'Please' not in explain(error.value)

    def test_faults_of_a_class_keep_their_traceback(self):
        with pytest.raises(TypeError) as error:
            HOOKS.build(dict(type='OwnHook', inner=1))
        assert explain(error.value) is None
        assert explain(KeyError('slip')) is None
