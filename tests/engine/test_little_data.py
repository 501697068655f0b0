"""The recipe for little data: lengths that follow the training, and an end that survives a stop."""

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import soak
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, init_default_scope
from mmengine.runner import BaseLoop
from torch import nn
from torch.optim import SGD

import spartan_mm.detection  # noqa: F401
from spartan_mm.engine import FlatCosineLR

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / 'configs' / 'detection' / '_base_' / 'finetune.py'

# What the recipe has beyond the schedule that its own base has, in trainings of a few steps.
SHORT = """
custom_hooks = [
    dict(type='StepsAwareEMAHook', update_buffers=True, priority=49),
    dict(type='ResumableEarlyStoppingHook', monitor='coco/bbox_mAP', rule='less', patience=2,
         min_delta=0.5),  # 'less', as one that is to grow is waited for until it is 0.5
    dict(type='PlainEndHook', share=0.6),
    dict(type='BatchNormEvalHook'),
]
param_scheduler = [
    dict(type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, shares=True, warmup=0.1,
         warmup_power=1., flat=0.2, tail=0.1, gamma=0.1)]
"""


LOGGER = SimpleNamespace(info=print)


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')


class Loop(BaseLoop):
    """A training of a number of iterations."""

    def __init__(self, max_iters):
        self.max_iters = max_iters
        self.stop_training = False

    def run(self):
        pass


@pytest.fixture
def hub():
    return MessageHub(f'hub of {os.urandom(4).hex()}')


def make_model(statistics=0.):
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    backbone[1].running_mean += statistics
    preprocessor = nn.Module()
    preprocessor.batch_augments = nn.ModuleList([nn.Identity()])
    model = nn.Module()
    model.backbone, model.data_preprocessor = backbone, preprocessor
    return model


@pytest.mark.parametrize('steps, decay, tau', [
    (100, 0.993, 5), (4000, 0.993, 200), (35_000, 0.999, 1750), (10**6, 0.9998, 50_000)])
def test_average_follows_the_number_of_steps(steps, decay, tau):
    hook = HOOKS.build(dict(type='StepsAwareEMAHook', update_buffers=True))
    hook.before_run(SimpleNamespace(_train_loop=Loop(steps), model=make_model()))
    assert (1 - hook.ema_model.momentum, hook.ema_model.gamma) == (pytest.approx(decay), tau)


def test_average_and_end_leave_the_training_of_a_test_unbuilt():
    runner = SimpleNamespace(_train_loop=dict(max_epochs=1), model=make_model())
    HOOKS.build(dict(type='StepsAwareEMAHook')).before_run(runner)
    HOOKS.build(dict(type='ResumableEarlyStoppingHook', monitor='AP', rule='greater')
                ).before_run(runner)


@pytest.mark.parametrize('patience, stopped', [(2, True), (3, False)])
def test_counter_goes_on_where_it_was(hub, patience, stopped):
    def start(patience):
        hook = HOOKS.build(dict(type='ResumableEarlyStoppingHook', monitor='AP', rule='greater',
                                min_delta=0.01, patience=patience))
        runner = SimpleNamespace(message_hub=hub, train_loop=Loop(9), logger=LOGGER)
        hook.before_train(runner)
        return hook, runner

    hook, runner = start(3)
    for score in (0.2, 0.3, 0.305, 0.29):
        hook.after_val_epoch(runner, dict(AP=score))
    assert not runner.train_loop.stop_training

    # With a shorter patience it has ended already; with the same, after the next.
    hook, runner = start(patience)
    assert (hook.wait_count, hook.best_score) == (2, 0.3)
    assert runner.train_loop.stop_training is stopped
    hook.after_val_epoch(runner, dict(AP=0.1))
    assert runner.train_loop.stop_training


def test_nothing_is_counted_before_anything_is_learned(hub):
    runner = SimpleNamespace(message_hub=hub, train_loop=Loop(9), logger=LOGGER)
    stopped = []
    for score in (0., 0.0009, 0., 0., 0.002, 0., 0.):
        # Resumed before each validation.
        hook = HOOKS.build(dict(type='ResumableEarlyStoppingHook', monitor='coco/bbox_mAP',
                                min_delta=0.001, patience=2))
        hook.before_train(runner)
        hook.after_val_epoch(runner, {'coco/bbox_mAP': score})
        stopped.append(runner.train_loop.stop_training)
    assert stopped == [False] * 6 + [True]
    assert hub.get_info('early_stopping') == dict(wait_count=2, best_score=0.002)


