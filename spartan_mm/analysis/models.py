"""Models by name, whoever's they are: what the commands that compare and look into models take."""

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from .. import zoo
from ..backbones import SpaRTAN
from ..engine.launch import load_config
from ..errors import UsageError
from ..model_index import check_predicts
from ..requirements import require
from ..weights.initialize import without_training
from ..weights.loading import load_for_inference
from ..weights.stored_config import config_from, find_test_dataset
from ..zoo import UnknownModelError

TASKS = {'mmdet': 'detection', 'mmpretrain': 'classification'}

#: What a name may be, for error messages and the help of commands.
NAMES = ("the name of a model of this package, a config file, a checkpoint that holds its config, "
         "'xt' or 't' (the backbone alone), 'timm:NAME', 'mmpretrain:NAME' or 'mmdet:NAME' (of "
         "their model zoos), or one of their configs such as "
         "'mmdet::detr/detr_r50_8xb2-150e_coco.py'")

# Per package of OpenMMLab: the oldest version that works, see `requirements.require`.
_MINIMUM = {'mmdet': '3.3.0', 'mmpretrain': '1.2.0'}


class CannotRunError(UsageError):
    """A model that cannot run as asked for, such as on images of this size."""


@dataclass(frozen=True)
class NamedModel:
    """A model that a name stands for.

    Args:
        name: What to call it in tables and pictures.
        source: 'spartan_mm', 'config' (a config or a checkpoint of the user's), 'mmpretrain',
            'mmdet' or 'timm'.
        task: 'classification', 'detection' or 'backbone'.
        model: The model, in evaluation mode. ``model(images)``, of images (N, 3, H, W) that are
            normalized already, gives outputs without post-processing: class logits, what a
            detector's head gives, or a backbone's maps.
        shape: (H, W) of the images that its test pipeline makes; None if that does not say.
        config: Its config; None for timm's models and a backbone alone.
    """

    name: str
    source: str
    task: str
    model: nn.Module
    shape: tuple[int, int] | None
    config: Config | None

    @property
    def has_spartan(self) -> bool:
        """Whether it is, or is built on, a SpaRTAN."""
        return any(isinstance(module, SpaRTAN) for module in self.model.modules())


def load_named_model(name: str | Path, checkpoint: str | Path | None = None,
                     device: str | torch.device = 'cpu') -> NamedModel:
    """Build the model that a name stands for.

    Nothing is downloaded unless a URL is given. timm's models get the images of the size that they
    were trained with.

    Args:
        name: One of :data:`NAMES`; a checkpoint is a file or a URL, as training and publishing
            write it.
        checkpoint: The weights, a local path or a URL; None for those of a checkpoint that `name`
            is, and else for random ones.
        device: Where to put the model, such as 'cuda:0'; 'meta' for shapes without numbers.

    Raises:
        UnknownModelError: If the name stands for nothing; the message has the closest names.
        ImportError: If the package whose model it is is not installed.
        FileNotFoundError: If there is no checkpoint at the path `checkpoint`.
        CheckpointError: If a checkpoint cannot be read or belongs to another architecture.
    """
    name = str(name)
    source, config, weights = _resolve(name)
    title = title_of(name)
    checkpoint = checkpoint or weights
    if config is not None:
        task, shape = task_of(config, name), find_test_shape(config)
        build = partial(zoo.get_model, config)
    elif source == 'timm':
        task, shape, build = 'classification', None, _timm_builder(title)
    else:
        task, shape, build = 'backbone', (224, 224), partial(SpaRTAN, name)

    with zoo.quiet():
        # The shapes alone are not enough where a checkpoint is to fit.
        if torch.device(device).type == 'meta' and checkpoint is None:
            model = build_without_weights(config) if config else build_without_numbers(build)
        else:
            model = build()
            if checkpoint is not None:
                load_for_inference(model, checkpoint)
            model.to(device)
    if source == 'timm':
        # In timm (channels, height, width).
        shape = tuple(model.pretrained_cfg['input_size'][1:])
    if task == 'detection':
        model.register_forward_pre_hook(_give_samples, with_kwargs=True)
    return NamedModel(title, source, task, model.eval(), shape, config)


