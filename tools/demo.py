"""From nothing to a trained detector: make data, train, evaluate, draw.

A small RT-DETR with a SpaRTAN backbone learns handwritten digits on photographs, from scratch, on
a GPU if there is one. Each step is a command that can be run alone, too; it is printed first.
"""

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
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A checkout that is not installed; what is installed comes first.
sys.path.append(str(ROOT))

# Beside the code in a checkout; an installed package is no place for data.
HOME = Path.cwd() if ROOT.name == '.mim' else ROOT
CONFIG = ROOT / 'configs' / 'detection' / 'rtdetr_spartan_xt_digits.py'

NUM_TRAIN, NUM_VAL = 2000, 200  # pictures
MIN_AP, MIN_AP50 = 0.30, 0.55  # what the demo is to reach on the validation pictures

NUM_SHOWN = 8  # pictures in the gallery
SCORE_THRESHOLD = 0.4  # of detections that are drawn

# --quick: a look at every step, in which nothing is learnt.
QUICK_TRAIN, QUICK_VAL = 8, 4
QUICK_OPTIONS = (
    'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1', 'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False')

FAILED, BELOW_BAR, INTERRUPTED = 1, 3, 130


class StepError(Exception):
    """A step of the demo failed."""


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


class Demo:
    """The steps, in the order they are run in.

    Args:
        work_dir: where everything but the data goes.
        data_root: where the data goes.
        options: settings of the config to override, ``KEY=VALUE``.
        quick: whether to use few pictures and iterations.
    """

    def __init__(self, work_dir: Path, data_root: Path, options: list[str], quick: bool) -> None:
        self.work_dir = work_dir
        self.data_root = data_root
        self.options = [*_data_options(data_root), *(QUICK_OPTIONS if quick else ()), *options]
        self.num_train, self.num_val = (QUICK_TRAIN, QUICK_VAL) if quick else (NUM_TRAIN, NUM_VAL)
        self.console = Console()
        self.seconds: dict[str, float] = {}

        self.logs = work_dir / 'logs'
        # The whole config, as the training writes it.
        self.config = work_dir / CONFIG.name
        self.predictions = work_dir / 'evaluation' / 'predictions.pkl'
        self.samples = work_dir / 'samples'
        self.detections = work_dir / 'detections'
        self.curves = work_dir / 'curves.png'
        self.gallery = work_dir / 'gallery.png'

    def run(self) -> tuple[float, float]:
        """Run all steps.

        Returns:
            AP and AP50 on the validation pictures.

        Raises:
            StepError: a step failed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.console.line(f'Running in {HOME} on {_device()}')
        with self._step('data'):
            self._make_data()
        with self._step('training'):
            checkpoint = self._train()
        with self._step('evaluation'):
            metrics = self._evaluate(checkpoint)
        with self._step('pictures'):
            self._draw(checkpoint)
        return metrics

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.console.line(f'\n--- {name} ---')
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def _make_data(self) -> None:
        from spartan_mm.datasets import make_digits
        try:
            paths = make_digits(self.data_root, self.num_train, self.num_val)
        except (OSError, ImportError) as error:
            raise StepError(f'the data cannot be made: {error}') from error
        self.console.line(f'{self.num_train} training and {self.num_val} validation pictures in '
                          f'{_shown(paths.root)}')

    def _train(self) -> str:
        """Train from scratch; return the last checkpoint."""
        latest = self.work_dir / 'last_checkpoint'
        latest.unlink(missing_ok=True)
        arguments = [_shown(CONFIG), '--work-dir', _shown(self.work_dir)]
        if self.options:
            arguments += ['--cfg-options', *self.options]
        self._run_tool('train.py', arguments, TrainingProgress(self.console, self.config))
        if not latest.is_file():
            raise StepError(f'the training left no checkpoint in {self.work_dir}')
        # NOTE: the last one, not the best one on the validation pictures, which would be chosen
        # by what is measured.
        return _shown(Path(latest.read_text().strip()))

    def _evaluate(self, checkpoint: str) -> tuple[float, float]:
        """Evaluate a checkpoint; return AP and AP50."""
        folder = self.predictions.parent
        self._run_tool('test.py', [_shown(self.config), checkpoint, '--work-dir', _shown(folder),
                                   '--out', _shown(self.predictions)],
                       self._show_evaluation)
        # Folders and files are named by the time of the run.
        report = max(folder.glob('*/*.json'), default=None)
        if report is None:
            raise StepError(f'the evaluation left no report in {folder}')
        metrics = json.loads(report.read_text())
        return metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']

    def _show_evaluation(self, line: str) -> None:
        if 'Average Precision' in line or 'Average Recall' in line:
            self.console.line(line.strip())
        elif progress := parse_progress(line):
            self.console.status(f'batch {progress["done"]} of {progress["total"]}')

    def _draw(self, checkpoint: str) -> None:
        """Draw curves and gallery, and detections on some pictures."""
        with open(self.logs / 'pictures.log', 'w', encoding='utf-8') as log:
            self.console.status('drawing curves and gallery')
            # What mmdet and mmengine print on the way is of no interest here.
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    shown = self._draw_sheets()
                except (OSError, ValueError, ImportError) as error:
                    raise StepError(f'curves and gallery cannot be drawn: {error}') from error
        shutil.rmtree(self.samples, ignore_errors=True)
        shutil.rmtree(self.detections, ignore_errors=True)
        self.samples.mkdir()
        for path in shown:
            shutil.copy(path, self.samples)
        self._run_tool('infer.py', [_shown(self.samples), _shown(self.config), checkpoint,
                                    '--out-dir', _shown(self.detections),
                                    '--score-thr', str(SCORE_THRESHOLD)],
                       lambda line: None)

    def _draw_sheets(self) -> list[str]:
        """Draw curves and gallery; return the paths of the pictures in the gallery."""
        from mmengine.config import Config
        from mmengine.registry import DATASETS, init_default_scope

        from spartan_mm.analysis.curves import draw_curves, read_log
        from spartan_mm.analysis.gallery import draw_gallery, read_predictions, spread
        draw_curves(read_log(self.work_dir)).savefig(self.curves)

        config = Config.fromfile(self.config)
        init_default_scope(config.default_scope)
        dataset = DATASETS.build(config.test_dataloader.dataset)
        indices = spread(len(dataset), NUM_SHOWN)
        sheet = draw_gallery(dataset, read_predictions(self.predictions), indices, SCORE_THRESHOLD)
        sheet.save(self.gallery)
        return [dataset.get_data_info(index)['img_path'] for index in indices]

    def _run_tool(self, name: str, arguments: list[str], show: Callable[[str], None]) -> None:
        """Run a command of this folder; its output goes to a file, and through ``show``.

        Raises:
            StepError: it failed.
        """
        log = self.logs / f'{Path(name).stem}.log'
        tool = ROOT / 'tools' / name
        self.console.line(f'$ {shlex.join([_shown(Path(sys.executable)), _shown(tool)])} '
                          f'{shlex.join(arguments)}')
        self.console.line(f'  (its whole output: {_shown(log)})')
        code = _run([sys.executable, str(tool), *arguments], log, show, self.console)
        if code:
            with open(log, encoding='utf-8', errors='replace') as file:
                tail = deque((line.rstrip() for line in file if line.strip()), maxlen=12)
            raise StepError('\n'.join([
                f'tools/{name} failed with exit code {code}. Its last lines, all in {log}:',
                *(f'    {line}' for line in tail)]))


class TrainingProgress:
    """Shows how far a training is, from what mmengine prints.

    Args:
        console: where to show it.
        config: the config file that the training writes when it starts.
    """

    def __init__(self, console: Console, config: Path) -> None:
        self._console = console
        self._config = config
        self._epochs: int | None = None
        self._loss = ''

    def __call__(self, line: str) -> None:
        """Look at a line of output."""
        progress = parse_progress(line)
        if not progress:
            return
        epoch = f'epoch {progress["epoch"]} of {self._find_epochs()}, ' if progress['epoch'] else ''
        values = progress['values']
        if progress['mode'] == 'train':
            self._loss = f'loss {values.get("loss", "-")}'
            eta = f', {progress["eta"]} of training left' if progress['eta'] else ''
            self._console.status(f'{epoch}iteration {progress["done"]} of {progress["total"]}, '
                                 f'{self._loss}{eta}')
        elif 'coco/bbox_mAP' in values:
            self._console.line(f'{epoch}{self._loss}: AP {values["coco/bbox_mAP"]}, '
                               f'AP50 {values["coco/bbox_mAP_50"]}')
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


def judge(ap: float, ap50: float) -> str | None:
    """Compare the metrics with what the demo is to reach; say what is missing, if anything is."""
    short = [f'{name} is {value:.3f}, to be at least {least:.2f}'
             for name, value, least in (('AP', ap, MIN_AP), ('AP50', ap50, MIN_AP50))
             if not value >= least]
    return '; '.join(short) or None


def _run(command: list[str], log: Path, show: Callable[[str], None], console: Console) -> int:
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


def _data_options(data_root: Path) -> list[str]:
    """Point the config to a dataset that does not lie where the config says."""
    if data_root == HOME / 'data' / 'digits':
        return []
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    evaluators = ('val_evaluator', 'test_evaluator')
    return [*(f'{loader}.dataset.data_root={_shown(data_root)}' for loader in loaders),
            *(f'{evaluator}.ann_file={_shown(data_root / "annotations" / "val.json")}'
              for evaluator in evaluators)]


def _device() -> str:
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'the CPU, {torch.get_num_threads()} threads'


def _shown(path: Path) -> str:
    """Write a path from HOME, where it lies in there; commands are run there."""
    return str(path.relative_to(HOME) if path.is_relative_to(HOME) else path)


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='where logs, weights and pictures go (default: work_dirs/demo)')
    parser.add_argument('--data-root', type=Path, metavar='DIR',
                        help='where the data goes (default: data/digits); data made here earlier '
                             'is used again, or replaced if it has other numbers of pictures')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override settings of the config, such as train_cfg.max_epochs=8')
    parser.add_argument('--quick', action='store_true',
                        help='run every step with a few pictures, where nothing is learnt; in '
                             'folders of its own')
    args = parser.parse_args()
    for option in args.cfg_options:
        if '=' not in option:
            parser.error(f'--cfg-options {option} must be KEY=VALUE')
    suffix = '_quick' if args.quick else ''
    args.work_dir = (args.work_dir or HOME / 'work_dirs' / f'demo{suffix}').resolve()
    args.data_root = (args.data_root or HOME / 'data' / f'digits{suffix}').resolve()
    if re.search(r'[\s,()\[\]]', _shown(args.data_root)):
        parser.error(f'--data-root {args.data_root}: mmengine cannot take a path with blanks, '
                     'commas or brackets as a setting of the config; choose another folder')
    return args


def main() -> int:
    args = parse_args()
    # So that a step in progress is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.chdir(HOME)
    demo = Demo(args.work_dir, args.data_root, args.cfg_options, args.quick)
    line = demo.console.line
    try:
        ap, ap50 = demo.run()
    except StepError as error:
        line()
        print(f'error: {error}', file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        line()
        print('interrupted', file=sys.stderr)
        return INTERRUPTED

    line(f'\nAP {ap:.3f}, AP50 {ap50:.3f} on {demo.num_val} validation pictures')
    missing = judge(ap, ap50)
    if missing:
        line(f'BELOW THE BAR: {missing}'
             + (' (no error with --quick, which learns nothing)' if args.quick else ''))
    else:
        line(f'The bar, AP {MIN_AP:.2f} and AP50 {MIN_AP50:.2f}, is reached')
    times = ', '.join(f'{name} {_clock(seconds)}' for name, seconds in demo.seconds.items())
    line(f'minutes: {times}; {_clock(sum(demo.seconds.values()))} in all')
    for what, path in (('loss, AP and learning rate', demo.curves),
                       ('predictions beside ground truth', demo.gallery),
                       ('detections by tools/infer.py', demo.detections)):
        line(f'{what}: {_shown(path)}')
    line(f'Everything lies in {demo.work_dir}')
    return BELOW_BAR if missing and not args.quick else 0


if __name__ == '__main__':
    sys.exit(main())
