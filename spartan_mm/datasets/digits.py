"""A small detection dataset made on the spot: handwritten digits on photographs, in COCO format.

The digits are scikit-learn's (1797 samples of 8x8 pixels, from the UCI repository), the photographs
its two sample images; nothing is downloaded. Training and validation share neither a digit nor a
pixel of a photograph. Everything that COCO has and a toy set usually lacks is there: several
objects a picture, small to large, overlapping; pictures without objects; crowd regions; category
ids with gaps.
"""

import colorsys
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..requirements import require
from .atomic_folder import SPLITS, make_once

_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
# gaps, so that a mistake in mapping ids to labels shows
_IDS = (1, 2, 4, 5, 7, 8, 11, 13, 14, 18)

#: The categories of the annotation files.
DIGITS_CATEGORIES = tuple(dict(id=number, name=name, supercategory='digit')
                          for number, name in zip(_IDS, _NAMES, strict=True))

# Goes into the stamp: raise it whenever the pictures change for the same arguments.
_VERSION = 1
_DESCRIPTION = 'handwritten digits on photographs'

_VAL_DIGITS = 0.2  # share of each class's samples
_VAL_PHOTO = 0.4  # share of each photograph's width

_NO_OBJECT = 0.06  # share of pictures
_CROWD = 0.08  # share of pictures
_MAX_DIGITS = 7
_DIGIT_SIZE = (0.10, 0.60)  # height of a digit over the shorter side of the picture
_CROWD_DIGIT_SIZE = (0.05, 0.07)
_MAX_COVERED = 0.10  # share of a digit's ink that later ones may hide
_MAX_OVERLAP = 0.35  # intersection of two boxes over the smaller one


class DigitsPaths(NamedTuple):
    """Where the parts of the dataset lie."""

    root: Path
    train_images: Path
    val_images: Path
    train_annotations: Path
    val_annotations: Path


def make_digits(root: str | Path, num_train: int = 2000, num_val: int = 200, seed: int = 0,
                image_size: tuple[int, int] = (320, 256), progress: bool = True) -> DigitsPaths:
    """Make the dataset under ``root``, unless it is there already, made with the same arguments.

    It is written beside ``root`` and moved there when complete, so an interrupted run leaves
    nothing half-made. Picture i of a split depends on the seed and i alone: asking for more
    pictures adds to the same ones.

    Args:
        root: Folder to make, with ``train/``, ``val/`` and ``annotations/{train,val}.json`` in it.
            One made here earlier with other arguments is replaced.
        num_train: Number of training pictures.
        num_val: Number of validation pictures.
        seed: Of everything that is drawn.
        image_size: (width, height) of most pictures, in pixels, at least 64; the others are square
            or turned.
        progress: Show a progress bar.

    Returns:
        The paths of its parts.

    Raises:
        FileExistsError: ``root`` is there and holds something else.
        ValueError: No pictures asked for, or too small ones.
    """
    if min(num_train, num_val) < 1:
        raise ValueError(f'num_train={num_train} and num_val={num_val} must be at least 1.')
    if min(image_size) < 64:
        raise ValueError(
            f'image_size={tuple(image_size)}: digits need pictures of at least 64x64 pixels.')
    counts = dict(train=num_train, val=num_val)
    stamp = dict(version=_VERSION, seed=seed, image_size=list(image_size), **counts)

    def write(folder: Path) -> None:
        from tqdm import tqdm
        sources = _load_sources(seed)
        (folder / 'annotations').mkdir()
        for number, split in enumerate(SPLITS):
            rngs = [np.random.default_rng([seed, number, i]) for i in range(counts[split])]
            rngs = tqdm(rngs, desc=f'digits, {split}', unit='picture', disable=not progress,
                        # A log file would keep every state of the bar.
                        mininterval=0.1 if sys.stderr.isatty() else 10)
            content = _write_pictures(folder / split, sources[split], rngs, image_size)
            content['info'].update(stamp=stamp)
            (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content))

    annotations = [f'annotations/{split}.json' for split in SPLITS]
    root = make_once(root, _DESCRIPTION, stamp, annotations, write)
    return DigitsPaths(root, *(root / name for name in (*SPLITS, *annotations)))


