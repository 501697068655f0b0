"""Kill trainings at random moments, go on with them, and say how many end bit-equal: all should.

Small trainings of both tasks are killed in turn: at random times by SIGKILL or SIGTERM, in the
middle of writing a checkpoint, and after the disk was full. Each is resumed until it has ended, and
compared with one that ran through: weights, averaged weights, optimizer, schedules, random states.

Everything is small, and each command runs in a fork of this process, which has imported all that
takes long: a run takes a second or two.
"""

import argparse
import errno
import gc
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor

import spartan_mm.classification  # noqa: F401 - for the forks, which find it imported
import spartan_mm.detection  # noqa: F401
from spartan_mm.engine import checkpoint_hook
from spartan_mm.engine.resume import ResumableTrainLoop

ROOT = Path(__file__).resolve().parents[2]

_SPARTAN = """
backbone = dict(
    type='SpaRTAN', out_indices=(1, 2, 3), drop_path_rate=0.2,
    arch=dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32),
              expand_ratios=(2, 2, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise')))
"""

_RUN = """
ema = dict(type='EMAHook', ema_type={ema!r}, momentum=0.1, update_buffers=True, priority=49)
custom_hooks = [ema]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2, save_best={metric!r}))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end={epochs}, eta_min=1e-5,
         convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs={epochs}, val_interval=1)
val_cfg = dict()
test_cfg = dict()
"""

#: A config for each task, in which whatever can be random is, and whatever can has a state.
CONFIGS = {
    'detection': """
custom_imports = dict(imports=['spartan_mm.detection'])
default_scope = 'mmdet'
""" + _SPARTAN + """
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
end = [dict(type='Resize', scale=(64, 64), keep_ratio=False), dict(type='PackDetInputs')]
dense_pipeline = [
    *load,
    dict(type='RandomChoice', transforms=[[dict(type='DenseMosaic', side=32)],
                                          [dict(type='RandomZoomOut')]]),
    dict(type='FilterSmallBoxes'),
    *end,
]
train_pipeline = [
    *load,
    dict(type='RandomPhotometricDistort', prob=0.5),
    dict(type='RandomZoomOut', prob=0.5),
    dict(type='RandomIoUCrop', prob=0.8),
    dict(type='FilterSmallBoxes'),
    dict(type='RandomFlip', prob=0.5),
    *end,
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(type='CheckedCocoDataset', ann_file={root!r} + '/annotations.json',
               data_prefix=dict(img={root!r} + '/pictures/'),
               metainfo=dict(classes=('square', 'disc')))
train_dataloader = dict(
    batch_size=3, num_workers={workers}, persistent_workers={workers} > 0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, pipeline=dense_pipeline, filter_cfg=dict(filter_empty_gt=False)))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, pipeline=test_pipeline, test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file={root!r} + '/annotations.json', metric='bbox')
test_evaluator = val_evaluator
model = dict(
    type='RTDETR', num_queries=20,
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0] * 3, std=[255] * 3, bgr_to_rgb=True,
        batch_augments=[dict(type='BatchMixUp', prob=0.5, stop_epoch=1),
                        dict(type='BatchRandomResize', sizes=(32, 64))]),
    backbone=backbone,
    neck=dict(type='HybridEncoder', in_channels=[16, 24, 32], embed_dims=32, ffn_dims=32,
              expansion=0.5, num_blocks=1),
    decoder=dict(in_channels=[32, 32, 32], embed_dims=32, num_layers=2, num_heads=4, ffn_dims=32),
    bbox_head=dict(type='RTDETRHead', num_classes=2, embed_dims=32,
                   loss_cls=dict(type='MatchabilityAwareLoss')),
    dn_cfg=dict(num_queries=8),
    train_cfg=dict(assigner=dict(
        type='HungarianAssigner',
        match_costs=[
            dict(type='FocalLossCost', weight=2.0),
            dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
            dict(type='IoUCost', iou_mode='giou', weight=2.0),
        ])),
    test_cfg=dict(max_per_img=20))
""" + _RUN + """
custom_hooks.append(dict(type='CheckedPipelineSwitchHook', switch_epoch=1,
                         switch_pipeline=train_pipeline))
param_scheduler = [dict(type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, warmup=1,
                        flat=1, tail=0.5)]
""",
    'classification': """
custom_imports = dict(imports=['spartan_mm.classification'])
default_scope = 'mmpretrain'
""" + _SPARTAN + """
dataset = dict(type='CustomDataset', data_root={root!r} + '/classes')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TorchvisionTransforms', transforms=[
        dict(type='RandomResizedCrop', size=32, antialias=True),
        dict(type='RandAugment', num_ops=2, magnitude=7, num_magnitude_bins=31),
        dict(type='RandomErasing', p=0.25)]),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={workers} > 0, drop_last=True,
    collate_fn=dict(type='default_collate'), sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
backbone.update(out_indices=(3,))
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[0] * 3, std=[255] * 3, to_rgb=True),
    backbone=backbone,
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32,
              loss=dict(type='CrossEntropyLoss')),
    train_cfg=dict(augments=[dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.2)]))
""" + _RUN,
}
# How a command ends that was killed, or told to leave (before it listens, and when it does).
_KILLED = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
_METRICS = dict(detection='coco/bbox_mAP', classification='accuracy/top1')
_EMAS = dict(detection='ExpMomentumEMA', classification='ExponentialMovingAverage')


