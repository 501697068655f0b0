"""The ground truth of a batch, as denoising, matching and losses read it."""
from typing import NamedTuple

import numpy as np
import torch
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from mmengine.structures import InstanceData
from torch import Tensor


class Targets(NamedTuple):
    """The G objects of all N images, image after image.

    Attributes:
        labels: (G,), classes.
        boxes: (G, 4), (cx, cy, w, h) as fractions of the padded image, float32.
        scale: (G, 4), (width, height, width, height) in pixels of the padded image of each.
        image: (G,), the image that each lies in.
        slot: (G,), its number within its image.
        counts: Objects of each image.
    """

    labels: Tensor
    boxes: Tensor
    scale: Tensor
    image: Tensor
    slot: Tensor
    counts: tuple[int, ...]


def gather_targets(batch_data_samples: SampleList) -> Targets:
    """Join the images' ground truth, as the model sees it.

    NOTE: Boxes are fractions of the padded image, since the maps cover the padding too. Where
    images of different sizes share a batch, mmdet's DETRs use the unpadded size and mask the
    padding; RT-DETR has no mask. Without padding both are the same.

    Args:
        batch_data_samples: Samples with `gt_instances`, boxes (x1, y1, x2, y2) in pixels.
    """
    instances = [sample.gt_instances for sample in batch_data_samples]
    labels = torch.cat([objects.labels for objects in instances])
    corners = torch.cat([boxes_tensor(objects) for objects in instances]).float()

    counts = tuple(len(objects) for objects in instances)
    sizes = [input_shape(sample.metainfo)[::-1] * 2 for sample in batch_data_samples]
    scale = to_device(np.repeat(np.array(sizes, np.float32), counts, axis=0), corners.device)
    image, slot = to_device(
        np.stack([np.repeat(np.arange(len(counts)), counts), _number(counts)]), corners.device)
    return Targets(labels, bbox_xyxy_to_cxcywh(corners / scale), scale, image, slot, counts)


def draw_targets(targets: Targets, most: int) -> Targets:
    """At most so many objects of each image, a random subset where there are more."""
    if max(targets.counts) <= most:
        return targets
    starts = np.cumsum([0, *targets.counts[:-1]])
    index = to_device(np.concatenate([
        start + (torch.randperm(count)[:most].numpy() if count > most else np.arange(count))
        for start, count in zip(starts, targets.counts, strict=True)]), targets.image.device)
    counts = tuple(min(count, most) for count in targets.counts)
    slot = to_device(_number(counts), index.device)
    return Targets(*(values[index] for values in targets[:4]), slot, counts)


def _number(counts: tuple[int, ...]) -> np.ndarray:
    """The number of each object within its image, image after image."""
    return np.concatenate([np.arange(count) for count in counts])


def boxes_tensor(instances: InstanceData) -> Tensor:
    """The instances' boxes (G, 4) as a plain tensor, whichever of mmdet's box types they are."""
    return getattr(instances.bboxes, 'tensor', instances.bboxes)


def input_shape(img_meta: dict) -> tuple[int, int]:
    """(height, width) in pixels of the image as it entered the network, padding included."""
    return tuple(img_meta.get('batch_input_shape', img_meta['img_shape'])[:2])


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers as a tensor on `device`, without waiting for what the device still has to do.

    NOTE: ``torch.tensor(values, device='cuda')`` and ``tensor.new_tensor(values)`` wait.
    """
    tensor = torch.from_numpy(values)
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