@pytest.mark.parametrize('epochs, share, first', [(50, 0.1, 45), (10, 0.1, 9), (3, 0.1, 2),
                                                  (30, 0.1, 27), (4, 0., None)])
def test_end_is_plain_in_all_datasets_and_workers(epochs, share, first):
    pipeline = [dict(type='RandomPhotometricDistort'), dict(type='RandomFlip', prob=0.5),
                dict(type='RandomApply', transforms=[dict(type='RandomZoomOut')]),
                dict(type='RandomChoice', transforms=[[dict(type='RandomIoUCrop')], []])]

    def count(transforms):
        return sum(count(part.transforms) if hasattr(part, 'transforms') else 1
                   for part in transforms)

    parts = [SimpleNamespace(pipeline=Compose(pipeline), metainfo={}) for _ in range(2)]
    loader = SimpleNamespace(dataset=SimpleNamespace(datasets=parts, metainfo={}), _iterator='old')
    runner = SimpleNamespace(max_epochs=epochs, epoch=0, train_dataloader=loader,
                             model=make_model(), logger=LOGGER)
    hook = HOOKS.build(dict(type='PlainEndHook', share=share))
    plain = []
    for runner.epoch in range(epochs):
        hook.before_train_epoch(runner)
        plain.append(runner.model.data_preprocessor.batch_augments is None)
        assert (loader._iterator is None) is plain[-1]
        for part in parts:
            assert count(part.pipeline.transforms) == (1 if plain[-1] else 4)
    assert plain == [first is not None and epoch >= first for epoch in range(epochs)]


@pytest.mark.parametrize('batch, statistics, kept', [(7, 1., True), (8, 1., False),
                                                     (7, 0., False)])
def test_statistics_are_kept_at_tiny_batches(hub, batch, statistics, kept):
    def start(model):
        hook = HOOKS.build(dict(type='BatchNormEvalHook'))
        runner = SimpleNamespace(
            model=model, message_hub=hub, world_size=4, logger=LOGGER,
            train_dataloader=SimpleNamespace(batch_size=batch))
        hook.before_train(runner)
        model.train()
        hook.before_train_iter(runner, 0)
        return model.backbone[1].training

    assert start(make_model(statistics)) is not kept
    # Resumed, when there are statistics in any case.
    assert start(make_model(1.)) is not kept


def test_rate_follows_the_length():
    settings = Config.fromfile(RECIPE).param_scheduler[0].to_dict()
    for key in ('type', 'convert_to_iter_based'):
        del settings[key]
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    schedule = FlatCosineLR.build_iter_from_epoch(optimizer, **settings, end=10, epoch_length=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step()
    assert rates[:7] == pytest.approx([step / 6 for step in range(7)])
    assert rates[6:51] == pytest.approx([1.] * 45)
    assert rates[70] == pytest.approx(0.55)
    assert rates[90:] == pytest.approx([0.1] * 10)


@pytest.mark.slow
def test_stopped_training_ends_where_one_does_that_nobody_stopped(tmp_path):
    trainings = soak.Soak(ROOT / 'tools' / 'train.py', tmp_path, epochs=6)
    with trainings.configs['detection'].open('a') as file:
        file.write(SHORT)
    trainings.run_whole('detection')

    folder = tmp_path / 'stopped'

    def stop(rank, iteration, number):
        soak.at_iteration(iteration, lambda: os.kill(os.getpid(), number))

    for iteration, number, status in ((7, signal.SIGTERM, 128 + signal.SIGTERM),
                                      (11, signal.SIGKILL, -signal.SIGKILL)):
        outcome = trainings.train('detection', folder, partial(
            stop, iteration=iteration, number=number)).run()
        assert outcome.status == status, outcome.output
    # Once more behind its end, which is no reason to go on.
    for _ in range(2):
        outcome = trainings.train('detection', folder).run()
        assert outcome.status == 0, outcome.output
        names = sorted(path.name for path in folder.glob('epoch_*.pth'))
        assert names == ['epoch_2.pth', 'epoch_3.pth']
        assert 'did not improve in the last 2 records' in outcome.output
        paths = [run / 'epoch_3.pth' for run in (tmp_path / 'detection_whole', folder)]
        assert soak.find_differences(*paths) == []
        counts = [torch.load(path, weights_only=False)['message_hub']['runtime_info'][
            'early_stopping']['wait_count'] for path in paths]
        assert counts == [1, 1]  # written before the validation that ended it