def share_out_digits(seed: int) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """Load scikit-learn's digits and share them out to the splits, disjointly.

    Args:
        seed: Of the shares; a fifth of each class is for validation.

    Returns:
        The samples (1797, 8, 8), ink from 0 to 1; and for each split and class, the indices of its
        samples.

    Raises:
        ImportError: Scikit-learn is missing.
    """
    require('sklearn', '1.2', 'demo')
    from sklearn.datasets import load_digits
    digits = load_digits()
    rng = np.random.default_rng(seed)
    indices = {split: [] for split in SPLITS}
    for label in range(10):
        of_class = rng.permutation(np.flatnonzero(digits.target == label))
        num_val = round(_VAL_DIGITS * len(of_class))
        indices['val'].append(of_class[:num_val])
        indices['train'].append(of_class[num_val:])
    return digits.images / digits.images.max(), indices


class _Source(NamedTuple):
    """What the pictures of a split are made of.

    Attributes:
        photos: (H, W, 3) RGB uint8 each.
        digits: For each class, (samples, 8, 8) ink from 0 to 1.
    """

    photos: list[np.ndarray]
    digits: list[np.ndarray]


def _load_sources(seed: int) -> dict[str, _Source]:
    """Load digits and photographs and share them out to the splits, disjointly."""
    samples, indices = share_out_digits(seed)
    from sklearn.datasets import load_sample_images
    parts = [np.split(photo, [round((1 - _VAL_PHOTO) * photo.shape[1])], axis=1)
             for photo in load_sample_images().images]
    return {split: _Source(list(photos), [samples[of_class] for of_class in indices[split]])
            for split, photos in zip(SPLITS, zip(*parts, strict=True), strict=True)}


def _write_pictures(folder: Path, source: _Source, rngs: Sequence[np.random.Generator],
                    image_size: tuple[int, int]) -> dict:
    """Write the pictures of a split, one for each generator, and return their annotations."""
    folder.mkdir()
    images, annotations = [], []
    for image_id, rng in enumerate(rngs, start=1):
        picture, objects = _draw_picture(rng, source, image_size)
        name = f'{image_id:06d}.jpg'
        if not cv2.imwrite(str(folder / name), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f'{folder / name} could not be written.')
        height, width = picture.shape[:2]
        images.append(dict(id=image_id, file_name=name, width=width, height=height))
        for item in objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **item))
    return dict(info=dict(description=_DESCRIPTION), images=images, annotations=annotations,
                categories=list(DIGITS_CATEGORIES))


def _draw_picture(rng: np.random.Generator, source: _Source,
                  image_size: tuple[int, int]) -> tuple[np.ndarray, list[dict]]:
    """Draw a picture.

    Returns:
        The picture (H, W, 3), RGB uint8, and its objects as COCO annotations without ids.
    """
    width, height = image_size
    side = (width + height) // 2
    shapes = [(height, width), (width, height), (side, side)]
    shape = shapes[rng.choice(3, p=[0.7, 0.15, 0.15])]
    canvas = _Canvas(_draw_background(rng, source.photos, shape))
    if rng.random() < _NO_OBJECT:
        return canvas.picture(), []

    if rng.random() < _CROWD:
        _draw_crowd(rng, source, canvas)
    shorter = min(canvas.shape)
    for _ in range(rng.integers(1, _MAX_DIGITS, endpoint=True)):
        label = int(rng.integers(10))
        size = shorter * np.exp(rng.uniform(*np.log(_DIGIT_SIZE)))
        glyph = _draw_glyph(rng, source.digits[label], size)
        for _ in range(20):
            if canvas.paint(glyph, label, _draw_position(rng, canvas.shape, glyph), _draw_ink(rng)):
                break
    return canvas.picture(), canvas.objects()