def read_config(name: str | Path) -> Config | None:
    """Read the config that a name stands for, and build nothing.

    Args:
        name: See :func:`load_named_model`.

    Returns:
        The config; None for timm's models and a backbone alone.

    Raises:
        UnknownModelError: If the name stands for nothing; the message has the closest names.
    """
    return _resolve(str(name))[1]


def title_of(name: str | Path) -> str:
    """Tell what to call the model that a name stands for."""
    package, path, own = _split(str(name))
    if package:
        return Path(own).stem if path else own
    return f'SpaRTAN-{own.upper()}' if own in SpaRTAN.arch_settings else Path(own).stem


def task_of(config: Config, name: str) -> str:
    """Tell whether a config is for 'detection' or 'classification'.

    Args:
        config: The config.
        name: What to call it in the error message.

    Raises:
        UnknownModelError: If it is for neither.
        UsageError: If it pre-trains a backbone.
    """
    check_predicts(config, name)
    scope = config.get('default_scope')
    if scope not in TASKS or 'model' not in config:
        raise UnknownModelError(f'{name} describes neither a detector nor a classifier (its '
                                f'default_scope is {scope!r}, not one of '
                                f'{", ".join(map(repr, TASKS))})')
    return TASKS[scope]


def find_test_shape(config: Config) -> tuple[int, int] | None:
    """Find the (H, W) of the images that a config's test pipeline makes; None if it has none."""
    return _find_shape(find_test_dataset(config).get('pipeline') or ())


def describe_images(images: Tensor) -> list:
    """Make mmdet's samples for images that fill their batch.

    Args:
        images: (N, 3, H, W).

    Returns:
        A ``DetDataSample`` for each, with its meta information alone.
    """
    from mmdet.structures import DetDataSample
    size = tuple(images.shape[-2:])
    return [DetDataSample(metainfo=dict(
        img_id=index, img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
        scale_factor=(1., 1.))) for index in range(len(images))]


def build_without_weights(config: Config) -> nn.Module:
    """Build the model of a config on the meta device: shapes, and no numbers.

    Args:
        config: One whose ``custom_imports`` have been made.
    """
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return build_without_numbers(lambda: MODELS.build(without_training(config.model)))


def build_without_numbers(build: Callable[[], nn.Module]) -> nn.Module:
    """Call what builds a model, and have it on the meta device.

    Args:
        build: Builds the model where torch's default device is.
    """
    try:
        with torch.device('meta'):
            # Not everything heeds torch's default device: torch.Tensor(...) does not.
            model = build().to('meta')
    except (NotImplementedError, RuntimeError):
        # It computes something while it is built, such as the rate of drop path block by block.
        model = build().to('meta')
    return model


@cache
def packaged_models(package: str) -> dict[str, Mapping[str, Any]]:
    """Read the metafiles that a package of OpenMMLab comes with.

    Args:
        package: 'mmdet' or 'mmpretrain'.

    Returns:
        The entry of each model by its name. Of two with the same name, mmdet has a pair, the first.

    Raises:
        ImportError: If the package is not installed.
    """
    models = {}
    folder = _packaged(package)
    for path in fileio.load(folder / 'model-index.yml')['Import']:
        for model in fileio.load(folder / path).get('Models') or ():
            models.setdefault(model['Name'], model)
    return models


def find_entry(name: str | Path) -> tuple[Mapping[str, Any], str] | None:
    """Find what the metafiles say of a model.

    Args:
        name: See :func:`load_named_model`.

    Returns:
        The model's entry, and whose metafile has it: 'spartan_mm', 'mmdet' or 'mmpretrain'. None if
        there is none.
    """
    package, path, own = _split(str(name))
    if package in _MINIMUM:
        for own_name, entry in packaged_models(package).items():
            if own == (entry['Config'].removeprefix('configs/') if path else own_name):
                return entry, package
        return None
    for own_name, entry in zoo.read_metafiles().items():
        # A config of this package may be named by its path, too.
        if name == own_name or (Path(name).is_file()
                                and Path(name).resolve() == Path(zoo.config_path(own_name))):
            return entry, 'spartan_mm'
    return None


