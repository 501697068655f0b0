"""A small training that is interrupted anywhere ends as if it had not been."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from itertools import count
from pathlib import Path

import pytest
import soak
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from spartan_mm.engine import checkpoint_hook
from spartan_mm.engine.checkpoint_hook import ResumableCheckpointHook, SavingError
from spartan_mm.engine.resume import ResumableTrainLoop, find_resumable
from spartan_mm.engine.signals import (
    Interrupted,
    LeaveOnSignalHook,
    SignalConsensus,
    _ignore_signals,
)

DATA = Path(__file__).parents[1] / 'data' / 'resumable'
NUMBERS = count()
BATCHES, EPOCHS = 5, 3


class Killed(BaseException):
    """What stands for a kill in one process."""


class Noise(Dataset):
    def __len__(self):
        return 3 * BATCHES - 1

    def __getitem__(self, index):
        return dict(inputs=torch.cat([torch.rand(3), torch.tensor([float(index)])]))


class Model(BaseModel):
    """Draws numbers in all ways, and has running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.own = None

    def forward(self, inputs, mode='tensor'):
        if mode == 'predict':
            return list(self.layers(inputs))
        self.own = self.own or random.Random(0)
        factor = self.own.random() + random.random()
        return dict(loss=self.layers(inputs).square().mean() * factor)


class Score(BaseMetric):
    """As good as the test says: a number for each validation."""

    default_prefix = 'toy'
    values = (1., 3., 2.)

    def process(self, batch, outputs):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=self.values[self.epoch() - 1])


