"""The demos: from nothing to a trained model, each step a command in a process of its own."""

import argparse
import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.fileio import load

from . import zoo
from .analysis.mistakes.predictions import spread
from .datasets.check import SPLITS
from .errors import ExplainedError
from .files import clean_up_on_sigterm
from .text import Console, count

FAILED, BELOW_BAR, INTERRUPTED = 1, 3, 130
NUM_SHOWN = 8  # pictures to infer on
SCORE_THRESHOLD = 0.4  # of detections that are drawn


class StepError(ExplainedError):
    """A step of a demo failed."""


class Goal(NamedTuple):
    """A metric, and what a demo is to reach in it.

    Args:
        name: What to call it.
        key: Its name in mmengine's log.
        least: The bar.
        form: How to write a value, as for ``str.format``.
    """

    name: str
    key: str
    least: float
    form: str = '{:.3f}'

    def write(self, value: float) -> str:
        """Write the metric with a value."""
        return f'{self.name} {self.form.format(value)}'


class Commands:
    """Runs commands of ``tools/``, each printed first, their output in files.

    Args:
        root: The folder of ``tools/`` and ``configs/``.
        logs: Where the output of the commands goes.
    """

    def __init__(self, root: Path, logs: Path) -> None:
        self.root = root
        self.home = find_home(root)
        self.logs = logs
        self.console = Console()

    def run(self, name: str, arguments: list[str],
            show: Callable[[str], None] = lambda line: None) -> None:
        """Run a command, its output line by line to ``show``.

        Raises:
            StepError: It failed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f'{Path(name).stem}.log'
        tool = self.root / 'tools' / name
        self.console.line(f'$ {shlex.join([self.shown(Path(sys.executable)), self.shown(tool)])} '
                          f'{shlex.join(arguments)}')
        self.console.line(f'  (its whole output: {self.shown(log)})')
        code = run_process([sys.executable, str(tool), *arguments], log, show)
        if code:
            with open(log, encoding='utf-8', errors='replace') as file:
                tail = deque((line.rstrip() for line in file if line.strip()), maxlen=12)
            raise StepError(
                f'tools/{name} failed with exit code {code}. Its last lines, all in {log}:', *tail)

    def train(self, config: Path, work_dir: Path, arguments: Sequence[str] = (),
              metrics: Mapping[str, str] | None = None) -> str:
        """Train; return the last checkpoint.

        Args:
            config: The config file.
            work_dir: Where logs and weights go.
            arguments: Further ones of ``tools/train.py``.
            metrics: Those to show after each epoch: what to call them, by their name in the log.
        """
        latest = work_dir / 'last_checkpoint'
        latest.unlink(missing_ok=True)
        self.run('train.py', [self.shown(config), '--work-dir', self.shown(work_dir), *arguments],
                 Progress(self.console, metrics or {}))
        if not latest.is_file():
            raise StepError(f'the training left no checkpoint in {work_dir}')
        # NOTE: The last one, not the best one on the validation pictures, which would be chosen
        # by what is measured.
        return self.shown(Path(latest.read_text().strip()))

    def shown(self, path: Path) -> str:
        """Write a path as the commands take it, from the home folder where it lies in there."""
        return str(path.relative_to(self.home) if path.is_relative_to(self.home) else path)


class Progress:
    """Shows how far a training or a test is, from what mmengine prints.

    Args:
        console: Where to show it.
        metrics: Those to show after each epoch: what to call them, by their name in the log.
    """

    def __init__(self, console: Console, metrics: Mapping[str, str]) -> None:
        self._console = console
        self._metrics = metrics
        self._loss = ''

    def __call__(self, line: str) -> None:
        """Look at a line of output."""
        match = re.search(r'(?:Epoch|Iter)\((train|val|test)\)\s+(?:\[\s*(\d+)\])?'
                          r'\[\s*(\d+)/\s*(\d+)\](.*)', line)
        if match is None:
            return
        mode, epoch, done, total, rest = match.groups()
        values = dict(re.findall(r'([\w./]+): ((?:\d+ days?, )?\S+)', rest))
        if mode == 'train':
            self._loss = f'loss {values.get("loss", "-")}'
        measured = [f'{name} {values[key]}' for key, name in self._metrics.items() if key in values]
        parts = [f'epoch {epoch}'] if epoch else []
        if mode != 'train' and measured:
            self._console.line(f'{", ".join([*parts, self._loss])}: {", ".join(measured)}')
            return
        parts.append(f'{"iteration" if mode == "train" else mode} {done} of {total}')
        if mode == 'train':
            parts += [self._loss, *([f'{values["eta"]} left'] if 'eta' in values else [])]
        self._console.status(', '.join(parts))


def run_process(command: list[str], log: Path, show: Callable[[str], None]) -> int:
    """Run a process to its end, its output to a file and line by line to ``show``."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
        encoding='utf-8', env=dict(os.environ, PYTHONUNBUFFERED='1', PYTHONIOENCODING='utf-8'))
    try:
        with open(log, 'w', encoding='utf-8', buffering=1) as file:
            for line in process.stdout:
                file.write(line)
                show(line)
        return process.wait()
    finally:
        # Interrupted: nothing is left running.
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Demo(ABC):
    """The steps: make data, train, evaluate, draw, report.

    Args:
        work_dir: Where everything but the data goes; None for one in ``work_dirs/``.
        data_root: Where the data goes; None for one in ``data/``.
        options: Settings of the config to override, ``KEY=VALUE``.
        quick: Whether to take a look at every step only, in which nothing is learnt.
    """

    #: Names the work dir.
    name: str
    #: Where the config expects the data to be, in ``data/``.
    data_name: str
    #: The config file, in ``configs/``.
    config_name: str
    #: What is to be reached, and on what it is measured.
    goals: tuple[Goal, ...]
    evaluated_on: str
    num_evaluated = 0
    #: Variables that are set where they are not.
    environment: Mapping[str, str] = {}
    #: Flags of ``tools/train.py``, and of ``tools/infer.py`` and ``tools/report.py``.
    train_flags: tuple[str, ...] = ()
    score_flags: tuple[str, ...] = ()
    #: Settings of the config with which nothing is learnt.
    quick_options: tuple[str, ...] = (
        'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
        *(f'{split}_dataloader.{setting}' for split in SPLITS
          for setting in ('num_workers=0', 'persistent_workers=False')))

    def __init__(self, work_dir: Path | None = None, data_root: Path | None = None,
                 options: Sequence[str] = (), quick: bool = False) -> None:
        root, suffix = zoo.root(), '_quick' if quick else ''
        home = find_home(root)
        self.quick = quick
        self.work_dir = (work_dir or home / 'work_dirs' / f'{self.name}{suffix}').resolve()
        self.data_root = (data_root or home / 'data' / f'{self.data_name}{suffix}').resolve()
        self.source_config = root / 'configs' / self.config_name
        # The whole config, as the training writes it.
        self.config = self.work_dir / self.source_config.name
        self.predictions = self.work_dir / 'evaluation' / 'predictions.pkl'
        self.samples, self.inferred = self.work_dir / 'samples', self.work_dir / 'inferred'
        self.commands = Commands(root, self.work_dir / 'logs')
        self.console, self.shown = self.commands.console, self.commands.shown
        self.seconds: dict[str, float] = {}
        data = self.shown(self.data_root)
        expected = str(Path('data', self.data_name))
        self.options = [*(self.data_options(data) if data != expected else ()),
                        *(self.quick_options if quick else ()), *options]

    def data_options(self, root: str) -> list[str]:
        """Settings that point the config to data that lies elsewhere than it says."""
        return [f'{split}_dataloader.dataset.data_root={root}' for split in SPLITS]

    @abstractmethod
    def make_data(self) -> str:
        """Make the data and say what there is; ``OSError`` or ``ImportError`` if that fails."""

    def run(self) -> tuple[float, ...]:
        """Run all steps.

        Returns:
            The metrics of the goals.

        Raises:
            StepError: A step failed.
        """
        run, shown, folder = self.commands.run, self.shown, self.predictions.parent
        self.console.line(f'Running in {self.commands.home} on {describe_device()}')
        with self._step('data'):
            try:
                self.console.line(self.make_data())
            except (OSError, ValueError, ImportError) as error:
                raise StepError(f'the data cannot be made: {error}') from error
        with self._step('training'):
            options = ['--cfg-options', *self.options] if self.options else []
            checkpoint = self.commands.train(self.source_config, self.work_dir,
                                             [*self.train_flags, *options],
                                             {goal.key: goal.name for goal in self.goals})
        with self._step('evaluation'):
            progress = Progress(self.console, {})
            run('test.py', [shown(self.config), checkpoint, '--work-dir', shown(folder), '--out',
                            shown(self.predictions)],
                lambda line: self.console.line(line.strip())
                if line.lstrip().startswith('Average ') else progress(line))
            # Folders and files are named by the time of the run.
            record = max(folder.glob('*/*.json'), default=None)
            if record is None:
                raise StepError(f'the evaluation left no report in {folder}')
        with self._step('pictures'):
            self._choose_pictures()
            run('infer.py', [shown(self.samples), shown(self.config), checkpoint, '--out-dir',
                             shown(self.inferred), *self.score_flags])
        with self._step('report'):
            run('report.py', [shown(self.work_dir), *self.score_flags])
        self.num_evaluated = len(load(self.predictions))
        metrics = json.loads(record.read_text())
        return tuple(metrics[goal.key] for goal in self.goals)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Name and time a step."""
        self.console.line(f'\n--- {name} ---')
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def _choose_pictures(self) -> None:
        """Copy a few pictures to a folder of their own, and make place for what is found."""
        for folder in (self.samples, self.inferred):
            shutil.rmtree(folder, ignore_errors=True)
        self.samples.mkdir()
        pictures = sorted((self.data_root / 'val').rglob('*.*'))
        for index in spread(len(pictures), NUM_SHOWN):
            shutil.copy(pictures[index], self.samples)


class DetectorDemo(Demo):
    """From nothing to a trained detector: make data, train, evaluate, draw, report.

    A small RT-DETR with a SpaRTAN backbone learns handwritten digits on photographs, from scratch,
    on a GPU if there is one. Each step is a command that can be run alone, too; it is printed
    first.
    """

    name = 'demo'
    data_name = 'digits'
    config_name = 'detection/rtdetr_spartan_xt_digits.py'
    goals = (Goal('AP', 'coco/bbox_mAP', 0.30), Goal('AP50', 'coco/bbox_mAP_50', 0.55))
    score_flags = ('--score-thr', str(SCORE_THRESHOLD))
    quick_options = (*Demo.quick_options, 'train_dataloader.batch_size=4')
    evaluated_on = 'validation pictures'

    @property
    def num_pictures(self) -> tuple[int, int]:
        """Number of pictures for training and validation."""
        return (8, 4) if self.quick else (2000, 200)

    def data_options(self, root: str) -> list[str]:
        return [*super().data_options(root), *(
            f'{split}_evaluator.ann_file={Path(root, "annotations", "val.json")}'
            for split in ('val', 'test'))]

    def make_data(self) -> str:
        from .datasets import make_digits
        train, val = self.num_pictures
        paths = make_digits(self.data_root, train, val)
        return f'{train} training and {val} validation pictures in {self.shown(paths.root)}'


class ClassifierDemo(Demo):
    """From nothing to a trained classifier: make data, train, evaluate, draw, report.

    SpaRTAN-XT learns scikit-learn's handwritten digits, from scratch, on a GPU if there is one, and
    is evaluated on digits that were held out. Each step is a command that can be run alone, too; it
    is printed first.
    """

    name = 'demo_classification'
    data_name = 'digit_folder'
    config_name = 'classification/spartan_xt_digits.py'
    goals = (Goal('top-1', 'accuracy/top1', 97., '{:.2f} %'), )
    # On a CPU: with maps this small, threads wait for each other longer than they work.
    environment = dict(OMP_NUM_THREADS='1')
    train_flags = ('--channels-last', )
    # A few pictures of each class.
    quick_options = (*Demo.quick_options, *(
        f'{split}_dataloader.{setting}' for split in SPLITS
        for setting in ('batch_size=8', f'dataset.indices={[*range(0, 352, 22)]}'.replace(' ', ''))
    ))
    evaluated_on = 'digits that were held out'

    def make_data(self) -> str:
        from .datasets import make_digit_folder
        root = make_digit_folder(self.data_root)
        train, val = (len([*(root / split).glob('*/*.png')]) for split in ('train', 'val'))
        return f'{train} digits to learn from and {val} held out, in {self.shown(root)}'


def main(kind: type[Demo], argv: Sequence[str] | None = None) -> int:
    """Run a demo as a command.

    Args:
        kind: The demo.
        argv: The flags; None for those of the process.

    Returns:
        The exit code.
    """
    demo = parse_args(kind, argv)
    for name, value in demo.environment.items():
        os.environ.setdefault(name, value)
    clean_up_on_sigterm()
    os.chdir(demo.commands.home)
    try:
        values = demo.run()
    except StepError as error:
        demo.console.line()
        print(f'error: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        demo.console.line()
        print('interrupted', file=sys.stderr)
        return INTERRUPTED
    return conclude(demo, values)


def parse_args(kind: type[Demo], argv: Sequence[str] | None) -> Demo:
    """Make a demo of its flags."""
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(kind), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='where logs, weights and pictures go '
                             f'(default: work_dirs/{kind.name})')
    parser.add_argument('--data-root', type=Path, metavar='DIR',
                        help=f'where the data goes (default: data/{kind.data_name}); data made '
                             'here earlier is used again, or replaced if it was made otherwise')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override settings of the config, such as train_cfg.max_epochs=8')
    parser.add_argument('--quick', action='store_true',
                        help='take a look at every step, in which nothing is learnt; in a work dir '
                             'of its own')
    args = parser.parse_args(argv)
    for option in args.cfg_options:
        if '=' not in option:
            parser.error(f'--cfg-options {option} must be KEY=VALUE')
    demo = kind(args.work_dir, args.data_root, args.cfg_options, args.quick)
    if re.search(r'[\s,()\[\]]', demo.shown(demo.data_root)):
        parser.error(f'--data-root {demo.data_root}: mmengine cannot take a path with blanks, '
                     'commas or brackets as a setting of the config; choose another folder')
    return demo


def conclude(demo: Demo, values: Sequence[float]) -> int:
    """Say what came of a demo, and return the exit code."""
    line = demo.console.line
    goals = [*zip(demo.goals, values, strict=True)]
    measured = ', '.join(goal.write(value) for goal, value in goals)
    line(f'\n{measured} on {demo.num_evaluated} {demo.evaluated_on}')
    # A value that is not a number is below every bar, too.
    missing = '; '.join(f'{goal.write(value)}, to be at least {goal.form.format(goal.least)}'
                        for goal, value in goals if not value >= goal.least)
    if missing:
        line(f'BELOW THE BAR: {missing}'
             + (' (no error with --quick, which learns nothing)' if demo.quick else ''))
    else:
        bars = ' and '.join(goal.write(goal.least) for goal in demo.goals)
        line(f'The bar, {bars}, is reached')
    times = ', '.join(f'{name} {_clock(seconds)}' for name, seconds in demo.seconds.items())
    line(f'minutes: {times}; {_clock(sum(demo.seconds.values()))} in all')
    line(f'curves, metrics, pictures, errors: {demo.shown(demo.work_dir / "report.html")}')
    line(f'pictures by tools/infer.py: {demo.shown(demo.inferred)}')
    line(f'Everything lies in {demo.work_dir}')
    return BELOW_BAR if missing and not demo.quick else 0


def find_home(root: Path) -> Path:
    """Find where data and results go: beside the code in a checkout, never in an installation.

    Args:
        root: The folder of ``tools/`` and ``configs/``.
    """
    return Path.cwd() if root.name == '.mim' else root


def describe_device() -> str:
    """Name the GPU, or the CPU with its threads."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'the CPU, {count(torch.get_num_threads(), "thread")}'


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'
