"""The hook that stops a run whose checkpoint does not fit."""
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..weights.forms import switch_to_deploy
from ..weights.loading import REMEDY, find_meta, find_state_dict, load_all_weights


@HOOKS.register_module()
class StrictCheckpointHook(Hook):
    """Stops a run whose checkpoint does not fit the model, where mmengine only warns."""

    #: What to do if it does not fit.
    remedy = REMEDY

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the weights with the model's before the runner loads what fits.

        The model takes its deploy form first if the weights are of that form.

        The checkpoint's own are replaced by what was compared: a name that still has its prefix
        would fit nothing where other hooks load it, and leave random weights.

        Raises:
            CheckpointError: The checkpoint belongs to another architecture.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        name = runner._load_from or f'in {runner.work_dir}'
        checkpoint['state_dict'] = self.find_weights(runner, model, checkpoint, name)
        load_all_weights(model, checkpoint, name, self.remedy)

    def find_weights(self, runner: Runner, model: nn.Module, checkpoint: dict[str, Any],
                     name: str) -> dict[str, Tensor]:
        """Find the weights to load into a model, out of its wrapper."""
        if find_meta(checkpoint).get('deploy'):
            switch_to_deploy(model)
        return find_state_dict(checkpoint, name)
