"""The classes of heads and datasets: where heads are, and what to say if classes do not fit."""
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from mmengine.registry import DATASETS
from torch import nn

from ..errors import CheckpointError
from ..text import count, join, printable
from .data_errors import DataError


class Head(NamedTuple):
    """A part of a model that tells classes apart.

    Attributes:
        path: Where it is in the model, such as 'roi_head.bbox_head.0'.
        kind: Its class.
        num_classes: Its number of classes.
    """

    path: str
    kind: str
    num_classes: int


def find_heads(model: nn.Module | Mapping) -> Iterator[Head]:
    """Find the parts whose name ends in 'head' and that have ``num_classes``.

    A region proposal head, which knows one class, is none of them.

    Args:
        model: The model, out of its wrapper, or its config.
    """
    for path, part in model.named_modules() if isinstance(model, nn.Module) else _walk(model):
        # Heads may stand in a list.
        name = path.rstrip('.0123456789').rsplit('.', 1)[-1]
        if isinstance(part, Mapping):
            kind, number = str(part.get('type')), part.get('num_classes')
        else:
            kind, number = type(part).__name__, getattr(part, 'num_classes', None)
        if name.endswith('head') and name != 'rpn_head' and isinstance(number, int):
            yield Head(path, kind, number)


def check_names(model: nn.Module, names: Sequence[str], source: str) -> None:
    """Insist that there is a name for each class that a model tells apart, if there are names.

    Raises:
        CheckpointError: There are fewer or more.
    """
    counts = {head.num_classes for head in find_heads(model)}
    if names and counts and len(names) not in counts:
        raise CheckpointError(f'{source} names {count(len(names), "class")} ({join(names, 5)}), '
                              f'but the model tells {join(counts)} apart: correct the names')


def find_names(model: nn.Module, classes: Sequence[str] | None, dataset: Mapping[str, Any],
               checkpoint: str) -> tuple[str, ...]:
    """Find the names of a model's classes; none if nobody knows them.

    Args:
        model: The model.
        classes: What its checkpoint says. If it does not, the config knows, or they are COCO's 80.
        dataset: Settings of the config's test dataset.
        checkpoint: What to call the checkpoint in a message.

    Raises:
        CheckpointError: There are fewer or more names than the model has classes.
    """
    kind = DATASETS.get(dataset['type']) if 'type' in dataset else None
    for source, names in ((checkpoint, classes), *(
            ('the config', meta.get('classes') or meta.get('CLASSES'))
            for meta in (dataset.get('metainfo') or {}, getattr(kind, 'METAINFO', {})))):
        if names:
            names = (names, ) if isinstance(names, str) else tuple(map(str, names))
            check_names(model, names, source)
            return names
    if {head.num_classes for head in find_heads(model)} == {80}:
        from mmdet.evaluation import get_classes
        return tuple(get_classes('coco'))
    return ()


def describe_class_count(head: Head, classes: Sequence[str], loader: str, dataset: str,
                         in_preprocessor: bool) -> str:
    """Say that a head has another number of classes than a dataset, and what to set.

    Args:
        head: The head.
        classes: Those of the dataset.
        loader: The data loader, such as 'train_dataloader'.
        dataset: What to call the dataset.
        in_preprocessor: Whether the model's data preprocessor has the number, too, as mmpretrain's,
            which makes the targets of mixed images.
    """
    setting = f'model.{head.path}.num_classes={len(classes)}'
    if in_preprocessor:
        setting += f' model.data_preprocessor.num_classes={len(classes)}'
    return (f'model.{head.path} ({head.kind}) has num_classes={head.num_classes}, but the dataset '
            f'of {loader}, {dataset}, has {len(classes)} classes ({join(classes, 5)}). Set '
            f'{setting} in the config (or on the command line: --cfg-options {setting}), or '
            "correct the dataset's files or `metainfo`.")


def describe_other_classes(classes: Sequence[str], one: str, other_classes: Sequence[str],
                           other: str) -> str:
    """Say where the classes of two datasets, which are called so, differ."""
    pairs = enumerate(zip_longest(classes, other_classes))
    label, (name, other_name) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    return (f'The classes of {one} and of {other} differ: label {label} is {_show(name)} in the '
            f'one and {_show(other_name)} in the other. Give both the same classes in the same '
            'order; files of other categories are matched by name if each dataset has the same '
            '`metainfo=dict(classes=(...))` and `classes_by_name=True`.')


def find_parts(dataset: Any) -> list[Any]:
    """Find the datasets inside wrappers such as ``ConcatDataset``; one that is none by itself.

    What has a description of its own, but nothing inside that has, is no wrapper.
    """
    parts = getattr(dataset, 'datasets', None) or (
        [dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if hasattr(dataset, 'metainfo') and not any(hasattr(part, 'metainfo') for part in parts):
        return [dataset]
    return [inner for part in parts for inner in find_parts(part)] or [dataset]


def name_dataset(dataset: Any) -> str:
    """Name a dataset, out of its wrappers, by its class and the file or else folder that it is of.

    What joins several is named by all of them.
    """
    def source(part: Any) -> str:
        return next(filter(None, (getattr(part, name, '') for name in (
            'ann_file', 'img_prefix', 'data_root'))), 'no file')

    return printable(' and '.join(dict.fromkeys(
        f'{type(part).__name__} of {source(part)}' for part in find_parts(dataset))))


def classes_of(dataset: Any, loader: str) -> tuple[str, ...] | None:
    """Find the classes of a dataset, in wrappers those of its parts; None if it has none.

    Raises:
        DataError: They are a text, or parts that are joined have others.
    """
    found = None
    for part in find_parts(dataset):
        name = f'{loader}, {name_dataset(part)},'
        classes = (getattr(part, 'metainfo', None) or {}).get('classes')
        if isinstance(classes, str):
            raise DataError(
                f'The dataset of {name} has classes={classes!r}, which must be a tuple; a single '
                f'class is written metainfo=dict(classes=({classes!r},)).')
        if classes is None:
            continue
        if found is None:
            first, found = name, tuple(classes)
        elif found != tuple(classes):
            raise DataError(describe_other_classes(
                found, f'the dataset of {first}', tuple(classes), f'that of {name}'))
    return found


def _walk(settings: Any, path: str = '') -> Iterator[tuple[str, Mapping]]:
    """Find the dicts in a config, with their path."""
    if isinstance(settings, Mapping):
        yield path, settings
        items = settings.items()
    else:
        items = enumerate(settings) if isinstance(settings, list | tuple) else ()
    for key, value in items:
        yield from _walk(value, f'{path}.{key}' if path else str(key))


def _show(name: str | None) -> str:
    return 'none' if name is None else repr(name)
