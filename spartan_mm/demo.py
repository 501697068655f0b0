"""What the demo commands have in common: steps in processes of their own, and what is shown."""

import argparse
import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILED, BELOW_BAR, INTERRUPTED = 1, 3, 130


class StepError(Exception):
    """A step of a demo failed."""


@dataclass(frozen=True)
class Goal:
    """A metric, and what a demo is to reach in it.

    Args:
        name: What to call it.
        key: Its name in mmengine's log.
        least: The bar.
        form: How to write it, as for ``format``.
        unit: Written after it.
    """

    name: str
    key: str
    least: float
    form: str = '.3f'
    unit: str = ''

    def write(self, value: float) -> str:
        """Write the metric with a value."""
        return f'{self.name} {value:{self.form}}{self.unit}'


class Console:
    """Lines that stay, and below them one that changes; in a file, now and then a line of it."""

    def __init__(self, pause: float = 20.) -> None:
        self._live = sys.stdout.isatty()
        self._pause = pause
        self._shown = 0.
        self._width = 0

    def line(self, text: str = '') -> None:
        """Print a line that stays."""
        self._clear()
        self._shown = time.monotonic()
        print(text, flush=True)

    def status(self, text: str) -> None:
        """Show how far a step is."""
        if self._live:
            text = text[:shutil.get_terminal_size().columns - 1]
            print(f'\r{text:<{self._width}}', end='', flush=True)
            self._width = len(text)
        elif time.monotonic() - self._shown > self._pause:
            self._shown = time.monotonic()
            print(text, flush=True)

    def _clear(self) -> None:
        if self._width:
            print(f'\r{"":<{self._width}}\r', end='')
            self._width = 0


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
        code = run_process([sys.executable, str(tool), *arguments], log, show, self.console)
        if code:
            with open(log, encoding='utf-8', errors='replace') as file:
                tail = deque((line.rstrip() for line in file if line.strip()), maxlen=12)
            raise StepError('\n'.join([
                f'tools/{name} failed with exit code {code}. Its last lines, all in {log}:',
                *(f'    {line}' for line in tail)]))

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
                 TrainingProgress(self.console, work_dir / config.name, metrics or {}))
        if not latest.is_file():
            raise StepError(f'the training left no checkpoint in {work_dir}')
        # NOTE: the last one, not the best one on the validation pictures, which would be chosen
        # by what is measured.
        return self.shown(Path(latest.read_text().strip()))

    def evaluate(self, config: Path, checkpoint: str, folder: Path,
                 arguments: Sequence[str] = (),
                 keep: Callable[[str], bool] = lambda line: False) -> dict[str, float]:
        """Evaluate a checkpoint; return the metrics by their name in the log.

        Args:
            config: The config file.
            checkpoint: The weights.
            folder: Where the logs go.
            arguments: Further ones of ``tools/test.py``.
            keep: Says which lines of the output to print.
        """
        def show(line: str) -> None:
            if keep(line):
                self.console.line(line.strip())
            elif progress := parse_progress(line):
                self.console.status(f'batch {progress["done"]} of {progress["total"]}')

        self.run('test.py', [self.shown(config), checkpoint, '--work-dir', self.shown(folder),
                             *arguments], show)
        # Folders and files are named by the time of the run.
        report = max(folder.glob('*/*.json'), default=None)
        if report is None:
            raise StepError(f'the evaluation left no report in {folder}')
        return json.loads(report.read_text())

    def shown(self, path: Path) -> str:
        """Write a path as the commands take it, which are run in the home folder."""
        return shorten(path, self.home)


