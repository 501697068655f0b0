"""Settings that are changed before a training goes on are followed, named or refused."""

import copy
import importlib
import os
import random
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from spartan_mm.cli import main
from spartan_mm.engine.agreement import _adapt_average, _compare_optimizers
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.stored_config import as_text

NUMBERS = count()
#: How many random combinations of changes are tried.
TRIALS = int(os.environ.get('RESUME_TRIALS', 6))


class Noise(nn.Module):
    """Has random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.own = random.Random(0)


@MODELS.register_module()
class AgreementModel(BaseModel):
    """Has few weights, some of the same shape, running statistics, and options."""

    def __init__(self, dropout=0., noise=True):
        super().__init__()
        self.noise = Noise() if noise else None
        self.body = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(dropout)
        self.top = nn.Linear(2, 2)

    def forward(self, inputs, mode='tensor'):
        outputs = self.top(self.dropout(self.norm(self.body(inputs))))
        return list(outputs) if mode == 'predict' else dict(loss=outputs.square().mean())


@DATASETS.register_module()
class AgreementData(Dataset):
    def __init__(self, classes=('disc', 'square'), shift=0.):
        self.metainfo = dict(classes=tuple(classes))
        self.shift = shift

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.rand(2) + self.shift)


@METRICS.register_module()
class AgreementMetric(BaseMetric):
    default_prefix = 'toy'

    def process(self, batch, outputs):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(up=1., down=-1.)


@OPTIM_WRAPPERS.register_module()
class AgreementAmp(OptimWrapper):
    """Stands for mixed precision, which needs a GPU."""


@HOOKS.register_module()
class AgreementLook(Hook):
    """Looks at a runner when all is restored and the first iteration is still to come."""

    priority = 'LOWEST'
    seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.seen:
            self.seen.append((runner, copy.deepcopy(runner.model.state_dict()),
                              copy.deepcopy(runner.optim_wrapper.state_dict()),
                              [copy.deepcopy(hook.ema_model.module.state_dict())
                               for hook in runner.hooks if isinstance(hook, EMAHook)]))


def make_config(average=True, by_epoch=True):
    loader = dict(batch_size=4, num_workers=0, collate_fn=dict(type='default_collate'),
                  dataset=dict(type='AgreementData'))
    return dict(
        model=dict(type='AgreementModel'),
        train_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='AgreementMetric'), val_cfg=dict(),
        train_cfg=(dict(by_epoch=True, max_epochs=1) if by_epoch else
                   dict(by_epoch=False, max_iters=2, val_interval=2)),
        optim_wrapper=dict(
            type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1),
            constructor='RuleOptimWrapperConstructor',
            paramwise_cfg=dict(rules=[dict(norm=True, decay_mult=0.)])),
        param_scheduler=[dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=9)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1 if by_epoch else 2,
                                           by_epoch=by_epoch, save_best='toy/up', rule='greater')),
        custom_hooks=[dict(type='AgreementLook')] + average * [
            dict(type='EMAHook', momentum=0.1)],
        randomness=dict(seed=1), log_level='ERROR')


def set_at(path, value):
    """A change: sets what is found under a path of keys, or removes it."""
    def change(config):
        *outer, last = path.split('.')
        for key in outer:
            config = config.setdefault(key, {})
        config[last] = value
    return change


def average(momentum):
    """A change: sets, adds or removes the average."""
    def change(config):
        config['custom_hooks'] = config['custom_hooks'][:1] + [
            dict(type='EMAHook', momentum=momentum)] * (momentum is not None)
    return change


def last_average(runner):
    return next((hook.ema_model.momentum for hook in runner.hooks if isinstance(hook, EMAHook)),
                None)


def group(key, number=0):
    return lambda runner: runner.optim_wrapper.param_groups[number][key]


def schedule(key):
    return lambda runner: getattr(runner.param_schedulers[0], key)


REFUSED = object()
RULES = 'optim_wrapper.paramwise_cfg'
# What is changed, how, what names it, what the run then has, and what that is read from.
CHANGES = {
    'lr': (set_at('optim_wrapper.optimizer.lr', 0.3), 'optimizer.lr', 0.1, group('initial_lr')),
    'decay': (set_at('optim_wrapper.optimizer.weight_decay', 0.), 'weight_decay', 0.1,
              group('weight_decay')),
    'betas': (set_at('optim_wrapper.optimizer.betas', (0.5, 0.9)), 'betas', (0.9, 0.999),
              group('betas')),
    'optimizer': (set_at('optim_wrapper.optimizer', dict(type='SGD', lr=0.1)), 'SGD', REFUSED,
                  None),
    'like optimizer': (set_at('optim_wrapper.optimizer.type', 'Adam'), 'Adam', REFUSED, None),
    'rule': (set_at(RULES, dict(rules=[dict(norm=True, decay_mult=0., lr_mult=0.5)])),
             'optimizer.lr', 0.1, group('initial_lr', 1)),
    'groups': (set_at(RULES, dict(rules=[dict(pattern='bias', decay_mult=0.)])), 'paramwise_cfg',
               REFUSED, None),
    'one group': (set_at(RULES, {}), 'paramwise_cfg', REFUSED, None),
    'schedule': (set_at('param_scheduler', [dict(type='LinearLR', start_factor=0.5, by_epoch=False,
                                                 begin=0, end=20)]), 'param_scheduler[0].end', 9,
                 schedule('end')),
    'other schedule': (set_at('param_scheduler', dict(type='StepLR', step_size=3)), 'step_size',
                       REFUSED, None),
    'flat schedule': (set_at('param_scheduler', dict(type='FlatCosineLR', by_epoch=False, flat=4)),
                      'flat, gamma', REFUSED, None),
    'no schedule': (set_at('param_scheduler', None), 'param_scheduler', REFUSED, None),
    'average': (average(0.3), 'EMAHook', 0.3, last_average),
    'no average': (average(None), 'EMAHook', None, last_average),
    'batch': (set_at('train_dataloader.batch_size', 2), 'train_dataloader.batch_size', 2,
              lambda runner: runner.train_dataloader.batch_size),
    'workers': (set_at('train_dataloader.num_workers', 1), 'train_dataloader.num_workers', 1,
                lambda runner: runner.train_dataloader.num_workers),
    'order': (set_at('train_dataloader.sampler.shuffle', False), 'sampler.shuffle', False,
              lambda runner: runner.train_dataloader.sampler.shuffle),
    'data': (set_at('train_dataloader.dataset.shift', 1.), 'dataset.shift', 1.,
             lambda runner: runner.train_dataloader.dataset.shift),
    'amp': (set_at('optim_wrapper.type', 'AgreementAmp'), 'optim_wrapper.type', 'AgreementAmp',
            lambda runner: type(runner.optim_wrapper).__name__),
    'clip': (set_at('optim_wrapper.clip_grad', dict(max_norm=1.)), 'clip_grad', 1.,
             lambda runner: runner.optim_wrapper.clip_grad_kwargs['max_norm']),
    'accumulate': (set_at('optim_wrapper.accumulative_counts', 2), 'accumulative_counts', 2,
                   lambda runner: runner.optim_wrapper._accumulative_counts),
    'classes': (set_at('train_dataloader.dataset.classes', ('square', 'disc')), 'square, disc',
                REFUSED, None),
    'seed': (set_at('randomness.seed', 5), 'randomness.seed', 1, lambda runner: runner.seed),
    'model': (set_at('model.dropout', 0.5), 'model.dropout', 0.5,
              lambda runner: runner.model.dropout.p),
    'part': (set_at('model.noise', False), 'model.noise', None, lambda runner: runner.model.noise),
    'best': (set_at('default_hooks.checkpoint.save_best', 'toy/down'), 'checkpoint.save_best', -1.,
             lambda runner: runner.message_hub.get_info('best_score')),
    'interval': (set_at('train_cfg.val_interval', 3), 'train_cfg.val_interval', 3,
                 lambda runner: runner.train_loop.val_interval),
    'scale': (set_at('auto_scale_lr', dict(enable=True, base_batch_size=1)), 'optimizer.lr', 0.1,
              group('initial_lr')),
}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains with a config; returns what was said, and what a resumed run looked like."""
    # These take longer than all the rest.
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(importlib.import_module('yapf.yapflib.yapf_api'), 'FormatCode',
                        lambda text, **_: (text, False))
    said = []
    for module in ('agreement', 'resume'):
        monkeypatch.setattr(f'spartan_mm.engine.{module}.print_log',
                            lambda text, *_: said.append(text))

    def train(config, work_dir, *flags):
        said.clear()
        AgreementLook.seen.clear()
        path = config
        if isinstance(config, dict):
            path = tmp_path / f'config_{next(NUMBERS)}.py'
            path.write_text(as_text(config))
        try:
            main(['train', str(path), '--work-dir', str(work_dir), *flags])
        except SystemExit as leaving:
            assert str(leaving.code).startswith('error: '), leaving.code
            return [str(leaving.code)], None
        return list(said), AgreementLook.seen[0] if AgreementLook.seen else None

    return train


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Runs to go on from, by whether they have an average and whether they go by epochs."""
    return {}, tmp_path_factory.mktemp('agreement')


def check(train, saved, names, average=True, by_epoch=True):
    runs, root = saved
    config = make_config(average, by_epoch)
    if (average, by_epoch) not in runs:
        runs[average, by_epoch] = root / f'{average}_{by_epoch}'
        train(config, runs[average, by_epoch])
    checkpoint_path, = runs[average, by_epoch].glob('epoch_1.pth' if by_epoch else 'iter_2.pth')
    checkpoint = torch.load(checkpoint_path, weights_only=False)
    config['train_cfg']['max_epochs' if by_epoch else 'max_iters'] = 2 if by_epoch else 4
    before = copy.deepcopy(config)
    for name in names:
        CHANGES[name][0](config)
    said, seen = train(config, root / f'resumed_{next(NUMBERS)}', '--resume', str(checkpoint_path))
    text = '\n'.join(said)
    if 'classes' in names:
        names = ['classes']
    refused = [name for name in names if CHANGES[name][2] is REFUSED]
    assert (seen is None) == bool(refused), text
    if refused:
        assert 'cannot be resumed' in text and 'load_from=' in text and '\n' not in text
        assert any(CHANGES[name][1] in text for name in refused), text
        return text

    runner, weights, optimizer, averages = seen
    for name in names:
        _, key, expected, read = CHANGES[name]
        assert key in text or config == before, (name, text)
        assert read(runner) == expected, (name, text)
    # The weights that were trained go on with their moments, and beside them their average.
    trained = checkpoint['state_dict']
    if 'ema_state_dict' in checkpoint:
        trained = {key: checkpoint['ema_state_dict'][f'module.{key}'] for key in trained}
    assert_close(weights, trained, rtol=0, atol=0)
    assert_close(optimizer['state'], checkpoint['optimizer']['state'], rtol=0, atol=0)
    for average in averages:
        expected = checkpoint['state_dict'] if 'ema_state_dict' in checkpoint else trained
        assert_close(average, expected, rtol=0, atol=0)
    return text


def wrap(*shapes, kind=torch.optim.AdamW):
    """An optimizer that has taken a step, with a group of parameters for each shape."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    wrapper = OptimWrapper(kind([dict(params=[parameter]) for parameter in parameters], lr=0.1))
    wrapper.update_params(sum(parameter.sum() for parameter in parameters))
    return wrapper


