"""RT-DETR's transform of colours, in mmdet's terms and with torchvision's meaning."""

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.registry import TRANSFORMS
from PIL import Image

from ..datasets.images import image_of_bytes


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
        brightness: Range of the factor on the image.
        contrast: Range of the weight of the image against its mean grey.
        saturation: Range of the weight of the image against its grey version.
        hue: Range of the shift of the hue, in turns of the colour circle, within -0.5..0.5.
        prob: Probability of each step, 0..1. RT-DETR uses 0.5 (0.8 before January 2024).

    Raises:
        ValueError: A shift of the hue by more than half a turn.
    """

    def __init__(self, brightness: Sequence[float] = (0.875, 1.125),
                 contrast: Sequence[float] = (0.5, 1.5), saturation: Sequence[float] = (0.5, 1.5),
                 hue: Sequence[float] = (-0.05, 0.05), prob: float = 0.5) -> None:
        if not -0.5 <= hue[0] <= hue[1] <= 0.5:
            raise ValueError(f'RandomPhotometricDistort: hue={tuple(hue)} must be (low, high) with '
                             '-0.5 <= low <= high <= 0.5.')
        self.ranges = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self.prob = prob

    @cache_randomness
    def _draw(self) -> tuple[list[tuple[str, float]], np.ndarray | None]:
        """Draw the steps in their order, as (name, factor), and the permutation of channels."""
        factors = {name: np.random.uniform(*limits) for name, limits in self.ranges.items()
                   if np.random.rand() < self.prob}
        order = ['brightness', 'saturation', 'hue']
        order.insert(1 if np.random.rand() < 0.5 else 3, 'contrast')
        steps = [(name, factors[name]) for name in order if name in factors]

        permutation = np.random.permutation(3) if np.random.rand() < self.prob else None
        return steps, permutation

    def transform(self, results: dict) -> dict:
        """Distort ``results['img']``.

        Raises:
            TypeError: The image is not (H, W, 3) uint8.
        """
        bgr = image_of_bytes(results, type(self).__name__, 3)
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
    return cv2.merge([
        cv2.subtract(value, cv2.convertScaleAbs(cv2.multiply(cv2.LUT(hue, loss), chroma)))
        for loss in losses])


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
    cases = [(low, middle, high), (middle, low, high), (low, high, middle), impossible, impossible,
             (high, low, middle), (middle, high, low), (high, middle, low)]
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


_ADJUST = dict(brightness=_adjust_brightness, contrast=_adjust_contrast,
               saturation=_adjust_saturation, hue=_adjust_hue)
