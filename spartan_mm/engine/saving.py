"""Checkpoints that are whole or not there, and one at hand when the run is told to leave."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..errors import ExplainedError
from ..files import remove_unfinished, write_whole
from .resume import ResumableTrainLoop


class SavingError(ExplainedError, RuntimeError):
    """Checkpoints could not be written, several times in a row."""


class Interrupted(Exception):
    """The training leaves because a signal asked it to.

    Attributes:
        number: the signal's number; commands end with status 128 + number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class WholeFileBackend(LocalBackend):
    """The local disk, where a file takes its name only when it is complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        with write_whole(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        self.put(obj.encode(encoding), filepath)


register_backend('WholeFileBackend', WholeFileBackend, force=True)


@HOOKS.register_module()
class OneWriterLoggerHook(LoggerHook):
    """Writes the metrics of a test from the first process alone.

    NOTE: with mmengine's hook every process writes the same file, and one that comes later may
    leave the end of a longer text behind its own.
    """

    @dist.master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write the metrics to the log, and as JSON to ``runner.log_dir``."""
        super().after_test_epoch(runner, metrics)


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """Writes checkpoints that a :class:`ResumableTrainLoop` goes on from exactly.

    - A checkpoint takes its name when it is complete, and ones it replaces are removed after that.
    - If it cannot be written (a full disk), the training goes on with a warning, and tries again
      when the next one is due.
    - ``every_iters`` writes some in the middle of epochs, too, named after the epochs and the
      iterations that are done: ``epoch_2_iter_700.pth``. The latest two are kept until the epoch
      is over.

    NOTE: mmengine's hook writes into the file of the final name, removes the best checkpoint before
    it writes the next, and ends the training if the disk is full.

    Args:
        interval: number of epochs, or of iterations if ``by_epoch`` is False, between checkpoints;
            -1 for only the last one.
        every_iters: number of iterations between checkpoints in the middle of epochs; None for
            none.
        max_failures: number of failures in a row that end the training.
        kwargs: further arguments of mmengine's hook.

    Raises:
        ValueError: ``every_iters`` or ``max_failures`` is less than 1.
    """

    def __init__(self, interval: int = -1, every_iters: int | None = None, max_failures: int = 3,
                 **kwargs: Any) -> None:
        super().__init__(interval, **kwargs)
        for name, value in (('every_iters', every_iters), ('max_failures', max_failures)):
            if value is not None and value < 1:
                raise ValueError(f'ResumableCheckpointHook: {name}={value} must be at least 1')
        if self.backend_args is None and self.file_client_args is None:
            local = '://' not in str(self.out_dir or '')
            self.backend_args = dict(backend='WholeFileBackend') if local else None
        self.every_iters = every_iters
        self.max_failures = max_failures
        self._failures = 0
        self._saved_iter: int | None = None
        self._state: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Remove what a killed run left half written or not yet removed."""
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = list(self.keep_ckpt_ids)
        if dist.is_main_process() and '://' not in self.out_dir:
            remove_unfinished(self.out_dir)
            remove_unfinished(runner.work_dir)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Hand the loop what it needs to go on."""
        if runner._resume and isinstance(runner.train_loop, ResumableTrainLoop):
            runner.train_loop.resume_from(checkpoint.get('resume'))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add what the loop needs to go on, except to a best checkpoint."""
        if self._state is not None:
            checkpoint['resume'] = self._state

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Save if it is time to, unless the end of the epoch does so right away."""
        self._batches_done = batch_idx + 1
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if (self.every_iters and (runner.iter + 1) % self.every_iters == 0
                and batch_idx + 1 < len(runner.train_dataloader)):
            self.save_now(runner, batch_idx)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save if it is time to."""
        self._batches_done = 0
        super().after_train_epoch(runner)

    def save_now(self, runner: Runner, batch_idx: int) -> bool:
        """Save between two iterations. All ranks have to call it, after the same iteration.

        Args:
            runner: the runner.
            batch_idx: index of the iteration's batch in the epoch.

        Returns:
            Whether there is a checkpoint of this iteration now.
        """
        done = runner.iter + 1
        if self._saved_iter == done:
            return True
        self._batches_done = batch_idx + 1
        by_iteration = not self.by_epoch or isinstance(runner.train_loop, IterBasedTrainLoop)
        name = f'iter_{done}.pth' if by_iteration else f'epoch_{runner.epoch}_iter_{done}.pth'
        return self._save(runner, name, dict(epoch=runner.epoch, iter=done))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Write a checkpoint, then remove those that are one too many."""
        if self.max_keep_ckpts <= 0:
            self._save(runner, self.filename_tmpl.format(step), meta)
            return

        kept = [other for other in self.keep_ckpt_ids if other != step] + [step]
        # A run that is killed before it removes the old one finds it here and removes it later.
        runner.message_hub.update_info('keep_ckpt_ids', kept)
        if self._save(runner, self.filename_tmpl.format(step), meta):
            self.keep_ckpt_ids, surplus = kept[-self.max_keep_ckpts:], kept[:-self.max_keep_ckpts]
            for other in surplus:
                self._remove(self.filename_tmpl.format(other))
        runner.message_hub.update_info('keep_ckpt_ids', self.keep_ckpt_ids)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Write the best checkpoint if this is it, then remove the one that was."""
        # What is written from now on is of after validation.
        self._batches_done = 0
        if isinstance(runner.train_loop, ResumableTrainLoop):
            runner.train_loop.validated = True
        if not self.save_best:
            return

        info = runner.message_hub.runtime_info
        scores = {key: info[key] for key in info if key.startswith('best_')}
        before = self._best_paths()
        # What mmengine's hook does not know of it neither removes nor writes anew.
        last, self.last_ckpt = self.last_ckpt, None
        self._set_best_paths(dict.fromkeys(before))
        save = super()._save_best_checkpoint
        failed = self._attempt(runner, lambda: save(runner, metrics))
        self.last_ckpt = last
        written = {key: path for key, path in self._best_paths().items() if path}
        if failed:
            # So that the next good one is saved.
            for key in [key for key in info if key.startswith('best_')]:
                runner.message_hub.pop_info(key)
            runner.message_hub.update_info_dict(scores)
            written = {}
        self._set_best_paths(before | written)

        for key, path in written.items():
            if before.get(key) and Path(before[key]).name != Path(path).name:
                self._remove(Path(before[key]).name)
        if written and last is not None:
            # For it to name the best one.
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, dict(epoch=runner.epoch,
                                                               iter=runner.iter))

    def _best_paths(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths.get('')
        else:
            self.best_ckpt_path_dict = dict(paths)

    def _save(self, runner: Runner, name: str, meta: dict[str, Any]) -> bool:
        """Write a checkpoint with all that is needed to go on from it.

        Returns:
            Whether it was written.
        """
        if isinstance(runner.train_loop, ResumableTrainLoop):
            self._state = runner.train_loop.collect_state(self._batches_done)
        path = self.file_backend.join_path(self.out_dir, name)
        last, self.last_ckpt = self.last_ckpt, path
        runner.message_hub.update_info('last_ckpt', path)
        failed = self._attempt(runner, lambda: self._write(runner, name, dict(meta)))
        self._state = None
        if failed:
            self.last_ckpt = last
            return False

        self._saved_iter = meta['iter']
        if dist.is_main_process() and '://' not in self.out_dir:
            # In the middle of epochs the one before stays, too, in case the last gets damaged;
            # behind an epoch they have done their duty.
            partial = sorted(Path(self.out_dir).glob('epoch_*_iter_*.pth'),
                             key=lambda path: int(path.stem.rsplit('_', 1)[1]))
            for old in partial[:-2] if '_iter_' in name else partial:
                old.unlink(missing_ok=True)
        return True

    def _write(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        runner.save_checkpoint(
            self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
            backend_args=self.backend_args, **self.args)
        if dist.is_main_process():
            WholeFileBackend().put_text(str(self.last_ckpt), Path(runner.work_dir,
                                                                  'last_checkpoint'))

    def _attempt(self, runner: Runner, write: Callable[[], None]) -> bool:
        """Call a function in which the main process writes; all processes learn of a failure.

        Returns:
            Whether it failed.

        Raises:
            SavingError: it did so too often in a row.
        """
        outcome: list[str | None] = [None]
        try:
            write()
        except OSError as error:
            outcome = [error.strerror or str(error)]
        dist.broadcast_object_list(outcome)
        if outcome == [None]:
            self._failures = 0
            return False
        self._failures += 1
        message = f'a checkpoint cannot be written to {self.out_dir}: {outcome[0]}'
        if self._failures >= self.max_failures:
            raise SavingError(f'{message}, {self._failures} times in a row. Make room, and go on '
                              'from the last whole one with --resume')
        runner.logger.error(
            f'{message}. The training goes on; the checkpoints before are still there. Make room: '
            f'after {self.max_failures - self._failures} more failures in a row it ends')
        return True

    def _remove(self, name: str) -> None:
        """Remove a checkpoint, if it is there."""
        path = self.file_backend.join_path(self.out_dir, name)
        if dist.is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


@HOOKS.register_module()
class LeaveOnSignalHook(Hook):
    """Saves and leaves when a signal announces that the process is about to be killed.

    All ranks leave after the same iteration: the one after that in which any of them got the
    signal. To agree on it, they exchange one number an iteration and read it an iteration later,
    when it has long arrived, so that nobody waits for it.

    During validation there is nothing new to save: the run leaves at once, and goes on with that
    validation.

    Args:
        signals: names of the signals; those of them that the system does not have are left out.
    """

    priority = 'LOWEST'

    def __init__(self, signals: Sequence[str] = ('SIGTERM', 'SIGUSR1')) -> None:
        self.signals = [getattr(signal, name) for name in signals if hasattr(signal, name)]
        self._received = 0
        self._handlers: dict[int, Any] = {}
        self._vote: Vote | None = None

    def before_train(self, runner: Runner) -> None:
        """Begin to listen, in the process, but not in those that load data."""
        self._received = 0
        self._vote = Vote(next(runner.model.parameters()).device)
        self._over = multiprocessing.Event()
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            # A signal to all processes of a job would take the batches away before the end.
            loader.worker_init_fn = _Deaf(self.signals, self._over, loader.worker_init_fn)
        self._handlers = {number: signal.signal(number, self._receive) for number in self.signals}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Save and leave if a rank got a signal.

        Raises:
            Interrupted: a rank got a signal.
        """
        number = self._vote.exchange(self._received)
        if number:
            hook = next((hook for hook in runner.hooks
                         if isinstance(hook, ResumableCheckpointHook)), None)
            saved = hook is not None and hook.save_now(runner, batch_idx)
            place = f'{"saved" if saved else "nothing saved"} after iteration {runner.iter + 1}'
            self._leave(number, place)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence | None = None) -> None:
        """Leave if this rank got a signal.

        Raises:
            Interrupted: it got one.
        """
        if self._received and self._handlers:
            self._leave(self._received, 'in validation')

    def after_train(self, runner: Runner) -> None:
        """Stop listening."""
        self._stop_listening()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _leave(self, number: int, place: str) -> None:
        self._stop_listening()
        raise Interrupted(f'{signal.Signals(number).name} received, {place}; go on with --resume',
                          number)

    def _stop_listening(self) -> None:
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class Vote:
    """The largest number that any rank gave in the exchange before.

    Args:
        device: where the ranks exchange tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: Callable[[], int] | None = None

    def exchange(self, number: int) -> int:
        """Give a number, and get the largest of the exchange before; 0 in the first one.

        A single process gets its own number at once.
        """
        if dist.get_world_size() == 1:
            return number
        before, self._before = self._before, self._send(number)
        return before() if before else 0

    def _send(self, number: int) -> Callable[[], int]:
        ballot = torch.full((1,), number, device=self.device)
        work = torch.distributed.all_reduce(ballot, torch.distributed.ReduceOp.MAX, async_op=True)
        if self.device.type != 'cuda':
            def read() -> int:
                work.wait()
                return ballot.item()
            return read

        work.wait()  # lets the GPU wait, not the process
        result = torch.empty_like(ballot, device='cpu', pin_memory=True)
        result.copy_(ballot, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read_copy() -> int:
            arrived.synchronize()
            return result.item()
        return read_copy


class _Deaf:
    """Lets a data loading process ignore signals that its parent listens to.

    Args:
        signals: their numbers.
        over: set when the parent no longer listens. It ends the process by SIGTERM then, and waits
            for its end.
        init: what else the process begins with.
    """

    def __init__(self, signals: Sequence[int], over: Event,
                 init: Callable[[int], None] | None) -> None:
        self.signals = signals
        self.over = over
        self.init = init

    def __call__(self, worker: int) -> None:
        for number in self.signals:
            signal.signal(number, self._receive)
        if self.init is not None:
            self.init(worker)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.over.is_set():
            os._exit(0)