class Note(Hook):
    """Lists the checkpoints after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, *args, **kwargs):
        self.seen.append(names(runner.work_dir))


def readable(value):
    return hash(value) if isinstance(value, str) else value.tolist()


def names(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith('.pth'))


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    # Asks compilers for their versions.
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    # What tests change in these ends with them.
    monkeypatch.setattr(checkpoint_hook, 'write_whole', checkpoint_hook.write_whole)
    monkeypatch.setattr(ResumableTrainLoop, 'run_iter', ResumableTrainLoop.run_iter)

    def make(work_dir='run', counts=1, epochs=EPOCHS, hooks=(), **checkpoint):
        work_dir = tmp_path / work_dir
        collate = dict(type='default_collate')
        found = find_resumable(work_dir)
        torch.manual_seed(0)
        runner = Runner(
            Model(), str(work_dir), experiment_name=f'saving_{next(NUMBERS)}',
            train_dataloader=dict(dataset=Noise(), batch_size=3, collate_fn=collate,
                                  sampler=dict(type='DefaultSampler', shuffle=True)),
            val_dataloader=dict(dataset=Noise(), batch_size=4, collate_fn=collate,
                                sampler=dict(type='DefaultSampler', shuffle=False)),
            train_cfg=dict(type='ResumableTrainLoop', max_epochs=epochs), val_cfg=dict(),
            val_evaluator=[metric := Score()],
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05), accumulative_counts=counts),
            param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=12),
            default_hooks=dict(checkpoint=dict(
                type='ResumableCheckpointHook', interval=1, **checkpoint)),
            custom_hooks=[EMAHook(momentum=0.1), LeaveOnSignalHook(), *hooks],
            randomness=dict(seed=5), resume=found is not None,
            load_from=found and found.path, log_level='ERROR')
        metric.epoch = lambda: runner.epoch
        return runner

    return make


@pytest.mark.slow
@pytest.mark.parametrize('counts, every', [(1, None), (3, 2)])
def test_goes_on_as_if_nothing_had_happened(make_runner, tmp_path, monkeypatch, counts, every):
    settings = dict(counts=counts, save_best='toy/score', rule='greater', every_iters=every)
    make_runner('whole', **settings).train()
    whole = tmp_path / 'whole' / f'epoch_{EPOCHS}.pth'

    def die():
        raise Killed

    # In the middle of iterations, of writing checkpoints, and of validation.
    run_iter, write_whole = ResumableTrainLoop.run_iter, checkpoint_hook.write_whole
    for number in (4, 6, 9, 14):
        for how in (soak.at_iteration, soak.at_write):
            name = f'{how.__name__}_{number}'
            with monkeypatch.context() as context:
                context.setattr(checkpoint_hook, 'write_whole', write_whole)
                context.setattr(ResumableTrainLoop, 'run_iter', run_iter)
                how(number, die)
                try:
                    make_runner(name, **settings).train()
                except Killed:
                    pass
            make_runner(name, **settings).train()
            assert soak.find_differences(whole, tmp_path / name / whole.name) == []
            assert names(tmp_path / name) == names(tmp_path / 'whole')


def test_goes_on_from_a_checkpoint_of_version_0_1(make_runner, tmp_path):
    """That version was told to leave after iteration 7; a run of it without that ended so."""
    (tmp_path / 'run').mkdir()
    shutil.copy(DATA / 'epoch_1_iter_7.pth', tmp_path / 'run')
    note = Note()
    make_runner(counts=3, hooks=[note], save_best='toy/score', rule='greater').train()
    assert len(note.seen) == EPOCHS * BATCHES - 7
    keys = 'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'resume'
    found, expected = (torch.load(folder / 'epoch_3.pth', weights_only=False)
                       for folder in (tmp_path / 'run', DATA))
    for key in keys:
        # Another machine may round otherwise, but draws the same numbers; states were tensors.
        assert_close(*(tree_map_only((str, Tensor), readable, end[key])
                       for end in (found, expected)))


def test_goes_on_with_an_interrupted_validation(make_runner, tmp_path):
    class Kill(Hook):
        def after_val_iter(self, runner, *args, **kwargs):
            raise Killed

    make_runner('whole', save_best='toy/score', rule='greater').train()
    with pytest.raises(Killed):
        make_runner(hooks=[Kill()], save_best='toy/score', rule='greater').train()
    assert names(tmp_path / 'run') == ['epoch_1.pth']
    validated = []

    class Count(Hook):
        def before_val(self, runner):
            validated.append(runner.epoch)

    make_runner(hooks=[Count()], save_best='toy/score', rule='greater').train()
    assert validated == [1, 2, 3]
    assert names(tmp_path / 'run') == names(tmp_path / 'whole')


def test_the_averaged_weights_are_evaluated_and_saved_as_the_best(make_runner, tmp_path):
    evaluated = {}

    class Look(Hook):
        def before_val_iter(self, runner, *args, **kwargs):
            evaluated[runner.epoch] = {name: value.clone()
                                       for name, value in runner.model.state_dict().items()}

    make_runner(hooks=[Look()], save_best='toy/score', rule='greater').train()
    last = torch.load(tmp_path / 'run' / 'epoch_3.pth', weights_only=False)
    best = torch.load(tmp_path / 'run' / 'best_toy_score_epoch_2.pth', weights_only=False)
    trained, averaged = last['ema_state_dict'], last['state_dict']
    for name, weight in averaged.items():
        assert torch.equal(evaluated[3][name], weight)
        assert torch.equal(best['state_dict'][name], evaluated[2][name])
    weight = 'layers.0.weight'
    assert not torch.equal(trained[f'module.{weight}'], averaged[weight])


def test_what_is_kept(make_runner):
    note = Note()
    runner = make_runner(hooks=[note], every_iters=1, max_keep_ckpts=2, save_best='toy/score',
                         rule='greater')
    [hook] = [hook for hook in runner.hooks if isinstance(hook, ResumableCheckpointHook)]
    remove = hook._remove

    def check(name):
        # A new one is there before an old one goes.
        assert len(names(runner.work_dir)) > 1
        remove(name)

    hook._remove = check
    runner.train()
    first, second, third = (note.seen[BATCHES * epoch + 3] for epoch in range(3))
    assert first == ['epoch_0_iter_3.pth', 'epoch_0_iter_4.pth']
    assert second == ['best_toy_score_epoch_1.pth', 'epoch_1.pth', 'epoch_1_iter_8.pth',
                      'epoch_1_iter_9.pth']
    assert third[:3] == ['best_toy_score_epoch_2.pth', 'epoch_1.pth', 'epoch_2.pth']
    assert names(runner.work_dir) == ['best_toy_score_epoch_2.pth', 'epoch_2.pth', 'epoch_3.pth']
    with open(f'{runner.work_dir}/last_checkpoint') as file:
        assert file.read() == f'{runner.work_dir}/epoch_3.pth'


def fill_disk():
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_leaves_the_checkpoints_before_and_is_tried_again(make_runner, caplog):
    settings = dict(save_best='toy/score', rule='greater', max_keep_ckpts=1)
    # Written are: epoch 1, last_checkpoint, the best, epoch 1 again, last_checkpoint, epoch 2 ...
    soak.at_write(6, fill_disk, times=2)
    runner = make_runner(epochs=2, **settings)
    runner.train()
    # Neither epoch 2 nor the best of it found room.
    assert names(runner.work_dir) == ['best_toy_score_epoch_1.pth', 'epoch_1.pth']
    assert os.listdir(runner.work_dir).count('last_checkpoint') == 1

    resumed = make_runner(**settings)
    resumed.train()
    assert names(resumed.work_dir) == ['best_toy_score_epoch_2.pth', 'epoch_3.pth']


def test_a_disk_that_stays_full_ends_the_training(make_runner):
    runner = make_runner(every_iters=1)
    soak.at_write(3, fill_disk, times=3)
    with pytest.raises(SavingError, match='No space left on device, 3 times in a row.*--resume'):
        runner.train()
    assert names(runner.work_dir) == ['epoch_0_iter_1.pth']
    assert runner.iter == 3


@pytest.fixture
def hear_ctrl_c():
    """What runs these tests in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGINT'])