@pytest.mark.parametrize('before, now, words', [
    (wrap(2), wrap(2, kind=torch.optim.SGD), 'its optimizer is another, that of the config SGD'),
    (wrap(2, kind=torch.optim.SGD), wrap(2), 'its optimizer is another, that of the config AdamW'),
    (wrap(2, 3), wrap(2), r'has 2 groups of 1, 1 parameters, that of the config 1 group of 1'),
    (wrap(2, 3), wrap(3, 2), 'has 2 groups'),
    (wrap(2), OptimWrapperDict(a=wrap(2)), 'are a single one, those of the config a'),
    (OptimWrapperDict(a=wrap(2), b=wrap(2)), wrap(2), 'are a, b, those of the config a single one'),
])
def test_optimizers_without_a_config(before, now, words):
    runner = SimpleNamespace(optim_wrapper=now)
    with pytest.raises(CheckpointError, match=f'{words}.*load_from=a.pth'):
        [*_compare_optimizers(runner, before.state_dict(), 'a.pth', [])]


def test_several_optimizers():
    before, now = (OptimWrapperDict(a=wrap(2), b=wrap(3)) for _ in range(2))
    assert [*_compare_optimizers(SimpleNamespace(optim_wrapper=now), before.state_dict(), '', [])
            ] == []
    now['b'].param_groups[0]['eps'] = 0.5
    assert [*_compare_optimizers(SimpleNamespace(optim_wrapper=now), before.state_dict(), '', [])
            ] == [('optim_wrapper.b.optimizer.eps', 1e-8, 0.5)]


