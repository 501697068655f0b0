"""Hooks of a detector's training."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.transforms import Compose
from mmdet.engine.hooks import PipelineSwitchHook
from mmdet.registry import HOOKS
from mmengine.runner import Runner

from ..datasets.classes import find_parts
from ..datasets.images import with_checked_loader


@HOOKS.register_module()
class CheckedPipelineSwitchHook(PipelineSwitchHook):
    """Another training pipeline from an epoch on, wherever a training is resumed.

    Several of these make stages; they stand in the order of their epochs. Workers that persist
    start anew, since they would never hear of the epoch.

    NOTE: mmdet's hook has no effect on joined datasets, and its pipeline loads images without the
    checks of ``CheckedCocoDataset``.

    Args:
        switch_epoch: The first epoch, from 0, with the pipeline.
        switch_pipeline: The steps of the pipeline.
    """

    def __init__(self, switch_epoch: int, switch_pipeline: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(switch_epoch, with_checked_loader(switch_pipeline))

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch if it is due."""
        switched = self._has_switched
        super().before_train_epoch(runner)
        if not switched and self._has_switched:
            for part in find_parts(runner.train_dataloader.dataset):
                part.pipeline = Compose(self.switch_pipeline)
