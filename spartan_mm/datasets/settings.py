"""The settings of data loaders in a config: keys that nobody takes, and values of a wrong form.

``spartan-mm check-data`` reports what is wrong here, commands refuse it before they build anything,
and this package's datasets when they are made, all in the same words.
"""

import copy
import inspect
import logging
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS

from ..errors import ExplainedError
from ..text import first_line
from .data_errors import DataError, Finding, join, read_lines, show

SPLITS = ('train', 'val', 'test')

#: What mmdet 2 and mmpretrain's predecessor call some settings, and what to write today.
RENAMED = {
    'img_prefix': "data_prefix=dict(img='...')", 'seg_prefix': "data_prefix=dict(seg='...')",
    'img_dir': "data_prefix=dict(img='...')", 'classes': "metainfo=dict(classes=('...', ))",
    'CLASSES': "classes=('...', )", 'PALETTE': 'palette=[...]',
    'filter_empty_gt': 'filter_cfg=dict(filter_empty_gt=...)', 'file_client_args': 'backend_args',
    'samples_per_gpu': 'batch_size', 'imgs_per_gpu': 'batch_size',
    'workers_per_gpu': 'num_workers', 'img_scale': 'scale', 'flip_ratio': 'prob',
    'Collect': 'PackDetInputs (mmpretrain: PackInputs)',
    'DefaultFormatBundle': 'PackDetInputs (mmpretrain: PackInputs)',
    'ImageToTensor': 'PackDetInputs (mmpretrain: PackInputs)', 'MultiScaleFlipAug': 'TestTimeAug',
    'Normalize': 'mean and std of model.data_preprocessor',
    'Pad': 'pad_size_divisor of model.data_preprocessor'}

# Of whose classes it is known which forms their arguments have.
_PACKAGES = ('mmengine', 'mmdet', 'mmpretrain', 'spartan_mm')

# The type of a value, or a test of it, and what to call that. None is said where it may be.
_Forms = Mapping[str, tuple[Any, str]]
_FLAG = (int, 'True or False')
# Datasets and samplers may be there already; what they surely are not.
_NO_DATASET = list | tuple | str | int | None
_MAYBE_DICT = (Mapping, Config, type(None))
_FORMS: _Forms = {
    'data_root': ((str, type(None)), 'a text, the path of a folder'),
    'split': ((str, type(None)), 'a text, the name of a folder'),
    'ann_file': (str, 'a text, the path of one file; several are joined by '
                      "dict(type='ConcatDataset', datasets=[...])"),
    'data_prefix': (Mapping, "a dict of texts, such as data_prefix=dict(img='images/')"),
    'classes': ((str, list, tuple, type(None)), "a tuple of texts, such as ('cat', 'dog'), or a "
                                                'file with one in each line'),
    'pipeline': ((list, tuple), 'a list of dicts'),
    'metainfo': (_MAYBE_DICT, "a dict, such as metainfo=dict(classes=('cat', 'dog'))"),
    'filter_cfg': (_MAYBE_DICT, 'a dict, such as filter_cfg=dict(filter_empty_gt=False)'),
    'backend_args': (_MAYBE_DICT, "a dict, such as backend_args=dict(backend='local')"),
    'indices': (lambda value: isinstance(value, int | None) or isinstance(value, list | tuple) and (
        value and all(isinstance(index, int) for index in value)),
        'a whole number, or a list of them'),
    'proposal_file': ((str, type(None)), 'a text, the path of a file'),
    'max_refetch': (int, 'a whole number'),
    **dict.fromkeys(('test_mode', 'serialize_data', 'lazy_init', 'with_label', 'allow_no_objects',
                     'allow_empty_classes', 'classes_by_name'), _FLAG)}
_LOADER_FORMS: _Forms = {
    'batch_size': (lambda value: isinstance(value, int) and value > 0, 'a whole number from 1 on'),
    'num_workers': (lambda value: isinstance(value, int) and value >= 0,
                    'a whole number from 0 on'),
    'dataset': (lambda value: not isinstance(value, _NO_DATASET),
                "a dict; several are joined by dict(type='ConcatDataset', datasets=[...])"),
    'sampler': (lambda value: not isinstance(value, _NO_DATASET),
                "a dict, such as sampler=dict(type='DefaultSampler', shuffle=True)"),
    'batch_sampler': (lambda value: value is None or not isinstance(value, _NO_DATASET), 'a dict'),
    **dict.fromkeys(('persistent_workers', 'drop_last', 'pin_memory'), _FLAG)}


def check_loaders(cfg: Config) -> None:
    """Check the settings of a config's data loaders, those of their datasets apart.

    Raises:
        DataError: A key that nobody takes, or a value of a wrong form.
    """
    for split in SPLITS:
        raise_first(find_loader_faults(cfg, split))


