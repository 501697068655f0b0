"""The names of this package's models, and their configs.

The names are those of ``configs/*/metafile.yml``, which are the names of the config files.
"""
import difflib
import fnmatch
import functools
import importlib
from pathlib import Path
from typing import Any

from mmengine import fileio
from mmengine.config import Config

from .errors import UsageError

#: What models are for, each with the folder of configs, and the toolbox, that it belongs to.
TASKS = {'classification': 'classification', 'detection': 'detection',
         'pretraining': 'classification'}
CONFIG_SUFFIXES = ('.json', '.py', '.yaml', '.yml')
_PACKAGE = Path(__file__).parent


class UnknownModelError(UsageError):
    """A name that no model has."""


class NoConfigError(UsageError, FileNotFoundError):
    """A name that is neither that of a config file nor that of a model."""


def root() -> Path:
    """Find the folder that holds ``model-index.yml``, ``configs`` and ``tools``.

    A wheel has them in ``spartan_mm/.mim``, where OpenMMLab's tools look for them; a checkout and
    its editable install have them beside the package.
    """
    installed = _PACKAGE / '.mim'
    return installed if installed.is_dir() else _PACKAGE.parent


@functools.cache
def read_metafiles(folder: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Read what ``model-index.yml`` and the metafiles that it imports say of the models.

    Args:
        folder: The one that holds ``model-index.yml``; None for this package's own.

    Returns:
        The entry of each model by its name, in their order.

    Raises:
        ValueError: Two models have the same name.
    """
    folder = root() if folder is None else Path(folder)
    models = {}
    for path in fileio.load(folder / 'model-index.yml')['Import']:
        for model in fileio.load(folder / path)['Models']:
            if model['Name'] in models:
                raise ValueError(f'{path}: there are two models called {model["Name"]}')
            models[model['Name']] = model
    return models


def list_models(pattern: str = '*', task: str | None = None) -> list[str]:
    """List the names that :func:`get_config` and :func:`get_model` take.

    Args:
        pattern: Which names, with the wildcards of a shell, such as ``'rtdetr_*'``.
        task: 'detection', 'classification' or 'pretraining'; None for all.

    Raises:
        ValueError: There is no such task.

    Example:
        >>> list_models('rtdetr_spartan_?', task='detection')
        ['rtdetr_spartan_t']
    """
    if task not in (None, *TASKS):
        raise ValueError(f'task={task!r} must be one of {", ".join(map(repr, TASKS))}, or None')
    names = fnmatch.filter(read_metafiles(), pattern)
    return [name for name in names if task in (None, task_of(name))]


def task_of(name: str) -> str:
    """Tell what a model is for: 'detection', 'classification' or 'pretraining'."""
    folder = Path(config_path(name)).relative_to(root() / 'configs').parts[0]
    return read_metafiles()[name]['Metadata'].get('Task', folder)


def check_predicts(config: Config, name: str) -> None:
    """Refuse a config that pre-trains a backbone where a classifier or a detector is needed.

    Raises:
        UsageError: It is one; `name` is what the message calls it.
    """
    if str((config.get('model') or {}).get('type')).endswith('SparK'):
        raise UsageError(
            f'{name} pre-trains a backbone and predicts nothing: start a classifier or detector '
            "from its checkpoint, with model.backbone.init_cfg=dict(type='CheckedPretrained', "
            "prefix='backbone.', checkpoint=FILE)")


def config_path(name: str) -> str:
    """Find the config file of a model.

    In a config of your own, outside of this repository, it makes the base:
    ``_base_ = __import__('spartan_mm').config_path('rtdetr_spartan_t')``.

    Args:
        name: One of :func:`list_models`.

    Raises:
        UnknownModelError: There is no such model; the message has the closest names.

    Example:
        >>> config_path('rtdetr_spartan_t')
        '.../configs/detection/rtdetr_spartan_t.py'
        >>> config_path('spartan-t')
        Traceback (most recent call last):
            ...
        spartan_mm.model_index.UnknownModelError: there is no model 'spartan-t'; did you mean ...
    """
    models = read_metafiles()
    if name not in models:
        close = difflib.get_close_matches(str(name), models, 4, 0.5)
        hint = f'did you mean {", ".join(close)}?' if close else 'see spartan_mm.list_models()'
        raise UnknownModelError(f'there is no model {name!r}; {hint}')
    return str(root() / models[name]['Config'])


def is_checkpoint(name: str | Path) -> bool:
    """Whether a name is that of a checkpoint, a file or a URL, and not of a config or a model."""
    return '://' in str(name) or (Path(name).is_file()
                                  and Path(name).suffix not in CONFIG_SUFFIXES)


def find_config(name_or_path: str | Path) -> Path:
    """Find a config by its path, or by the name of a model.

    Args:
        name_or_path: A file that exists, or one of :func:`list_models`.

    Raises:
        NoConfigError: It is neither.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    try:
        return Path(config_path(str(name_or_path)))
    except UnknownModelError as error:
        raise NoConfigError(f'config {name_or_path} does not exist, and {error}') from error


def get_config(name: str) -> Config:
    """Read the config of a model and register what it names.

    Args:
        name: One of :func:`list_models`.

    Raises:
        UnknownModelError: There is no such model; the message has the closest names.
        ImportError: What the model's task needs is not installed; the message says what to do.
    """
    path = config_path(name)
    importlib.import_module(f'spartan_mm.{TASKS[task_of(name)]}')
    return Config.fromfile(path)
