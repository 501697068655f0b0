"""RT-DETR's transforms of places and sizes, in mmdet's terms and with torchvision's meaning.

The official pipeline is written with ``torchvision.transforms.v2`` on PIL images. Its flip exists
in mmdet with the same meaning, ``RandomFlip(prob=0.5)``; colours are distorted in ``photometric``.
The order is::

    RandomPhotometricDistort -> RandomZoomOut -> RandomIoUCrop -> FilterSmallBoxes -> RandomFlip ->
    AntialiasedResize -> FilterSmallBoxes

Images are (H, W, 3) BGR uint8 arrays before and after each transform, boxes (N, 4) corners in
pixels.
"""

from collections.abc import Sequence

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.datasets.transforms import Expand, Resize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import autocast_box_type
from torch.nn import functional

from ..datasets.images import image_of_bytes

_INSTANCE_KEYS = ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks')


def _keep_instances(results: dict, keep: np.ndarray) -> None:
    """Keep the instances where the boolean ``keep`` (N,) is true, in every per-instance entry."""
    index = keep.nonzero()[0]
    for key in _INSTANCE_KEYS:
        if results.get(key) is not None:
            results[key] = results[key][index]


@TRANSFORMS.register_module()
class RandomZoomOut(Expand):
    """Place the image at a random spot of a larger black canvas.

    mmdet's ``Expand`` has the meaning of torchvision's ``RandomZoomOut``: one ratio for both sides,
    uniform, and a uniform position. Its defaults here are RT-DETR's.

    NOTE: Differs from ``Expand`` in the value of the canvas (one number) and in speed: given a
    tuple, ``Expand`` always takes the slow way of filling the canvas, about 16 ms for a threefold
    640x480 image.

    Args:
        fill: Value of the canvas, 0..255.
        ratio_range: Range of the canvas side over the image side, from 1.
        prob: Probability of the transform, 0..1.

    Raises:
        ValueError: A ratio below 1.
    """

    def __init__(self, fill: int = 0, ratio_range: Sequence[float] = (1.0, 4.0),
                 prob: float = 0.5) -> None:
        if not 1 <= ratio_range[0] <= ratio_range[1]:
            raise ValueError(f'RandomZoomOut: ratio_range={tuple(ratio_range)} must be (low, high) '
                             'with 1 <= low <= high.')
        super().__init__(mean=[fill] * 3, to_rgb=False, ratio_range=ratio_range, prob=prob)
        # an array makes the comparison elementwise that chooses the fast way
        self.mean = np.array(self.mean)


