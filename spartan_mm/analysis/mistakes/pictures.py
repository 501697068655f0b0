"""Pictures beside their truth, and what a model gets wrong in them, on sheets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ...drawing import (
    INK,
    MARGIN,
    add_caption,
    arrange,
    class_colour,
    class_name,
    draw_boxes,
    open_image,
    resize,
)
from ...inference import Detections, draw_detections
from .errors import (
    DetectionError,
    describe_mistake,
    find_mistakes,
    summarize_mistakes,
    worst_by_kind,
)
from .predictions import DetectionDataset, Outcomes, Truth, found_in, read_truth

#: What the frames of :func:`draw_error` stand for.
LEGEND = 'solid blue: annotated; dashed orange: detected'

_CROWD = (128, 128, 128)
#: How the boxes of an error are drawn: legible on photographs, and told apart by everybody.
_TRUE, _FOUND, _EMPTY = '#56B4E9', '#E69F00', '#E6E6E6'


def draw_truth(image: Image.Image, truth: Truth, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw annotations on a resized copy of an image, crowds hatched in grey."""
    canvas = resize(image, longer_side)
    for _, mask in truth.crowds:
        inside = Image.fromarray(mask).resize(canvas.size, Image.Resampling.NEAREST)
        canvas.paste(_CROWD, mask=_as_mask(np.array(inside) & _stripes(canvas.size, 4, 3)))
    crowds = [Image.fromarray(mask).getbbox() or (0, 0, 0, 0) for _, mask in truth.crowds]
    labels = [label for label, _ in truth.crowds]
    pixels = np.array(canvas)
    draw_boxes(
        pixels, np.array([*crowds, *truth.boxes]) * longer_side / max(image.size),
        [*(f'crowd: {class_name(classes, label)}' for label in labels),
         *(class_name(classes, label) for label in truth.labels)],
        [*[_CROWD] * len(crowds), *map(class_colour, truth.labels)],
        [*[False] * len(crowds), *[True] * len(truth.boxes)])
    return Image.fromarray(pixels)


