"""What makes a recipe fit a training on little data, however long it is."""
import math
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.hooks import EarlyStoppingHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from ..datasets.classes import find_parts

#: Transforms that change a picture beyond a flip and a resize.
STRONG = (
    'RandomPhotometricDistort', 'PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'RandomZoomOut',
    'RandomIoUCrop', 'Expand', 'MinIoURandomCrop', 'RandomCrop', 'RandomAffine', 'Mosaic', 'MixUp',
    'CachedMosaic', 'CachedMixUp', 'CopyPaste', 'DenseMosaic', 'AutoAugment', 'RandAugment',
    'RandomErasing')


@HOOKS.register_module()
class StepsAwareEMAHook(EMAHook):
    """Averages weights over a share of the training, whatever its length.

    After u of S steps, decay(u) = D (1 - exp(-(u + 1) / tau)), with tau = S / 20 and
    1 - D = 35 / S, but from 0.0002 to 0.007: of a long training 5000 steps are averaged, of one of
    under 5000 steps 143.

    NOTE: RT-DETR's tau of 2000 steps, at a decay of 0.9999, is longer than a whole training on a
    few hundred pictures, whose average is then all but the last weights.

    Args:
        kwargs: Further arguments of mmengine's hook; ``momentum`` and ``gamma`` are set here.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ema_type='ExpMomentumEMA', **kwargs)

    def before_run(self, runner: Runner) -> None:
        """Learn of the number of steps, and make the average."""
        # Of a test, which has none, the runner would build the training.
        loop = runner._train_loop
        steps = loop.max_iters if isinstance(loop, BaseLoop) else 1
        self.ema_cfg.update(momentum=min(max(35 / steps, 2e-4), 7e-3), gamma=max(steps // 20, 1))
        super().before_run(runner)


@HOOKS.register_module()
class ResumableEarlyStoppingHook(EarlyStoppingHook):
    """Ends a training that gets no better; a resumed one ends where it would have.

    NOTE: mmengine's hook counts anew in a training that is resumed. It counts from the first
    validation on, too, and may end a training that starts from random weights, whose AP stays at 0
    for many epochs; here a score that is to grow is waited for until it first reaches `min_delta`.
    """

    #: Ahead of the checkpoint hook, which may write a checkpoint behind the same validation.
    priority = 'LOW'

    def before_run(self, runner: Runner) -> None:
        """Do nothing: of a test, mmengine's hook would build the training."""

    def before_train(self, runner: Runner) -> None:
        """Go on counting, in a training that is resumed."""
        state = runner.message_hub.get_info('early_stopping')
        if state is not None:
            self.wait_count, self.best_score = state['wait_count'], state['best_score']
            # It may have ended, and be resumed all the same.
            runner.train_loop.stop_training = self.wait_count >= self.patience

    def _check_stop_condition(self, current_score: float) -> tuple[bool, str]:
        nothing_yet = self.best_score < self.min_delta and (
            -math.inf < current_score < self.min_delta)
        if self.rule == 'greater' and nothing_yet:
            return False, ''
        return super()._check_stop_condition(current_score)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Count, and end the training if it is time to."""
        super().after_val_epoch(runner, metrics)
        # It is in each checkpoint.
        runner.message_hub.update_info('early_stopping', dict(
            wait_count=self.wait_count, best_score=float(self.best_score)))


@HOOKS.register_module()
class PlainEndHook(Hook):
    """Leaves strong augmentation out at the end of a training.

    The transforms that are named are taken out of the pipelines of the training set, and the
    model's data preprocessor keeps batches as they are, multi-scale training included.

    Args:
        share: Share of the epochs that go without, rounded up.
        transforms: The transforms to leave out; those that a pipeline lacks don't matter.
    """

    def __init__(self, share: float = 0.1, transforms: Sequence[str] = STRONG) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f'PlainEndHook: share={share} must be from 0 to 1')
        self.share = share
        self.transforms = frozenset(transforms)
        self._done = False

    def before_train_epoch(self, runner: Runner) -> None:
        """Change the pipelines if it is time to, in the workers, too."""
        # Rounded, as 0.1 is no binary fraction.
        epochs = math.ceil(round(self.share * runner.max_epochs, 6))
        if self._done or runner.epoch < runner.max_epochs - epochs:
            return
        self._done = True
        loader = runner.train_dataloader
        left_out = [type(transform).__name__ for part in find_parts(loader.dataset)
                    for transform in self._strip(getattr(part, 'pipeline', None))]
        # Workers that persist have pipelines of their own; the next epoch starts others.
        loader._iterator = None
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        preprocessor = getattr(model, 'data_preprocessor', None)
        augments = getattr(preprocessor, 'batch_augments', None)
        if augments:
            left_out += [type(augment).__name__ for augment in augments]
            preprocessor.batch_augments = None
        runner.logger.info('from here on without '
                           f'{", ".join(dict.fromkeys(left_out)) or "anything to leave out"}')

    def _strip(self, pipeline: Any) -> Iterator[Any]:
        """Take the transforms out of a pipeline and of what it nests; return them."""
        transforms = getattr(pipeline, 'transforms', None)
        if not isinstance(transforms, list):
            if transforms is not None:
                yield from self._strip(transforms)
            return
        for transform in [*transforms]:
            if type(transform).__name__ in self.transforms:
                transforms.remove(transform)
                yield transform
            else:
                yield from self._strip(transform)


@HOOKS.register_module()
class BatchNormEvalHook(Hook):
    """Keeps the statistics of the backbone's batch norms if batches are too small for their own.

    That is with fewer pictures than `batch_size` in each, those of all processes together where
    batch norms are synchronized. A backbone that starts from random weights has none to keep.

    Args:
        batch_size: Number of pictures from which on a batch has statistics of its own.
    """

    def __init__(self, batch_size: int = 8) -> None:
        self.batch_size = batch_size
        self._norms: list[nn.Module] = []

    def before_train(self, runner: Runner) -> None:
        """Find the batch norms to keep."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]
        hub = runner.message_hub
        if 'had_statistics' not in hub.runtime_info:
            # Asked once: in a training that is resumed there are some, whatever it started from.
            hub.update_info('had_statistics', any(
                bool(norm.running_mean.any() or (norm.running_var != 1).any()) for norm in norms))
        together = any(isinstance(norm, SyncBatchNorm) for norm in norms)
        pictures = runner.train_dataloader.batch_size * (runner.world_size if together else 1)
        if pictures < self.batch_size and hub.get_info('had_statistics'):
            self._norms = norms
            runner.logger.info(f'{pictures} pictures in a batch: the batch norms of the backbone '
                               'keep the statistics that they start with')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Put them into evaluation mode, which the beginning of an epoch ends."""
        for norm in self._norms:
            norm.eval()