@TRANSFORMS.register_module()
class RandomIoUCrop(BaseTransform):
    """Crop so that at least one object stays, covered well enough (the sampling of SSD).

    A minimal IoU is drawn from ``min_ious``; 1 keeps the image as it is. Otherwise up to ``trials``
    crops are drawn, sides and position uniform and independent, and the first is taken whose aspect
    ratio is allowed, that has the centre of a box inside, and whose *best* IoU with the boxes
    centred inside reaches the minimal one. If none is found, another minimal IoU is drawn. Boxes
    centred inside stay, clipped.

    Numbers are those of torchvision's class of this name; ``prob`` is RT-DETR's.

    NOTE: mmdet's ``MinIoURandomCrop`` asks for the *worst* IoU over *all* boxes to reach the
    minimum, tries 50 times, crops images without boxes, and lets ignored boxes decide. Here, as in
    torchvision, an image without boxes stays whole (there, after drawing until 1 comes up), and
    ignored boxes (crowds, which the official code drops when loading) do not decide; they are
    cropped along.

    Args:
        min_ious: The minimal IoUs drawn from; at least one of them 1 or more.
        min_scale: Smallest side of the crop over the side of the image, in (0, 1].
        max_scale: Largest side of the crop over the side of the image, in (0, 1].
        min_aspect_ratio: Smallest width over height of the crop.
        max_aspect_ratio: Largest width over height of the crop.
        trials: Number of crops to try for a drawn minimal IoU.
        prob: Probability of the transform, 0..1.

    Raises:
        ValueError: No value of ``min_ious`` is 1 or more, so that the search may never end.
    """

    def __init__(self, min_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
                 min_scale: float = 0.3, max_scale: float = 1.0, min_aspect_ratio: float = 0.5,
                 max_aspect_ratio: float = 2.0, trials: int = 40, prob: float = 0.8) -> None:
        if max(min_ious) < 1:
            raise ValueError(
                f'RandomIoUCrop: min_ious={tuple(min_ious)} must contain 1.0 (keep the image '
                'whole), or the search never ends on an image where no crop fits.')
        self.min_ious = tuple(min_ious)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.min_aspect_ratio = min_aspect_ratio
        self.max_aspect_ratio = max_aspect_ratio
        self.trials = trials
        self.prob = prob

    @cache_randomness
    def _draw_crop(self, height: int, width: int, boxes: np.ndarray) -> np.ndarray | None:
        """Draw a crop (left, top, right, bottom) for the boxes (N, 4) that decide.

        None keeps the image as it is.
        """
        if np.random.rand() >= self.prob or len(boxes) == 0:
            return None
        while True:
            min_iou = np.random.choice(self.min_ious)
            if min_iou >= 1:
                return None
            crops, valid = self._judge(np.random.rand(self.trials, 4), min_iou, height, width,
                                       boxes)
            if valid.any():
                return crops[valid.argmax()]

    def _judge(self, draws: np.ndarray, min_iou: float, height: int, width: int,
               boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn T uniform draws (T, 4) into crops (T, 4) and tell which are valid (T,).

        All trials at once: the first valid row is what trying one after the other would have taken.
        """
        scales = self.min_scale + (self.max_scale - self.min_scale) * draws[:, :2]
        sizes = (scales * (width, height)).astype(int)
        corners = (draws[:, 2:] * ((width, height) - sizes)).astype(int)
        crops = np.concatenate([corners, corners + sizes], axis=1)

        crop_widths, crop_heights = sizes.T
        valid = (crop_widths > 0) & (crop_heights > 0)
        valid &= crop_widths >= self.min_aspect_ratio * crop_heights
        valid &= crop_widths <= self.max_aspect_ratio * crop_heights

        inside = _centres_inside(boxes, crops)
        overlap = (np.minimum(crops[:, None, 2:], boxes[:, 2:])
                   - np.maximum(crops[:, None, :2], boxes[:, :2]))
        intersection = overlap.clip(min=0).prod(-1)
        box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        union = sizes.prod(-1)[:, None] + box_areas - intersection
        ious = np.where(inside, intersection / np.maximum(union, 1e-9), -1)
        valid &= ious.max(1) >= min_iou
        return crops, valid

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Crop image, boxes, masks and segmentation map."""
        boxes = results['gt_bboxes'].numpy()
        ignored = results.get('gt_ignore_flags')
        deciding = boxes if ignored is None else boxes[~np.asarray(ignored, dtype=bool)]
        crop = self._draw_crop(*results['img'].shape[:2], deciding)
        if crop is None:
            return results
        left, top, right, bottom = (int(side) for side in crop)

        _keep_instances(results, _centres_inside(boxes, crop[None])[0])
        results['gt_bboxes'].translate_([-left, -top])
        results['gt_bboxes'].clip_([bottom - top, right - left])
        if results.get('gt_masks') is not None:
            results['gt_masks'] = results['gt_masks'].crop(crop)

        results['img'] = results['img'][top:bottom, left:right]
        results['img_shape'] = results['img'].shape[:2]
        if results.get('gt_seg_map') is not None:
            results['gt_seg_map'] = results['gt_seg_map'][top:bottom, left:right]
        return results

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(min_ious={self.min_ious}, min_scale={self.min_scale}, '
                f'max_scale={self.max_scale}, min_aspect_ratio={self.min_aspect_ratio}, '
                f'max_aspect_ratio={self.max_aspect_ratio}, trials={self.trials}, '
                f'prob={self.prob})')


def _centres_inside(boxes: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Tell for each crop (T, 4) which boxes (N, 4) have their centre strictly inside: (T, N)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(-1)


@TRANSFORMS.register_module()
class FilterSmallBoxes(BaseTransform):
    """Drop boxes narrower or lower than ``min_size``; the image stays, even when no box is left.

    RT-DETR does this after cropping and again after resizing, and trains on images that it leaves
    without a box, too.

    NOTE: mmdet's ``FilterAnnotations`` drops a box of exactly the minimum, and its
    ``keep_empty=True`` discards the image when no box is left.

    Args:
        min_size: Smallest width and height kept, in pixels.
    """

    def __init__(self, min_size: float = 1.0) -> None:
        self.min_size = min_size

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Filter every per-instance entry of ``results``."""
        boxes = results['gt_bboxes'].numpy()
        _keep_instances(results, ((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(1))
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(min_size={self.min_size})'


@TRANSFORMS.register_module()
class AntialiasedResize(Resize):
    """Resize bilinearly, smoothing before the image shrinks.

    This is torchvision's resize of a tensor, which takes a tenth to a half of the time of that of a
    PIL image where the CPU has AVX2.

    NOTE: The official code resizes PIL images, as ``Resize(backend='pillow')`` does, which is used
    at test. The results differ by one grey level at most, as a rule in one value of a thousand, and
    in up to one of twenty where the sides are in a simple ratio such as 5 to 4.

    Args:
        scale: Width and height of the result in pixels; with ``keep_ratio`` those it fits in.
        keep_ratio: Whether to keep the ratio of width and height.
        clip_object_border: Whether to clip the boxes at the border of the image.
    """

    def __init__(self, scale: int | tuple[int, int], keep_ratio: bool = False,
                 clip_object_border: bool = True) -> None:
        super().__init__(scale, keep_ratio=keep_ratio, clip_object_border=clip_object_border)

    def _resize_img(self, results: dict) -> None:
        """Resize ``results['img']``, (H, W, C) uint8, to ``results['scale']``.

        Raises:
            TypeError: The image is something else.
        """
        image = image_of_bytes(results, type(self).__name__)
        height, width = image.shape[:2]
        new_width, new_height = results['scale']
        if self.keep_ratio:
            new_width, new_height = mmcv.rescale_size((width, height), results['scale'])
        results['img'] = resize_antialiased(image, new_height, new_width)
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (new_width / width, new_height / height)
        results['keep_ratio'] = self.keep_ratio

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(scale={self.scale}, keep_ratio={self.keep_ratio}, '
                f'clip_object_border={self.clip_object_border})')


def resize_antialiased(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image (H, W, C) uint8 bilinearly, smoothing before it shrinks."""
    pixels = torch.from_numpy(_contiguous(image)).permute(2, 0, 1)[None]  # (1, C, H, W)
    resized = functional.interpolate(pixels, size=(height, width), mode='bilinear', antialias=True)
    # In planes behind the view of pixels, which is what gets packed in the end: no copy.
    return resized[0].permute(1, 2, 0).numpy()


def _contiguous(image: np.ndarray) -> np.ndarray:
    """Copy an image (H, W, C) that is a view of another, unless it is contiguous."""
    if image.strides[1] < 0:
        # NumPy copies a mirrored image pixel by pixel, in fifty times the time.
        return cv2.flip(np.ascontiguousarray(image[:, ::-1]), 1).reshape(image.shape)
    return np.ascontiguousarray(image)
