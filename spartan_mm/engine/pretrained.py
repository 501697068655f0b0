"""Initialisation from a part of a checkpoint, with a report of what was loaded and what was not."""

import logging
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model import BaseModule, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from .checkpoint import CheckpointError, find_state_dict, load_all_weights
from .reading import local_file, read_checkpoint

_MAX_NAMED = 5


@WEIGHT_INITIALIZERS.register_module()
class CheckedPretrained:
    """Loads a module's weights from a checkpoint of ours, all of them, and reports what it did.

    For ``init_cfg``, to start a detector's backbone from a classifier, say.

    NOTE: mmengine's ``Pretrained`` loads what fits and goes on if nothing does; it does not say how
    much that was.

    Args:
        checkpoint: path or URL of a file, safetensors or written by torch; None for none, so that a
            config can leave the choice to the command line (``--cfg-options
            model.backbone.init_cfg.checkpoint=FILE``). A warning then says that the weights are
            random.
        prefix: what the names of the module's weights begin with in the checkpoint, such as
            'backbone.'; empty if they are all the checkpoint has.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the checkpoint cannot be read, has no weights under the prefix, or belongs
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
        chosen = {key[len(self.prefix):]: value for key, value in weights.items()
                  if key.startswith(self.prefix)}
        skipped = [key for key in weights if not key.startswith(self.prefix)]
        if not chosen:
            found = ', '.join(sorted({key.split('.')[0] for key in weights}))
            raise CheckpointError(f'checkpoint {self.checkpoint} has no weights that begin with '
                                  f'{self.prefix!r} for {name}; its weights begin with: {found}')
        load_all_weights(module, chosen, self.checkpoint,
                         f'Give {name} the options that the weights were trained with')

        # Nothing below has weights left to initialise.
        for part in module.modules():
            if isinstance(part, BaseModule):
                part.is_init = True
        if hasattr(module, '_params_init_info'):
            update_init_info(module, f'{type(self).__name__}: from {self.checkpoint}')
        place = f' ({self.prefix}*)' if self.prefix else ''
        print_log(f'{name}: loaded {len(chosen)} of {len(module.state_dict())} tensors from '
                  f'{self.checkpoint}{place}; skipped: {_join(skipped)}', 'current')


def init_file(checkpoint: str) -> Path:
    """Where the checkpoint lies that an ``init_cfg`` names; one behind a URL is downloaded first.

    Args:
        checkpoint: path or URL.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be downloaded.
    """
    path = local_file(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'checkpoint {checkpoint}, which init_cfg names, does not exist; point to yours with '
            '--cfg-options model.backbone.init_cfg.checkpoint=FILE, or start from random weights '
            'with model.backbone.init_cfg=None')
    return path


def _join(keys: list[str]) -> str:
    more = f', ... ({len(keys)} in all)' if len(keys) > _MAX_NAMED else ''
    return (', '.join(keys[:_MAX_NAMED]) or 'nothing') + more
