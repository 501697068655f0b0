"""Images of a batch mixed with each other."""
import random
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn


@MODELS.register_module()
class BatchMixUp(nn.Module):
    """Blend each image with the one before it in the batch, and keep the objects of both.

    Source: `DEIM <https://arxiv.org/abs/2412.04234>`_, section 3.2: a mixed batch has twice the
    objects, all of which count in full. To be named before ``BatchRandomResize`` in
    ``DetDataPreprocessor(batch_augments=[...])``, which runs it in training only. Each rank draws
    for itself, from a generator seeded by the run's seed and the rank. Instance masks and ignored
    boxes are joined as the boxes are.

    NOTE: A batch of one image stays as it is; officially it is mixed with itself, which doubles its
    boxes. mmdet's ``MixUp`` is another transform: it flips and rescales one image over another.

    Args:
        prob: Probability of the mixing of a batch, 0..1.
        ratio: Range of the share of the own image.
        begin_epoch: First epoch (from 0) that mixes.
        stop_epoch: First epoch that doesn't any more; None for never.
        seed: Seed of the draws; None takes the run's.

    Raises:
        ValueError: A share beyond 0 to 1.
    """

    def __init__(self, prob: float = 0.75, ratio: Sequence[float] = (0.45, 0.55),
                 begin_epoch: int = 0, stop_epoch: int | None = None,
                 seed: int | None = None) -> None:
        super().__init__()
        if not 0 <= ratio[0] <= ratio[1] <= 1:
            raise ValueError(f'BatchMixUp: ratio={tuple(ratio)} must be (low, high) with 0 <= low '
                             '<= high <= 1')
        self.prob = prob
        self.ratio = tuple(ratio)
        self.begin_epoch = begin_epoch
        self.stop_epoch = stop_epoch
        self.seed = seed
        self._random: random.Random | None = None

    def _draw_share(self) -> float | None:
        """Draw the share of the own image; None leaves the batch as it is."""
        if self._random is None:
            # At the first batch, when the run's seed (the same on all ranks) and the rank are
            # known. Other augments of the batch have the same seed.
            seed = torch.initial_seed() if self.seed is None else self.seed
            self._random = random.Random(f'mixup {seed} {get_rank()}')
        mixed = self._random.random() < self.prob
        share = self._random.uniform(*self.ratio)
        return share if mixed else None

    def forward(self, inputs: Tensor,
                data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Mix.

        Args:
            inputs: Images (N, C, H, W), float.
            data_samples: Their N samples, changed in place.

        Returns:
            Images (N, C, H, W) and the samples.
        """
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        if epoch < self.begin_epoch or self.stop_epoch is not None and epoch >= self.stop_epoch:
            return inputs, data_samples
        share = self._draw_share()
        if share is None or len(inputs) == 1:
            return inputs, data_samples

        inputs = share * inputs + (1 - share) * inputs.roll(1, 0)
        for name in ('gt_instances', 'ignored_instances'):
            if name in data_samples[0]:
                found = [getattr(sample, name) for sample in data_samples]
                for number, sample in enumerate(data_samples):
                    setattr(sample, name, InstanceData.cat([found[number], found[number - 1]]))
        return inputs, data_samples

    def extra_repr(self) -> str:
        return (f'prob={self.prob}, ratio={self.ratio}, begin_epoch={self.begin_epoch}, '
                f'stop_epoch={self.stop_epoch}')
