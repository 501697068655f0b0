"""The learning rate of each iteration."""
import math
from typing import Any

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class FlatCosineLR(LRSchedulerMixin, _ParamScheduler):
    """A warm-up, a constant learning rate, half a cosine down to a share of it, and a constant end.

    The schedule of `RTMDet <https://arxiv.org/abs/2212.07784>`_ (section 3.4) as
    `DEIM <https://arxiv.org/abs/2412.04234>`_ has it. At iteration t, counted from 0, with the
    optimizer's learning rate L:

    - t < warmup: L (t / warmup)^warmup_power;
    - up to `flat`: L;
    - from end - tail on: gamma L;
    - between these two: gamma L + (1 - gamma) L (1 + cos(pi x)) / 2, where x goes from 0 to 1.

    Epochs are usual in a config, and become iterations where ``convert_to_iter_based`` is set:
    ``dict(type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, warmup=3, flat=64,
    tail=3)``; the warm-up then takes `max_warmup` iterations at most.

    NOTE: The official warm-up takes 2000 iterations, which on a small dataset may be the whole
    training. There the rate is set behind a step, so that each is that of the step before.

    Args:
        optimizer: The optimizer or optimizer wrapper.
        flat: Number of iterations until the cosine begins, those of the warm-up among them; as many
            as the whole training has for none.
        warmup: Number of iterations of warm-up.
        tail: Number of iterations at the end with gamma L.
        gamma: Last learning rate, as a share of L.
        warmup_power: 2 for the squared warm-up of the recipe, 1 for a linear one.
        end: Number of iterations of the whole schedule.
        by_epoch: False, a step is an iteration.
        last_step: Index of the last step done, -1 for none.
        verbose: Whether to print each step's learning rate.

    Raises:
        ValueError: It goes by epochs, or the warm-up is longer than `flat`.
    """

    def __init__(self,
                 optimizer,
                 flat: int,
                 warmup: int = 0,
                 tail: int = 0,
                 gamma: float = 0.5,
                 warmup_power: float = 2.,
                 end: int = INF,
                 by_epoch: bool = False,
                 last_step: int = -1,
                 verbose: bool = False):
        if by_epoch:
            raise ValueError('FlatCosineLR changes the learning rate at each iteration; set '
                             'convert_to_iter_based=True to give its lengths in epochs')
        if not 0 <= warmup <= flat:
            raise ValueError(f'FlatCosineLR: warmup={warmup} must be at least 0 and at most '
                             f'flat={flat}')
        self.flat = flat
        self.warmup = warmup
        self.tail = tail
        self.gamma = gamma
        self.warmup_power = warmup_power
        super().__init__(optimizer, end=end, by_epoch=by_epoch, last_step=last_step,
                         verbose=verbose)

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, flat: float, warmup: float = 3., tail: float = 0.,
                              end: float = INF, max_warmup: int = 2000, shares: bool = False,
                              epoch_length: int, by_epoch: bool = True,
                              **kwargs: Any) -> 'FlatCosineLR':
        """Build it of lengths in epochs.

        Args:
            args: Arguments before these.
            flat: Epochs until the cosine begins.
            warmup: Epochs of warm-up.
            tail: Epochs at the end with the last learning rate.
            end: Epochs of the whole schedule.
            max_warmup: Number of iterations that the warm-up takes at most.
            shares: Whether `flat`, `warmup` and `tail` are shares of `end` rather than epochs.
            epoch_length: Number of iterations in an epoch.
            by_epoch: Stands in the config.
            kwargs: Further arguments.
        """
        unit = epoch_length * (end if shares else 1)
        flat, warmup, tail = (round(length * unit) for length in (flat, warmup, tail))
        return cls(*args, flat=flat, warmup=min(warmup, max_warmup), tail=tail,
                   end=end if end == INF else round(end * epoch_length), **kwargs)

    def _get_value(self) -> list[float]:
        step, decayed = self.last_step, self.end - self.tail
        if step < self.warmup:
            factor = (step / self.warmup) ** self.warmup_power
        elif step <= self.flat:
            factor = 1.
        elif step >= decayed:
            factor = self.gamma
        else:
            turned = math.pi * (step - self.flat) / (decayed - self.flat)
            factor = self.gamma + (1 - self.gamma) * (1 + math.cos(turned)) / 2
        return [base * factor for base in self.base_values]
