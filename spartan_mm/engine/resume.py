"""Going on with an interrupted training as if nothing had happened."""

import logging
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from .random_state import get_random_state, pack_state, set_random_state, unpack_state

#: What checkpoints to resume from are called; the best ones have no optimizer and do not count.
CHECKPOINT_NAME = re.compile(r'(epoch_\d+|iter_\d+|epoch_\d+_iter_\d+)\.pth')


@dataclass
class Resumable:
    """A checkpoint to go on from.

    Attributes:
        path: The file, or its address on another storage.
        seed: Seed of the run that wrote it; None if it does not say.
    """

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
        latest = next((path for path in (work_dir / Path(named).name, Path(named))
                       if path.is_file()), None)
        if latest is None:
            print_log(f'checkpoint {named}, the latest according to {pointer}, is gone', 'current',
                      logging.WARNING)
        else:
            candidates = [latest, *(path for path in candidates if path != latest)]

    problems = []
    for path in candidates:
        try:
            resumable = read_resumable(path)
        except CheckpointError as error:
            problems.append(str(error))
            print_log(str(error), 'current', logging.WARNING)
            continue
        if problems:
            print_log(f'going on from the one before, {path}', 'current', logging.WARNING)
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
                raise CheckpointError(f'checkpoint {path} is damaged: the checksum of {damaged} '
                                      'is wrong')
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
    """

    def __init__(self, runner: Runner, dataloader: Any, max_epochs: int, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, max_epochs, **kwargs)
        self.dataloader = place_batches(self.dataloader, runner.seed)
        self.validated = False
        self._resumed: dict[str, Any] | None = None

    def collect_state(self, batches_done: int = 0) -> dict[str, Any]:
        """Collect what a checkpoint needs besides what mmengine writes. All ranks have to call it.

        Args:
            batches_done: Number of batches of the current epoch that were trained on; 0 behind an
                epoch.
        """
        return dict(
            batches_done=batches_done,
            batches_in_epoch=len(self.dataloader),
            validated=self.validated,
            ranks=_share_equal_buffers(dist.all_gather_object(_collect_rank_state(self.runner))),
        )

    def resume_from(self, state: dict[str, Any] | None) -> None:
        """Go on from a state when the loop is run; the runner sets epoch, iteration and weights.

        Args:
            state: What :meth:`collect_state` returned; None if the checkpoint has none.
        """
        if state is None:
            print_log('the checkpoint does not say where in the epoch and with which random '
                      'numbers to go on: the training goes on, but with other numbers',
                      'current', logging.WARNING)
        self._resumed = state

    def run(self) -> nn.Module:
        """Train."""
        self.runner.call_hook('before_train')
        if self.runner.val_loop is not None:
            keep_apart(self.runner.val_dataloader)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._check_agreement(resumed)
        first = resumed['batches_done'] if resumed else 0
        if resumed and not first:
            _restore_rank_state(self.runner, resumed['ranks'])
            self._decide_current_val_interval()
            if not resumed['validated']:
                self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch(first, resumed['ranks'] if first else None)
            first = 0
            self._decide_current_val_interval()
            self._validate()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self, first: int = 0, ranks: list[dict] | None = None) -> None:
        """Train for an epoch, or the rest of one.

        Args:
            first: Number of batches to leave out.
            ranks: Each rank's state to go on from.
        """
        self.validated = False
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if isinstance(self.dataloader.batch_sampler, PlacedBatches):
            self.dataloader.batch_sampler.start(self._epoch, first)
        batches = iter(self.dataloader)
        if ranks is not None:
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

    def _check_agreement(self, resumed: dict[str, Any]) -> None:
        """Look whether this run is like the one that wrote the checkpoint."""
        if len({*dist.all_gather_object((self._epoch, self._iter))}) > 1:
            raise CheckpointError('the processes found different checkpoints to resume from; name '
                                  'one that all can read: --resume CHECKPOINT')
        before = len(resumed['ranks']), resumed['batches_in_epoch']
        now = dist.get_world_size(), len(self.dataloader)
        if before == now:
            return
        message = (f'the checkpoint is of a run with {before[0]} processes and {before[1]} batches '
                   f'an epoch, this one has {now[0]} and {now[1]}: the training goes on, but with '
                   'other numbers')
        if resumed['batches_done']:
            message += f', and from the beginning of epoch {self._epoch + 1}'
            resumed.update(batches_done=0, validated=True)
        print_log(message, 'current', logging.WARNING)


def _collect_rank_state(runner: Runner) -> dict[str, Any]:
    """Collect what differs between the ranks and changes the training.

    As tensors and numbers, which alone may stand in a checkpoint that is read safely.
    """
    model = _unwrap(runner.model)
    state = get_random_state()
    # Of generators that modules have of their own.
    state['modules'] = {f'{name}.{attribute}': pack_state(value.getstate())
                        for name, module in model.named_modules()
                        for attribute, value in vars(module).items()
                        if isinstance(value, random.Random)}
    state['buffers'] = {name: value.cpu() for name, value in _buffers(runner).items()}
    if getattr(runner.optim_wrapper, '_accumulative_counts', 1) > 1:
        # Of iterations whose step is still to come.
        state['gradients'] = {name: value.grad.cpu() for name, value in model.named_parameters()
                              if value.grad is not None}
    return state


def _restore_rank_state(runner: Runner, ranks: list[dict[str, Any]]) -> None:
    """Put back what :func:`_collect_rank_state` collected; nothing for a rank there was not."""
    rank = dist.get_rank()
    if rank >= len(ranks):
        return
    state, model = ranks[rank], _unwrap(runner.model)
    buffers, parameters = _buffers(runner), dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (state['buffers'] or {}).items():
            buffers[name].copy_(value)
    for name, gradient in state.get('gradients', {}).items():
        parameters[name].grad = gradient.to(parameters[name])
    for place, packed in state['modules'].items():
        name, _, attribute = place.rpartition('.')
        generator = random.Random()
        generator.setstate(unpack_state(packed))
        setattr(model.get_submodule(name), attribute, generator)
    set_random_state(state)


def _buffers(runner: Runner) -> dict[str, torch.Tensor]:
    """Find the running statistics, which each rank has of its own, averaged ones included."""
    models = {'': _unwrap(runner.model)}
    models.update((f'{number}: ', hook.ema_model) for number, hook in enumerate(runner.hooks)
                  if isinstance(hook, EMAHook))
    return {f'{prefix}{name}': value for prefix, model in models.items()
            for name, value in model.named_buffers()}


def _share_equal_buffers(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the buffers of ranks that have the first one's, which the weights contain."""
    first = ranks[0]['buffers']
    for state in ranks:
        if all(torch.equal(value, first[name]) for name, value in state['buffers'].items()):
            state['buffers'] = None
    return ranks


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