class Demo(ABC):
    """From nothing to a trained model: make data, train, evaluate, draw, report.

    Subclasses say what ``goals`` there are and which flags to train (``train_flags``) and to report
    with (``report_flags``), and fill in the steps.

    Args:
        root: The folder of ``tools/`` and ``configs/``.
        config: The config file.
        work_dir: Where everything but the data goes.
        data_root: Where the data goes.
        options: Settings of the config to override, ``KEY=VALUE``.
        quick: Whether to take a look at every step only, in which nothing is learnt.
    """

    goals: tuple[Goal, ...]
    train_flags: tuple[str, ...] = ()
    report_flags: tuple[str, ...] = ()

    def __init__(self, root: Path, config: Path, work_dir: Path, data_root: Path,
                 options: Sequence[str], quick: bool) -> None:
        self.work_dir = work_dir
        self.data_root = data_root
        self.options = list(options)
        self.quick = quick
        self.commands = Commands(root, work_dir / 'logs')
        self.console = self.commands.console
        self.seconds: dict[str, float] = {}

        self.source_config = config
        # The whole config, as the training writes it.
        self.config = work_dir / config.name
        self.predictions = work_dir / 'evaluation' / 'predictions.pkl'
        self.curves = work_dir / 'curves.png'
        self.report = work_dir / 'report.html'

    @abstractmethod
    def make_data(self) -> None:
        """Make the data and say what there is; ``OSError`` or ``ImportError`` if that fails."""

    @abstractmethod
    def keeps(self, line: str) -> bool:
        """Say whether a line of the evaluation's output is to be printed."""

    @abstractmethod
    def draw_sheets(self) -> list[str]:
        """Draw curves and whatever else; return pictures to infer on."""

    @abstractmethod
    def infer(self, checkpoint: str, pictures: list[str]) -> None:
        """Run inference on some pictures."""

    @property
    @abstractmethod
    def evaluated_on(self) -> str:
        """What the metrics are measured on, in words."""

    @property
    @abstractmethod
    def results(self) -> dict[str, Path]:
        """What there is to look at, in words, and where it lies."""

    def run(self) -> tuple[float, ...]:
        """Run all steps.

        Returns:
            The metrics of the goals.

        Raises:
            StepError: A step failed.
        """
        self.console.line(f'Running in {self.commands.home} on {describe_device()}')
        with self._step('data'):
            try:
                self.make_data()
            except (OSError, ImportError) as error:
                raise StepError(f'the data cannot be made: {error}') from error
        with self._step('training'):
            options = ['--cfg-options', *self.options] if self.options else []
            checkpoint = self.commands.train(self.source_config, self.work_dir,
                                             [*self.train_flags, *options],
                                             {goal.key: goal.name for goal in self.goals})
        with self._step('evaluation'):
            metrics = self.commands.evaluate(
                self.config, checkpoint, self.predictions.parent,
                ['--out', self.commands.shown(self.predictions)], self.keeps)
        with self._step('pictures'):
            self.infer(checkpoint, self._draw())
        with self._step('report'):
            self.commands.run('report.py', [self.commands.shown(self.work_dir),
                                            *self.report_flags])
        return tuple(metrics[goal.key] for goal in self.goals)

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.console.line(f'\n--- {name} ---')
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def _draw(self) -> list[str]:
        self.console.status('drawing')
        self.commands.logs.mkdir(parents=True, exist_ok=True)
        with open(self.commands.logs / 'pictures.log', 'w', encoding='utf-8') as log:
            # What the toolboxes print on the way is of no interest here.
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    return self.draw_sheets()
                except (OSError, ValueError, ImportError) as error:
                    raise StepError(f'the sheets cannot be drawn: {error}') from error

    def run_on_folder(self, checkpoint: str, pictures: list[str], samples: Path, out_dir: Path,
                      arguments: Sequence[str] = ()) -> None:
        """Run ``tools/infer.py`` on copies of some pictures.

        Args:
            checkpoint: The weights.
            pictures: Files.
            samples: Where to copy them.
            out_dir: Where the results go.
            arguments: Further ones of ``tools/infer.py``.
        """
        for folder in (samples, out_dir):
            shutil.rmtree(folder, ignore_errors=True)
        samples.mkdir(parents=True)
        for path in pictures:
            shutil.copy(path, samples)
        shown = self.commands.shown
        self.commands.run('infer.py', [shown(samples), shown(self.config), checkpoint, '--out-dir',
                                       shown(out_dir), *arguments])


class TrainingProgress:
    """Shows how far a training is, from what mmengine prints.

    Args:
        console: Where to show it.
        config: The config file that the training writes when it starts.
        metrics: Those to show after each epoch: what to call them, by their name in the log.
    """

    def __init__(self, console: Console, config: Path, metrics: Mapping[str, str]) -> None:
        self._console = console
        self._config = config
        self._metrics = metrics
        self._epochs: int | None = None
        self._loss = ''

    def __call__(self, line: str) -> None:
        """Look at a line of output."""
        progress = parse_progress(line)
        if not progress:
            return
        epoch = f'epoch {progress["epoch"]} of {self._find_epochs()}, ' if progress['epoch'] else ''
        values = progress['values']
        measured = [f'{name} {values[key]}' for key, name in self._metrics.items() if key in values]
        if progress['mode'] == 'train':
            self._loss = f'loss {values.get("loss", "-")}'
            eta = f', {progress["eta"]} of training left' if progress['eta'] else ''
            self._console.status(f'{epoch}iteration {progress["done"]} of {progress["total"]}, '
                                 f'{self._loss}{eta}')
        elif measured:
            self._console.line(f'{epoch}{self._loss}: {", ".join(measured)}')
        else:
            self._console.status(f'{epoch}validation, batch {progress["done"]} of '
                                 f'{progress["total"]}')

    def _find_epochs(self) -> int | str:
        if self._epochs is None:
            from mmengine.config import Config
            config = Config.fromfile(self._config, import_custom_modules=False)
            self._epochs = config.train_cfg.get('max_epochs', '?')
        return self._epochs


def parse_progress(line: str) -> dict[str, Any] | None:
    """Read a line in which mmengine reports progress.

    Returns:
        mode ('train', 'val', 'test'), epoch (None if not given), done and total (iterations), eta
        (None if not given) and values by name; None for another line.
    """
    match = re.search(r'(?:Epoch|Iter)\((train|val|test)\)\s+(?:\[\s*(\d+)\])?'
                      r'\[\s*(\d+)/\s*(\d+)\](.*)', line)
    if match is None:
        return None
    mode, epoch, done, total, rest = match.groups()
    eta = re.search(r'\beta: ((?:\d+ days?, )?[\d:]+)', rest)
    return dict(mode=mode, epoch=epoch and int(epoch), done=int(done), total=int(total),
                eta=eta and eta[1], values=dict(re.findall(r'([\w./]+): (\S+)', rest)))


