"""Going on with an interrupted training as if nothing had happened."""

import logging
import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine import dist
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner
from torch import nn

from ..errors import CheckpointError
from ..text import first_line
from .data_order import PlacedBatches, keep_apart, place_batches
from .random_state import get_random_state, read_state, set_random_state

#: What checkpoints to resume from are called; the best ones have no optimizer and do not count.
CHECKPOINT_NAME = re.compile(r'(epoch|iter)_\d+(_iter_\d+)?\.pth')


class Resumable(NamedTuple):
    """A checkpoint to go on from: its file or address, and the seed of its run if it says."""

    path: str
    seed: int | None


def find_resumable(work_dir: str | Path) -> Resumable | None:
    """Find the latest whole checkpoint of a training.

    The one that the file ``last_checkpoint`` names comes first, then the others in ``work_dir``,
    latest first. Each that is damaged is named in a warning.

    Args:
        work_dir: The training's folder.

    Returns:
        The checkpoint, None if there is none at all.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged.
    """
    work_dir = Path(work_dir)
    candidates = sorted((path for path in work_dir.glob('*.pth')
                         if CHECKPOINT_NAME.fullmatch(path.name)),
                        key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    pointer = work_dir / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if '://' in named:
        return read_resumable(named)
    if named:
        # Folders get moved with all that is in them.
        latest = [path for path in (work_dir / Path(named).name, Path(named)) if path.is_file()]
        if not latest:
            _warn(f'checkpoint {named}, the latest according to {pointer}, is gone')
        candidates = [*dict.fromkeys(latest[:1] + candidates)]

    problems = []
    for path in candidates:
        try:
            resumable = read_resumable(path)
        except CheckpointError as error:
            problems.append(str(error))
            _warn(problems[-1])
        else:
            if problems:
                _warn(f'going on from the one before, {path}')
            return resumable
    if problems:
        raise CheckpointError(f'none of the {len(problems)} checkpoints in {work_dir} can be '
                              f'resumed from: {"; ".join(problems)}. Start anew in another '
                              '--work-dir, or name a whole checkpoint: --resume CHECKPOINT')
    return None


def read_resumable(path: str | Path) -> Resumable:
    """Read a checkpoint, every byte of it, to see whether a training can go on from it.

    Args:
        path: A file, or an address on another storage.

    Raises:
        CheckpointError: It is damaged, or not one of a training.
    """
    try:
        if '://' not in str(path) and zipfile.is_zipfile(path):
            # torch does not look at the checksums.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged files are reported by half a dozen exception types.
        raise CheckpointError(f'checkpoint {path} is damaged: {first_line(error)}') from error
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict) or 'optimizer' not in checkpoint or 'iter' not in meta:
        raise CheckpointError(f'checkpoint {path} has no state of a training to go on from, only '
                              'weights')
    return Resumable(str(path), meta.get('seed'))


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """Trains by epochs, and goes on from any iteration exactly as if it had not been interrupted.

    In the middle of an epoch it goes on with the next batch, without decoding those before; behind
    an epoch whose validation was interrupted, with that validation.

    NOTE: mmengine's loop starts an epoch from its beginning, with other random numbers, and leaves
    an interrupted validation out.

    Args:
        runner: The runner.
        dataloader: The training batches, a data loader or its settings.
        max_epochs: Number of epochs.
        kwargs: Further arguments of mmengine's loop.

    Attributes:
        resumed: What :meth:`collect_state` returned, to go on from when the loop is run; the runner
            sets epoch, iteration and weights.
        validated: Whether the validation behind the epoch before is done.
    """

    def __init__(self, runner: Runner, dataloader: Any, max_epochs: int, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, max_epochs, **kwargs)
        place_batches(self.dataloader, runner.seed)
        self.validated = False
        self.resumed: dict[str, Any] | None = None

    def collect_state(self, batches_done: int = 0) -> dict[str, Any]:
        """Collect what a checkpoint needs besides what mmengine writes. All ranks have to call it.

        Args:
            batches_done: Number of batches of the current epoch that were trained on; 0 behind an
                epoch.
        """
        ranks = dist.all_gather_object(_collect_rank_state(self.runner))
        first = ranks[0]['buffers']
        for state in ranks:
            # The weights contain those of the first.
            if all(torch.equal(value, first[name]) for name, value in state['buffers'].items()):
                state['buffers'] = None
        return dict(batches_done=batches_done, batches_in_epoch=len(self.dataloader),
                    validated=self.validated, ranks=ranks)

    def run(self) -> nn.Module:
        """Train."""
        self.runner.call_hook('before_train')
        if self.runner.val_loop is not None:
            keep_apart(self.runner.val_dataloader)
        first, ranks = self._find_place()
        if ranks and not first:
            _restore_rank_state(self.runner, ranks)
            self._decide_current_val_interval()
            if not self.validated:
                self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch(first, ranks)
            first = 0
            self._decide_current_val_interval()
            self._validate()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self, first: int = 0, ranks: Sequence[dict[str, Any]] = ()) -> None:
        """Train for an epoch, or the rest of one.

        Args:
            first: Number of batches to leave out.
            ranks: Each rank's state behind them.
        """
        self.validated = False
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        order = self.dataloader.batch_sampler
        if isinstance(order, PlacedBatches):
            order.epoch, order.first = self._epoch, first
        batches = iter(self.dataloader)
        if first:
            # After all that draws random numbers at the beginning of an epoch.
            _restore_rank_state(self.runner, ranks)
        for index, batch in enumerate(batches, first):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _validate(self) -> None:
        """Validate if it is due behind the current epoch."""
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        if self.runner.val_loop is not None and due and self._epoch >= self.val_begin:
            self.runner.val_loop.run()
        self.validated = True

    def _find_place(self) -> tuple[int, Sequence[dict[str, Any]]]:
        """Find the batch of the epoch to go on with, and each rank's state if there is one."""
        resumed, self.resumed = self.resumed, None
        if resumed is None:
            if self._iter:
                _warn('the checkpoint does not say where in the epoch and with which random '
                      'numbers to go on: the training goes on, but with other numbers')
            return 0, ()
        if len({*dist.all_gather_object((self._epoch, self._iter))}) > 1:
            raise CheckpointError('the processes found different checkpoints to resume from; name '
                                  'one that all can read: --resume CHECKPOINT')
        first, ranks, self.validated = (resumed[key] for key in ('batches_done', 'ranks',
                                                                 'validated'))
        before = len(ranks), resumed['batches_in_epoch']
        now = dist.get_world_size(), len(self.dataloader)
        if before != now:
            message = (f'the checkpoint is of a run with {before[0]} processes and {before[1]} '
                       f'batches an epoch, this one has {now[0]} and {now[1]}: the training goes '
                       'on, but with other numbers')
            if first:
                message += f', and from the beginning of epoch {self._epoch + 1}'
                first, self.validated = 0, True
            _warn(message)
        return first, ranks