def test_a_signal_saves_and_leaves(make_runner, tmp_path, hear_ctrl_c, name):
    make_runner('whole').train()
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    soak.at_iteration(7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f'{name} received, saved after iteration 7; go on with '
                                          '--resume') as leaving:
        make_runner().train()
    assert leaving.value.number == number
    assert signal.getsignal(number) is before
    assert names(tmp_path / 'run') == ['epoch_1.pth', 'epoch_1_iter_7.pth']
    make_runner().train()
    assert soak.find_differences(tmp_path / 'whole' / 'epoch_3.pth',
                                 tmp_path / 'run' / 'epoch_3.pth') == []


def test_a_second_ctrl_c_ends_at_once(make_runner, tmp_path, hear_ctrl_c, capfd):
    soak.at_iteration(7, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        make_runner().train()
    assert names(tmp_path / 'run') == ['epoch_1.pth']
    assert capfd.readouterr().err.count('once more to end at once') == 1


def test_ctrl_c_that_is_ignored_stays_so(make_runner, tmp_path, hear_ctrl_c):
    """As of what a shell runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    soak.at_iteration(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    make_runner(epochs=2).train()
    assert names(tmp_path / 'run') == ['epoch_1.pth', 'epoch_2.pth']
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_in_validation_leaves_at_once(make_runner, tmp_path):
    class Signal(Hook):
        def before_val_iter(self, runner, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match='in validation'):
        make_runner(hooks=[Signal()]).train()
    assert names(tmp_path / 'run') == ['epoch_1.pth']


def test_processes_that_load_data_hear_no_signal_before_the_end():
    over, ready = multiprocessing.Event(), multiprocessing.Event()

    def load():
        _ignore_signals([signal.SIGTERM], over, lambda worker: ready.set(), 4)
        while True:
            time.sleep(60)

    process = multiprocessing.get_context('fork').Process(target=load)
    process.start()
    try:
        assert ready.wait(60)
        process.terminate()
        process.join(0.5)
        assert process.is_alive()
        over.set()
        process.terminate()
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_one_process_hears_itself_at_once():
    consensus = SignalConsensus(torch.device('cpu'))
    assert [consensus.exchange(number) for number in (0, 15, 0)] == [0, 15, 0]


def test_another_number_of_batches_begins_the_epoch_anew(make_runner, tmp_path, monkeypatch):
    soak.at_iteration(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        make_runner().train()
    monkeypatch.setattr(Noise, '__len__', lambda noise: 9)
    warnings = []
    monkeypatch.setattr('spartan_mm.engine.resume.print_log',
                        lambda text, *_: warnings.append(text))
    note = Note()
    make_runner(hooks=[note], epochs=2).train()
    assert len(note.seen) == 3
    assert any('5 batches an epoch, this one has 1 and 3' in text and 'beginning of epoch 2' in text
               for text in warnings)


@pytest.mark.parametrize('setting', [dict(every_iters=0), dict(max_failures=0)])
def test_bad_settings(setting):
    with pytest.raises(ValueError, match='must be at least 1'):
        ResumableCheckpointHook(**setting)
