"""What a training leaves in its work dir: config, logs, checkpoints, predictions."""

import re
import shlex
from datetime import datetime
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from ...engine import launch
from ...engine.class_order import OrderedCheckpointHook
from ...engine.settings import check_run
from ...errors import UsageError
from .curves import find_logs, read_log

#: Where predictions go that are made here.
PREDICTIONS = Path('evaluation', 'predictions.pkl')


class Run:
    """A training, as it lies in its work dir; of several in a folder, the latest.

    Args:
        folder: The work dir.

    Attributes:
        log_path: Its log, and ``log``, what that holds.
        text_log: Mmengine's log for people; None if it is gone.
        checkpoints: In the order of writing.
        last: The checkpoint to evaluate; None if there is none yet.

    Raises:
        FileNotFoundError: There is no such folder, or no log of a training in it.
        UsageError: The log is empty, or is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f'{folder} is no folder: name the work dir of a training')
        self.log_path = find_logs(self.folder)[-1]
        self.log = read_log(self.log_path)
        self.text_log = next(reversed(_by_time(self.log_path.parent.parent, '*.log')), None)
        self.checkpoints = _by_time(self.folder, '*.pth')
        self.last = next(reversed(self.checkpoints), None)
        pointer = self.folder / 'last_checkpoint'
        if pointer.is_file():
            named = self.folder / Path(pointer.read_text().strip()).name
            self.last = named if named.is_file() else None

    @property
    def config_file(self) -> Path:
        """Its whole config, as mmengine wrote it.

        Raises:
            FileNotFoundError: It is gone.
        """
        own = self.log_path.parent / 'config.py'
        configs = [own] if own.is_file() else _by_time(self.folder, '*.py')
        if not configs:
            raise FileNotFoundError(f'{self.folder} has no config: neither {own}, which mmengine '
                                    'writes, nor a .py file')
        return configs[-1]

    @cached_property
    def config(self) -> Config:
        """Its whole config, read.

        Raises:
            FileNotFoundError: It is gone.
            UsageError: It cannot be read.
        """
        path = self.config_file
        try:
            return Config.fromfile(path)
        except FileNotFoundError:
            raise
        except Exception as error:  # a config is Python, in which anything can go wrong
            raise UsageError(f'{path} cannot be read: {type(error).__name__}: {error}') from error

    @property
    def name(self) -> str:
        """Name of the config, else of the folder."""
        named = [path for path in _by_time(self.folder, '*.py')
                 if path.name not in ('config.py', launch.WHOLE_CONFIG)]
        return named[-1].stem if named else self.folder.resolve().name

    @property
    def test_command(self) -> str:
        """The command that makes predictions."""
        config = (_by_time(self.folder, '*.py') or [self.config_file])[-1]
        out = self.folder / PREDICTIONS
        return shlex.join(['spartan-mm', 'test', str(config), str(self.last or 'CHECKPOINT'),
                           '--work-dir', str(out.parent), '--out', str(out)])

    @property
    def progress(self) -> tuple[str, str]:
        """Whether it is finished, and how far it is: 'unfinished' and 'epoch 1 of 2'."""
        record = self.log.train[-1] if self.log.train else {}
        unit, key, short = (('epoch', 'epoch', 'epoch') if self.log.by_epoch
                            else ('iteration', 'step', 'iter'))
        try:
            total = (self.config.get('train_cfg') or {}).get(f'max_{short}s')
        except (OSError, ValueError):
            total = None
        # The last iterations may not be logged: not every one is.
        if total is not None and (
                any(path.stem == f'{short}_{total}' for path in self.checkpoints)
                or any(record['step'] >= total for record in self.log.evaluations)):
            return 'finished', f'{total} {unit}s'
        return 'unfinished', f'{unit} {record.get(key, 0)}' + (f' of {total}' if total else '')


def make_predictions(run: Run) -> Path:
    """Test the last checkpoint, keep its predictions in the folder of the run.

    Returns:
        The file.

    Raises:
        UsageError: There is no checkpoint, or the config cannot be read.
        FileNotFoundError: There is no config.
        CheckpointError: The checkpoint belongs to another architecture.
        DataError: The data is not what it should be.
    """
    if run.last is None:
        raise UsageError(f'{run.folder} has no checkpoint to make predictions with')
    out = run.folder / PREDICTIONS
    cfg = run.config.copy()
    check_run(cfg, 'test')
    cfg.launcher, cfg.work_dir = 'none', str(out.parent)
    launch.load_weights(cfg, str(run.last))
    launch.keep_predictions(cfg, str(out))
    runner = launch.build_runner(cfg)
    runner.register_hook(OrderedCheckpointHook(), priority='HIGHEST')
    runner.test()
    return out


def find_predictions(run: Run) -> list[Path]:
    """List what may be predictions in the folder of a run and those in it, the latest first."""
    return _by_time(run.folder, *(f'{place}*{suffix}' for place in ('', '*/')
                                  for suffix in ('.pkl', '.pickle')))[::-1]


def read_text_log(path: str | Path) -> tuple[dict[str, str], list[datetime]]:
    """Read mmengine's text log.

    Returns:
        What it says of the machine; when the training began, and when it last said something.
        Both are empty if it does not say it.
    """
    text = Path(path).read_text(encoding='utf-8', errors='replace')
    times = re.findall(r'^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(?= - )', text, re.MULTILINE)
    machine = re.search(r'^(System|Runtime) environment:.*?(?=^---|^[^\n]*Config:|\Z)', text,
                        re.MULTILINE | re.DOTALL)
    facts: dict[str, str] = {}
    for name, value in re.findall(r'^ {4}(\w[^:\n]*): (.+)', machine[0] if machine else '',
                                  re.MULTILINE):
        facts.setdefault(name, value.strip())
    facts.pop('PyTorch compiling details', None)  # pages of flags
    return facts, [datetime.strptime(time, '%Y/%m/%d %H:%M:%S') for time in times[:1] + times[-1:]]


def time_of(path: Path) -> float:
    """Get when a file was written, in seconds."""
    return path.stat().st_mtime


def _by_time(folder: Path, *patterns: str) -> list[Path]:
    """List the files of a folder in the order of writing."""
    return sorted((path for pattern in patterns for path in folder.glob(pattern)), key=time_of)
