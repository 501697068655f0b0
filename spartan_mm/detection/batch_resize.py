"""Multi-scale training: the whole batch takes a new size at each iteration."""

import random
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import scale_boxes
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.nn import functional as F

#: RT-DETR's sizes: 480 to 800 in steps of 32, 640 three times as likely as any other.
RTDETR_SIZES = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)


@MODELS.register_module()
class BatchRandomResize(nn.Module):
    """Resize images and boxes of a batch to a size drawn at random, a new one for each batch.

    To be named in ``DetDataPreprocessor(batch_augments=[...])``, which runs it in training only, on
    the device. Each rank draws for itself, from a generator seeded by the run's seed and the rank,
    so a run can be repeated whatever else draws random numbers.

    NOTE: mmdet's ``BatchSyncRandomResize`` interpolates bilinearly, draws from an even range (640
    is no more likely than the rest), keeps a size for 10 iterations on all ranks, and starts with
    the size of the input.

    Args:
        sizes: Sizes to draw from, repeated ones more likely; a number for a square, (height, width)
            else.
        interpolation: Mode of ``torch.nn.functional.interpolate``: 'nearest', 'bilinear', 'bicubic'
            or 'area'. RT-DETR uses 'nearest'.
        stop_epoch: First epoch (from 0) that keeps the size of the input; None for never. RT-DETRv2
            switches multi-scale off for its last epochs.
        seed: Seed of the draws; None takes the run's.

    Raises:
        ValueError: No sizes, or an unknown interpolation.
    """

    def __init__(self, sizes: Sequence[int | Sequence[int]] = RTDETR_SIZES,
                 interpolation: str = 'nearest', stop_epoch: int | None = None,
                 seed: int | None = None) -> None:
        super().__init__()
        if not sizes:
            raise ValueError('BatchRandomResize: `sizes` is empty; leave the batch augment out '
                             'instead.')
        allowed = ('nearest', 'bilinear', 'bicubic', 'area')
        if interpolation not in allowed:
            raise ValueError(f'BatchRandomResize: interpolation={interpolation!r} is none of '
                             f'{allowed}.')
        self.sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
        self.interpolation = interpolation
        self.stop_epoch = stop_epoch
        self.seed = seed
        self._random: random.Random | None = None

    def _draw_size(self) -> tuple[int, int]:
        """Draw (height, width) for this batch."""
        if self._random is None:
            # At the first batch, when the run's seed (the same on all ranks) and the rank are
            # known.
            seed = torch.initial_seed() if self.seed is None else self.seed
            self._random = random.Random(f'{seed} {get_rank()}')
        return self._random.choice(self.sizes)

    def forward(self, inputs: Tensor,
                data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Resize.

        Args:
            inputs: Images (N, C, H, W), float.
            data_samples: Their N samples; boxes and sizes in them are rescaled in place.

        Returns:
            Images (N, C, h, w) and the samples.
        """
        size = self._draw_size()
        height, width = inputs.shape[-2:]
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        stopped = self.stop_epoch is not None and epoch >= self.stop_epoch
        if stopped or size == (height, width):
            return inputs, data_samples

        inputs = F.interpolate(inputs, size=size, mode=self.interpolation)
        for sample in data_samples:
            _rescale_sample(sample, size, size[0] / height, size[1] / width)
        return inputs, data_samples

    def extra_repr(self) -> str:
        return (f'sizes={self.sizes}, interpolation={self.interpolation!r}, '
                f'stop_epoch={self.stop_epoch}')


def _rescale_sample(sample: DetDataSample, size: tuple[int, int], scale_height: float,
                    scale_width: float) -> None:
    """Rescale boxes and sizes of a sample whose batch was resized to ``size``."""
    for instances in (sample.get('gt_instances', {}), sample.get('ignored_instances', {})):
        if 'masks' in instances:
            raise NotImplementedError(
                'BatchRandomResize does not resize instance masks: leave `with_mask` out of '
                'LoadAnnotations.')
        if 'bboxes' not in instances:
            continue
        instances.bboxes = scale_boxes(instances.bboxes, (scale_width, scale_height))

    meta = dict(batch_input_shape=size)
    for key in ('img_shape', 'pad_shape'):
        if key in sample:
            old_height, old_width = sample.get(key)[:2]
            meta[key] = (round(old_height * scale_height), round(old_width * scale_width))
    if 'scale_factor' in sample:
        factor_width, factor_height = sample.scale_factor
        meta['scale_factor'] = (factor_width * scale_width, factor_height * scale_height)
    sample.set_metainfo(meta)
