"""Training stops, or passes over a batch, where a loss or a gradient is no finite number."""

import io
import json
import logging
import random
from collections.abc import Sequence
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
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..errors import ExplainedError
from ..files import write_whole

_FORMAT = 1
_MAX_NAMED = 8


class NonFiniteError(ExplainedError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


@dataclass
class _Pass:
    """A batch on its way through the model, of which an update may take several.

    Args:
        batch: what the model's forward is called with: images after all augmentation, samples.
        random: the states of the random number generators before that.
        terms: what the model's loss returned, detached.
    """

    batch: Any
    random: dict[str, Any]
    terms: dict[str, Tensor]


@HOOKS.register_module()
class FiniteNumbersHook(Hook):
    """Looks at the loss and the gradient before each update of the weights.

    A NaN that reaches the weights stays there: everything trained until then is lost. So the loss
    of every batch and the norm of the gradient are looked at after the backward pass and before the
    optimizer's step; what the optimizer would divide by, average or remember has not seen them yet.

    With 'stop', the training ends with an error that names the images and the terms. Whatever the
    action, the batch, the weights and buffers before it, and the states of the random number
    generators are kept in ``nonfinite/`` of the work dir, for ``tools/dev/replay_batch.py``.

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
        max_consecutive: the number of updates in a row that 'skip' leaves out before it stops.
        max_overflows: the number of updates in a row that a loss scaler may leave out. A dynamic
            scale falls from 65536 to 1 in 16.
        max_dumps: the number of batches that 'skip' keeps.

    Raises:
        ValueError: an argument is none of these.
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
        self._consecutive = self._overflows = self._dumps = 0
        self._passes: list[_Pass] = []
        self._stepped = False

    def before_train(self, runner: Runner) -> None:
        """Attach to the model and the optimizer.

        Raises:
            ValueError: there are several optimizers.
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
            NonFiniteError: the loss is not finite, or the scaler does so again and again.
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
        self._passes.append(_Pass(batch, _random_states(), {}))

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
            NonFiniteError: the action is 'stop', or too many updates were left out in a row.
        """
        with torch.no_grad():
            for buffers, kept in self._buffers:
                torch._foreach_copy_(buffers, kept)
        self._consecutive += 1
        self.skipped += 1
        reasons = [*(['action=stop'] if self.action == 'stop' or stop else []),
                   *([f'{self._consecutive} updates in a row'] if
                     self._consecutive >= self.max_consecutive else [])]
        message = self._describe(what)
        if reasons or self._dumps < self.max_dumps:
            self._dumps += 1
            message += self._dump(what)
        if reasons:
            raise NonFiniteError(
                f'{message}. Look at these images, lower the learning rate, or pass over such '
                "batches: action='skip' of FiniteNumbersHook in the config")
        print_log(f'{message}. The update is left out, the {self.skipped}. of this run',
                  'current', logging.WARNING)

    def _describe(self, what: str) -> str:
        """Say what happened, in the words of all processes."""
        own = not bool(self._finite_losses())
        names = [name for one in self._passes for name in image_names(one.batch)]
        terms = {name: float(term) for one in self._passes for name, term in one.terms.items()}
        # Where the gradient alone is not finite, every process may have caused it.
        everyone = _gather((own or what != 'the loss', names, terms))
        culprits = [(names, terms) for concerned, names, terms in everyone if concerned]
        images = [name for names, _ in culprits for name in names]
        more = f' and {len(images) - _MAX_NAMED} more' if len(images) > _MAX_NAMED else ''
        broken = [f'{name}={value}' for _, terms in culprits for name, value in terms.items()
                  if not np.isfinite(value)]
        shown = broken or [f'{name}={value:.4g}' for name, value in culprits[0][1].items()]
        more_terms = f' and {len(shown) - _MAX_NAMED} more' if len(shown) > _MAX_NAMED else ''
        return (f'iteration {self._runner.iter + 1}: {what} is not finite '
                f'({", ".join(shown[:_MAX_NAMED])}{more_terms}); images: '
                f'{", ".join(images[:_MAX_NAMED])}{more}')

    def _dump(self, what: str) -> str:
        """Write what the update started from, in the processes concerned; say where it is."""
        path = None
        if what != 'the loss' or not bool(self._finite_losses()):
            path = Path(self._runner.work_dir, 'nonfinite',
                        f'iter_{self._runner.iter + 1}_rank_{dist.get_rank()}.pth')
            wrapper = self._wrapper
            about = dict(
                format=_FORMAT, iteration=self._runner.iter + 1, epoch=self._runner.epoch + 1,
                what=what, rank=dist.get_rank(), world_size=dist.get_world_size(),
                autocast=_autocast_dtype(wrapper),
                device=self._parameters[0].device.type,
                learning_rates=[group['lr'] for group in wrapper.optimizer.param_groups],
                passes=[dict(images=image_names(one.batch),
                             terms={name: float(term) for name, term in one.terms.items()})
                        for one in self._passes])
            content = dict(
                about=json.dumps(about),
                weights=self._model.state_dict(),
                batches=[pack(one.batch) for one in self._passes],
                random=[pack(one.random) for one in self._passes])
            memory = io.BytesIO()
            torch.save(content, memory)
            try:
                with write_whole(path) as file:
                    file.write(memory.getbuffer())
            except OSError as error:
                print_log(str(error), 'current', logging.WARNING)
                path = None
        paths = [str(path) for path in _gather(path) if path is not None]
        if not paths:
            return ''
        return (f'; replay it with `python tools/dev/replay_batch.py CONFIG {paths[0]}`'
                + (f' ({len(paths)} processes wrote one)' if len(paths) > 1 else ''))


def read_dump(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], list, list]:
    """Read what :class:`FiniteNumbersHook` has kept; nothing in such a file is run as code.

    Returns:
        What it is about, the weights, and of each pass the batch and the random states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'dump {path} does not exist')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        about = json.loads(content['about'])
        if about['format'] != _FORMAT:
            raise ValueError(f'its format is {about["format"]}, not {_FORMAT}')
        return (about, content['weights'], [unpack(batch) for batch in content['batches']],
                [unpack(state) for state in content['random']])
    except Exception as error:
        # torch reports a damaged file by half a dozen exception types.
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path} is no dump of a batch: {reason}') from error


