"""Initialization from checkpoints, ours and those that other code bases published.

It says what was loaded and what was not.
"""
import logging
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..errors import CheckpointError
from ..text import join
from .converters.names import strip_prefix
from .converters.rtdetr import convert_resnet_vd
from .converters.spartan import convert_spartan_backbone
from .loading import find_state_dict, load_all_weights
from .safe_load import local_file, read_checkpoint, read_foreign

CONVERTERS = {
    'resnet_vd': convert_resnet_vd,
    'spartan': lambda state_dict: convert_spartan_backbone(
        {name: tensor for name, tensor in state_dict.items() if not name.startswith('linear.')})[0],
}

_MAX_NAMED = 5


@WEIGHT_INITIALIZERS.register_module()
class CheckedPretrained:
    """Loads a module's weights from a checkpoint of ours, all of them, and reports what it did.

    For ``init_cfg``, to start a detector's backbone from a classifier, say.

    NOTE: mmengine's ``Pretrained`` loads what fits and goes on if nothing does; it does not say how
    much that was.

    Args:
        checkpoint: Path or URL of a file, safetensors or written by torch; None for none, so that a
            config can leave the choice to the command line (``--cfg-options
            model.backbone.init_cfg.checkpoint=FILE``). A warning then says that the weights are
            random.
        prefix: What the names of the module's weights begin with in the checkpoint, such as
            'backbone.'; empty if they are all the checkpoint has.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The checkpoint cannot be read, has no weights under the prefix, or belongs
            to another architecture.
    """

    def __init__(self, checkpoint: str | None, prefix: str = '') -> None:
        self.checkpoint = checkpoint
        self.prefix = f'{prefix.rstrip(".")}.' if prefix else ''

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into a module."""
        name = type(module).__name__
        if self.checkpoint is None:
            print_log(f'{name} starts from random weights: no checkpoint is given; point its '
                      'init_cfg.checkpoint to one', 'current', logging.WARNING)
            return
        weights = find_state_dict(read_checkpoint(init_file(self.checkpoint)), self.checkpoint)
        chosen = strip_prefix(weights, self.prefix)
        skipped = [key for key in weights if not key.startswith(self.prefix)]
        if not chosen:
            found = ', '.join(sorted({key.split('.')[0] for key in weights}))
            raise CheckpointError(f'checkpoint {self.checkpoint} has no weights that begin with '
                                  f'{self.prefix!r} for {name}; its weights begin with: {found}')
        load_all_weights(module, chosen, self.checkpoint,
                         f'Give {name} the options that the weights were trained with')

        # Nothing below has weights left to initialize.
        for part in module.modules():
            if isinstance(part, BaseModule):
                part.is_init = True
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'{type(self).__name__}: from {self.checkpoint}')
        place = f' ({self.prefix}*)' if self.prefix else ''
        others = join(skipped, _MAX_NAMED, 'nothing')
        print_log(f'{name}: loaded {len(chosen)} of {len(module.state_dict())} tensors from '
                  f'{self.checkpoint}{place}; skipped: {others}', 'current')


@WEIGHT_INITIALIZERS.register_module()
class ConvertedPretrained:
    """Loads a backbone's original checkpoint, all of it, renaming its tensors on the way.

    For `init_cfg`.

    Args:
        checkpoint: Path or URL of a file, safetensors or written by torch.
        converter: 'resnet_vd' for RT-DETR's ResNet-vd weights, 'spartan' for the authors'
            classifiers, whose linear layer is left out.

    Raises:
        ValueError: Unknown converter.
        FileNotFoundError: There is no such file.
        CheckpointError: The checkpoint cannot be downloaded, read or converted, or does not fit.
    """

    def __init__(self, checkpoint: str, converter: str):
        if converter not in CONVERTERS:
            raise ValueError(f"ConvertedPretrained: converter='{converter}' is unknown; "
                             f'choose one of {sorted(CONVERTERS)}')
        self.checkpoint = checkpoint
        self.converter = converter

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into `module`."""
        path = init_file(self.checkpoint)
        try:
            weights = find_state_dict(read_foreign(path), path,
                                      ('ema.module', 'model', 'state_dict'))
            module.load_state_dict(CONVERTERS[self.converter](weights), strict=True)
        except (ValueError, RuntimeError) as error:
            first, *others = map(str.strip, str(error).splitlines())
            raise CheckpointError(f'checkpoint {self.checkpoint} does not fit '
                                  f'{type(module).__name__}: {first}', *others) from error
        print_log(f'{type(module).__name__}: loaded {len(weights)} tensors of {self.checkpoint}',
                  'current')


def init_file(checkpoint: str) -> Path:
    """Where the checkpoint lies that an ``init_cfg`` names, see :func:`local_file`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = local_file(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'checkpoint {checkpoint}, which init_cfg names, does not exist; point to yours with '
            '--cfg-options model.backbone.init_cfg.checkpoint=FILE, or start from random weights '
            'with model.backbone.init_cfg=None')
    return path


def without_pretrained(settings: Any) -> Any:
    """Copy a model's config, or a part of it, without pretrained weights that it would load."""
    if isinstance(settings, dict):
        return type(settings)({
            key: without_pretrained(value) for key, value in settings.items()
            if key != 'pretrained' and not (key == 'init_cfg' and _loads(value))})
    if isinstance(settings, list | tuple):
        return type(settings)(without_pretrained(value) for value in settings)
    return settings


def without_training(model: dict) -> dict:
    """Copy a model's config without what only a training uses, pretrained weights included."""
    return without_pretrained(type(model)({
        key: value for key, value in model.items() if key != 'distillation'}))


def _loads(init_cfg: Any) -> bool:
    return any(isinstance(item, dict) and item.get('checkpoint') is not None
               for item in (init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]))
