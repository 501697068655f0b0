"""What a training leaves in its work dir: config, logs, checkpoints, predictions."""

import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

from ...engine import launch
from ...engine.class_order import OrderedCheckpointHook
from ...errors import UsageError
from .curves import RunLog, find_log, read_log

#: Where predictions go that are made here.
PREDICTIONS = Path('evaluation', 'predictions.pkl')


@dataclass(frozen=True)
class RunProgress:
    """How far a training is.

    Args:
        unit: What is counted, 'epoch' or 'iteration'.
        done: How many have begun.
        total: How many there are to be; None if the config does not say it.
        finished: Whether all are done.
    """

    unit: str
    done: int
    total: int | None
    finished: bool

    def __str__(self) -> str:
        if self.finished:
            return f'finished, {self.total} {self.unit}s'
        return f'unfinished, {self.unit} {self.done}' + (f' of {self.total}' if self.total else '')


@dataclass(frozen=True)
class Run:
    """A training, as it lies in its work dir.

    Args:
        folder: The work dir.
        log: What it logged.
        log_path: Where.
        config_path: Its whole config, as mmengine wrote it; None if it is gone.
        text_log: Mmengine's log for people; None if it is gone.
        checkpoints: In the order of writing.
        last: The one to evaluate; None if there is none yet.
    """

    folder: Path
    log: RunLog
    log_path: Path
    config_path: Path | None
    text_log: Path | None
    checkpoints: tuple[Path, ...]
    last: Path | None

    @property
    def config_file(self) -> Path:
        """Its whole config.

        Raises:
            FileNotFoundError: It is gone.
        """
        if self.config_path is None:
            raise FileNotFoundError(f'{self.folder} has no config: neither '
                                    f'{self.log_path.parent}/config.py, which mmengine writes, nor '
                                    'a .py file')
        return self.config_path

    @cached_property
    def config(self) -> Config:
        """Its whole config, read.

        Raises:
            FileNotFoundError: It is gone.
            UsageError: It cannot be read.
        """
        try:
            return Config.fromfile(self.config_file)
        except FileNotFoundError:
            raise
        except Exception as error:  # a config is Python, in which anything can go wrong
            raise UsageError(f'{self.config_path} cannot be read: {type(error).__name__}: {error}'
                             ) from error

    @property
    def name(self) -> str:
        """Name of the config, else of the folder."""
        named = [path for path in self._config_files if path.stem != 'config']
        return named[-1].stem if named else self.folder.resolve().name

    @property
    def _config_files(self) -> list[Path]:
        return sorted(self.folder.glob('*.py'), key=time_of)

    @property
    def test_command(self) -> str:
        """The command that makes predictions."""
        named = self._config_files
        config = named[-1] if named else self.config_path or 'CONFIG'
        return shlex.join(['spartan-mm', 'test', str(config), str(self.last or 'CHECKPOINT'),
                           '--work-dir', str((self.folder / PREDICTIONS).parent),
                           '--out', str(self.folder / PREDICTIONS)])

    @property
    def progress(self) -> RunProgress:
        """How far it is."""
        record = self.log.train[-1] if self.log.train else {}
        unit, done, short = (('epoch', record.get('epoch', 0), 'epoch') if self.log.by_epoch
                             else ('iteration', record.get('step', 0), 'iter'))
        try:
            total = (self.config.get('train_cfg') or {}).get(f'max_{short}s')
        except (OSError, ValueError):
            total = None
        # The last iterations may not be logged: not every one is.
        finished = total is not None and (
            any(path.stem == f'{short}_{total}' for path in self.checkpoints)
            or any(record['step'] >= total for record in self.log.evaluations))
        return RunProgress(unit, done, total, finished)


def find_run(folder: str | Path) -> Run:
    """Look what a training has left; of several in a folder, the latest.

    Args:
        folder: The work dir.

    Raises:
        FileNotFoundError: There is no such folder, or no log of a training in it.
        UsageError: The log is empty, or is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder: name the work dir of a training')
    log_path = find_log(folder)
    log = read_log(log_path)
    own_config = log_path.parent / 'config.py'
    configs = [own_config] if own_config.is_file() else sorted(folder.glob('*.py'), key=time_of)
    text_logs = sorted(log_path.parent.parent.glob('*.log'), key=time_of)
    checkpoints = sorted(folder.glob('*.pth'), key=time_of)
    latest = [folder / Path((folder / 'last_checkpoint').read_text().strip()).name
              ] if (folder / 'last_checkpoint').is_file() else checkpoints[-1:]
    return Run(folder, log, log_path, configs[-1] if configs else None,
               text_logs[-1] if text_logs else None, tuple(checkpoints),
               latest[0] if latest and latest[0].is_file() else None)


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
    cfg.launcher, cfg.work_dir = 'none', str(out.parent)
    launch.load_weights(cfg, str(run.last))
    launch.keep_predictions(cfg, str(out))
    runner = launch.build_runner(cfg)
    runner.register_hook(OrderedCheckpointHook(), priority='HIGHEST')
    runner.test()
    return out


def find_predictions(run: Run) -> list[Path]:
    """List what may be predictions in the folder of a run and those in it, the latest first."""
    found = [path for pattern in ('*', '*/*') for suffix in ('.pkl', '.pickle')
             for path in run.folder.glob(pattern + suffix)]
    return sorted(found, key=time_of, reverse=True)


def read_environment(path: str | Path) -> dict[str, str]:
    """Read what mmengine's text log says of the machine; nothing if it does not say it."""
    facts: dict[str, str] = {}
    inside = False
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            if line.startswith(('System environment:', 'Runtime environment:')):
                inside = True
            elif inside and (line.startswith('---') or 'Config:' in line):
                break
            elif inside and (match := re.match(r' {4}(\w[^:]*): (.+)', line)):
                name, value = match[1], match[2].strip()
                # Pages of flags.
                if name != 'PyTorch compiling details':
                    facts.setdefault(name, value)
    return facts


def read_span(path: str | Path) -> tuple[datetime, datetime] | None:
    """Read from mmengine's text log when a training began, and when it last said something."""
    found = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            if match := re.match(r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(?= - )', line):
                found = [*found[:1], match[0]]
    times = [datetime.strptime(text, '%Y/%m/%d %H:%M:%S') for text in found]
    return (times[0], times[-1]) if times else None


def time_of(path: Path) -> float:
    """Get when a file was written, in seconds."""
    return path.stat().st_mtime
