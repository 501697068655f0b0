"""Settings of a config are brought into one form, or refused in a line, before anything is built.

A function that takes a config, ``cfg``, and returns nothing changes it in place.
"""

import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from ..datasets.settings import RENAMED, SPLITS
from ..errors import UsageError
from ..model_index import check_predicts
from ..text import join

# What a runner needs for each of them: all or none.
TRIOS = {'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
         **{split: (f'{split}_dataloader', f'{split}_cfg', f'{split}_evaluator')
            for split in ('val', 'test')}}

# What settings may be, besides None, and in words.
_FORMS = {
    **dict.fromkeys(('model', 'optim_wrapper', 'default_hooks', 'env_cfg', 'randomness',
                     'auto_scale_lr', 'visualizer', *(f'{split}_{part}' for split in SPLITS
                                                      for part in ('dataloader', 'cfg'))),
                    (dict, 'a dict')),
    **dict.fromkeys(('param_scheduler', 'val_evaluator', 'test_evaluator'),
                    ((dict, list, tuple), 'a dict or a list of dicts')),
    'custom_hooks': ((list, tuple), 'a list of dicts'),
    **dict.fromkeys(('work_dir', 'load_from'), (str, 'a text')),
    'resume': (bool, 'True or False'),
}

# Settings of OpenMMLab's versions before mmengine, mmdet 2 among them, and their names today.
_OLD = {
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'total_iters': 'train_cfg.max_iters',
    'data': 'train_dataloader, val_dataloader and test_dataloader',
    'evaluation': 'val_evaluator, train_cfg.val_interval and default_hooks.checkpoint.save_best',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger and visualizer.vis_backends',
    'fp16': 'optim_wrapper.type=AmpOptimWrapper, or the flag --amp',
    'resume_from': 'the flag --resume',
    'dist_params': 'env_cfg.dist_cfg',
    'seed': 'randomness.seed',
    'deterministic': 'randomness.deterministic',
    'cudnn_benchmark': 'env_cfg.cudnn_benchmark',
}
_OLD_IN_LOADERS = {old: RENAMED[old] for old in ('samples_per_gpu', 'workers_per_gpu')}

# What mmengine's own loops take.
_LOOPS = (None, 'EpochBasedTrainLoop', 'IterBasedTrainLoop', 'ResumableTrainLoop')
_LOOP_SETTINGS = {'type', '_scope_', 'by_epoch', 'max_epochs', 'max_iters', 'val_begin',
                  'val_interval', 'dynamic_intervals'}

# What torch refuses of a data loader without workers.
_OF_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context', 'timeout')


def settle(cfg: Config, asked: Collection[str] = ()) -> None:
    """Check the settings that a runner reads, and settle those of data loaders.

    Args:
        cfg: The config.
        asked: Settings that a flag made, which can be no variables of a config.

    Raises:
        UsageError: A setting has another form than mmengine reads, or is one of mmdet 2.
    """
    for key, (kinds, words) in _FORMS.items():
        value = cfg.get(key)
        if value is not None and not isinstance(value, kinds):
            raise UsageError(f'{key}={value!r} must be {words}')
    _refuse_old(cfg, asked)
    for key in ('custom_hooks', 'param_scheduler', 'val_evaluator', 'test_evaluator'):
        items = cfg.get(key)
        if isinstance(items, list | tuple):
            for number, item in enumerate(items):
                _check_built(f'{key}[{number}]', item)
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if hook is not None:
            _check_built(f'default_hooks.{name}', hook)
    _check_train_cfg(cfg.get('train_cfg') or {})
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            _settle_loader(f'{split}_dataloader', loader)


def check_run(cfg: Config, split: str) -> None:
    """Check that a config has all that a training or a test needs.

    Args:
        split: 'train' or 'test'.

    Raises:
        UsageError: It has not.
    """
    if split == 'test':
        check_predicts(cfg, cfg.filename or 'the config')
    for other, keys in TRIOS.items():
        missing = [key for key in keys if cfg.get(key) is None]
        if missing and (other == split or len(missing) < len(keys)):
            raise UsageError(f'the config has no {join(missing)}: {join(keys)} belong together'
                             + ('' if other == split else '; set all of them, or all to None'))
        if not missing and 'sampler' not in cfg[keys[0]]:
            raise UsageError(f"{keys[0]} has no sampler; set {keys[0]}.sampler=dict(type="
                             f"'DefaultSampler', shuffle={other == 'train'})")


