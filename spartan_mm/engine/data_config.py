"""From a folder of data to a config: short, complete, and its reader's to edit."""
import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from ..datasets.check import Report, check_config
from ..datasets.classes import find_heads
from ..datasets.data_errors import DataError
from ..datasets.layouts import Data, find_data
from ..datasets.settings import find_datasets
from ..errors import UsageError
from ..files import check_writable, write_whole
from ..model_index import check_predicts, find_config, list_models, root
from ..text import count, join, printable
from ..weights.loading import find_state_dict
from ..weights.safe_load import local_file, read_checkpoint
from .batch_size import find_batch_size

#: What is trained if nobody says otherwise.
MODEL_OF = dict(detection='rtdetr_spartan_t', classification='spartan_t')
#: The config that goes into the work dir.
NAME = 'config.py'
# The recipe for small data, and its batch size.
_RECIPE = Path('configs', 'detection', '_base_', 'finetune.py')
_RECIPE_BATCH = 8
# An epoch has so many steps at least, if the batch size is free.
_STEPS = 8
_WIDTH = 100

# The settings in the order in which they are read, each group behind a blank line, with what there
# is to say of the first.
_GROUPS = (
    ('_base_', 'custom_imports', 'work_dir', 'load_from'),
    ('data_root', 'classes', 'model'),
    ('train_pipeline', 'test_pipeline'),
    ('train_dataset', 'val_dataset', 'train_dataloader', 'val_dataloader', 'test_dataloader',
     'val_evaluator', 'test_evaluator'),
    ('train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks', 'auto_scale_lr',
     'randomness'))
_COMMENTS = dict(work_dir='The folder of this file.',
                 param_scheduler='In shares of the training: warm-up, constant, down to a tenth.',
                 custom_hooks='Averaged weights, early stopping, plain images at the end.',
                 auto_scale_lr='The learning rate follows the real number of images a step.')

Settings = dict[str, Any]


class _Name(str):
    """The name of a variable in the config, or an expression, written as it is."""

    __slots__ = ()


def prepare(data: str | Path, model: str | None = None, *, work_dir: str | Path | None = None,
            epochs: int | None = None, weights: str | Path | None = None, gpus: int = 1,
            batch_size: int | str | None = None, size: int | None = None, seed: int | None = None,
            deterministic: bool = False, options: Mapping[str, Any] | None = None) -> Path:
    """Look through data, and write the config of a training on it.

    Args:
        data: Its folder, see :func:`.find_data`.
        model: The name of a model, or a config; None for `MODEL_OF` its task. A name takes the
            recipe for small data, a config keeps its own.
        work_dir: Folder of the config and of all that the training writes; None for
            ``work_dirs/<model>_<name of the data>``.
        epochs: Number of epochs; None for those of the recipe.
        weights: What to start from, a detector's checkpoint or a classifier's; None for what the
            model starts from.
        gpus: Number of processes that will train.
        batch_size: Images a step of a process; 'auto' for as many as fit on the GPU, up to the
            recipe's; None for the model's. A small set lowers it.
        size: Side of the images in pixels; None for the model's.
        seed: Of the training and of the pictures that are held out; None for 0.
        deterministic: Whether torch uses deterministic algorithms wherever it has them.
        options: Other settings, with dots in the keys.

    Returns:
        The config.

    Raises:
        DataError: The data is not what it should be.
        UsageError: The model is not for this data, or the work dir has another config.
    """
    found = find_data(data, seed or 0)
    model = model or MODEL_OF[found.task]
    base = _read_base(model, found)
    notes = [*found.notes]
    settings = _make_settings(found, base, model, seed or 0, deterministic, notes)
    if weights is not None:
        _start_from(settings, base, str(weights))
    else:
        _drop_missing_weights(settings, base, notes)
    if size is not None:
        _resize(settings, base, size)
    if epochs is not None:
        _set_epochs(settings, base, epochs)
    for key, value in (options or {}).items():
        _set_option(settings, key, value)
    if 'train_dataloader.batch_size' in (options or {}):
        raise UsageError('--batch-size says how many images a step takes beside data, not '
                         'train_dataloader.batch_size')

    target = Path(work_dir or Path('work_dirs', f'{Path(model).stem}_{_name_of(found)}')) / NAME
    check_writable(target)
    reports = _check(Config.fromstring(write_text(settings), '.py'))
    pictures = {report.split: len(report.content.infos) for report in reports}
    told = _set_batches(settings, base, pictures, batch_size, gpus, target)
    head = [f'{_name_of(found)}, {found.format}: {count(pictures["train"], "picture")} to train '
            f'on, {pictures["val"]} to validate on.', *notes,
            'Written by `spartan-mm train`, and yours to edit: `spartan-mm train` takes this file.']
    text = ''.join(f'# {line}\n' for line in _wrap(head)) + write_text(settings)
    _write(target, text)
    _tell(found, reports, [*notes, *told], target)
    return target