def raise_first(findings: Iterable[Finding]) -> None:
    """Raise the first finding that is an error, and log the warnings before it."""
    for finding in findings:
        if finding.level == 'error':
            raise DataError(finding.message)
        print_log(finding.message, 'current', logging.WARNING)


def find_loader_faults(cfg: Config, split: str) -> Iterator[Finding]:
    """Find what is wrong with the settings of a data loader, those of its datasets apart."""
    where = f'{split}_dataloader'
    loader = cfg.get(where)
    if isinstance(loader, Mapping):
        yield from _check_forms(loader, _LOADER_FORMS, where)
        for key in loader:
            if key in RENAMED:
                yield _fault(f'{where}.{key}', f'is no setting any more: write {RENAMED[key]}')
        if 'dataset' not in loader:
            yield _fault(where, 'has no `dataset`')
    elif loader is not None and not hasattr(loader, 'dataset'):
        yield _fault(where, f'is {show(loader)}, but must be a dict')


def find_datasets(cfg: Config, split: str) -> Iterator[tuple[str, Any]]:
    """Find the configs of the datasets of a split, those inside wrappers such as ``RepeatDataset``.

    Yields:
        Where each is in the config, and its own config.
    """
    def walk(dataset: Any, where: str) -> Iterator[tuple[str, Any]]:
        parts = {}
        if isinstance(dataset, Mapping):
            joined = dataset.get('datasets')
            if isinstance(joined, list | tuple):
                parts = {f'.datasets[{number}]': part for number, part in enumerate(joined)}
            elif 'dataset' in dataset:
                parts = {'.dataset': dataset['dataset']}
            # What is no dict may be the name of something that a class of a user knows.
            kind = _get_kind(dataset)
            if callable(kind) and _is_users(kind):
                parts = {place: part for place, part in parts.items() if isinstance(part, Mapping)}
        for place, part in parts.items():
            yield from walk(part, where + place)
        if not parts and isinstance(dataset, _NO_DATASET | Mapping):
            yield where, dataset

    loader = cfg.get(f'{split}_dataloader')
    if isinstance(loader, Mapping) and isinstance(loader.get('dataset'), Mapping):
        yield from walk(loader.get('dataset'), f'{split}_dataloader.dataset')


def find_dataset_faults(settings: Mapping[str, Any], where: str) -> Iterator[Finding]:
    """Find what is wrong with the settings of a dataset.

    Args:
        settings: Its config; the default scope must be that of the config it comes from.
        where: What to call it.
    """
    if not isinstance(settings, Mapping):
        yield _fault(where, f'is {show(settings)}, but must be a dict')
        return
    if not settings.get('type'):
        yield _fault(where, 'has no `type`, the name of a dataset')
        return
    kind = _get_kind(settings)
    if not callable(kind):
        yield _fault(f'{where}.type', f'is {show(settings["type"])}, but there is no dataset of '
                     'that name: is its package in custom_imports of the config?')
        return
    yield from find_argument_faults(
        kind, {key: value for key, value in settings.items() if key not in ('type', '_scope_')},
        where)
    pipeline = settings.get('pipeline')
    for number, step in enumerate(pipeline if isinstance(pipeline, list | tuple) else ()):
        yield from _find_step_faults(step, f'{where}.pipeline[{number}]')


def _get_kind(settings: Mapping[str, Any]) -> Any:
    """The class of a dataset; None if there is none of that name."""
    with DATASETS.switch_scope_and_registry(settings.get('_scope_')) as registry:
        name = settings.get('type')
        return registry.get(name) if isinstance(name, str) else name


def _is_users(kind: Any) -> bool:
    return kind.__module__.partition('.')[0] not in _PACKAGES


