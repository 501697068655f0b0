"""The form of a model for inference: same function, less to compute, no way back to training."""
from torch import nn

from ..errors import CheckpointError


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Bring a model to its deploy form, all parts of it that have one.

    As in RepVGG, a part with another form for inference has a method ``switch_to_deploy()`` and an
    attribute ``deploy``. A detector's method deals with its parts; a classifier is searched for
    them. The result cannot be trained, and training it is refused. Doing it again changes nothing.

    Args:
        model: Any model, changed in place.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: No part of it has a deploy form.
    """
    if not _switch(model):
        raise CheckpointError(f'{type(model).__name__} has no deploy form, and neither has any '
                              'part of it; SpaRTAN and RTDETR have one')
    return model.eval()


def is_deployed(model: nn.Module) -> bool:
    """Whether parts of a model were merged for inference."""
    return any(getattr(module, 'deploy', False) is True for module in model.modules())


def _switch(module: nn.Module) -> bool:
    if hasattr(module, 'switch_to_deploy'):
        module.switch_to_deploy()
        return True
    return any([_switch(child) for child in module.children()])