def _collect_rank_state(runner: Runner) -> dict[str, Any]:
    """Collect what differs between the ranks and changes the training.

    As tensors and numbers, which alone may stand in a checkpoint that is read safely.
    """
    model = _unwrap(runner.model)
    state = get_random_state()
    # Of generators that modules have of their own.
    state['modules'] = {f'{name}.{attribute}': value.getstate()
                        for name, module in model.named_modules()
                        for attribute, value in vars(module).items()
                        if isinstance(value, random.Random)}
    state['buffers'] = {name: value.cpu() for name, value in _buffers(runner).items()}
    if getattr(runner.optim_wrapper, '_accumulative_counts', 1) > 1:
        # Of iterations whose step is still to come.
        state['gradients'] = {name: value.grad.cpu() for name, value in model.named_parameters()
                              if value.grad is not None}
    return state


def _restore_rank_state(runner: Runner, ranks: Sequence[dict[str, Any]]) -> None:
    """Put back what :func:`_collect_rank_state` collected; nothing for a rank there was not."""
    rank = dist.get_rank()
    if rank >= len(ranks):
        return
    state, model = ranks[rank], _unwrap(runner.model)
    buffers, modules = _buffers(runner), dict(model.named_modules())
    # The config may have other parts now, an average or an augmentation of batches less.
    for name, value in (state['buffers'] or {}).items():
        # Versions before called the average by the number of its hook.
        name = re.sub(r'^\d+: ', 'average: ', name)
        if name in buffers:
            buffers[name].data.copy_(value)
    for name, gradient in state.get('gradients', {}).items():
        parameter = model.get_parameter(name)
        parameter.grad = gradient.to(parameter)
    for place, kept in state['modules'].items():
        name, _, attribute = place.rpartition('.')
        if name in modules:
            generator = random.Random()
            generator.setstate(read_state(kept))
            setattr(modules[name], attribute, generator)
    set_random_state(state)


def _buffers(runner: Runner) -> dict[str, torch.Tensor]:
    """Find the running statistics, which each rank has of its own, averaged ones included."""
    models = {'': _unwrap(runner.model)}
    models.update(('average: ', hook.ema_model) for hook in runner.hooks
                  if isinstance(hook, EMAHook))
    return {f'{prefix}{name}': value for prefix, model in models.items()
            for name, value in model.named_buffers()}


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _warn(message: str) -> None:
    print_log(message, 'current', logging.WARNING)