def _refuse_old(cfg: Config, asked: Collection[str]) -> None:
    """Refuse settings that nobody reads any more, or warn of them.

    What today's settings were made of is neither. What may be a variable of the user is a warning.
    """
    used = [value for key, value in cfg.items() if key not in _OLD]
    old = [key for key in _OLD if cfg.get(key) not in (None, False)
           and not (any(cfg[key] == value for value in _walk(used))
                    if isinstance(cfg[key], dict) else cfg[key] == _find(cfg, _OLD[key]))]
    if not old:
        return
    message = (f'nobody reads {join(f"{key}={cfg[key]!r}" for key in old)}, which '
               f'{"is a setting" if len(old) == 1 else "are settings"} of mmdet 2 and the like; '
               f'today: {"; ".join(_OLD[key] for key in old)}')
    set_now = {name.partition('.')[0] for name in asked}
    if all(_may_be_variable(cfg, key) and key not in set_now for key in old):
        print_log(message, 'current', logging.WARNING)
    else:
        raise UsageError(message)


def _may_be_variable(cfg: Config, key: str) -> bool:
    value = cfg[key]
    today = re.match(r'\w+', _OLD[key])[0]
    return not isinstance(value, dict) or (
        key in ('optimizer', 'data') and cfg.get(today) is not None
        and not _OLD_IN_LOADERS.keys() & value.keys())


def _check_built(name: str, settings: Any) -> None:
    """Check that something can be built of settings."""
    if isinstance(settings, dict) and 'type' not in settings:
        raise UsageError(f'{name} has no type: {settings!r}')
    if isinstance(settings, str | int | float | list | tuple):
        raise UsageError(f'{name}={settings!r} must be a dict with a type')


def _check_train_cfg(train_cfg: dict[str, Any]) -> None:
    if train_cfg.get('type') not in _LOOPS:
        return
    unknown = sorted(set(train_cfg) - _LOOP_SETTINGS)
    if unknown:
        raise UsageError(f'train_cfg has {join(unknown)}, which no training loop takes; what a '
                         'model needs for training is model.train_cfg')
    for key in ('max_epochs', 'max_iters'):
        _check_number('train_cfg', train_cfg, key, 1)


def _settle_loader(name: str, loader: dict[str, Any]) -> None:
    """Bring the settings of a data loader into a form that torch takes."""
    for old, today in _OLD_IN_LOADERS.items():
        if old in loader:
            raise UsageError(f'{name}.{old}={loader[old]!r} is a setting of mmdet 2; today it is '
                             f'{name}.{today}')
    _check_number(name, loader, 'batch_size', 1)
    _check_number(name, loader, 'num_workers', 0)
    if isinstance(loader.get('dataset'), list | tuple):
        raise UsageError(f'{name}.dataset is a list; several datasets are joined by '
                         "dict(type='ConcatDataset', datasets=[...])")
    for part in ('dataset', 'sampler', 'batch_sampler'):
        _check_built(f'{name}.{part}', loader.get(part))

    shuffle = loader.pop('shuffle', None)
    if shuffle is None:
        pass
    elif loader.get('sampler') is None:
        loader['sampler'] = dict(type='DefaultSampler', shuffle=bool(shuffle))
    elif loader['sampler'].get('shuffle') != shuffle:
        raise UsageError(f'{name}.shuffle={shuffle!r} stands beside {name}.sampler='
                         f'{loader["sampler"]!r}, which decides the order; set '
                         f'{name}.sampler.shuffle')

    batch_sampler = loader.get('batch_sampler')
    if isinstance(batch_sampler, dict):
        # The batches are the batch sampler's business, and so is the last one.
        if loader.pop('drop_last', False):
            batch_sampler.setdefault('drop_last', True)
        loader.setdefault('batch_size', batch_sampler.get('batch_size', 1))
    if not loader.get('num_workers'):
        for key in _OF_WORKERS:
            loader.pop(key, None)


def _check_number(name: str, settings: dict[str, Any], key: str, least: int) -> None:
    value = settings.get(key, least)
    if isinstance(value, float) and value.is_integer():
        value = settings[key] = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f'{name}.{key}={value!r} must be a whole number, at least {least}')


def _find(cfg: Config, path: str) -> Any:
    """What stands at a path of two names, None if there is nothing."""
    name, _, leaf = path.partition('.')
    return (cfg.get(name) or {}).get(leaf)


def _walk(value: Any) -> Iterator[Any]:
    """All that is in a config, at any depth."""
    yield value
    for part in value.values() if isinstance(value, dict) else (
            value if isinstance(value, list | tuple) else ()):
        yield from _walk(part)
