"""Hooks of the ImageNet recipe."""

from mmengine.dist import all_reduce_params
from mmengine.hooks import EMAHook, SyncBuffersHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class AverageStatisticsHook(SyncBuffersHook):
    """Averages the running statistics of batch norms over the ranks after each training epoch.

    Between two averages each rank keeps the statistics of its own batches.

    NOTE: mmengine's ``SyncBuffersHook`` averages those of the trained model. A moving average of
    the model (``EMAHook`` with ``update_buffers=True``) has statistics of its own, and it is the
    one that is evaluated and saved: they are averaged here, too.
    """

    def after_train_epoch(self, runner: Runner) -> None:
        """Average over the ranks; nothing happens where there is only one."""
        super().after_train_epoch(runner)
        if self.distributed:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    all_reduce_params(hook.ema_model.buffers(), op='mean')
