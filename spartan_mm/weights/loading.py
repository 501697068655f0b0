"""Checkpoints for testing and inference: every weight finds its place, or an error says why."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..text import count, join
from .forms import is_deployed, switch_to_deploy
from .safe_load import local_file, read_checkpoint

# What the original authors call the weights in their checkpoints.
_FOREIGN = {'ema', 'model'}

#: What to do if a checkpoint does not fit, unless the caller knows better.
REMEDY = 'Use the config it was trained with, which lies next to it'


def load_for_inference(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load the weights that a model is tested with, all of them.

    Of a training with a moving average, mmengine keeps the averaged weights in ``state_dict``:
    these are loaded. A model takes its deploy form first if the weights are of that form.

    Args:
        model: The model, changed in place.
        path: The checkpoint, safetensors or written by torch, a local path or a URL.

    Returns:
        The whole checkpoint, with ``meta`` beside the weights.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is no checkpoint, would run code, or is of another architecture.
    """
    checkpoint = read_checkpoint(local_file(path))
    fill_for_inference(model, checkpoint, str(path))
    return checkpoint


def fill_for_inference(model: nn.Module, checkpoint: Any, name: str) -> None:
    """Do what :func:`load_for_inference` does, with a checkpoint of this name that was read."""
    if find_meta(checkpoint).get('deploy'):
        switch_to_deploy(model)
    elif is_deployed(model):
        raise CheckpointError(f'checkpoint {name} does not fit the {type(model).__name__}, which '
                              'is in its deploy form already: load it into a model as the config '
                              'builds it, and deploy that')
    load_all_weights(model, checkpoint, name)


def load_all_weights(model: nn.Module, checkpoint: dict[str, Any], name: str,
                     remedy: str = REMEDY) -> None:
    """Load a checkpoint's ``state_dict``, allowing nothing missing, left over or of another shape.

    A counter of batches that a batch norm layer has seen (``num_batches_tracked``) may be missing:
    old checkpoints and conversions have none, and inference does not read it.

    Args:
        model: The model, changed in place.
        checkpoint: The checkpoint, as mmengine writes it, or the bare state dict.
        name: What to call the checkpoint in an error message.
        remedy: What to do if it does not fit.

    Raises:
        CheckpointError: The checkpoint belongs to another architecture.
    """
    does_not_fit = f"checkpoint {name} does not fit the config's {type(model).__name__}"
    state_dict = find_state_dict(checkpoint, name)
    own = model.state_dict()
    reshaped = {key: (tuple(value.shape), tuple(own[key].shape))
                for key, value in state_dict.items()
                if key in own and value.shape != own[key].shape}
    fitting = {key: value for key, value in state_dict.items() if key not in reshaped}
    try:
        result = model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        # A part of the model that checks what it is given, as SpaRTAN does.
        raise CheckpointError(f'{does_not_fit}: {error}. {remedy}') from error
    missing = [key for key in result.missing_keys
               if key not in reshaped and not key.endswith('num_batches_tracked')]
    problems = {
        'missing in it': missing, 'unknown to the model': result.unexpected_keys,
        'of another shape': [f'{key}: {theirs} instead of {ours}'
                             for key, (theirs, ours) in reshaped.items()]}
    found = [f'{count(len(keys), "key")} {"is" if len(keys) == 1 else "are"} {problem} '
             f'({" | ".join(keys[:3])}{" | ..." if len(keys) > 3 else ""})'
             for problem, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f'{does_not_fit}: {"; ".join(found)}. {remedy}')


def find_meta(checkpoint: Any) -> dict[str, Any]:
    """Find what a checkpoint says about itself; nothing in one of bare weights."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def find_classes(checkpoint: Any) -> tuple[str, ...] | None:
    """Find the names of the classes in a checkpoint; None if it does not tell."""
    meta = find_meta(checkpoint)
    # 'CLASSES' is what OpenMMLab's versions before 3.0 wrote.
    for place in (meta.get('dataset_meta') or {}, meta):
        classes = place.get('classes') or place.get('CLASSES')
        if classes:
            return (classes, ) if isinstance(classes, str) else tuple(map(str, classes))
    return None


def find_state_dict(checkpoint: Any, name: str | Path,
                    entries: Sequence[str] = ('state_dict', )) -> dict[str, Tensor]:
    """Find the weights in a checkpoint.

    Args:
        checkpoint: The checkpoint, or the bare state dict.
        name: What to call it in an error message.
        entries: Where the weights may lie, in order of preference; 'ema.module' is the entry
            'module' of the entry 'ema'.

    Returns:
        Tensors by name, without the prefix that a model in a distributed wrapper leaves.

    Raises:
        CheckpointError: There are none.
    """
    state_dict = checkpoint
    for entry in entries:
        found = checkpoint
        for key in entry.split('.'):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            state_dict = found
            break
    content = state_dict if isinstance(state_dict, Mapping) else {type(state_dict).__name__: None}
    others = [str(key) for key, value in content.items()
              if not (isinstance(key, str) and isinstance(value, Tensor))]
    if content and not others:
        return {re.sub(r'^module\.', '', key): value for key, value in state_dict.items()}
    message = (f"checkpoint {name} has no {' or '.join(map(repr, entries))} with weights (it has: "
               f'{join(others, 5)})')
    if _FOREIGN.intersection(others):
        message += ('; if it comes from the original authors, convert it with spartan-mm convert '
                    'FILE OUT --to mm')
    raise CheckpointError(message)
