"""Training stops, or passes over a batch, where a loss or a gradient is no finite number."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..errors import ExplainedError
from ..text import join
from .random_state import get_random_state
from .replay import write_dump


class NonFiniteError(ExplainedError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


@dataclass
class _Pass:
    """A batch on its way through the model, of which an update may take several."""

    batch: dict[str, Any]  # what the model's forward is called with, after all augmentation
    random: dict[str, Any]  # states of the generators before that
    terms: dict[str, Tensor]  # what the model's loss returned, detached


@HOOKS.register_module()
class FiniteNumbersHook(Hook):
    """Looks at the loss and the gradient before each update of the weights.

    A NaN that reaches the weights stays there: everything trained until then is lost. So the loss
    of every batch and the norm of the gradient are looked at after the backward pass and before the
    optimizer's step; what the optimizer would divide by, average or remember has not seen them yet.

    With 'stop', the training ends with an error that names the images and the terms. Whatever the
    action, the batch, the weights and buffers before it, and the states of the random number
    generators are kept in ``nonfinite/`` of the work dir, for ``spartan-mm replay``.

    In mixed precision with a loss scale, an overflow of the *scaled* gradient is part of the
    method: the scaler leaves the step out and lowers the scale. That is no reason to stop, unless
    the loss itself is not finite or the scaler does so ``max_overflows`` times in a row.

    In a distributed training, all processes take the decision together.

    NOTE: The look costs one pass over the gradients, and on a GPU a wait for the backward pass;
    with gradient clipping by norm neither, since mmengine reads that norm in every step.

    NOTE: The forward pass of a bad batch has already moved the running statistics of batch norm
    layers, for ever if it was NaN: they are put back.

    Args:
        action: 'stop', or 'skip' to leave the update out and count.
        max_consecutive: The number of updates in a row that 'skip' leaves out before it stops.
        max_overflows: The number of updates in a row that a loss scaler may leave out. A dynamic
            scale falls from 65536 to 1 in 16.
        max_dumps: The number of batches that 'skip' keeps.

    Raises:
        ValueError: An argument is none of these.
    """

    # Ahead of the hook of the moving average, which takes the running statistics.
    priority = 'VERY_HIGH'

    def __init__(self, action: str = 'stop', max_consecutive: int = 10, max_overflows: int = 25,
                 max_dumps: int = 3) -> None:
        if action not in ('stop', 'skip'):
            raise ValueError(f"action={action!r} must be 'stop' or 'skip'.")
        if max_consecutive < 1 or max_overflows < 1:
            raise ValueError(f'max_consecutive={max_consecutive} and max_overflows={max_overflows} '
                             'must be at least 1.')
        self.action = action
        self.max_consecutive = max_consecutive
        self.max_overflows = max_overflows
        self.max_dumps = max_dumps
        #: Number of updates that were left out.
        self.skipped = 0
        self._consecutive = self._overflows = 0
        self._passes: list[_Pass] = []
        self._stepped = False

    def before_train(self, runner: Runner) -> None:
        """Attach to the model and the optimizer.

        Raises:
            ValueError: There are several optimizers.
        """
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise ValueError(f'FiniteNumbersHook works with one optimizer, not with the '
                             f'{type(wrapper).__name__} of this config: take it out of the hooks.')
        self._runner, self._wrapper = runner, wrapper
        self._model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._parameters = [parameter for group in wrapper.optimizer.param_groups
                            for parameter in group['params']]
        # By type, so that a few operations copy all of them.
        buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._model.buffers():
            buffers.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(group, [buffer.clone() for buffer in group])
                         for group in buffers.values()]
        self._handles = [self._model.register_forward_pre_hook(self._note_batch, with_kwargs=True),
                         self._model.register_forward_hook(self._note_terms),
                         wrapper.optimizer.register_step_pre_hook(self._before_step)]
        self._passes.clear()

    def after_train(self, runner: Runner) -> None:
        """Detach."""
        for handle in self._handles:
            handle.remove()
        if self.skipped:
            print_log(f'{self.skipped} updates were left out because of NaN or infinite values',
                      'current', logging.WARNING)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Expect a step of the optimizer."""
        self._stepped = False

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Look at what a loss scaler left out.

        Raises:
            NonFiniteError: The loss is not finite, or the scaler does so again and again.
        """
        if not self._wrapper.should_update():
            return
        if not self._stepped:
            if not self._agree(self._finite_losses()):
                self._handle('the loss')
            else:
                self._overflows += 1
                if self._overflows >= self.max_overflows:
                    self._handle(f'the gradient, {self._overflows} times in a row whatever the '
                                 'loss scale,', stop=True)
        self._passes.clear()

    @torch.no_grad()
    def _note_batch(self, model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        """Remember what a pass starts from."""
        if not model.training or options.get('mode') != 'loss':
            return
        if not self._passes:
            for buffers, kept in self._buffers:
                torch._foreach_copy_(kept, buffers)
        batch = {name: value for name, value in options.items() if name != 'mode'}
        self._passes.append(_Pass(batch, get_random_state(), {}))

    def _note_terms(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if self._passes and model.training and isinstance(output, dict):
            self._passes[-1].terms = {
                name: sum(term.detach().float().mean() for term in
                          (value if isinstance(value, (list, tuple)) else [value]))
                for name, value in output.items()}

    def _before_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Look at loss and gradient; stop, or leave the optimizer nothing to step with."""
        self._stepped = True
        if not self._passes:
            return
        losses_are_finite = self._finite_losses()
        # A fused optimizer is handed the scaled gradient, with its overflows.
        scaled = getattr(optimizer, 'found_inf', None) is not None
        finite = losses_are_finite if scaled else losses_are_finite & self._finite_gradient()
        if self._agree(finite):
            self._consecutive = self._overflows = 0
            return
        self._handle('the gradient' if self._agree(losses_are_finite) else 'the loss')
        for parameter in self._parameters:
            parameter.grad = None

    def _finite_losses(self) -> Tensor:
        """Whether the losses of all passes are finite, a scalar on the device."""
        losses = [term for one in self._passes for name, term in one.terms.items()
                  if 'loss' in name]
        if not losses:
            return torch.ones((), dtype=torch.bool, device=self._parameters[0].device)
        return torch.stack(losses).isfinite().all()

    def _finite_gradient(self) -> Tensor | bool:
        """Whether the gradient is finite; where mmengine clips it by norm, by the norm it read."""
        if self._wrapper.clip_grad_kwargs and self._wrapper.grad_name == 'grad_norm':
            norm = self._wrapper.message_hub.get_scalar('train/grad_norm').current()
            return bool(np.isfinite(norm))
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not gradients:
            return True
        # The largest of the elements: unlike a sum of squares, it overflows only if one of them
        # does.
        return torch.stack([norm.float() for norm in torch._foreach_norm(
            gradients, float('inf'))]).isfinite().all()

    def _agree(self, finite: Tensor) -> bool:
        """Whether it holds in all processes."""
        if dist.get_world_size() > 1:
            finite = finite.to(torch.int32)
            dist.all_reduce(finite, op='min')
        return bool(finite)

    def _handle(self, what: str, stop: bool = False) -> None:
        """Keep the batch; stop or count.

        Raises:
            NonFiniteError: The action is 'stop', or too many updates were left out in a row.
        """
        with torch.no_grad():
            for buffers, kept in self._buffers:
                torch._foreach_copy_(buffers, kept)
        self._consecutive += 1
        self.skipped += 1
        stop = stop or self.action == 'stop' or self._consecutive >= self.max_consecutive
        message = self._report(what, stop or self.skipped <= self.max_dumps)
        if stop:
            raise NonFiniteError(
                f'{message}. Look at these images, lower the learning rate, or pass over such '
                "batches: action='skip' of FiniteNumbersHook in the config")
        print_log(f'{message}. The update is left out, the {self.skipped}. of this run',
                  'current', logging.WARNING)

    def _report(self, what: str, keep: bool) -> str:
        """Say what happened, in the words of all processes; those concerned may keep the batch."""
        passes = [dict(images=_image_names(one.batch),
                       terms={name: float(term) for name, term in one.terms.items()})
                  for one in self._passes]
        # Where the gradient alone is not finite, every process may have caused it.
        concerned = what != 'the loss' or not bool(self._finite_losses())
        path = self._dump(what, passes) if concerned and keep else None
        everyone = [(passes, path) for concerned, passes, path
                    in dist.all_gather_object((concerned, passes, path)) if concerned]
        images = [name for passes, _ in everyone for one in passes for name in one['images']]
        terms = [term for passes, _ in everyone for one in passes for term in one['terms'].items()]
        broken = [f'{name}={value}' for name, value in terms if not np.isfinite(value)]
        shown = broken or [f'{name}={value:.4g}' for name, value in dict(terms).items()]
        message = (f'iteration {self._runner.iter + 1}: {what} is not finite ({join(shown)}); '
                   f'images: {join(images)}')
        paths = [path for _, path in everyone if path is not None]
        if paths:
            message += f'; replay it with `spartan-mm replay CONFIG {paths[0]}`'
        if len(paths) > 1:
            message += f' ({len(paths)} processes wrote one)'
        return message

    def _dump(self, what: str, passes: list[dict[str, Any]]) -> str | None:
        """Write what the update started from; return where it is, None if there is no room."""
        rank, optimizer = dist.get_rank(), self._wrapper.optimizer
        path = Path(self._runner.work_dir, 'nonfinite',
                    f'iter_{self._runner.iter + 1}_rank_{rank}.pth')
        about = dict(
            iteration=self._runner.iter + 1, epoch=self._runner.epoch + 1, what=what, rank=rank,
            world_size=dist.get_world_size(), autocast=_autocast_dtype(self._wrapper),
            device=self._parameters[0].device.type, passes=passes,
            learning_rates=[group['lr'] for group in optimizer.param_groups])
        try:
            write_dump(path, about, self._model.state_dict(), [one.batch for one in self._passes],
                       [one.random for one in self._passes])
        except OSError as error:
            print_log(str(error), 'current', logging.WARNING)
            return None
        return str(path)


def _image_names(batch: dict[str, Any]) -> list[str]:
    """Find the paths, or else the ids, of the images of a batch."""
    metas = [getattr(sample, 'metainfo', {}) for sample in batch.get('data_samples') or ()]
    return [str(meta.get('img_path') or meta.get('img_id', f'number {number}'))
            for number, meta in enumerate(metas)]


def _autocast_dtype(wrapper: OptimWrapper) -> str | None:
    """Name the precision of the forward pass, None for that of the weights."""
    if not hasattr(wrapper, 'loss_scaler'):
        return None
    return str(getattr(wrapper, 'cast_dtype', None) or torch.float16).removeprefix('torch.')