def make_project(root: str | Path, pictures: int = 11, epochs: int = 3,
                 workers: int = 2) -> dict[str, Path]:
    """Make a folder with pictures and a config of each task.

    Args:
        root: the folder, made if need be.
        pictures: number of pictures; an odd one leaves an uneven last batch.
        epochs: number of epochs.
        workers: number of processes that load training data.

    Returns:
        The config of each task.
    """
    root = Path(root)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(pictures):
        height, width = rng.integers(40, 72, 2).tolist()
        picture = rng.integers(0, 128, (height, width, 3)).astype(np.uint8)
        label = index % 2
        # The fourth picture, and every fifth from there, has no object.
        for _ in range(0 if index % 5 == 3 else 1 + index % 3):
            side = int(rng.integers(10, 24))
            x, y = rng.integers(0, [width - side, height - side]).tolist()
            color = rng.integers(128, 256, 3).tolist()
            if label:
                cv2.circle(picture, (x + side // 2, y + side // 2), side // 2, color, -1)
            else:
                cv2.rectangle(picture, (x, y), (x + side - 1, y + side - 1), color, -1)
            annotations.append(dict(id=len(annotations) + 1, image_id=index, category_id=label + 1,
                                    bbox=[x, y, side, side], area=side**2, iscrowd=0))
        folders = root / 'pictures', root / 'classes' / ('square', 'disc')[label]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f'{index}.png'), picture)
        images.append(dict(id=index, file_name=f'{index}.png', height=height, width=width))
    (root / 'annotations.json').write_text(json.dumps(dict(
        images=images, annotations=annotations,
        categories=[dict(id=1, name='square'), dict(id=2, name='disc')])))

    configs = {}
    for task, text in CONFIGS.items():
        configs[task] = root / f'{task}.py'
        configs[task].write_text(text.format(root=str(root), workers=workers, epochs=epochs,
                                             metric=_METRICS[task], ema=_EMAS[task]))
    return configs


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status; minus the signal's number if a signal ended it.
        output: what it wrote.
    """

    status: int
    output: str


@dataclass
class Command:
    """A Python script that runs in forks of this process, on the CPU.

    Args:
        script: the script.
        arguments: its arguments.
        log: file for what it writes, which grows with every start.
        ranks: number of processes, started as torchrun does.
        prepare: called in each fork before the script, with the rank, to make things go wrong.
    """

    script: Path
    arguments: Sequence[str]
    log: Path
    ranks: int = 1
    prepare: Callable[[int], None] | None = None
    pids: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._begin = self.log.stat().st_size if self.log.is_file() else 0
        port = _free_port() if self.ranks > 1 else 0
        sys.stdout.flush()
        sys.stderr.flush()
        # The forks' garbage collector leaves alone what is here, which is a lot.
        gc.freeze()
        self.pids = [self._fork(rank, port) for rank in range(self.ranks)]
        gc.unfreeze()

    def wait(self, timeout: float = 120.) -> list[Outcome]:
        """Wait until all ranks have ended.

        Args:
            timeout: seconds after which they are killed.

        Returns:
            Each rank's outcome; the output is common.
        """
        end = time.monotonic() + timeout
        statuses: dict[int, int] = {}
        while len(statuses) < len(self.pids):
            for pid in self.pids:
                if pid not in statuses:
                    if time.monotonic() > end:
                        os.killpg(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for pid in self.pids:
            _kill_group(pid)
        with self.log.open(errors='replace') as file:
            file.seek(self._begin)
            output = file.read()
        return [Outcome(statuses[pid], output) for pid in self.pids]

    def run(self) -> Outcome:
        """Start it, wait, and return the first rank's outcome."""
        self.start()
        return self.wait()[0]

    def _fork(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = open(1, 'w', buffering=1, closefd=False)
            sys.stderr = open(2, 'w', buffering=1, closefd=False)
            arguments = list(self.arguments)
            if self.ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                                  WORLD_SIZE=str(self.ranks), MASTER_ADDR='127.0.0.1')
                arguments += ['--launcher', 'pytorch']
            # A fork cannot use a GPU that its parent has looked at.
            torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
            importlib.import_module('mmengine.device.utils').DEVICE = 'cpu'
            # To ask compilers for their versions, and to lay out the config for each checkpoint,
            # takes longer than all the training.
            Runner._log_env = lambda *args: None
            importlib.import_module('yapf.yapflib.yapf_api').FormatCode = _leave_as_it_is
            _forget_runs(ManagerMixin)
            if self.prepare is not None:
                self.prepare(rank)
            sys.argv = [str(self.script), *arguments]
            runpy.run_path(str(self.script), run_name='__main__')
            status = 0
        except SystemExit as leaving:
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
            status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)


