"""Checkpoints that are whole or not there."""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..errors import ExplainedError
from ..files import check_writable, remove_unfinished, write_whole
from .resume import ResumableTrainLoop


class SavingError(ExplainedError, RuntimeError):
    """Checkpoints could not be written, several times in a row."""


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
        interval: Number of epochs, or of iterations if ``by_epoch`` is False, between checkpoints;
            -1 for only the last one.
        every_iters: Number of iterations between checkpoints in the middle of epochs; None for
            none.
        max_failures: Number of failures in a row that end the training.
        kwargs: Further arguments of mmengine's hook.

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
        """Look whether there is a place, and remove what a killed run left there.

        Raises:
            UnwritableError: There is none.
        """
        super().before_train(runner)
        if '://' not in self.out_dir:
            check_writable(Path(self.out_dir, 'last'))
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = list(self.keep_ckpt_ids)
        if dist.is_main_process() and '://' not in self.out_dir:
            remove_unfinished(self.out_dir)
            remove_unfinished(runner.work_dir)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Hand the loop what it needs to go on."""
        if runner._resume and isinstance(runner.train_loop, ResumableTrainLoop):
            runner.train_loop.resumed = checkpoint.get('resume')

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

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Write the best checkpoint if this is it, then remove the one that was."""
        # What is written from now on is of after validation.
        self._batches_done = 0
        if isinstance(runner.train_loop, ResumableTrainLoop):
            runner.train_loop.validated = True
        if not self.save_best:
            return

        info = runner.message_hub.runtime_info
        before = dict(info)
        # What mmengine's hook does not know of it neither removes nor writes anew.
        last, self.last_ckpt = self.last_ckpt, None
        self._know_best({})
        written = self._attempt(runner, partial(super().after_val_epoch, runner, metrics))
        self.last_ckpt = last
        if not written:
            # So that the next good one is saved.
            info.clear()
            info.update(before)
        self._know_best(info)

        changed = [key for key in info if key.startswith('best_') and info[key] != before.get(key)]
        for key in changed:
            # By name, since folders get moved with all that is in them.
            old = Path(before.get(key) or '').name if key.startswith('best_ckpt') else ''
            if old and old != Path(info[key]).name:
                self._remove(old)
        if changed and last is not None:
            # For it to name the best one.
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, dict(epoch=runner.epoch,
                                                               iter=runner.iter))

    def save_now(self, runner: Runner, batch_idx: int) -> bool:
        """Save between two iterations. All ranks have to call it, after the same iteration.

        Args:
            runner: The runner.
            batch_idx: Index of the iteration's batch in the epoch.

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

    def _know_best(self, info: dict[str, Any]) -> None:
        """Take the paths of the best checkpoints from what the message hub says of them."""
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = info.get('best_ckpt')
        else:
            self.best_ckpt_path_dict = {key: info.get(f'best_ckpt_{key}')
                                        for key in self.key_indicators}

    def _save(self, runner: Runner, name: str, meta: dict[str, Any]) -> bool:
        """Write a checkpoint with all that is needed to go on from it.

        Returns:
            Whether it was written.
        """
        if isinstance(runner.train_loop, ResumableTrainLoop):
            self._state = runner.train_loop.collect_state(self._batches_done)
        last = self.last_ckpt
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

        def write() -> None:
            runner.save_checkpoint(
                self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler, meta=dict(meta),
                by_epoch=self.by_epoch, backend_args=self.backend_args, **self.args)
            if dist.is_main_process():
                WholeFileBackend().put_text(str(self.last_ckpt),
                                            Path(runner.work_dir, 'last_checkpoint'))

        written = self._attempt(runner, write)
        self._state = None
        if not written:
            self.last_ckpt = last
            return False

        self._saved_iter = meta['iter']
        if dist.is_main_process() and '://' not in self.out_dir:
            # In the middle of epochs the one before stays, too, in case the last gets damaged;
            # behind an epoch they have done their duty.
            partials = sorted(Path(self.out_dir).glob('epoch_*_iter_*.pth'),
                              key=lambda path: int(path.stem.rsplit('_', 1)[1]))
            for old in partials[:-2] if '_iter_' in name else partials:
                old.unlink(missing_ok=True)
        return True

    def _attempt(self, runner: Runner, write: Callable[[], None]) -> bool:
        """Call a function in which the main process writes; all processes learn of a failure.

        Returns:
            Whether it succeeded.

        Raises:
            SavingError: It failed too often in a row.
        """
        outcome: list[str | None] = [None]
        try:
            write()
        except OSError as error:
            outcome = [error.strerror or str(error)]
        dist.broadcast_object_list(outcome)
        if outcome == [None]:
            self._failures = 0
            return True
        self._failures += 1
        message = f'a checkpoint cannot be written to {self.out_dir}: {outcome[0]}'
        if self._failures >= self.max_failures:
            raise SavingError(f'{message}, {self._failures} times in a row. Make room, and go on '
                              'from the last whole one with --resume')
        runner.logger.error(
            f'{message}. The training goes on; the checkpoints before are still there. Make room: '
            f'after {self.max_failures - self._failures} more failures in a row it ends')
        return False

    def _remove(self, name: str) -> None:
        """Remove a checkpoint, if it is there."""
        path = self.file_backend.join_path(self.out_dir, name)
        if dist.is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)