def run_process(command: list[str], log: Path, show: Callable[[str], None],
                console: Console) -> int:
    """Run a process to its end, its output to a file and line by line to ``show``."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
        encoding='utf-8', env=dict(os.environ, PYTHONUNBUFFERED='1', PYTHONIOENCODING='utf-8'))
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    start, reported = time.monotonic(), False
    try:
        with open(log, 'w', encoding='utf-8') as file:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    if not reported:
                        console.status(f'running for {time.monotonic() - start:.0f} s')
                    continue
                if line is None:
                    return process.wait()
                file.write(line)
                file.flush()
                reported = reported or parse_progress(line) is not None
                show(line)
    finally:
        # Interrupted: nothing is left running.
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def parse_args(description: str, root: Path, name: str, data_name: str) -> argparse.Namespace:
    """Parse the flags of a demo.

    Args:
        description: What the demo does.
        root: The folder of ``tools/`` and ``configs/``.
        name: Its work dir in ``work_dirs/``, where nothing else is asked for.
        data_name: Its data in ``data/``, where nothing else is asked for.

    Returns:
        work_dir and data_root (absolute paths), cfg_options (a list of ``KEY=VALUE``) and quick.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help=f'where logs, weights and pictures go (default: work_dirs/{name})')
    parser.add_argument('--data-root', type=Path, metavar='DIR',
                        help=f'where the data goes (default: data/{data_name}); data made here '
                             'earlier is used again, or replaced if it was made otherwise')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override settings of the config, such as train_cfg.max_epochs=8')
    parser.add_argument('--quick', action='store_true',
                        help='take a look at every step, in which nothing is learnt; in a work dir '
                             'of its own')
    args = parser.parse_args()
    for option in args.cfg_options:
        if '=' not in option:
            parser.error(f'--cfg-options {option} must be KEY=VALUE')
    home = find_home(root)
    suffix = '_quick' if args.quick else ''
    args.work_dir = (args.work_dir or home / 'work_dirs' / f'{name}{suffix}').resolve()
    args.data_root = (args.data_root or home / 'data' / f'{data_name}{suffix}').resolve()
    if re.search(r'[\s,()\[\]]', shorten(args.data_root, home)):
        parser.error(f'--data-root {args.data_root}: mmengine cannot take a path with blanks, '
                     'commas or brackets as a setting of the config; choose another folder')
    return args


def run_demo(demo: Demo) -> int:
    """Run a demo, say what came of it, and return the exit code."""
    # So that a step in progress is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.chdir(demo.commands.home)
    line = demo.console.line
    try:
        values = demo.run()
    except StepError as error:
        line()
        print(f'error: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        line()
        print('interrupted', file=sys.stderr)
        return INTERRUPTED

    measured = [goal.write(value) for goal, value in zip(demo.goals, values, strict=True)]
    line(f'\n{", ".join(measured)} on {demo.evaluated_on}')
    missing = judge(demo.goals, values)
    if missing:
        line(f'BELOW THE BAR: {missing}'
             + (' (no error with --quick, which learns nothing)' if demo.quick else ''))
    else:
        bars = ' and '.join(goal.write(goal.least) for goal in demo.goals)
        line(f'The bar, {bars}, is reached')
    times = ', '.join(f'{name} {_clock(seconds)}' for name, seconds in demo.seconds.items())
    line(f'minutes: {times}; {_clock(sum(demo.seconds.values()))} in all')
    for what, path in {**demo.results, 'all on one page': demo.report}.items():
        line(f'{what}: {demo.commands.shown(path)}')
    line(f'Everything lies in {demo.work_dir}')
    return BELOW_BAR if missing and not demo.quick else 0


def judge(goals: Sequence[Goal], values: Sequence[float]) -> str | None:
    """Compare metrics with what is to be reached; say what is missing, if anything is."""
    short = [f'{goal.write(value)}, to be at least {goal.least:{goal.form}}{goal.unit}'
             for goal, value in zip(goals, values, strict=True) if not value >= goal.least]
    return '; '.join(short) or None


def find_home(root: Path) -> Path:
    """Find where data and results go: beside the code in a checkout, never in an installation.

    Args:
        root: The folder of ``tools/`` and ``configs/``.
    """
    return Path.cwd() if root.name == '.mim' else root


def shorten(path: Path, home: Path) -> str:
    """Write a path from the home folder, where it lies in there."""
    return str(path.relative_to(home) if path.is_relative_to(home) else path)


def describe_device() -> str:
    """Name the GPU, or the CPU with its threads."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f'the CPU, {threads} thread{"" if threads == 1 else "s"}'


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'
