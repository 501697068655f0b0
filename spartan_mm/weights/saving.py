"""Writing checkpoints: all of a file or nothing."""
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import PickleError
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ..errors import CheckpointError
from ..files import check_writable, write_whole
from .forms import is_deployed, switch_to_deploy
from .loading import find_meta, load_for_inference


def deploy_checkpoint(model: nn.Module, checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the checkpoint of a model's deploy form.

    Its ``meta`` says ``deploy=True``, by which whoever loads it knows to switch the model first.

    Args:
        model: The model as its config builds it; it is in deploy form afterwards.
        checkpoint: Its weights after training.
        out: File to write.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: It belongs to another architecture or is of the deploy form already, the
            model has no deploy form, or the file cannot hold it.
        UnwritableError: The file cannot be written, or is the checkpoint that is read.
    """
    check_writable(out, checkpoint)
    meta = find_meta(load_for_inference(model, checkpoint))
    if is_deployed(model):
        raise CheckpointError(f'{checkpoint} is of the deploy form already')
    switch_to_deploy(model)
    deployed = dict(state_dict=model.state_dict(), meta=meta | dict(deploy=True))
    save_checkpoint(deployed, out)
    return deployed


def save_checkpoint(checkpoint: Mapping, path: str | Path) -> None:
    """Write a checkpoint so that `path` holds either all of it or what it held before.

    Args:
        checkpoint: Anything ``torch.save`` takes. For a name that ends in '.safetensors' either
            tensors by name, or these as `state_dict` beside `meta`, which goes into the file's
            header as JSON (entry 'meta').
        path: File to write; its folder is made if need be.

    Raises:
        UnwritableError: The file cannot be written.
        CheckpointError: It cannot hold the checkpoint.
    """
    path = Path(path)
    try:
        with write_whole(path) as file:
            write_checkpoint(checkpoint, file, path.suffix)
    # What safetensors, JSON and pickle say of content that they cannot hold.
    except (AttributeError, PickleError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path} cannot be written, it cannot hold this checkpoint: '
                              f'{error}') from error


def write_checkpoint(checkpoint: Mapping, file: IO[bytes], suffix: str) -> None:
    """Write a checkpoint to an open file, see :func:`save_checkpoint`; the same gives same bytes.

    NOTE: The header of a safetensors file gets one entry alone: safetensors does not write several
    in the same order every time. transformers insists on 'format'.
    """
    if suffix != '.safetensors':
        torch.save(checkpoint, file)
        return
    metadata, tensors = dict(format='pt'), checkpoint
    if 'meta' in checkpoint:
        metadata = dict(meta=json.dumps(checkpoint['meta'], default=_plain, sort_keys=True,
                                        ensure_ascii=False))
        tensors = checkpoint['state_dict']
    file.write(safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def _plain(value: Any) -> Any:
    """Make of NumPy's numbers what JSON has; colours of classes often are arrays."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f'meta has {value!r}, of type {type(value).__name__}, which JSON cannot hold')
