"""Pictures beside their truth, and sheets of what a model gets wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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
from ...text import count
from .errors import (
    DetectionError,
    describe_mistake,
    find_mistakes,
    summarize_mistakes,
    worst_by_kind,
)
from .predictions import ClassifierResults, DetectorResults, Truth, read_truth

#: What the frames of :func:`draw_error` stand for.
LEGEND = 'solid blue: annotated; dashed orange: detected'

#: The longer side of a picture of an error, in pixels.
CELL_SIDE = 180

_CROWD = (128, 128, 128)
# Pictures of errors side by side.
_COLUMNS = 8
#: How the boxes of an error are drawn: legible on photographs, and told apart by everybody.
_TRUE, _FOUND, _EMPTY = '#56B4E9', '#E69F00', '#E6E6E6'


def draw_truth(image: Image.Image, truth: Truth, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw annotations on a resized copy of an image, crowds hatched in grey.

    NOTE: Of a crowd its box is hatched, whatever shape it has: that is where COCO's evaluation of
    boxes leaves detections out.
    """
    pixels = np.array(resize(image, longer_side))
    # Crowds first: what is drawn last is on top.
    order = np.argsort(~truth.crowds, kind='stable')
    boxes = truth.boxes[order] * longer_side / max(image.size)
    labels, crowds = truth.labels[order], truth.crowds[order]
    stripes = _stripes(pixels.shape[1::-1], 4, 3)
    for left, top, right, bottom in boxes[crowds].round().astype(int).clip(0):
        inside = slice(top, bottom), slice(left, right)
        pixels[inside][stripes[inside]] = _CROWD
    names = [class_name(classes, label) for label in labels]
    draw_boxes(pixels, boxes,
               [f'crowd: {name}' if crowd else name
                for name, crowd in zip(names, crowds, strict=True)],
               [_CROWD if crowd else class_colour(label)
                for label, crowd in zip(labels, crowds, strict=True)], (~crowds).tolist())
    return Image.fromarray(pixels)


