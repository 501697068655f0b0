"""Mosaics of training images: four times the objects at the price of one image, nearly."""
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose
from mmcv.transforms.utils import cache_randomness
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes, autocast_box_type
from PIL import Image
from torch import Tensor

from ..datasets.data_errors import UndecodableError
from ..datasets.images import image_of_bytes
from ..engine.data_order import RECENT, surroundings
from .geometry import resize_antialiased


class Picture(NamedTuple):
    """An image (H, W, 3), uint8, and its objects: corners (G, 4) in pixels and labels (G,).

    `ignored` (G,) tells which of them are crowds and the like.
    """

    image: np.ndarray
    boxes: Tensor
    labels: np.ndarray
    ignored: np.ndarray


class Affine(NamedTuple):
    """A turn about the centre by degrees, a factor, and a shift (x, y) in pixels; y is down."""

    angle: float
    scale: float
    shift: tuple[int, int]


@TRANSFORMS.register_module()
class DenseMosaic(BaseTransform):
    """Set the image and three others in a square of four, then turn, scale and shift it.

    Source: `DEIM <https://arxiv.org/abs/2412.04234>`_, section 3.2: more objects an image are more
    queries that are matched. Each image is resized to the same shorter side, keeps its aspect, and
    lies in the top left of its quadrant; the canvas, twice as high and wide as the largest of them,
    is black where nothing lies. Boxes become the hulls of the turned ones, clipped to the canvas;
    ignored ones are carried along.

    The transform goes right behind the loading of image and annotations.

    The others are drawn, each by itself, from the images that the same worker had last (50, those
    of the batch among them), which are kept resized, so that nearly none has to be decoded for it.
    Which ones they are depends on the order of the run alone: one that is resumed with the same
    number of workers makes the same mosaics. Without ``ResumableTrainLoop`` they are drawn from the
    whole dataset.

    NOTE: DEIM draws from the whole dataset and decodes four times as much; DEIMv2 keeps 50 images a
    worker as here, and leaves out a random one of them. A worker's first batches in an epoch have
    fewer to draw from. mmdet's ``Mosaic`` has a random centre and grey margins.

    Args:
        side: Shorter side of each image, in pixels.
        angle: Largest turn, in degrees.
        shift: Largest shift, as a share of the sides.
        scale: Range of the factor.
        load: How the others are loaded, with the same steps as the pipeline begins with.
    """

    def __init__(self, side: int = 320, angle: float = 10., shift: float = 0.1,
                 scale: Sequence[float] = (0.5, 1.5),
                 load: Sequence[Mapping[str, Any]] = (
                     dict(type='LoadCheckedImage'),
                     dict(type='LoadAnnotations', with_bbox=True))) -> None:
        self.side = side
        self.angle = angle
        self.shift = shift
        self.scale = tuple(scale)
        self.load = Compose(load)
        self._kept: OrderedDict[tuple[Any, ...], Picture] = OrderedDict()

    @cache_randomness
    def _draw_others(self, count: int) -> list[int]:
        """Draw three of so many."""
        return np.random.randint(count, size=3).tolist()

    @cache_randomness
    def _draw_affine(self, height: int, width: int) -> Affine:
        """Draw a turn, a factor and a shift for a canvas."""
        def draw(most: float) -> float:
            return np.random.uniform(-most, most)

        return Affine(draw(self.angle), np.random.uniform(*self.scale),
                      (round(draw(self.shift * width)), round(draw(self.shift * height))))

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Put the mosaic in the place of image and objects.

        Raises:
            RuntimeError: The dataset does not say which images there are.
            NotImplementedError: There are masks.
        """
        if results.get('gt_masks') is not None:
            raise NotImplementedError('DenseMosaic does not turn instance masks: leave `with_mask` '
                                      'out of LoadAnnotations')
        dataset, indices = surroundings()
        if dataset is None:
            raise RuntimeError('DenseMosaic needs a dataset that tells its transforms of the '
                               'others: CheckedCocoDataset, or any that ResumableTrainLoop trains '
                               'on')
        own = self._keep(results, loaded=True)
        drawn = self._draw_others(len(indices))
        pictures = [own]
        for other in drawn:
            try:
                pictures.append(self._keep(dataset.get_data_info(indices[other])))
            except UndecodableError:
                # The dataset reports it when its turn comes.
                pictures.append(own)
        mosaic = arrange(pictures)
        mosaic = turn(mosaic, self._draw_affine(*mosaic.image.shape[:2]))

        results['img'] = mosaic.image
        results['img_shape'] = mosaic.image.shape[:2]
        results['gt_bboxes'] = HorizontalBoxes(mosaic.boxes)
        results['gt_bboxes_labels'] = mosaic.labels
        results['gt_ignore_flags'] = mosaic.ignored
        return results

    def _keep(self, info: dict, loaded: bool = False) -> Picture:
        """Give an image resized, from those that are kept if it is among them."""
        # Several annotation files may be of the same images.
        key = tuple(info.get(name) for name in ('ann_file', 'img_path', 'sample_idx'))
        if key not in self._kept:
            self._kept[key] = self._resize(info if loaded else self.load(info))
        self._kept.move_to_end(key)
        if len(self._kept) > RECENT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _resize(self, results: dict) -> Picture:
        image = image_of_bytes(results, type(self).__name__, 3)
        height, width = image.shape[:2]
        shorter = min(height, width)
        # Whole pixels, cut off as torchvision does it.
        new_height, new_width = (self.side * length // shorter for length in (height, width))
        boxes = results['gt_bboxes'].tensor * torch.tensor(
            [new_width / width, new_height / height] * 2)
        return Picture(resize_antialiased(image, new_height, new_width), boxes,
                       results['gt_bboxes_labels'], results['gt_ignore_flags'])

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(side={self.side}, angle={self.angle}, shift={self.shift}, '
                f'scale={self.scale})')


def arrange(pictures: Sequence[Picture]) -> Picture:
    """Lay four pictures out: top left, top right, bottom left, bottom right."""
    height, width = np.max([picture.image.shape[:2] for picture in pictures], 0).tolist()
    canvas = np.zeros((2 * height, 2 * width, 3), np.uint8)
    moved = []
    for number, (image, boxes, *_) in enumerate(pictures):
        top, left = number // 2 * height, number % 2 * width
        canvas[top:top + image.shape[0], left:left + image.shape[1]] = image
        moved.append(boxes + torch.tensor([left, top] * 2))
    labels, ignored = (np.concatenate([getattr(picture, name) for picture in pictures])
                       for name in ('labels', 'ignored'))
    return Picture(canvas, torch.cat(moved), labels, ignored)


def turn(picture: Picture, affine: Affine) -> Picture:
    """Turn, scale and shift a picture, the nearest pixel everywhere, black beyond its border.

    A point p goes to scale R(angle) (p - c) + c + shift, c the centre.
    """
    image, boxes, *others = picture
    height, width = image.shape[:2]
    angle = math.radians(affine.angle)
    matrix = affine.scale * np.array([[math.cos(angle), -math.sin(angle)],
                                      [math.sin(angle), math.cos(angle)]])
    centre = np.array([width, height]) / 2
    offset = centre + affine.shift - matrix @ centre

    # Pillow asks for the way back, from the centre of each pixel.
    back = np.linalg.inv(matrix)
    back = np.column_stack([back, -back @ offset])
    turned = Image.fromarray(image).transform((width, height), Image.Transform.AFFINE,
                                              back.flatten().tolist(), Image.Resampling.NEAREST)

    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)
    corners = corners @ torch.tensor(matrix.T).float() + torch.tensor(offset).float()
    hulls = torch.cat([corners.amin(1), corners.amax(1)], 1).clamp(min=0)
    return Picture(np.array(turned), hulls.minimum(torch.tensor([width, height] * 2)), *others)
