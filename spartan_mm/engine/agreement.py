"""Whether a training goes on with the settings of the run that wrote its checkpoint."""
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from ..errors import CheckpointError
from ..text import count, join, printable, shorten
from ..weights.initialize import without_pretrained
from ..weights.loading import find_classes
from ..weights.stored_config import read_config
from .class_order import describe_classes, same_classes
from .hooks import classes_of

# What a training is made of, by the names that mmengine's runner gives it. A config has more, such
# as variables that its other parts are made of.
_PARTS = ('model', 'data_preprocessor', 'train_dataloader', 'train_cfg', 'optim_wrapper',
          'val_dataloader', 'val_cfg', 'val_evaluator', 'default_hooks', 'custom_hooks',
          'randomness', 'sync_bn', 'model_wrapper_cfg', 'activation_checkpointing',
          'efficient_conv_bn_eval')

# What the state in the checkpoint decides; it is compared itself, as conversions leave it.
_RESTORED = ('optim_wrapper.optimizer', 'optim_wrapper.paramwise_cfg', 'optim_wrapper.constructor',
             'randomness.seed')

# What is in the state of a schedule besides its settings; the base values are the optimizer's.
_PROGRESS = {'last_step', '_global_step', '_last_value', 'base_values', 'verbose', 'best',
             'num_bad_epochs', 'cooldown_counter'}


class Difference(NamedTuple):
    """A setting that differs between two runs."""

    key: str
    before: Any
    now: Any


class ResumeCheckHook(Hook):
    """Compares the config with the run whose checkpoint a training goes on from.

    - Other classes, another kind of optimizer, other groups of parameters and other kinds of
      schedules are refused.
    - Whatever else differs is named in one warning, with what counts: the checkpoint for optimizer,
      schedules, loss scale and seed, the config for all other settings.
    - If there is no ``EMAHook`` any more, the training goes on from the trained weights.

    NOTE: mmengine loads what it finds and says nothing. Without ``EMAHook`` it goes on from the
    averaged weights with the optimizer's state of the trained ones.

    Args:
        seed: The config's seed, if the checkpoint's has taken its place.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare, and put the weights right.

        Raises:
            CheckpointError: The training cannot go on with these settings.
        """
        if not runner._resume:
            return
        name = runner._load_from or f'in {runner.work_dir}'
        theirs = find_classes(checkpoint)
        ours = classes_of(runner.train_dataloader.dataset, 'train_dataloader')
        if not same_classes(theirs, ours):
            _refuse(name, describe_classes(f'checkpoint {name}', theirs, ours,
                                           'the training data'))
        before = _read_parts(checkpoint['meta'].get('cfg'))
        now = _read_parts(runner.message_hub.get_info('cfg'))
        changed = [*find_differences(before, now)] if before and now else []
        kept = [*_compare_optimizers(runner, checkpoint['optimizer'], name, changed),
                *_compare_schedules(runner, checkpoint.get('param_schedulers'), name)]
        if self.seed is not None:
            kept.append(Difference('randomness.seed', checkpoint['meta']['seed'], self.seed))
        if 'loss_scaler' in checkpoint['optimizer']:
            kept += [change for change in changed if change.key == 'optim_wrapper.loss_scale']
        followed = [change for change in changed
                    if change not in kept and not change.key.startswith(_RESTORED)]
        notes = [*_adapt_average(runner, checkpoint), *_adapt_best(checkpoint, followed)]
        if now and not before:
            notes.append('Its config cannot be read, more than optimizer and schedules may differ')
        if kept or followed or notes:
            print_log(printable(_describe(name, kept, followed, notes)), 'current', logging.WARNING)


