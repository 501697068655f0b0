"""RT-DETR's training transforms, in mmdet's terms and with torchvision's meaning.

The official pipeline is written with ``torchvision.transforms.v2`` on PIL images. Its flip exists
in mmdet with the same meaning, ``RandomFlip(prob=0.5)``. The others are here, to be used in this
order::

    RandomPhotometricDistort -> RandomZoomOut -> RandomIoUCrop -> FilterSmallBoxes -> RandomFlip ->
    AntialiasedResize -> FilterSmallBoxes

Images are (H, W, 3) BGR uint8 arrays before and after each transform, boxes (N, 4) corners in
pixels.
"""

from collections.abc import Sequence
from functools import cache

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.datasets.transforms import Expand, Resize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import autocast_box_type
from PIL import Image
from torch.nn import functional

_INSTANCE_KEYS = ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks')


def _keep_instances(results: dict, keep: np.ndarray) -> None:
    """Keep the instances where the boolean ``keep`` (N,) is true, in every per-instance entry."""
    index = keep.nonzero()[0]
    for key in _INSTANCE_KEYS:
        if results.get(key) is not None:
            results[key] = results[key][index]


@TRANSFORMS.register_module()
class RandomPhotometricDistort(BaseTransform):
    """Distort brightness, contrast, saturation, hue and channel order, each by a chance of its own.

    The ranges and ``prob`` are the defaults of torchvision's class of this name, and RT-DETR's
    recipe: each of the five steps is switched on by a draw of its own; contrast comes before
    saturation and hue, or after them, with equal chance.

    NOTE: mmdet's ``PhotoMetricDistortion`` is another transform: additive brightness, contrast
    without the mean, saturation in HSV, and a float result beyond 0..255 that the Pillow resize
    does not take.

    Args:
        brightness: range of the factor on the image.
        contrast: range of the weight of the image against its mean grey.
        saturation: range of the weight of the image against its grey version.
        hue: range of the shift of the hue, in turns of the colour circle, within -0.5..0.5.
        prob: probability of each step, 0..1. RT-DETR uses 0.5 (0.8 before January 2024).

    Raises:
        ValueError: a shift of the hue by more than half a turn.
    """

    def __init__(
        self,
        brightness: Sequence[float] = (0.875, 1.125),
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: Sequence[float] = (-0.05, 0.05),
        prob: float = 0.5,
    ) -> None:
        if not -0.5 <= hue[0] <= hue[1] <= 0.5:
            raise ValueError(
                f'RandomPhotometricDistort: hue={tuple(hue)} must be (low, high) with '
                '-0.5 <= low <= high <= 0.5.'
            )
        self.ranges = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self.prob = prob

    @cache_randomness
    def _draw(self) -> tuple[list[tuple[str, float]], np.ndarray | None]:
        """Draw the steps in their order, as (name, factor), and the permutation of channels."""
        factors = {
            name: np.random.uniform(*limits)
            for name, limits in self.ranges.items()
            if np.random.rand() < self.prob
        }
        contrast_first = np.random.rand() < 0.5
        order = (
            ('contrast', 'saturation', 'hue')
            if contrast_first
            else ('saturation', 'hue', 'contrast')
        )
        steps = [(name, factors[name]) for name in ('brightness', *order) if name in factors]

        permutation = np.random.permutation(3) if np.random.rand() < self.prob else None
        return steps, permutation

    def transform(self, results: dict) -> dict:
        """Distort ``results['img']``.

        Raises:
            TypeError: the image is not (H, W, 3) uint8.
        """
        bgr = results['img']
        if bgr.dtype != np.uint8 or bgr.ndim != 3 or bgr.shape[2] != 3:
            raise TypeError(
                'RandomPhotometricDistort needs a (H, W, 3) uint8 image, but '
                f'{results.get("img_path", "the image")} is {bgr.shape} {bgr.dtype}: put it before '
                'every transform that makes floats, and load with `to_float32=False` and '
                '`color_type="color"`.'
            )
        steps, permutation = self._draw()

        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        for name, factor in steps:
            rgb = _ADJUST[name](rgb, factor)
        if permutation is not None:
            planes = cv2.split(rgb)
            rgb = cv2.merge([planes[channel] for channel in permutation])
        results['img'] = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        return results

    def __repr__(self) -> str:
        ranges = ', '.join(f'{name}={tuple(limits)}' for name, limits in self.ranges.items())
        return f'{type(self).__name__}({ranges}, prob={self.prob})'


