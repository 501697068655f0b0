"""The learning rate schedule of the ImageNet recipe."""

import math

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """A cosine from the first to the last step, whose beginning a linear warm-up replaces.

    At step t, counted from 0, with the optimizer's learning rate L:

    - t < warmup: L (start_factor + t / warmup (1 - start_factor));
    - after it: eta_min + (L - eta_min) (1 + cos(pi t / end)) / 2.

    NOTE: This is what timm's ``CosineLRScheduler`` does by default, and so does the recipe.
    mmengine's ``LinearLR`` followed by ``CosineAnnealingLR`` begins the cosine when the warm-up is
    over; then the learning rate is higher from there to the end, by up to 6 % of L.

    Args:
        optimizer: The optimizer or optimizer wrapper.
        warmup: Number of steps of warm-up.
        start_factor: The first step's share of the learning rate, in [0, 1].
        eta_min: The learning rate that the cosine would reach at ``end``.
        end: Number of steps of the whole schedule.
        by_epoch: Whether a step is an epoch, else an iteration.
        last_step: Index of the last step done, -1 for none.
        verbose: Whether to print each step's learning rate.

    Raises:
        ValueError: If the warm-up is not shorter than the schedule.
    """

    def __init__(self,
                 optimizer,
                 warmup: int,
                 start_factor: float,
                 eta_min: float,
                 end: int,
                 by_epoch: bool = True,
                 last_step: int = -1,
                 verbose: bool = False):
        if not 0 <= warmup < end:
            raise ValueError(f'WarmupCosineLR: warmup={warmup} must be at least 0 and less than '
                             f'end={end}')
        self.warmup = warmup
        self.start_factor = start_factor
        self.eta_min = eta_min
        super().__init__(optimizer, end=end, by_epoch=by_epoch, last_step=last_step,
                         verbose=verbose)

    def _get_value(self) -> list[float]:
        step = self.last_step
        if step < self.warmup:
            factor = self.start_factor + step / self.warmup * (1 - self.start_factor)
            return [base * factor for base in self.base_values]
        weight = (1 + math.cos(math.pi * step / self.end)) / 2
        return [self.eta_min + (base - self.eta_min) * weight for base in self.base_values]