def draw_found(image: Image.Image, found: Detections, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw detections with their scores on a resized copy of an image."""
    pixels = np.array(resize(image, longer_side))[..., ::-1]
    found = replace(found, boxes=found.boxes * longer_side / max(image.size), names=classes)
    return Image.fromarray(draw_detections(pixels, found)[..., ::-1])


def draw_pair(results: DetectorResults, index: int, score_threshold: float, longer_side: int
              ) -> tuple[str, tuple[tuple[Image.Image, str], tuple[Image.Image, str]]]:
    """Draw an image twice: with what is annotated, and with what was detected.

    Args:
        results: Predictions with their dataset.
        index: Of the image in the dataset.
        score_threshold: The least score of a prediction that is drawn.
        longer_side: Of each picture in pixels; smaller ones are enlarged, larger ones reduced.

    Returns:
        Name of the file; picture and caption of both.

    Raises:
        UsageError: There is no prediction for the image.
        OSError: It cannot be read.
    """
    info, classes = results.dataset.get_data_info(index), results.classes
    found = results.found_in(info).above(score_threshold)
    image = open_image(info['img_path'])
    truth, crowds = read_truth(info), ''
    if truth.crowds.any():
        crowds = f', {count(truth.crowds.sum(), "crowd")}'
    return Path(info['img_path']).name, (
        (draw_truth(image, truth, classes, longer_side),
         f'annotated: {count((~truth.crowds).sum(), "object")}{crowds}'),
        (draw_found(image, found, classes, longer_side),
         f'detected: {count(len(found.boxes), "object")}'))


def draw_errors(errors: Sequence[DetectionError], results: DetectorResults, per_kind: int = 8
                ) -> Image.Image:
    """Draw the worst errors of each kind, each a part of its image.

    What is annotated is framed by a solid line, what was found by a dashed one in another colour.

    Args:
        errors: The worst first, see :func:`~.errors.find_errors`.
        results: What they were found in.
        per_kind: The largest number of pictures of each kind.

    Returns:
        The sheet; its ``save`` writes it. Without errors, it says so.

    Raises:
        OSError: An image cannot be read.
    """
    parts = [add_caption(_arrange_cells(show_errors(worst, results)), heading, size=16, width=720,
                         indent=MARGIN) for heading, worst in worst_by_kind(errors, per_kind)]
    headline = f'{len(errors)} errors ({LEGEND})' if errors else 'No errors'
    return add_caption(arrange(parts, 1), headline, size=20, width=720, indent=2 * MARGIN)


def draw_mistakes(results: ClassifierResults, limit: int = 48) -> Image.Image:
    """Draw the pictures that are predicted wrong, each with what it is and what it is taken for.

    Args:
        results: Predictions beside the truth.
        limit: The largest number of pictures; of more mistakes, the most confident ones are drawn.

    Returns:
        The sheet; its ``save`` writes it. Without mistakes, it says so.

    Raises:
        OSError: A picture cannot be read.
    """
    return add_caption(_arrange_cells(show_mistakes(results, limit)),
                       summarize_mistakes(results, limit), size=20, width=720, indent=MARGIN)


def show_errors(errors: Sequence[DetectionError], results: DetectorResults
                ) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """Draw each error, ``CELL_SIDE`` long, with lines that say what is wrong."""
    for error in errors:
        path = results.dataset.get_data_info(error.index)['img_path']
        yield draw_error(open_image(path), error), (*error.describe(results.classes),
                                                    Path(path).name)


def show_mistakes(results: ClassifierResults, limit: int
                  ) -> Iterator[tuple[Image.Image, tuple[str, ...]]]:
    """Read the pictures of the worst mistakes, each with lines that say what is wrong."""
    for index in find_mistakes(results)[:limit]:
        path = results.paths[index]
        yield open_image(path), (*describe_mistake(results, index), Path(path).name)


def draw_error(image: Image.Image, error: DetectionError) -> Image.Image:
    """Draw the part of an image that an error is in, the longer side ``CELL_SIDE`` pixels."""
    window = _choose_window(error.boxes, np.array(image.size))
    part = image.crop(tuple(window))
    scale = CELL_SIDE / max(part.size)
    part = resize(part, CELL_SIDE)
    for box, found in ((error.true_box, False), (error.found_box, True)):
        if box is None:
            continue
        box = np.sort((box.reshape(2, 2) - window[:2]) * scale, axis=0).round().ravel()
        framed = part.copy()
        draw = ImageDraw.Draw(framed)
        # A dark line on both sides of the bright one, for bright backgrounds.
        draw.rectangle((*(box[:2] - 1), *(box[2:] + 1)), outline=INK, width=4)
        draw.rectangle((*box, ), outline=_FOUND if found else _TRUE, width=2)
        stripes = Image.fromarray(_stripes(part.size, 6, 2))
        part.paste(framed, mask=stripes if found else None)
    return part


def _arrange_cells(cells: Iterator[tuple[Image.Image, tuple[str, ...]]]) -> Image.Image:
    """Arrange pictures with lines below; of small ones, each pixel becomes a square."""
    size = CELL_SIDE, CELL_SIDE
    return arrange([add_caption(ImageOps.pad(resize(picture, CELL_SIDE, coarse=True), size,
                                             color=_EMPTY), *lines, below=True)
                    for picture, lines in cells], _COLUMNS)


def _choose_window(boxes: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Choose corners, in whole pixels, of the square that shows boxes (N, 4) with what is around.

    It lies inside of the image, and is no square where that is too narrow.
    """
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(1.8 * (high - low).max(), 24.)
    size = np.minimum(np.ceil(side), image_size)
    start = np.clip(((low + high - size) / 2).round(), 0, image_size - size)
    return np.concatenate([start, start + size]).astype(int)


def _stripes(size: tuple[int, int], width: int, period: int) -> np.ndarray:
    """Make diagonal stripes on an image of this width and height, one in `period` True."""
    return np.indices(size[::-1]).sum(0) // width % period == 0
