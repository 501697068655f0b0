"""Hooks of training and evaluation that need neither mmdet nor mmpretrain."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..datasets.data_errors import DataError


@HOOKS.register_module()
class ClassCountCheckHook(Hook):
    """Check before the run that the heads of the model have the classes of the datasets.

    Checked are the training, validation and test dataset, those that the run uses, against each
    module whose name ends in 'head' and that has ``num_classes`` (a region proposal head, which
    knows one class, apart); and the validation dataset against the training dataset, since equal
    numbers of different classes give no error but an AP near zero.

    NOTE: mmdet's ``NumClassCheckHook`` checks validation only after the first epoch of training,
    takes every module with ``num_classes`` for a head, and does not say what to change.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training dataset, and already the validation dataset.

        Raises:
            DataError: the numbers of classes, or the classes of the two datasets, differ.
        """
        train = runner.train_dataloader.dataset
        _check_heads(runner.model, train, 'train_dataloader')
        if runner.val_loop is not None:
            val = runner.val_dataloader.dataset
            _check_heads(runner.model, val, 'val_dataloader')
            _check_same_classes(train, val)

    def before_val(self, runner: Runner) -> None:
        """Check the validation dataset."""
        _check_heads(runner.model, runner.val_dataloader.dataset, 'val_dataloader')

    def before_test(self, runner: Runner) -> None:
        """Check the test dataset."""
        _check_heads(runner.model, runner.test_dataloader.dataset, 'test_dataloader')


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay the model's weights out with the channels last before the run.

    Convolutions then keep their maps that way, too, which is faster on GPUs with tensor cores and
    on recent CPUs, in mixed precision above all.
    """

    def before_run(self, runner: Runner) -> None:
        """Change the layout, before a checkpoint is loaded and the optimizer takes a step."""
        runner.model.to(memory_format=torch.channels_last)


def _check_heads(model: nn.Module, dataset: Any, loader: str) -> None:
    """Compare the ``num_classes`` of each head with the classes of a dataset."""
    classes = _classes(dataset, loader)
    if classes is None:
        return
    for name, head in _heads(model):
        if head.num_classes != len(classes):
            own = model.module if is_model_wrapper(model) else model
            preprocessor = getattr(own, 'data_preprocessor', None)
            raise DataError(describe_class_count(
                name, type(head).__name__, head.num_classes, classes, loader, _describe(dataset),
                isinstance(getattr(preprocessor, 'num_classes', None), int)))


def describe_class_count(head: str, kind: str, num_classes: int, classes: Sequence[str],
                         loader: str, dataset: str, in_preprocessor: bool) -> str:
    """Say that a head has another number of classes than a dataset, and what to set.

    Args:
        head: the path of the head in the model, such as 'bbox_head'.
        kind: its class.
        num_classes: its number of classes.
        classes: those of the dataset.
        loader: the data loader, such as 'train_dataloader'.
        dataset: what to call the dataset.
        in_preprocessor: whether the model's data preprocessor has the number, too, as mmpretrain's,
            which makes the targets of mixed images.
    """
    setting = f'model.{head}.num_classes={len(classes)}'
    if in_preprocessor:
        setting += f' model.data_preprocessor.num_classes={len(classes)}'
    return (f'model.{head} ({kind}) has num_classes={num_classes}, but the dataset of {loader}, '
            f'{dataset}, has {len(classes)} classes ({_excerpt(classes)}). Set {setting} in the '
            f'config (or on the command line: --cfg-options {setting}), or correct the '
            "dataset's files or `metainfo`.")


def _check_same_classes(train: Any, val: Any) -> None:
    """Compare the classes of the training and the validation dataset."""
    train_classes, val_classes = (
        _classes(train, 'train_dataloader'),
        _classes(val, 'val_dataloader'),
    )
    if None in (train_classes, val_classes) or train_classes == val_classes:
        return
    raise DataError(describe_other_classes(train_classes, _describe(train), val_classes,
                                           _describe(val)))


def describe_other_classes(train_classes: Sequence[str], train: str, val_classes: Sequence[str],
                           val: str) -> str:
    """Say where the classes of two datasets, which are called so, differ."""
    label = next(
        i for i, pair in enumerate(zip_longest(train_classes, val_classes)) if len({*pair}) > 1
    )
    return (
        f'The classes of the training dataset, {train}, and of the validation dataset, {val}, '
        f'differ: label {label} is {_at(train_classes, label)} in the one and '
        f'{_at(val_classes, label)} in the other. Give both the same classes in the same order.'
    )


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the heads, with their path in the model."""
    model = model.module if is_model_wrapper(model) else model
    for name, module in model.named_modules():
        # heads may stand in a list, as in 'roi_head.bbox_head.0'
        own_name = name.rstrip('.0123456789').rsplit('.', 1)[-1]
        if own_name.endswith('head') and own_name != 'rpn_head':
            if isinstance(getattr(module, 'num_classes', None), int):
                yield name, module


def _classes(dataset: Any, loader: str) -> tuple[str, ...] | None:
    """Get the classes of a dataset, through wrappers that do not tell them; None if it has none."""
    while not hasattr(dataset, 'metainfo') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if isinstance(classes, str):
        raise DataError(
            f'The dataset of {loader}, {_describe(dataset)}, has classes={classes!r}, which must '
            f'be a tuple; a single class is written metainfo=dict(classes=({classes!r},)).'
        )
    return None if classes is None else tuple(classes)


def _describe(dataset: Any) -> str:
    """Name a dataset by its class and the annotation files, or else the folders, in it."""
    sources = ', '.join(_find_sources(dataset)) or 'no annotation file'
    return f'{type(dataset).__name__} of {sources}'


def _find_sources(dataset: Any) -> Iterator[str]:
    source = getattr(dataset, 'ann_file', '') or getattr(dataset, 'img_prefix', '')
    if source:
        yield str(source)
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in parts:
        if part is not None:
            yield from _find_sources(part)


def _at(classes: tuple[str, ...], label: int) -> str:
    return repr(classes[label]) if label < len(classes) else 'none'


def _excerpt(classes: tuple[str, ...]) -> str:
    return ', '.join(classes[:5]) + (', ...' if len(classes) > 5 else '')