def write_text(settings: Settings) -> str:
    """Write settings as the Python of a config."""
    grouped = {key for group in _GROUPS for key in group}
    blocks = []
    for group in (*_GROUPS, [key for key in settings if key not in grouped]):
        lines = [(f'# {_COMMENTS[key]}\n' if key in _COMMENTS
                  and (key != 'param_scheduler' or 'custom_hooks' in settings) else '')
                 + f'{key} = {_literal(settings[key], len(key) + 3)}\n'
                 for key in group if settings.get(key, {}) != {}]
        blocks += [''.join(lines)] if lines else []
    return '\n'.join(blocks)


def _read_base(model: str, data: Data) -> Config:
    base = Config.fromfile(find_config(model))
    check_predicts(base, model)
    task = 'classification' if base.get('default_scope') == 'mmpretrain' else 'detection'
    if task != data.task:
        has = ('folders of classes, for classifiers' if data.task == 'classification' else
               f'boxes in the format of {data.format}, for detectors')
        raise UsageError(f'{data.root} has {has}, and {model} is for {task}: give one of '
                         f'{join(list_models(task=data.task), 5)} as the model')
    return base


def _make_settings(data: Data, base: Config, model: str, seed: int, deterministic: bool,
                   notes: list[str]) -> Settings:
    """Make the settings of a training, in the order in which they are read."""
    named = not Path(model).is_file()
    settings: Settings = dict(
        _base_=_Name(f"__import__('spartan_mm').config_path({model!r})") if named else
        str(Path(model).absolute()),
        # Raw and in three quotes, as what is put there may have quotes of its own.
        work_dir=_Name('r"""{{ fileDirname }}"""'),
        data_root=str(data.root),
        classes=data.classes,
        model={})
    imports = (base.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else [*imports]
    if f'spartan_mm.{data.task}' not in imports:
        settings['custom_imports'] = dict(imports=[*imports, f'spartan_mm.{data.task}'])
    for head in find_heads(base.model):
        _set_option(settings, f'model.{head.path}.num_classes', len(data.classes))
    if 'num_classes' in (base.model.get('data_preprocessor') or {}):
        _set_option(settings, 'model.data_preprocessor.num_classes', len(data.classes))
    for split, name in (('train', 'train'), ('val', 'test')):
        steps = [_plain(step) for step in _dataset_of(base, split).get('pipeline', ())]
        settings[f'{name}_pipeline'] = steps
    for split, pipeline in (('train', 'train_pipeline'), ('val', 'test_pipeline')):
        found = data.splits[split]
        dataset = dict(type=found['type'], data_root=_Name('data_root')) | found | dict(
            metainfo=dict(classes=_Name('classes')), pipeline=_Name(pipeline))
        if data.task == 'detection':
            dataset |= dict(filter_cfg=dict(filter_empty_gt=False)) if split == 'train' else dict(
                test_mode=True)
        settings[f'{split}_dataset'] = dataset
    for split in ('train', 'val'):
        workers = min(base[f'{split}_dataloader'].get('num_workers', 0), os.cpu_count() or 1)
        settings[f'{split}_dataloader'] = dict(
            num_workers=workers, dataset=_Name(f'dict({split}_dataset, _delete_=True)'))
    settings['test_dataloader'] = _Name('val_dataloader')
    if data.task == 'detection':
        settings['val_evaluator'] = dict(
            _delete_=True, type='CheckedCocoMetric', dataset=_Name('val_dataset'), metric='bbox',
            proposal_nums=(1, 10, 100))
    else:
        settings['val_evaluator'] = dict(topk=(1, 5) if len(data.classes) > 5 else (1,))
    settings['test_evaluator'] = _Name('val_evaluator')
    if named and data.task == 'detection':
        _take_recipe(settings, base)
    elif 'base_batch_size' in (base.get('auto_scale_lr') or {}):
        settings['auto_scale_lr'] = dict(enable=True)
    settings['randomness'] = dict(seed=seed) | (dict(deterministic=True) if deterministic else {})
    return settings


def _take_recipe(settings: Settings, base: Config) -> None:
    """Train by the recipe for small data in place of the model's own."""
    recipe = Config.fromfile(root() / _RECIPE)
    settings['train_cfg'] = dict(max_epochs=recipe.train_cfg.max_epochs)
    settings['optim_wrapper'] = dict(_delete_=True, **_plain(recipe.optim_wrapper))
    for key in ('param_scheduler', 'custom_hooks'):
        settings[key] = _plain(recipe[key])
    if base.model.backbone.get('depth', 0) >= 50:
        for rule in settings['optim_wrapper']['paramwise_cfg']['rules']:
            if 'lr_mult' in rule:
                rule['lr_mult'] = 0.1  # as the recipe says of large ones
    settings['train_dataloader']['batch_size'] = _RECIPE_BATCH


def _dataset_of(base: Config, split: str) -> Mapping[str, Any]:
    for _, dataset in find_datasets(base, split):
        return dataset
    raise UsageError(f'the config of the model has no {split}_dataloader, whose pipeline would be '
                     'taken')


def _plain(value: Any) -> Any:
    """Copy a value of a config, its dicts made Python's own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return copy.deepcopy(value)


def _set_option(settings: Settings, key: str, value: Any) -> None:
    """Set what lies under a key with dots."""
    *path, last = key.split('.')
    place: Any = settings
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict) or any(part.isdecimal() for part in (*path, last)):
        raise UsageError(f'{key} cannot be set beside data: write the config without it, and '
                         f'change it there')
    place[last] = value


def _start_from(settings: Settings, base: Config, weights: str) -> None:
    """Start from a checkpoint: a classifier's is for the backbone of a detector."""
    state_dict = find_state_dict(read_checkpoint(local_file(weights)), weights)
    weights = weights if '://' in weights else str(Path(weights).absolute())
    detector = any('decoder.' in name or 'bbox_head.' in name for name in state_dict)
    if base.get('default_scope') == 'mmpretrain' or detector:
        settings['load_from'] = weights
    else:
        _set_option(settings, 'model.backbone.init_cfg', dict(
            _delete_=True, type='CheckedPretrained', checkpoint=weights, prefix='backbone.'))


def _drop_missing_weights(settings: Settings, base: Config, notes: list[str]) -> None:
    """Start from nothing where the file is not there that the model's config names."""
    backbone = base.model.get('backbone') or {}
    start = backbone.get('init_cfg') or {}
    checkpoint = start.get('checkpoint') or '' if isinstance(start, Mapping) else ''
    if '://' in checkpoint or backbone.get('pretrained'):
        return
    if checkpoint and Path(checkpoint).is_file():
        _set_option(settings, 'model.backbone.init_cfg.checkpoint',
                    str(Path(checkpoint).absolute()))
        return
    if checkpoint:
        _set_option(settings, 'model.backbone.init_cfg', None)
    notes.append('all weights start from random numbers, which takes many pictures and epochs; '
                 'with --weights FILE they start from a checkpoint')


def _resize(settings: Settings, base: Config, size: int) -> None:
    """Let pipelines and batches give images of another size."""
    if size % 32:
        raise UsageError(f'--size {size} must be a multiple of 32, the stride of the coarsest maps')
    before = next((side for side in _sides(settings['test_pipeline'])), size)
    for name in ('train_pipeline', 'test_pipeline'):
        settings[name] = [_with_size(step, size) for step in settings[name]]
    preprocessor = base.model.get('data_preprocessor') or {}
    augments = preprocessor.get('batch_augments') or []
    if any(augment.get('type') == 'BatchRandomResize' for augment in augments):
        scaled = []
        for augment in map(_plain, augments):
            if augment['type'] == 'BatchRandomResize':
                with DefaultScope.overwrite_default_scope(base.default_scope):
                    sizes = MODELS.build(augment).sizes
                augment['sizes'] = [max(32, 32 * round(side * size / before / 32))
                                    for side, _ in sizes]
            scaled.append(augment)
        _set_option(settings, 'model.data_preprocessor.batch_augments', scaled)


def _sides(value: Any) -> Iterator[int]:
    """Find the sizes that steps of a pipeline make."""
    if isinstance(value, dict):
        for key in ('scale', 'size'):
            side = value.get(key)
            if 'type' in value and isinstance(side, int | list | tuple):
                yield side if isinstance(side, int) else side[0]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _sides(item)


def _with_size(step: Any, size: int) -> Any:
    """Change the sizes that a step of a pipeline makes, and those inside of it."""
    if isinstance(step, list):
        return [_with_size(item, size) for item in step]
    if not isinstance(step, dict):
        return step
    step = {key: _with_size(value, size) for key, value in step.items()}
    for key in ('scale', 'size'):
        side = step.get(key)
        if 'type' in step and isinstance(side, int | list | tuple):
            step[key] = size if isinstance(side, int) else (size, size)
    return step


def _set_epochs(settings: Settings, base: Config, epochs: int) -> None:
    """Set the number of epochs, and let a schedule that counts them end with the last."""
    _set_option(settings, 'train_cfg.max_epochs', epochs)
    before = base.train_cfg.get('max_epochs')
    schedules = settings.get('param_scheduler') or _plain(base.get('param_scheduler') or [])
    alone = isinstance(schedules, dict)
    changed = False
    for schedule in [schedules] if alone else schedules:
        if before and schedule.get('end') == before and schedule.get('by_epoch', True):
            schedule['end'] = epochs
            changed = True
            if isinstance(schedule.get('warmup'), int):
                schedule['warmup'] = max(1, round(schedule['warmup'] * epochs / before))
    if changed:
        settings['param_scheduler'] = dict(schedules, _delete_=True) if alone else schedules


def _set_batches(settings: Settings, base: Config, pictures: Mapping[str, int],
                 batch_size: int | str | None, gpus: int, target: Path) -> list[str]:
    """Set the batch sizes, so that an epoch has some steps; return what to tell of it.

    It stays out of the config, as the free memory is another one each time.
    """
    told = []
    loader = settings['train_dataloader']
    of_model = loader.pop('batch_size', base.train_dataloader.get('batch_size', 1))
    most = max(1, pictures['train'] // gpus // _STEPS, min(2, pictures['train'] // gpus))
    if isinstance(batch_size, int):
        if batch_size * gpus > pictures['train']:
            raise UsageError(f'--batch-size {batch_size} of {count(gpus, "process")} is more than '
                             f'the {count(pictures["train"], "picture")} to train on')
        loader['batch_size'] = batch_size
    else:
        loader['batch_size'] = min(of_model, most)
        if batch_size == 'auto':
            found, how = _read_batch_size(target), f'as {target} says, which is there'
            if found is None:
                total = (base.get('auto_scale_lr') or {}).get('base_batch_size', of_model)
                cfg = Config.fromstring(write_text(settings), '.py')
                found, how = find_batch_size(cfg, min(most, max(1, total // gpus)))
            loader['batch_size'] = found or loader['batch_size']
            told.append(f'a batch has {count(loader["batch_size"], "image")}: {how}')
    settings['val_dataloader'].setdefault('batch_size', min(
        base.val_dataloader.get('batch_size', 1), pictures['val']))
    return told


def _read_batch_size(target: Path) -> int | None:
    """Read what was found to fit when the same command was given before.

    The config is not run for it: an edited one is refused.
    """
    text = target.read_text('utf-8', 'replace') if target.is_file() else ''
    found = re.search(r'^train_dataloader = .*?\bbatch_size=(\d+)', text, re.M | re.S)
    return int(found[1]) if found else None


def _check(cfg: Config) -> list[Report]:
    """Check the data as ``spartan-mm check-data`` does.

    Raises:
        DataError: It has errors; the message has the first.
    """
    reports = check_config(cfg, ('train', 'val'))
    errors = [f'{report.split}: {finding.message}' for report in reports
              for finding in report.findings if finding.level == 'error']
    if errors:
        raise DataError(f'{errors[0]}' + (f' ({len(errors) - 1} more errors: {join(errors[1:], 5)})'
                                          if errors[1:] else ''))
    return reports


def _write(target: Path, text: str) -> None:
    """Write the config, unless there is another one."""
    if target.exists():
        if target.read_text('utf-8') == text:
            return
        raise UsageError(f'{target} is there and says something else, be it edited or of another '
                         f'run: train it as it is, `spartan-mm train {target}`, or name another '
                         'folder with --work-dir')
    with write_whole(target) as file:
        file.write(text.encode())


def _tell(data: Data, reports: Sequence[Report], notes: Sequence[str], target: Path) -> None:
    """Print what was found."""
    print(printable(f'{data.root}: {data.format}, {count(len(data.classes), "class")} '
                    f'({join(data.classes, 8)})'))
    for report in reports:
        content = report.content
        print(printable(f'{report.split}: {count(len(content.infos), "picture")}, '
                        f'{count(int(content.count_objects().sum()), "label")}'))
        for finding in report.findings:
            print(printable(f'  {finding.level}: {finding.message}'))
    for note in notes:
        print(printable(f'note: {note}'))
    print(printable(f'config: {target}'))


def _name_of(data: Data) -> str:
    return data.root.name or 'data'


def _wrap(lines: Sequence[str]) -> Iterator[str]:
    """Cut lines at spaces, to fit beside the mark of a comment."""
    for line in map(printable, lines):
        while len(line) > _WIDTH - 2 and ' ' in line[:_WIDTH - 2]:
            place = line.rindex(' ', 0, _WIDTH - 2)
            yield line[:place]
            line = line[place + 1:]
        yield line


def _literal(value: Any, column: int) -> str:
    """Write a value as Python, over several lines if it does not fit behind a column."""
    if isinstance(value, _Name):
        return str(value)
    flat = _flat(value)
    if len(flat) + column <= _WIDTH or not isinstance(value, dict | list | tuple) or not value:
        return flat
    return _broken(value, 0)


def _flat(value: Any) -> str:
    if isinstance(value, _Name):
        return str(value)
    if isinstance(value, dict):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{key}={_flat(item)}" for key, item in value.items())})'
        return '{' + ', '.join(f'{key!r}: {_flat(item)}' for key, item in value.items()) + '}'
    if isinstance(value, list):
        return f'[{", ".join(map(_flat, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(_flat, value))}{"," if len(value) == 1 else ""})'
    return repr(value)


def _broken(value: Any, indent: int) -> str:
    """Write a dict or a list, an entry a line."""
    if isinstance(value, dict):
        named = all(isinstance(key, str) and key.isidentifier() for key in value)
        entries = [(f'{key}=' if named else f'{key!r}: ', item) for key, item in value.items()]
        start, end = ('dict(', ')') if named else ('{', '}')
    else:
        named, entries = False, [('', item) for item in value]
        start, end = ('[', ']') if isinstance(value, list) else ('(', ')')
    inner = indent + 4
    lines = []
    for name, item in entries:
        text = _flat(item)
        fits = inner + len(name) + len(text) + 1 <= _WIDTH
        if not fits and isinstance(item, dict | list | tuple) and item:
            text = _broken(item, inner)
        lines.append(f'{" " * inner}{name}{text},\n')
    return f'{start}\n{"".join(lines)}{" " * indent}{end}'