# These give what Pillow does, to the last bit, because the official code distorts PIL images;
# torchvision's kernels for tensors round hue differently, by up to a dozen grey levels.


def _adjust_brightness(rgb: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with_grey(rgb, 0, factor)


def _adjust_contrast(rgb: np.ndarray, factor: float) -> np.ndarray:
    grey = np.asarray(Image.fromarray(rgb).convert('L'))
    return _blend_with_grey(rgb, int(cv2.sumElems(grey)[0] / grey.size + 0.5), factor)


def _blend_with_grey(rgb: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Let Pillow blend every level there is with one grey, and look the pixels up."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = Image.blend(Image.new('L', levels.size, level), levels, factor)
    return cv2.LUT(rgb, np.asarray(table))


def _adjust_saturation(rgb: np.ndarray, factor: float) -> np.ndarray:
    image = Image.fromarray(rgb)
    return np.asarray(Image.blend(image.convert('L').convert('RGB'), image, factor))


def _adjust_hue(rgb: np.ndarray, factor: float) -> np.ndarray:
    hue, chroma, value = _to_hue(rgb)
    # NOTE: a turn has 255 hues but is counted as 256, in Pillow's arithmetic as in torchvision's.
    losses = np.roll(_tabulate_losses(), -int(factor * 255), axis=1)
    planes = [
        cv2.subtract(value, cv2.convertScaleAbs(cv2.multiply(cv2.LUT(hue, loss), chroma)))
        for loss in losses
    ]
    return cv2.merge(planes)


def _to_hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn an image (H, W, 3) into hue (H, W), saturation times value, and value, as Pillow does.

    Pillow computes each pixel anew, in three times the time.
    """
    red, green, blue = cv2.split(rgb)
    value = cv2.max(cv2.max(red, green), blue)
    lowest = cv2.min(cv2.min(red, green), blue)
    middle = red ^ green ^ blue ^ value ^ lowest  # what is neither of the two
    order = (red >= green).view(np.uint8)
    order |= (green >= blue).view(np.uint8) << 1
    order |= (red >= blue).view(np.uint8) << 2

    hues, chromas = _tabulate_hues()
    # The bytes of the places in the tables, the lowest first.
    in_hues = cv2.merge([value - middle, value - lowest, order, np.zeros_like(order)])
    in_chromas = cv2.merge([lowest, value])
    hue = hues.take(in_hues.view('<u4')[..., 0])
    return hue, chromas.take(in_chromas.view('<u2')[..., 0]), value


@cache
def _tabulate_hues() -> tuple[np.ndarray, np.ndarray]:
    """Let Pillow convert every case there is.

    Returns:
        Hue (8 * 256 * 256,), by the order of the channels, the highest over the lowest, and the
        highest over the middle one; saturation times value (256 * 256,), by the highest and the
        lowest.
    """
    high, below = np.mgrid[:256, :256].astype(np.uint8)
    middle, low = np.where(below <= high, high - below, 0), np.zeros_like(high)
    impossible = low, low, low
    # The bits are: red not below green, green not below blue, red not below blue.
    cases = [
        (low, middle, high), (middle, low, high), (low, high, middle), impossible,
        impossible, (high, low, middle), (middle, high, low), (high, middle, low),
    ]
    hues = [_convert_to_hsv(case)[..., 0] for case in cases]

    low = np.minimum(below, high)
    saturation = _convert_to_hsv([high, low, low])[..., 1]
    chromas = np.multiply(saturation, high, dtype=np.float32)
    return np.concatenate(hues).ravel(), chromas.ravel()


def _convert_to_hsv(planes: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.dstack(planes)).convert('HSV'))


@cache
def _tabulate_losses() -> np.ndarray:
    """Tabulate what red, green and blue lose at each hue, (3, 256), over saturation times value.

    Around its own hue, a channel has the full value for a sixth of a turn either way; over the next
    sixth it loses the share that is the saturation. 255 hues are a turn, saturation is 0..255.
    """
    angles = 6 * np.arange(256) - 510 * np.arange(3)[:, None]
    away = np.abs((angles + 765) % 1530 - 765)
    return (away - 255).clip(0, 255).astype(np.float32) / 255**2


_ADJUST = dict(
    brightness=_adjust_brightness,
    contrast=_adjust_contrast,
    saturation=_adjust_saturation,
    hue=_adjust_hue,
)


@TRANSFORMS.register_module()
class RandomZoomOut(Expand):
    """Place the image at a random spot of a larger black canvas.

    mmdet's ``Expand`` has the meaning of torchvision's ``RandomZoomOut``: one ratio for both sides,
    uniform, and a uniform position. Its defaults here are RT-DETR's.

    NOTE: differs from ``Expand`` in the value of the canvas (one number) and in speed: given a
    tuple, ``Expand`` always takes the slow way of filling the canvas, about 16 ms for a threefold
    640x480 image.

    Args:
        fill: value of the canvas, 0..255.
        ratio_range: range of the canvas side over the image side, from 1.
        prob: probability of the transform, 0..1.

    Raises:
        ValueError: a ratio below 1.
    """

    def __init__(
        self, fill: int = 0, ratio_range: Sequence[float] = (1.0, 4.0), prob: float = 0.5
    ) -> None:
        if not 1 <= ratio_range[0] <= ratio_range[1]:
            raise ValueError(
                f'RandomZoomOut: ratio_range={tuple(ratio_range)} must be (low, high) with '
                '1 <= low <= high.'
            )
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
        min_ious: the minimal IoUs drawn from; at least one of them 1 or more.
        min_scale: smallest side of the crop over the side of the image, in (0, 1].
        max_scale: largest side of the crop over the side of the image, in (0, 1].
        min_aspect_ratio: smallest width over height of the crop.
        max_aspect_ratio: largest width over height of the crop.
        trials: number of crops to try for a drawn minimal IoU.
        prob: probability of the transform, 0..1.

    Raises:
        ValueError: no value of ``min_ious`` is 1 or more, so that the search may never end.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        min_scale: float = 0.3,
        max_scale: float = 1.0,
        min_aspect_ratio: float = 0.5,
        max_aspect_ratio: float = 2.0,
        trials: int = 40,
        prob: float = 0.8,
    ) -> None:
        if max(min_ious) < 1:
            raise ValueError(
                f'RandomIoUCrop: min_ious={tuple(min_ious)} must contain 1.0 (keep the image '
                'whole), or the search never ends on an image where no crop fits.'
            )
        self.min_ious = tuple(min_ious)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.min_aspect_ratio = min_aspect_ratio
        self.max_aspect_ratio = max_aspect_ratio
        self.trials = trials
        self.prob = prob

    @cache_randomness
    def _draw_crop(self, height: int, width: int, boxes: np.ndarray) -> np.ndarray | None:
        """Draw a crop for the boxes (N, 4) that decide.

        Returns:
            Corners (left, top, right, bottom) as integers, None to keep the image as it is.
        """
        if np.random.rand() >= self.prob or len(boxes) == 0:
            return None
        while True:
            min_iou = np.random.choice(self.min_ious)
            if min_iou >= 1:
                return None
            crops, valid = self._judge(
                np.random.rand(self.trials, 4), min_iou, height, width, boxes
            )
            if valid.any():
                return crops[valid.argmax()]

    def _judge(
        self, draws: np.ndarray, min_iou: float, height: int, width: int, boxes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
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
        overlap = np.minimum(crops[:, None, 2:], boxes[:, 2:]) - np.maximum(
            crops[:, None, :2], boxes[:, :2]
        )
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
        return (
            f'{type(self).__name__}(min_ious={self.min_ious}, min_scale={self.min_scale}, '
            f'max_scale={self.max_scale}, min_aspect_ratio={self.min_aspect_ratio}, '
            f'max_aspect_ratio={self.max_aspect_ratio}, trials={self.trials}, prob={self.prob})'
        )


def _centres_inside(boxes: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Tell for each crop (T, 4) which boxes (N, 4) have their centre strictly inside: (T, N)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(-1)


@TRANSFORMS.register_module()
class FilterSmallBoxes(BaseTransform):
    """Drop boxes narrower or lower than ``min_size``; the image stays, even when no box is left.

    RT-DETR does this after cropping and again after resizing, and trains on the images emptied
    thereby.

    NOTE: mmdet's ``FilterAnnotations`` drops a box of exactly the minimum, and its
    ``keep_empty=True`` discards the image when no box is left.

    Args:
        min_size: smallest width and height kept, in pixels.
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

    NOTE: the official code resizes PIL images, as ``Resize(backend='pillow')`` does, which is used
    at test. The results differ by one grey level at most, as a rule in one value of a thousand, and
    in up to one of twenty where the sides are in a simple ratio such as 5 to 4.

    Args:
        scale: width and height of the result in pixels; with ``keep_ratio`` those it fits in.
        keep_ratio: whether to keep the ratio of width and height.
        clip_object_border: whether to clip the boxes at the border of the image.
    """

    def __init__(
        self,
        scale: int | tuple[int, int],
        keep_ratio: bool = False,
        clip_object_border: bool = True,
    ) -> None:
        super().__init__(scale, keep_ratio=keep_ratio, clip_object_border=clip_object_border)

    def _resize_img(self, results: dict) -> None:
        """Resize ``results['img']``, (H, W, C) uint8, to ``results['scale']``.

        Raises:
            TypeError: the image is something else.
        """
        image = results['img']
        if image.dtype != np.uint8 or image.ndim != 3:
            raise TypeError(
                'AntialiasedResize needs a (H, W, C) uint8 image, but '
                f'{results.get("img_path", "the image")} is {image.shape} {image.dtype}: put it '
                'before every transform that makes floats, and load with `to_float32=False` and '
                '`color_type="color"`.'
            )
        height, width = image.shape[:2]
        new_width, new_height = (
            mmcv.rescale_size((width, height), results['scale'])
            if self.keep_ratio
            else results['scale']
        )
        pixels = torch.from_numpy(_contiguous(image)).permute(2, 0, 1)[None]  # (1, C, H, W)
        resized = functional.interpolate(
            pixels, size=(new_height, new_width), mode='bilinear', antialias=True
        )
        # In planes behind the view of pixels, which is what gets packed in the end: no copy.
        results['img'] = resized[0].permute(1, 2, 0).numpy()
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (new_width / width, new_height / height)
        results['keep_ratio'] = self.keep_ratio

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(scale={self.scale}, keep_ratio={self.keep_ratio}, '
            f'clip_object_border={self.clip_object_border})'
        )


def _contiguous(image: np.ndarray) -> np.ndarray:
    """Copy an image (H, W, C) that is a view of another, unless it is contiguous."""
    if image.strides[1] < 0:
        # NumPy copies a mirrored image pixel by pixel, in fifty times the time.
        return cv2.flip(np.ascontiguousarray(image[:, ::-1]), 1).reshape(image.shape)
    return np.ascontiguousarray(image)
