"""Starting from a checkpoint of the same architecture that knows other classes."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..datasets.classes import find_heads
from ..errors import CheckpointError
from ..text import count, join
from ..weights.loading import find_classes, find_meta
from .hooks import StrictCheckpointHook, classes_of

Names = Sequence[str] | None
StateDict = Mapping[str, Tensor]


class Rows(NamedTuple):
    """How the classes lie in the first dimension of a tensor."""

    blocks: int  # how often all classes follow each other, such as once for each anchor
    extra: int  # rows behind them, such as one for the background or for padding


class Change(NamedTuple):
    """What became of a tensor that depends on the classes."""

    name: str
    theirs: tuple[int, ...]  # its shape in the checkpoint
    ours: tuple[int, ...]  # its shape in the model
    kept: int  # number of classes whose rows come from the checkpoint
    total: int  # number of classes of the model
    known: int  # number of classes of the checkpoint


@HOOKS.register_module()
class FineTuneHook(StrictCheckpointHook):
    """Lets a training start (``load_from``) from a checkpoint with other classes.

    All weights have to fit, but for what depends on the classes: of these, the rows of a class that
    checkpoint and training set both know by name go to its new place, and the rows of all others
    keep the initialization of the config. Where one of them has no names, an equal number of
    classes is taken for the same classes, and another number for other classes. The log says what
    was done. ``spartan-mm train`` registers this hook by itself.

    NOTE: mmengine loads whatever has the same name and shape and warns of the rest: a checkpoint
    of the same number of other classes would start with the heads of the wrong ones.
    """

    remedy = ('Use the config it was trained with, which lies next to it; to take the backbone '
              "alone, set model.backbone.init_cfg=dict(type='CheckedPretrained', checkpoint=..., "
              "prefix='backbone.') instead of load_from")

    def find_weights(self, runner: Runner, model: nn.Module, checkpoint: dict[str, Any],
                     name: str) -> dict[str, Tensor]:
        """Find the weights, with the rows of classes at their new places.

        A training that is resumed has the same classes.

        Raises:
            CheckpointError: If the weights are of the deploy form.
        """
        if find_meta(checkpoint).get('deploy'):
            raise CheckpointError(f'checkpoint {name} is of the deploy form, which is for '
                                  'inference alone; take the one that it was made of')
        state_dict = super().find_weights(runner, model, checkpoint, name)
        if runner._resume:
            return state_dict
        own = model.state_dict()
        theirs = find_classes(checkpoint)
        ours = classes_of(runner.train_dataloader.dataset, 'train_dataloader')
        fitted, changes = fit_classes(state_dict, own, find_rows(runner.cfg.model, own), theirs,
                                      ours)
        anew = any(change.kept < change.total for change in changes)
        print_log(describe(name, len(state_dict), changes, theirs, ours), 'current',
                  logging.WARNING if anew else logging.INFO)
        return fitted


def find_rows(model_cfg: dict[str, Any], own: StateDict) -> dict[str, Rows]:
    """Find the tensors of a model that depend on the number of classes.

    A second model is built, with one class more, and compared.

    Args:
        model_cfg: Config of the model.
        own: Its state dict.

    Returns:
        The layout of each such tensor by name; none if the config's heads have no ``num_classes``,
        or several that differ.
    """
    numbers = {head.num_classes for head in find_heads(model_cfg)}
    if len(numbers) != 1:
        return {}
    [number] = numbers
    with torch.random.fork_rng(devices=[]):
        larger = MODELS.build(_with_classes(model_cfg, number, number + 1))
    layouts = {}
    for name, tensor in larger.state_dict().items():
        if name in own and tensor.shape != own[name].shape:
            blocks = len(tensor) - len(own[name])
            layouts[name] = Rows(blocks, len(own[name]) - blocks * number)
    return layouts


def fit_classes(state_dict: StateDict, own: StateDict, layouts: Mapping[str, Rows], theirs: Names,
                ours: Names) -> tuple[dict[str, Tensor], list[Change]]:
    """Make the tensors that depend on the classes fit a model.

    Args:
        state_dict: Weights of the checkpoint.
        own: Weights of the model.
        layouts: The tensors that depend on the classes.
        theirs, ours: Names of the classes of checkpoint and model, None if unknown.

    Returns:
        The weights, those of the model where the checkpoint has none for a class; and what became
        of each tensor that was changed. A tensor that differs in anything else is left as it is.
    """
    fitted, changes = dict(state_dict), []
    for name, (blocks, extra) in layouts.items():
        if name not in state_dict or state_dict[name].shape[1:] != own[name].shape[1:]:
            continue
        source, target = state_dict[name], own[name].cpu().clone()
        old_count, rest = divmod(len(source) - extra, blocks)
        new_count = (len(target) - extra) // blocks
        if rest or old_count < 1:
            continue
        pairs = match_classes(old_count, new_count, theirs, ours)
        if pairs == [(i, i) for i in range(new_count)] and old_count == new_count:
            continue
        # (blocks, classes, ...)
        old_rows = source[:blocks * old_count].unflatten(0, (blocks, old_count))
        new_rows = target[:blocks * new_count].unflatten(0, (blocks, new_count))
        for old, new in pairs:
            new_rows[:, new] = old_rows[:, old]
        target[blocks * new_count:] = source[blocks * old_count:]
        fitted[name] = target
        changes.append(Change(name, tuple(source.shape), tuple(target.shape), len(pairs),
                              new_count, old_count))
    return fitted, changes


def match_classes(old_count: int, new_count: int, theirs: Names,
                  ours: Names) -> list[tuple[int, int]]:
    """Pair classes of the same name; if names are missing or do not fit, of the same number.

    Args:
        old_count, new_count: Number of the classes of checkpoint and model.
        theirs, ours: Names of the classes of checkpoint and model, None if unknown.

    Returns:
        Pairs (old index, new index), by new index.

    Example:
        >>> match_classes(3, 2, ['cat', 'dog', 'emu'], ['emu', 'fox'])
        [(2, 0)]
        >>> match_classes(2, 2, None, ['emu', 'fox'])
        [(0, 0), (1, 1)]
    """
    if _why_unusable(old_count, new_count, theirs, ours):
        return [(i, i) for i in range(new_count)] if old_count == new_count else []
    places = {name: index for index, name in enumerate(_numbered(theirs))}
    return [(places[name], index) for index, name in enumerate(_numbered(ours)) if name in places]


def describe(checkpoint: str, tensors: int, changes: Sequence[Change], theirs: Names,
             ours: Names) -> str:
    """Say in a short table what was loaded and what was not.

    Args:
        checkpoint: What to call the checkpoint.
        tensors: Number of its tensors.
        changes: What became of those that were changed.
        theirs, ours: Names of the classes of checkpoint and model, None if unknown.
    """
    if not changes:
        known = '' if theirs else '; it does not name its classes, which are taken to be the same'
        return f'{checkpoint}: all {tensors} tensors loaded{known}'
    unusable = next(filter(None, (_why_unusable(change.known, change.total, theirs, ours)
                                  for change in changes)), None)
    if unusable:
        reason = f'by number, as {unusable}'
    else:
        kept = set(theirs).intersection(ours)
        reason = f'by name; in both: {join(name for name in ours if name in kept)}'
    header = ('depends on the classes', 'checkpoint', 'model', 'classes kept')
    rows = [(name, str(theirs), str(ours), f'{kept} of {total}')
            for name, theirs, ours, kept, total, _ in _grouped(changes)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = ['  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (header, *rows)]
    return '\n  '.join([
        f'{checkpoint}: {tensors - len(changes)} tensors loaded as they are, {len(changes)} fitted '
        f'to other classes ({reason}); rows of classes not kept start anew', *table])


def _why_unusable(old_count: int, new_count: int, theirs: Names, ours: Names) -> str | None:
    """Say why classes cannot be paired by name; None if they can."""
    if theirs is None:
        return 'the checkpoint does not name its classes'
    if ours is None:
        return 'the training set does not name its classes'
    if len(theirs) != old_count:
        return f'the checkpoint names {count(len(theirs), "class")} but has {old_count}'
    if len(ours) != new_count:
        return f'the training set names {count(len(ours), "class")} but the model has {new_count}'
    return None


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Tell repeated names, which ImageNet has, apart."""
    names = list(names)
    return [(name, names[:index].count(name)) for index, name in enumerate(names)]


def _grouped(changes: Sequence[Change]) -> list[Change]:
    """Merge lines that differ in the number of a layer alone."""
    groups = Counter(change._replace(name=re.sub(r'\.\d+(?=\.)', '.*', change.name))
                     for change in changes)
    return [key._replace(name=f'{key.name} ({number}x)' if number > 1 else key.name)
            for key, number in groups.items()]


def _with_classes(settings: Any, old: int, new: int) -> Any:
    """Copy a model's config, with another number of classes everywhere."""
    if isinstance(settings, dict):
        return type(settings)({key: new if key == 'num_classes' and value == old else
                               _with_classes(value, old, new) for key, value in settings.items()})
    if isinstance(settings, list | tuple):
        return type(settings)(_with_classes(value, old, new) for value in settings)
    return settings