def test_an_average_of_a_user_is_left_alone():
    class OwnEMA(Hook):
        pass

    checkpoint = dict(state_dict=dict(a=1), ema_state_dict={'module.a': 2})
    for hook, left in ((OwnEMA(), checkpoint), (Hook(), dict(state_dict=dict(a=2)))):
        assert bool([*_adapt_average(SimpleNamespace(hooks=[hook]), checkpoint)]) == (
            left is not checkpoint)
        assert checkpoint == left


def statistics_of_another_rank(path):
    """Write the checkpoint that a process has whose running statistics are its own."""
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['resume']['ranks'][0]['buffers'] = {
        'norm.running_mean': torch.ones(2),
        # As versions before numbered the hook of the average.
        '17: module.norm.running_mean': torch.full((2, ), 2.)}
    torch.save(checkpoint, path.with_name('other.pth'))
    return path.with_name('other.pth')


@pytest.mark.parametrize('momentum', [0.1, None])
def test_running_statistics_of_a_rank(train, saved, momentum):
    check(train, saved, [])
    config = make_config()
    config['train_cfg']['max_epochs'] = 2
    average(momentum)(config)
    # At another place among the hooks.
    config['custom_hooks'].insert(0, dict(type='SyncBuffersHook'))
    path = statistics_of_another_rank(saved[0][True, True] / 'epoch_1.pth')
    _, (_, weights, _, averages) = train(config, saved[1] / f'rank_{momentum}', '--resume',
                                         str(path))
    assert weights['norm.running_mean'].tolist() == [1, 1]
    assert [found['norm.running_mean'].tolist() for found in averages] == (
        [] if momentum is None else [[2, 2]])


