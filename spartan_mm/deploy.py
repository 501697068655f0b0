"""The form of a model for inference: same function, less to compute, no way back to training."""

from pathlib import Path
from typing import Any

from torch import nn

from .converters.common import ConversionError, save_checkpoint
from .engine.checkpoint import CheckpointError, find_meta, is_deployed, load_for_inference


class DeployError(CheckpointError):
    """A model has no deploy form, or a checkpoint is of it already or cannot be written."""


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Bring a model to its deploy form, all parts of it that have one.

    As in RepVGG, a part with another form for inference has a method ``switch_to_deploy()`` and an
    attribute ``deploy``. A detector's method deals with its parts; a classifier is searched for
    them. The result cannot be trained, and training it is refused. Doing it again changes nothing.

    Args:
        model: any model, changed in place.

    Returns:
        The model, in evaluation mode.

    Raises:
        DeployError: if no part of it has a deploy form.
    """
    if not _switch(model):
        raise DeployError(f'{type(model).__name__} has no deploy form, and neither has any part of '
                          'it; SpaRTAN and RTDETR have one')
    return model.eval()


def _switch(module: nn.Module) -> bool:
    if hasattr(module, 'switch_to_deploy'):
        module.switch_to_deploy()
        return True
    return any([_switch(child) for child in module.children()])


def deploy_checkpoint(model: nn.Module, checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the checkpoint of a model's deploy form.

    Its ``meta`` says ``deploy=True``, by which whoever loads it knows to switch the model first.

    Args:
        model: the model as its config builds it; it is in deploy form afterwards.
        checkpoint: its weights after training.
        out: file to write.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it belongs to another architecture.
        DeployError: if the model has no deploy form, the checkpoint is of it already, or the file
            cannot be written.
    """
    meta = find_meta(load_for_inference(model, checkpoint))
    if is_deployed(model):
        raise DeployError(f'{checkpoint} is of the deploy form already')
    switch_to_deploy(model)
    deployed = dict(state_dict=model.state_dict(), meta=meta | dict(deploy=True))
    try:
        save_checkpoint(deployed, out)
    except ConversionError as error:
        raise DeployError(str(error)) from error
    return deployed