def find_differences(before: Any, now: Any, path: str = '') -> Iterator[Difference]:
    """Find the settings that differ between two configs; what is missing counts as None.

    Parts of a list that have a type are compared with the part of the same type.

    Example:
        >>> before = dict(hooks=[dict(type='SyncHook'), dict(type='EMAHook', momentum=0.1)])
        >>> now = dict(hooks=[dict(type='EMAHook', momentum=0.2)])
        >>> for difference in find_differences(before, now):
        ...     print(*difference)
        hooks ['SyncHook', 'EMAHook'] ['EMAHook']
        hooks.EMAHook.momentum 0.1 0.2
    """
    if _has_parts(before) and _has_parts(now):
        before, now = _by_type(before), _by_type(now)
        if [*before] != [*now]:
            yield Difference(path, [*before], [*now])
        before, now = ({name: before[name] for name in before if name in now},
                       {name: now[name] for name in before if name in now})
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from find_differences(before.get(key), now.get(key),
                                        f'{path}.{key}' if path else str(key))
    elif before != now:
        yield Difference(path, before, now)


def _has_parts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(part, Mapping) and 'type' in part for part in value)


def _by_type(parts: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name parts by their type, and several of a type by a number, too."""
    named: dict[str, Mapping[str, Any]] = {}
    for part in parts:
        number = 1 + sum(other['type'] == part['type'] for other in named.values())
        named[str(part['type']) + (f' {number}' if number > 1 else '')] = part
    return named


def _read_parts(text: str | None) -> dict[str, Any]:
    """Read what a training is made of in the text of its config; {} if it cannot be used."""
    try:
        config = read_config(dict(meta=dict(cfg=text)), '')
    except CheckpointError:
        return {}
    if not config:
        return {}
    # Where a checkpoint is loaded, a pretrained backbone is left out.
    return dict({name: config.get(name) for name in _PARTS},
                model=without_pretrained(config.get('model') or {}))


def _compare_optimizers(runner: Runner, states: Mapping[str, Any], name: str,
                        changed: Sequence[Difference]) -> Iterator[Difference]:
    """Compare what optimizers do to their groups of parameters; refuse what does not fit."""
    built = runner.optim_wrapper
    wrappers = dict(built.items()) if isinstance(built, OptimWrapperDict) else {'': built}
    states = {'': states} if 'param_groups' in states else states
    if wrappers.keys() != states.keys():
        _refuse(name, 'its optimizers are {}, those of the config {}'.format(*(
            join(filter(None, names), none='a single one') for names in (states, wrappers))))
    for label, wrapper in wrappers.items():
        path = '.'.join(filter(None, ('optim_wrapper', label, 'optimizer')))
        theirs, ours = states[label]['param_groups'], wrapper.optimizer.param_groups
        kind = type(wrapper.optimizer).__name__
        other = next((change.before for change in changed if change.key == f'{path}.type'), kind)
        unknown = {key for key in {*theirs[0]} - {*ours[0]} if not _is_of_schedule(key)}
        if str(other).rpartition('.')[2] != kind or unknown:
            _refuse(name, f"its optimizer is {other if other != kind else 'another'}, that of the "
                    f'config {kind}')
        sizes = [[len(group['params']) for group in groups] for groups in (theirs, ours)]
        if sizes[0] != sizes[1] or not _fits(states[label], ours):
            reasons = [f'{change.key}={_write(change.now)} (before: {_write(change.before)})'
                       for change in changed if change.key.startswith(('optim_wrapper', 'model'))]
            _refuse(name, 'its optimizer has {}, that of the config {}'.format(*(
                f'{count(len(found), "group")} of {join(found)} parameters' for found in sizes))
                + (f', which has {join(reasons)}' if reasons else ''))
        if not states[label].get('loss_scaler', True):
            del states[label]['loss_scaler']  # Of a scaler that was switched off, which has none.
        for key in ours[0]:
            pairs = {tuple(_plain(group.get(f'initial_{key}', group[key])) for group in both): None
                     for both in zip(theirs, ours, strict=True)
                     if key in both[0] and not _is_of_schedule(key)}
            pairs = [pair for pair in pairs if pair[0] != pair[1]]
            if pairs:
                yield Difference(f'{path}.{key}', *(
                    values[0] if len(values) == 1 else values
                    for values in zip(*pairs, strict=True)))


def _is_of_schedule(key: str) -> bool:
    """Whether an entry of a group of parameters is no setting."""
    # LAMB counts its steps in there.
    return key in ('params', 'param_names', 'step') or key.startswith('initial_')


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if isinstance(value, list) else value


def _fits(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the moments of an optimizer have the shapes of the parameters."""
    parameters = [parameter for group in groups for parameter in group['params']]
    return all(moments[key].shape == parameters[index].shape
               for index, moments in state['state'].items()
               for key in ('exp_avg', 'momentum_buffer') if isinstance(moments.get(key), Tensor))


def _compare_schedules(runner: Runner, states: Any, name: str) -> Iterator[Difference]:
    """Compare the settings of schedules; refuse other kinds of them."""
    ours = [schedule.state_dict() for schedule in _flat(runner.param_schedulers)]
    theirs = _flat(states)
    kinds = [[f'{state.get("param_name")} by {join(sorted({*state} - _PROGRESS - {"param_name"}))}'
              for state in schedules] for schedules in (theirs, ours)]
    if kinds[0] != kinds[1]:
        _refuse(name, f'its schedules (param_scheduler) are {join(kinds[0])}; those of the config '
                f'are {join(kinds[1])}')
    for index, (before, now) in enumerate(zip(theirs, ours, strict=True)):
        yield from find_differences(*({key: state[key] for key in state if key not in _PROGRESS}
                                      for state in (before, now)), f'param_scheduler[{index}]')


def _flat(schedules: Any) -> list[Any]:
    """List schedules, those of several optimizers one after the other."""
    if isinstance(schedules, Mapping):
        return [schedule for part in schedules.values() for schedule in part]
    return list(schedules or ())


def _adapt_average(runner: Runner, checkpoint: dict[str, Any]) -> Iterator[str]:
    """Put trained weights in the place of averaged ones if nothing else does."""
    # One of a user's has its own way.
    averages = any(isinstance(hook, EMAHook) or 'EMA' in type(hook).__name__
                   for hook in runner.hooks)
    if averages and 'ema_state_dict' not in checkpoint:
        yield 'EMAHook is new: its average begins with the trained weights'
    if not averages and 'ema_state_dict' in checkpoint:
        trained = checkpoint.pop('ema_state_dict')
        checkpoint['state_dict'] = {key: trained.get(f'module.{key}', value)
                                    for key, value in checkpoint['state_dict'].items()}
        yield ('EMAHook is gone: the training goes on from the trained weights, without their '
               'average')


def _adapt_best(checkpoint: dict[str, Any], changed: Sequence[Difference]) -> Iterator[str]:
    """Forget the best score if another one is asked for now."""
    if {'default_hooks.checkpoint.save_best', 'default_hooks.checkpoint.rule'}.intersection(
            change.key for change in changed):
        info = checkpoint['message_hub']['runtime_info']
        for key in [key for key in info if key.startswith('best_')]:
            del info[key]
        yield 'The best checkpoint is looked for anew'


def _describe(name: str, kept: Sequence[Difference], followed: Sequence[Difference],
              notes: Sequence[str]) -> str:
    """Say in a line what differs, and what counts."""
    parts = [f'the run of {name} had other settings']
    if kept:
        parts.append('Kept as they were there: ' + '; '.join(
            f'{key}={_write(before)} (config: {_write(now)})' for key, before, now in kept)
            + '; to train with those of the config, start anew from the weights: drop --resume and '
              f'add --cfg-options load_from={name}')
    if followed:
        parts.append('From now on as in the config: ' + '; '.join(
            f'{key}={_write(now)} (before: {_write(before)})' for key, before, now in followed))
    return '. '.join([*parts, *notes])


def _write(value: Any) -> str:
    if _has_parts(value):
        return ', '.join(_by_type(value))
    return shorten(str(value), 100)


def _refuse(name: str, problem: str) -> NoReturn:
    raise CheckpointError(f'{name} cannot be resumed with this config: {problem}. Give the config '
                          'the settings of that run, or start anew from its weights: drop --resume '
                          f'and add --cfg-options load_from={name}')