def _draw_background(rng: np.random.Generator, photos: Sequence[np.ndarray],
                     shape: tuple[int, int]) -> np.ndarray:
    """Cut a random part of a random photograph, (H, W, 3) float32 from 0 to 255."""
    photo = photos[rng.integers(len(photos))]
    fit = min(photo.shape[0] / shape[0], photo.shape[1] / shape[1])
    height, width = (int(fit * rng.uniform(0.5, 1) * side) for side in shape)
    top = rng.integers(photo.shape[0] - height, endpoint=True)
    left = rng.integers(photo.shape[1] - width, endpoint=True)
    part = photo[top : top + height, left : left + width]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    part = cv2.resize(np.ascontiguousarray(part), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(part * rng.uniform(0.6, 1.1), 0, 255).astype(np.float32)


def _draw_glyph(rng: np.random.Generator, samples: np.ndarray, size: float) -> np.ndarray:
    """Draw one of the samples (samples, 8, 8) about ``size`` pixels high.

    Returns:
        Opacity of the ink from 0 to 1, (h, w) float32, cut to where it is at least 1/2.
    """
    sample = np.pad(samples[rng.integers(len(samples))], 2).astype(np.float32)
    scale = size / 8
    angle, shear = np.radians(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    stretch = rng.uniform(0.85, 1.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn @ np.array([[stretch, shear], [0, 1]])

    side = int(np.ceil(2 * size)) + 4
    centre = (np.array(sample.shape) - 1) / 2
    offset = (side - 1) / 2 - matrix @ centre
    ink = cv2.warpAffine(sample, np.column_stack([matrix, offset]), (side, side),
                         flags=cv2.INTER_CUBIC)

    # The interpolated ink is a blur; a steeper slope around the middle gives strokes with an edge.
    opacity = np.clip((ink - 0.3) / 0.3, 0, 1)
    left, top, right, bottom = _tight_box(opacity >= 0.5)
    return opacity[top:bottom, left:right]


def _draw_ink(rng: np.random.Generator) -> np.ndarray:
    """Draw a light colour, (3,) RGB from 0 to 255."""
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.9, 1))
    return 255 * np.array(colour, dtype=np.float32)


def _draw_position(rng: np.random.Generator, shape: tuple[int, int],
                   glyph: np.ndarray) -> tuple[int, int]:
    """Draw the (top, left) of a glyph that fits into the picture."""
    top, left = (int(rng.integers(max(outer - inner, 0), endpoint=True))
                 for outer, inner in zip(shape, glyph.shape, strict=True))
    return top, left


def _draw_crowd(rng: np.random.Generator, source: _Source, canvas: '_Canvas') -> None:
    """Draw a cluster of tiny digits of one class and make it one crowd object."""
    label = int(rng.integers(10))
    shorter = min(canvas.shape)
    spacing = 1.25 * _CROWD_DIGIT_SIZE[1] * shorter
    rows, columns = rng.integers(3, 6, size=2)
    extent = np.array([rows, columns]) * spacing
    corner = rng.uniform(0, 1, 2) * (np.array(canvas.shape) - extent)

    cluster = np.zeros(canvas.shape, dtype=bool)
    ink = _draw_ink(rng)
    for row, column in np.ndindex(rows, columns):
        glyph = _draw_glyph(rng, source.digits[label], shorter * rng.uniform(*_CROWD_DIGIT_SIZE))
        room = spacing - np.array(glyph.shape)
        place = corner + np.array([row, column]) * spacing + rng.uniform(0, 1, 2) * room
        place = np.clip(place.astype(int), 0, np.array(canvas.shape) - glyph.shape)
        cluster |= canvas.blend(glyph, tuple(place), ink)
    # the region of the cluster, gaps between the digits filled
    gap = int(np.ceil(2 * spacing)) | 1
    region = cv2.morphologyEx(np.pad(cluster, gap).astype(np.uint8), cv2.MORPH_CLOSE,
                              np.ones((gap, gap), np.uint8))
    canvas.add_crowd(label, region[gap:-gap, gap:-gap] > 0)


class _Canvas:
    """A picture in the making, with the visible ink of each object in it."""

    def __init__(self, background: np.ndarray) -> None:
        self._pixels = background
        self._objects: list[dict] = []

    @property
    def shape(self) -> tuple[int, int]:
        return self._pixels.shape[:2]

    def picture(self) -> np.ndarray:
        return self._pixels.round().astype(np.uint8)

    def paint(self, glyph: np.ndarray, label: int, position: tuple[int, int],
              ink: np.ndarray) -> bool:
        """Paint a digit, unless it does not fit, or would hide too much of what is there."""
        if glyph.shape[0] > self.shape[0] or glyph.shape[1] > self.shape[1]:
            return False
        box, mask = _box(glyph, position), self._mask(glyph, position)
        for other in self._objects:
            if _overlap(box, other['box']) > (0 if other['crowd'] else _MAX_OVERLAP):
                return False
            if (other['visible'] & ~mask).sum() < (1 - _MAX_COVERED) * other['ink']:
                return False
        for other in self._objects:
            other['visible'] &= ~mask
        self._add(label, mask, box)
        self.blend(glyph, position, ink)
        return True

    def blend(self, glyph: np.ndarray, position: tuple[int, int], ink: np.ndarray) -> np.ndarray:
        """Lay a glyph over the picture, with a dark rim to set it off; return its mask (H, W)."""
        margin = max(2, round(0.08 * glyph.shape[0]))
        opacity = np.pad(glyph, margin)
        rim = cv2.GaussianBlur(opacity, (0, 0), margin / 2)
        rim = np.clip(2 * rim, 0, 1)

        top, left = position[0] - margin, position[1] - margin
        bottom, right = top + opacity.shape[0], left + opacity.shape[1]
        inner = np.s_[max(0, -top) : self.shape[0] - top, max(0, -left) : self.shape[1] - left]
        pixels = self._pixels[max(0, top) : bottom, max(0, left) : right]
        pixels *= 1 - 0.8 * rim[inner][..., None]
        pixels += opacity[inner][..., None] * (ink - pixels)
        return self._mask(glyph, position)

    def add_crowd(self, label: int, region: np.ndarray) -> None:
        """Make the region (H, W) a crowd of digits of one class."""
        self._add(label, region, _tight_box(region), crowd=True)

    def objects(self) -> list[dict]:
        """Describe the objects as COCO annotations without ids, crowds last."""
        annotations = []
        for item in sorted(self._objects, key=lambda item: item['crowd']):
            left, top, right, bottom = _tight_box(item['visible'])
            box = [left, top, right - left, bottom - top]
            # Without a segmentation, COCO's area is that of the box.
            annotations.append(dict(category_id=_IDS[item['label']], bbox=box,
                                    area=box[2] * box[3], iscrowd=0))
            if item['crowd']:
                annotations[-1].update(area=int(item['ink']), iscrowd=1,
                                       segmentation=_run_lengths(item['visible']))
        return annotations

    def _add(self, label: int, mask: np.ndarray, box: tuple[int, int, int, int],
             crowd: bool = False) -> None:
        self._objects.append(dict(label=label, visible=mask, box=box, ink=mask.sum(), crowd=crowd))

    def _mask(self, glyph: np.ndarray, position: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(self.shape, dtype=bool)
        left, top, right, bottom = _box(glyph, position)
        mask[top:bottom, left:right] = glyph >= 0.5
        return mask


def _box(glyph: np.ndarray, position: tuple[int, int]) -> tuple[int, int, int, int]:
    """Get the corners (left, top, right, bottom) of a glyph at a position (top, left)."""
    (top, left), (height, width) = position, glyph.shape
    return left, top, left + width, top + height


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Get the corners (left, top, right, bottom) of the tightest box around a mask (H, W)."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return left, top, left + width, top + height


def _overlap(box: Sequence[int], other: Sequence[int]) -> float:
    """Get the intersection of two boxes (corners) over the area of the smaller one."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    areas = [(corners[2] - corners[0]) * (corners[3] - corners[1]) for corners in (box, other)]
    return max(width, 0) * max(height, 0) / min(areas)


def _run_lengths(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) as COCO does for crowds: runs of 0 and 1 in turn, column by column."""
    flat = np.concatenate([[False], mask.T.ravel()])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], borders, [mask.size]]))
    return dict(counts=runs.tolist(), size=list(mask.shape))