@pytest.mark.slow
@pytest.mark.parametrize('task, words, batch', [('detector', 'disc, square', 4),
                                                ('classifier', 'square, disc', 2)])
def test_real_trainings(train, user_project, tmp_path, monkeypatch, task, words, batch):
    monkeypatch.chdir(user_project)
    config = f'user_{task}.py'
    run, dataset = tmp_path / task, 'train_dataloader.dataset.metainfo'

    def resume(*options):
        return '\n'.join(train(config, run, '--resume', '--cfg-options', 'train_cfg.max_epochs=3',
                               *options)[0])

    train(config, run, '--cfg-options', 'train_cfg.max_epochs=1')
    assert 'it has 2 classes' in resume(
        f'{dataset}.classes={tuple(words.split(", "))}'.replace(' ', ''))
    assert 'its optimizer is AdamW, that of the config SGD' in resume(
        'optim_wrapper.optimizer.type=SGD')
    text = resume('optim_wrapper.optimizer.lr=0.5', f'train_dataloader.batch_size={batch}',
                  'custom_hooks=[]')
    assert 'optim_wrapper.optimizer.lr=0.001 (config: 0.5)' in text
    assert f'train_dataloader.batch_size={batch} (before: {6 - batch})' in text
    assert ('EMAHook is gone' in text) == (task == 'detector')


@pytest.mark.parametrize('name', [name for name in CHANGES if CHANGES[name][2] is REFUSED])
def test_what_cannot_go_on_is_refused(train, saved, name):
    check(train, saved, [name])


@pytest.mark.parametrize('without', ['average', 'no average'])
def test_all_else_is_followed_or_named(train, saved, without):
    check(train, saved, [name for name in CHANGES
                         if CHANGES[name][2] is not REFUSED and name != without])


def test_no_change_no_word_but_of_the_epochs(train, saved):
    text = check(train, saved, [])
    assert text.endswith('had other settings. From now on as in the config: train_cfg.max_epochs=2 '
                         '(before: 1)')


@pytest.mark.parametrize('names', [['lr', 'average'], ['groups']])
@pytest.mark.parametrize('average, by_epoch', [(True, False), (False, True)])
def test_other_runs(train, saved, names, average, by_epoch):
    check(train, saved, names, average, by_epoch)


@pytest.mark.parametrize('seed', range(TRIALS))
def test_random_changes(train, saved, seed):
    draw = random.Random(seed)
    names = draw.sample([*CHANGES], draw.randint(2, 5))
    # Some exclude each other.
    for alternatives in (('optimizer', 'like optimizer', 'betas'), ('rule', 'groups', 'one group'),
                         ('schedule', 'other schedule', 'no schedule'), ('average', 'no average')):
        for name in [name for name in names if name in alternatives][1:]:
            names.remove(name)
    check(train, saved, names, draw.random() < 0.7 or 'no average' in names, draw.random() < 0.6)