def find_argument_faults(kind: type, arguments: Mapping[str, Any], where: str
                         ) -> Iterator[Finding]:
    """Find what is wrong with the arguments of a dataset.

    Args:
        kind: Its class.
        arguments: Those given by name.
        where: What to call it.
    """
    taken, own = _find_parameters(kind, arguments)
    for key in arguments:
        if taken is not None and key not in taken:
            today = f': write {RENAMED[key]}' if key in RENAMED else (
                f', which takes {join(sorted(taken))}')
            yield _fault(f'{where}.{key}', f'is no setting of {kind.__name__}{today}')
    # What a class of a user reads itself may have any form.
    forms = {key: form for key, form in _FORMS.items() if key not in own}
    # mmpretrain's take a text for the folder of the images, mmdet's a dict.
    if 'data_prefix' in forms and not isinstance(taken and taken.get('data_prefix'), Mapping):
        forms['data_prefix'] = ((str, *_MAYBE_DICT), 'a text, the name of a folder, or a dict, '
                                "such as dict(img_path='images/')")
    yield from _check_forms(arguments, forms, where)
    metainfo = arguments.get('metainfo')
    if not isinstance(metainfo, Mapping) or 'metainfo' in own:
        return
    known = {'classes', 'palette', *(getattr(kind, 'METAINFO', None) or {})}
    for key in metainfo:
        if key in RENAMED and key not in known:
            yield _fault(f'{where}.metainfo.{key}', f'is not read: write {RENAMED[key]}')
        elif key not in known:
            yield Finding('warning', 'setting', f'{where}.metainfo.{key} is not read by '
                          f'{kind.__name__}, which knows {join(sorted(known))}')
    classes = metainfo.get('classes', ())
    if isinstance(classes, str):
        if not os.path.isfile(classes):
            yield _fault(f'{where}.metainfo', f'has classes={classes!r}, which must be a tuple; a '
                         f'single class is written dict(classes=({classes!r},)), and there is no '
                         'file of that name')
    elif not (isinstance(classes, list | tuple)
              and all(isinstance(name, str) for name in classes)):
        yield _fault(f'{where}.metainfo.classes', f'is {show(classes)}, but must be a tuple of '
                     "texts, such as ('cat', 'dog')")


def with_class_names(metainfo: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Read the names of the classes where ``metainfo`` names a file with one in each line."""
    if metainfo and isinstance(metainfo.get('classes'), str):
        return dict(metainfo, classes=tuple(read_lines(metainfo['classes'])))
    return metainfo


#: What to say of a dataset or a data loader without an image.
NO_IMAGES = ('has no images: its annotation file or folder has none, or `filter_cfg` or `indices` '
             'of its dataset leave none')


def explain_build(error: Exception, where: str) -> Finding:
    """Say what kept something from being built, in the words of the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)
              if frame.f_code is BaseDataset._serialize_data.__code__]
    if frames and not frames[-1].f_locals['self'].data_list:
        return _fault(where, NO_IMAGES)  # which mmengine packs into an array
    return _fault(where, f'cannot be built: {type(error).__name__}: {first_line(error)}')


def _find_step_faults(step: Any, where: str) -> Iterator[Finding]:
    """Find what is wrong with a step of a pipeline."""
    if not isinstance(step, Mapping):
        if not callable(step):
            yield _fault(where, f"is {show(step)}, but must be a dict, such as dict(type='Resize', "
                         'scale=(64, 64))')
        return
    name = step.get('type')
    if not name:
        yield _fault(where, 'has no `type`, the name of a transform')
        return
    with TRANSFORMS.switch_scope_and_registry(step.get('_scope_')) as registry:
        kind = registry.get(name) if isinstance(name, str) else name
    if kind is None:
        today = f'; mmdet 2 had it, today it is {RENAMED[name]}' if name in RENAMED else ''
        yield _fault(where, f'has type={name!r}, but there is no transform of that name{today}')
        return
    try:
        TRANSFORMS.build(copy.deepcopy(dict(step)))
    except ExplainedError as error:
        yield _fault(f'{where} ({name})', str(error))
    except Exception as error:  # whatever a transform refuses its arguments with
        fault = explain_build(error, f'{where} ({name})')
        today = [f'; {key} is {RENAMED[key]} today' for key in step
                 if key in RENAMED and key in str(error)]
        yield replace(fault, message=fault.message + ''.join(today))


def _find_parameters(kind: Any, given: Iterable[str]) -> tuple[dict[str, Any] | None, set[str]]:
    """Find the arguments of a class and its bases, with defaults; None if it takes any.

    Those `given` count that a constructor takes out of its ``kwargs`` by name.

    Returns:
        The arguments, and the names of those that a class of a user takes.
    """
    found: dict[str, Any] = {}
    taken_out: set[str] = set()
    own: set[str] = set()
    for base in kind.__mro__ if inspect.isclass(kind) else ():
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        named = {item.name: item.default for item in parameters if item.name != 'self'
                 and item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
        if _is_users(base):
            own |= named.keys() - found.keys()
        found = named | found
        if not any(item.kind == item.VAR_KEYWORD for item in parameters):
            return dict.fromkeys(taken_out) | found, own
        code = getattr(base.__init__, '__code__', None)
        taken_out.update(key for key in given if code and key in code.co_consts)
    return None, set(given)


def _check_forms(settings: Mapping[str, Any], forms: _Forms, where: str) -> Iterator[Finding]:
    for key, value in settings.items():
        test, form = forms.get(key, (None, ''))
        sound = isinstance(value, test) if isinstance(test, type | tuple) else test is None or (
            test(value))
        if not sound:
            yield _fault(f'{where}.{key}', f'is {show(value)}, but must be {form}')


def _fault(where: str, message: str) -> Finding:
    return Finding('error', 'setting', f'{where} {message}')