def _split(name: str) -> tuple[str | None, bool, str]:
    """Split 'package:name' or 'package::path': the package, whether it is a path, and the rest."""
    package, colon, rest = name.partition(':')
    if not colon or package not in ('timm', *_MINIMUM):
        return None, False, name
    return package, rest.startswith(':'), rest.removeprefix(':')


def _resolve(name: str) -> tuple[str, Config | None, str | None]:
    """Find the source of a model, its config, and a checkpoint."""
    package, path, own = _split(name)
    if package == 'timm':
        return 'timm', None, None
    if package:
        return package, _packaged_config(package, path, own), None
    if name in SpaRTAN.arch_settings:
        return 'spartan_mm', None, None
    if zoo.is_checkpoint(name):
        return 'config', config_from(name), name
    if Path(name).is_file():
        return 'config', load_config(name), None
    if name in zoo.read_metafiles():
        return 'spartan_mm', zoo.get_config(name), None
    kinds = {suffix: 'config' for suffix in zoo.CONFIG_SUFFIXES} | {
        suffix: 'checkpoint' for suffix in ('.pt', '.pth', '.safetensors')}
    kind = kinds.get(Path(name).suffix)
    raise UnknownModelError(f'{kind} {name} does not exist' if kind else
                            f'there is no model {name!r}; {_did_you_mean(name)}')


def _packaged(package: str) -> Path:
    """The folder in a package of OpenMMLab that has its metafiles and configs."""
    require(package, _MINIMUM[package], TASKS[package])
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    # An editable install has them beside the package.
    return folder / '.mim' if (folder / '.mim').is_dir() else folder.parent


def _packaged_config(package: str, path: bool, name: str) -> Config:
    folder = _packaged(package)
    models = packaged_models(package)
    if path:
        file = folder / 'configs' / name
        known = [model['Config'].removeprefix('configs/') for model in models.values()]
    else:
        # Some of mmdet's entries are names of URLs, or of files that are elsewhere.
        file = folder / models[name]['Config'] if name in models else folder / 'missing'
        known = list(models)
    if not file.is_file():
        raise UnknownModelError(
            f'{package} comes with no {"config" if path else "model"} {name!r}; the closest are '
            f'{", ".join(_closest(name, known, package + ("::" if path else ":")))}')
    return load_config(str(file))


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    timm = require('timm', '1.0.4', 'timm')
    if not timm.is_model(name):
        raise UnknownModelError(f'timm {timm.__version__} has no model {name!r}; the closest are '
                                f'{", ".join(_closest(name, timm.list_models(), "timm:"))}')
    return lambda: timm.create_model(name)


def _closest(name: str, names: Sequence[str], prefix: str, most: int = 4,
             likeness: float = 0.) -> list[str]:
    return [prefix + other for other in difflib.get_close_matches(name, names, most, likeness)]


def _did_you_mean(name: str) -> str:
    """List the closest names of each package that is installed."""
    known = {'': [*zoo.read_metafiles(), *SpaRTAN.arch_settings]}
    for package in _MINIMUM:
        if importlib.util.find_spec(package):
            known[f'{package}:'] = list(packaged_models(package))
    if importlib.util.find_spec('timm'):
        import timm
        known['timm:'] = timm.list_models()
    close = [other for prefix, names in known.items()
             for other in _closest(name, names, prefix, 2, 0.5)]
    return f'did you mean {", ".join(close)}?' if close else f'a model is given as {NAMES}'


def _find_shape(pipeline: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Find the (H, W) of what a pipeline gives: what its last resize or crop says."""
    found = None
    for step in pipeline:
        if 'transforms' in step:
            found = _find_shape(step['transforms']) or found
        for key in ('size', 'scale', 'crop_size'):
            value = step.get(key)
            if isinstance(value, int):
                found = value, value
            elif isinstance(value, list | tuple) and len(value) == 2 and all(
                    isinstance(side, int) for side in value):
                # mmcv's scales are (width, height).
                found = tuple(value[::-1]) if key == 'scale' else tuple(value)
    return found


def _give_samples(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Let a detector run on images alone: some of mmdet's look their size up in the samples."""
    if len(args) == 1 and not kwargs:
        kwargs = dict(data_samples=describe_images(args[0]))
    return args, kwargs