def draw_found(image: Image.Image, found: Detections, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw detections with their scores on a resized copy of an image."""
    pixels = np.array(resize(image, longer_side))[..., ::-1]
    found = replace(found, boxes=found.boxes * longer_side / max(image.size))
    return Image.fromarray(draw_detections(pixels, found, classes)[..., ::-1])


def draw_gallery(dataset: DetectionDataset, predictions: Mapping[Any, Detections],
                 indices: Sequence[int], score_threshold: float = 0.3, columns: int = 2,
                 longer_side: int = 640) -> Image.Image:
    """Draw images in pairs, what is annotated on the left, what was detected on the right.

    Args:
        dataset: Where images and annotations come from.
        predictions: By image id, see :func:`~.predictions.read_predictions`.
        indices: Which images of the dataset to draw, in this order.
        score_threshold: The least score of a prediction that is drawn.
        columns: Pairs side by side.
        longer_side: Of each image on the sheet, in pixels; smaller ones are enlarged, larger ones
            reduced.

    Returns:
        The sheet; its ``save`` writes it.

    Raises:
        UsageError: There is no prediction for one of the images.
        ValueError: There are no indices.
        OSError: An image cannot be read.
    """
    if not indices:
        raise ValueError('indices is empty: there is no image to draw')
    pairs = []
    for index in indices:
        name, panels = draw_pair(dataset, predictions, index, score_threshold, longer_side)
        notes = f' in {name}', f' with a score of {score_threshold:g} or more'
        pairs.append(arrange([add_caption(picture, caption + note, size=15)
                              for (picture, caption), note in zip(panels, notes, strict=True)], 2))
    return arrange(pairs, columns)


def draw_pair(dataset: DetectionDataset, predictions: Mapping[Any, Detections], index: int,
              score_threshold: float, longer_side: int
              ) -> tuple[str, tuple[tuple[Image.Image, str], tuple[Image.Image, str]]]:
    """Draw an image twice; arguments and errors as of :func:`draw_gallery`.

    Returns:
        Name of the file; with what is annotated, and with what was detected: picture and caption.
    """
    info, classes = dataset.get_data_info(index), dataset.metainfo.get('classes', ())
    found = found_in(info, predictions).above(score_threshold)
    image = open_image(info['img_path'])
    truth = read_truth(info, image.size[::-1])
    crowds = f', {_count(truth.crowds, "crowd")}' if truth.crowds else ''
    return Path(info['img_path']).name, (
        (draw_truth(image, truth, classes, longer_side),
         f'annotated: {_count(truth.boxes, "object")}{crowds}'),
        (draw_found(image, found, classes, longer_side),
         f'detected: {_count(found.boxes, "object")}'))


def draw_errors(errors: Sequence[DetectionError], dataset: DetectionDataset, per_kind: int = 8,
                columns: int = 8, side: int = 180) -> Image.Image:
    """Draw the worst errors of each kind, each a part of its image.

    What is annotated is framed by a solid line, what was found by a dashed one in another colour.

    Args:
        errors: The worst first, see :func:`~.errors.find_errors`.
        dataset: The one they were found in.
        per_kind: The largest number of pictures of each kind.
        columns: Pictures side by side.
        side: Of each picture, in pixels.

    Returns:
        The sheet; its ``save`` writes it. Without errors, it says so.

    Raises:
        OSError: An image cannot be read.
    """
    classes, parts = dataset.metainfo.get('classes', ()), []
    for heading, worst in worst_by_kind(errors, per_kind):
        cells = []
        for error in worst:
            path = dataset.get_data_info(error.index)['img_path']
            picture = ImageOps.pad(draw_error(open_image(path), error, side), (side, side),
                                   color=_EMPTY)
            cells.append(add_caption(picture, *error.describe(classes), Path(path).name,
                                     below=True))
        parts.append(add_caption(arrange(cells, columns), heading, size=16, width=720,
                                 indent=MARGIN))
    headline = f'{len(errors)} errors ({LEGEND})' if errors else 'No errors'
    return add_caption(arrange(parts, 1), headline, size=20, width=720, indent=2 * MARGIN)


def draw_error(image: Image.Image, error: DetectionError, side: int) -> Image.Image:
    """Draw the part of an image that an error is in.

    Args:
        image: The whole image.
        error: An error in it.
        side: The longer one of the picture, in pixels.
    """
    window = _choose_window(error.boxes, np.array(image.size))
    part = image.crop(tuple(window))
    scale = side / max(part.size)
    part = resize(part, side)
    for box, found in ((error.true_box, False), (error.found_box, True)):
        if box is None:
            continue
        box = np.sort((box.reshape(2, 2) - window[:2]) * scale, axis=0).round().ravel()
        framed = part.copy()
        draw = ImageDraw.Draw(framed)
        # A dark line on both sides of the bright one, for bright backgrounds.
        draw.rectangle((*(box[:2] - 1), *(box[2:] + 1)), outline=INK, width=4)
        draw.rectangle((*box, ), outline=_FOUND if found else _TRUE, width=2)
        part.paste(framed, mask=_as_mask(_stripes(part.size, 6, 2)) if found else None)
    return part


def draw_mistakes(outcomes: Outcomes, classes: Sequence[str], limit: int = 48,
                  columns: int = 8, side: int = 180) -> Image.Image:
    """Draw the pictures that are predicted wrong, each with what it is and what it is taken for.

    Args:
        outcomes: Predictions beside the truth.
        classes: Names by class index.
        limit: The largest number of pictures; of more mistakes, the most confident ones are drawn.
        columns: Pictures in a row.
        side: Of each picture, in pixels.

    Returns:
        The sheet; its ``save`` writes it. Without mistakes, it says so.

    Raises:
        OSError: A picture cannot be read.
    """
    cells = []
    for index in find_mistakes(outcomes)[:limit]:
        path = outcomes.paths[index]
        picture = ImageOps.pad(resize(open_image(path), side, coarse=True), (side, side),
                               color=_EMPTY)
        cells.append(add_caption(picture, *describe_mistake(outcomes, index, classes),
                                 Path(path).name, below=True))
    return add_caption(arrange(cells, columns), summarize_mistakes(outcomes, limit), size=20,
                       width=720, indent=MARGIN)


def _choose_window(boxes: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Choose the square around boxes that shows them with what is around, inside of the image.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels, shape (N, 4).
        image_size: Width and height in pixels.

    Returns:
        Corners x1, y1, x2, y2 in whole pixels, shape (4,); no square where the image is too narrow.
    """
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(1.8 * (high - low).max(), 24.)
    size = np.minimum(np.ceil(side), image_size)
    start = np.clip(((low + high - size) / 2).round(), 0, image_size - size)
    return np.concatenate([start, start + size]).astype(int)


def _stripes(size: tuple[int, int], width: int, period: int) -> np.ndarray:
    """Make diagonal stripes on an image of this width and height, one in `period` True."""
    return np.indices(size[::-1]).sum(0) // width % period == 0


def _as_mask(chosen: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(255 * chosen))


def _count(items: Sequence, noun: str) -> str:
    return f'{len(items) or "no"} {noun}{"" if len(items) == 1 else "s"}'