def _forget_runs(kind: type[ManagerMixin]) -> None:
    """Drop the loggers, visualizers and scopes that earlier runs in the parent left behind."""
    kind._instance_dict.clear()
    for subclass in kind.__subclasses__():
        _forget_runs(subclass)


def at_iteration(number: int, act: Callable[[], None]) -> None:
    """Do something in this process's training, in the middle of an iteration.

    Args:
        number: the iteration, counted from 1 over the whole training.
        act: what to do.
    """
    run_iter = ResumableTrainLoop.run_iter

    def acting(loop: ResumableTrainLoop, index: int, batch: Any) -> None:
        if loop.iter + 1 == number:
            act()
        run_iter(loop, index, batch)

    ResumableTrainLoop.run_iter = acting


def at_write(number: int, act: Callable[[], None], times: int = 1) -> None:
    """Do something in this process when half of a file that is to appear as a whole is written.

    Args:
        number: which file, counted from 1; a checkpoint is followed by ``last_checkpoint``.
        act: what to do.
        times: with how many files from there on to do it.
    """
    write_whole, count = checkpoint_hook.write_whole, 0

    class Half:
        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def write(self, data: bytes) -> None:
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            act()
            self.file.write(data[len(data) // 2:])

    @contextmanager
    def writing(path: str | Path) -> Iterator[Any]:
        nonlocal count
        count += 1
        with write_whole(path) as file:
            yield Half(file) if number <= count < number + times else file

    checkpoint_hook.write_whole = writing


def die() -> None:
    """Be killed, without any chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """Be out of space."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def find_differences(path: str | Path, other: str | Path) -> list[str]:
    """Compare what two trainings ended with, bit by bit.

    Weights, averaged weights, optimizer, schedules and random states of every rank are compared;
    logs, names and times are not.

    Args:
        path: last checkpoint of the one.
        other: last checkpoint of the other.

    Returns:
        What differs.
    """
    kept = 'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'resume'
    first, second = ({key: checkpoint.get(key) for key in kept} for checkpoint in (
        # Written by this process's own forks.
        torch.load(file, map_location='cpu', weights_only=False) for file in (path, other)))
    return list(_compare('', first, second))


def _compare(name: str, first: Any, second: Any) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from _compare(f'{name}/{key}', first[key], second[key])
    elif (isinstance(first, (list, tuple)) and type(first) is type(second)
            and len(first) == len(second)):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from _compare(f'{name}/{number}', *pair)
    elif isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield name
    elif first != second:
        yield name


@dataclass
class Trial:
    """A training that was killed some times.

    Attributes:
        task: 'detection' or 'classification'.
        kills: what ended each run but the last.
        differences: what differs from the training that nobody killed; None if it failed.
        log: what it wrote.
    """

    task: str
    kills: list[str]
    differences: list[str] | None
    log: Path


class Soak:
    """Kills trainings at random moments, and compares what they end with.

    Args:
        script: ``tools/train.py``.
        root: folder for everything.
        seed: seed of the moments.
        epochs: number of epochs of each training.
    """

    def __init__(self, script: Path, root: Path, seed: int = 0, epochs: int = 3) -> None:
        self.script = script
        self.root = root
        self.random = random.Random(seed)
        self.configs = make_project(root / 'project', epochs=epochs)
        self.duration: dict[str, float] = {}

    def train(self, task: str, work_dir: Path, prepare: Callable[[int], None] | None = None,
              ) -> Command:
        """Make the command that starts or goes on with a training."""
        return Command(self.script, [
            str(self.configs[task]), '--work-dir', str(work_dir), '--seed', '1', '--deterministic',
            '--resume', '--save-every', '2'], work_dir / 'output.log', prepare=prepare)

    def run_whole(self, task: str) -> None:
        """Run the training that nobody kills.

        Raises:
            RuntimeError: it fails.
        """
        start = time.monotonic()
        outcome = self.train(task, self._work_dir(task, 'whole')).run()
        self.duration[task] = time.monotonic() - start
        if outcome.status:
            raise RuntimeError(f'training ended with status {outcome.status}:\n{outcome.output}')

    def run_trial(self, task: str, number: int, kills: int) -> Trial:
        """Kill a training several times, go on with it each time, and see how it ends.

        Args:
            task: 'detection' or 'classification'.
            number: number of the trial, for its folder.
            kills: how often to kill it; it can end before.
        """
        work_dir = self._work_dir(task, number)
        trial = Trial(task, [], None, work_dir / 'output.log')
        status = -signal.SIGKILL
        while status in _KILLED and len(trial.kills) < kills:
            way, status = self._run_killed(task, work_dir)
            if status:
                trial.kills.append(way)
        if status in _KILLED:
            status = self.train(task, work_dir).run().status
        if status == 0:
            last = sorted(self._work_dir(task, 'whole').glob('epoch_*.pth'))[-1]
            trial.differences = find_differences(last, work_dir / last.name)
        return trial

    def _run_killed(self, task: str, work_dir: Path) -> tuple[str, int]:
        """Run and kill once; how, and the status."""
        way = self.random.choice(['kill', 'kill', 'kill', 'terminate', 'die writing', 'full disk'])
        file, seconds = self.random.randint(1, 8), self.random.uniform(0.1, 0.95)
        prepare = {'die writing': lambda rank: at_write(file, die),
                   'full disk': lambda rank: at_write(file, fill_disk, times=2)}.get(way)
        command = self.train(task, work_dir, prepare)
        command.start()
        if way == 'die writing':
            text = f'SIGKILL with half of file {file} written'
        else:
            number = signal.SIGTERM if way == 'terminate' else signal.SIGKILL
            seconds *= self.duration[task]
            time.sleep(seconds)
            # Nobody has waited for this child yet: the number is nobody else's.
            os.kill(command.pids[0], number)
            text = f'{number.name} after {seconds:.1f} s'
            if way == 'full disk':
                text = f'disk full at files {file} and {file + 1}, {text}'
        return text, command.wait()[0].status

    def _work_dir(self, task: str, name: str | int) -> Path:
        return self.root / f'{task}_{name}'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _leave_as_it_is(text: str, **_: Any) -> tuple[str, bool]:
    return text, False


def _kill_group(pid: int) -> None:
    """Kill what a process that has ended left behind, such as those that load data."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=30, help='how many (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of what is killed when (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='empty folder for everything (default: a temporary one, kept if a '
                             'training does not end as it should)')
    args = parser.parse_args()
    if args.kills < 1:
        parser.error('--kills must be at least 1')
    if args.work_dir and args.work_dir.exists() and any(args.work_dir.iterdir()):
        parser.error(f'--work-dir {args.work_dir} is not empty')
    return args


def main() -> None:
    args = parse_args()
    root = args.work_dir or Path(tempfile.mkdtemp(prefix='soak_'))
    soak = Soak(ROOT / 'tools' / 'train.py', root.resolve(), args.seed)
    tasks, trials, kills = list(soak.configs), [], 0
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task('kills', total=args.kills)
        try:
            for task in tasks:
                soak.run_whole(task)
        except RuntimeError as error:
            sys.exit(f'error: {error}')
        while kills < args.kills:
            number = len(trials)
            trial = soak.run_trial(tasks[number % 2], number + 1,
                                   min(args.kills - kills, number % 3 + 1))
            trials.append(trial)
            kills += len(trial.kills)
            progress.update(bar, completed=kills)
            progress.console.print(describe(trial), highlight=False, markup=False, soft_wrap=True)

    equal = [trial for trial in trials if trial.differences == []]
    print(f'{len(equal)} of {len(trials)} trainings, killed {kills} times, ended bit-equal')
    if len(equal) < len(trials):
        sys.exit(f'error: {len(trials) - len(equal)} did not; their logs are in {root}')
    if args.work_dir is None:
        shutil.rmtree(root)


def describe(trial: Trial) -> str:
    if trial.differences is None:
        end = f'failed, see {trial.log}'
    elif trial.differences:
        end = f'{len(trial.differences)} differences, such as {trial.differences[0]}'
    else:
        end = 'bit-equal'
    return f'{trial.task}: {"; ".join(trial.kills) or "ended before it was killed"}: {end}'


if __name__ == '__main__':
    main()