def set_random_states(states: dict[str, Any]) -> None:
    """Set the random number generators to what they were before a pass."""
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states['numpy']
    np.random.set_state((kind, np.array(keys), position, has_gauss, cached))
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])


def image_names(batch: Any) -> list[str]:
    """Find the paths, or else the ids, of the images of a batch."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    names = []
    for number, sample in enumerate(samples):
        meta = getattr(sample, 'metainfo', {})
        names.append(str(meta.get('img_path') or meta.get('img_id', f'number {number}')))
    return names


def pack(value: Any) -> Any:
    """Turn a batch into tensors, numbers, texts, lists and dicts, which load safely.

    A mark says what each thing was. What is none of them, nor an array or one of OpenMMLab's data
    elements, is left out.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return dict(kind='array', dtype=str(value.dtype), values=value.ravel().tolist(),
                    shape=list(value.shape))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return dict(kind='dict', items=[[pack(key), pack(item)] for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return dict(kind='list' if isinstance(value, list) else 'tuple',
                    items=[pack(item) for item in value])
    name = type(value).__name__
    if isinstance(value, BaseDataElement):
        return dict(kind='element', type=name, meta=pack(value.metainfo),
                    fields=pack(dict(value.items())))
    if name in _BOXES:
        return dict(kind='boxes', type=name, tensor=value.tensor.detach().cpu())
    return dict(kind='left out', type=name)


def unpack(value: Any) -> Any:
    """Undo :func:`pack`; what was left out becomes None."""
    if not isinstance(value, dict):
        return value
    kind = value['kind']
    if kind == 'array':
        return np.array(value['values'], dtype=value['dtype']).reshape(value['shape'])
    if kind == 'dict':
        return {unpack(key): unpack(item) for key, item in value['items']}
    if kind in ('list', 'tuple'):
        items = [unpack(item) for item in value['items']]
        return items if kind == 'list' else tuple(items)
    if kind == 'element':
        element = _find_type(value['type'])(metainfo=unpack(value['meta']))
        for name, field in unpack(value['fields']).items():
            setattr(element, name, field)
        return element
    if kind == 'boxes':
        return _find_type(value['type'])(value['tensor'])
    return None


# Where the types of a batch come from, of those that may be made from a file.
_ELEMENTS = {'InstanceData': 'mmengine.structures', 'LabelData': 'mmengine.structures',
             'PixelData': 'mmengine.structures', 'BaseDataElement': 'mmengine.structures',
             'DetDataSample': 'mmdet.structures', 'DataSample': 'mmpretrain.structures'}
_BOXES = {'HorizontalBoxes': 'mmdet.structures.bbox'}


def _find_type(name: str) -> type:
    from importlib import import_module
    places = {**_ELEMENTS, **_BOXES}
    if name not in places:
        raise ValueError(f'it holds a {name}, which is none of {", ".join(places)}')
    return getattr(import_module(places[name]), name)


def _autocast_dtype(wrapper: OptimWrapper) -> str | None:
    """Name the precision of the forward pass, None for that of the weights."""
    if not hasattr(wrapper, 'loss_scaler'):
        return None
    return str(getattr(wrapper, 'cast_dtype', None) or torch.float16).removeprefix('torch.')


def _random_states() -> dict[str, Any]:
    states = dict(python=random.getstate(), numpy=np.random.get_state(),
                  torch=torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def _gather(value: Any) -> Sequence[Any]:
    """Collect a value of every process."""
    return dist.all_gather_object(value)
