"""Training that is told to leave saves first; all processes leave after the same iteration."""
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .checkpoint_hook import ResumableCheckpointHook


class Interrupted(Exception):
    """The training leaves because of a signal, whose number it has."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@HOOKS.register_module()
class LeaveOnSignalHook(Hook):
    """Saves and leaves on Ctrl-C, and when a signal announces that the process is to be killed.

    All ranks leave after the same iteration: the one after that in which any of them got the
    signal. To agree on it, they exchange one number an iteration and read it an iteration later,
    when it has long arrived, so that nobody waits for it.

    During validation there is nothing new to save: the run leaves at once, and goes on with that
    validation. A second Ctrl-C ends a single process at once; several get it from torchrun, too.
    """

    priority = 'LOWEST'
    signals = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT')
               if hasattr(signal, name)]
    _received = 0

    def before_train(self, runner: Runner) -> None:
        """Begin to listen, in the process, but not in those that load data."""
        self._received = 0
        self._consensus = SignalConsensus(next(runner.model.parameters()).device)
        self._over = multiprocessing.Event()
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            # A signal to all processes of a job would take the batches away before the end.
            loader.worker_init_fn = partial(_ignore_signals, self.signals, self._over,
                                            loader.worker_init_fn)
        # What runs in the background may have been told to ignore Ctrl-C.
        self._handlers = {number: signal.signal(number, self._receive) for number in self.signals
                          if signal.getsignal(number) is not signal.SIG_IGN}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Save and leave, by :class:`Interrupted`, if a rank got a signal."""
        number = self._consensus.exchange(self._received)
        if number:
            hook = next((hook for hook in runner.hooks
                         if isinstance(hook, ResumableCheckpointHook)), None)
            saved = hook is not None and hook.save_now(runner, batch_idx)
            place = f'{"saved" if saved else "nothing saved"} after iteration {runner.iter + 1}'
            self._leave(number, place)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence | None = None) -> None:
        """Leave, by :class:`Interrupted`, if this rank got a signal."""
        if self._received:
            self._leave(self._received, 'in validation')

    def after_train(self, runner: Runner | None = None) -> None:
        """Stop listening."""
        self._over.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and dist.get_world_size() == 1:
            if self._received:
                raise KeyboardInterrupt
            # Not by print, which may be at work right now.
            os.write(2, b'Ctrl-C: saving after this iteration; once more to end at once\n')
        self._received = number

    def _leave(self, number: int, place: str) -> None:
        self.after_train()
        raise Interrupted(f'{signal.Signals(number).name} received, {place}; go on with --resume',
                          number)


class SignalConsensus:
    """The largest number that any rank gave in the exchange before.

    Args:
        device: Where the ranks exchange tensors.
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
        wait = work.wait
        if self.device.type == 'cuda':
            work.wait()  # Lets the GPU wait, not the process.
            ballot = ballot.to('cpu', non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            wait = arrived.synchronize

        def read() -> int:
            wait()
            return ballot.item()
        return read


def _ignore_signals(signals: Sequence[int], over: Event, init: Callable[[int], None] | None,
                    worker: int) -> None:
    """Let a data loading process ignore signals until its parent, which ends it by one, is done."""
    def receive(number: int, frame: FrameType | None) -> None:
        if over.is_set():
            os._exit(0)

    for number in signals:
        signal.signal(number, receive)
    if init is not None:
        init(worker)
