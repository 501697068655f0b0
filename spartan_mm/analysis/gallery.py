"""A sheet of pictures: what is in them on the left, what a detector found on the right."""

import colorsys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmengine import fileio
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .. import compat
from ..inference import Detections, class_name, load_font

Colour = tuple[int, int, int]

_MARGIN = 12
_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_CROWD = (128, 128, 128)


class DetectionDataset(Protocol):
    """What is asked of a dataset; mmdet's have it."""

    metainfo: Mapping[str, Any]

    def __len__(self) -> int: ...

    def get_data_info(self, idx: int) -> dict[str, Any]: ...


@dataclass
class Truth:
    """What is annotated in an image.

    Args:
        boxes: corners x1, y1, x2, y2 in pixels, shape (N, 4).
        labels: class indices, shape (N,).
        crowds: regions with many objects of a class, which evaluation leaves out: class index and
            mask, shape (H, W), True inside.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: list[tuple[int, np.ndarray]] = field(default_factory=list)


def collect_predictions(samples: Iterable[Mapping[str, Any]]) -> dict[Any, Detections]:
    """Arrange predictions by image id.

    Args:
        samples: mmdet's ``DetDataSample`` of a model's ``test_step``, or the dicts of the pickle
            file that ``tools/test.py --out`` writes.
    """
    predictions = {}
    for sample in samples:
        found = sample.get('pred_instances')
        boxes, labels, scores = (torch.as_tensor(found.get(key)).detach().cpu().numpy()
                                 for key in ('bboxes', 'labels', 'scores'))
        predictions[sample.get('img_id')] = Detections(boxes, labels, scores)
    return predictions


def read_predictions(path: str | Path) -> dict[Any, Detections]:
    """Read predictions by image id from the file that ``tools/test.py --out`` writes.

    The file is a pickle, which can hold code: read none from strangers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, nothing, or is damaged.
    """
    return read_samples(path, 'detector', {'img_id', 'pred_instances'}, collect_predictions)


def read_samples(path: str | Path, kind: str, keys: set[str],
                 collect: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """Read what ``tools/test.py --out`` writes of any model.

    Args:
        path: the file.
        kind: of the model, for messages.
        keys: what each sample must have.
        collect: arranges the samples.

    Returns:
        What ``collect`` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, nothing, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'predictions {path} do not exist')
    remedy = 'make it with `tools/test.py CONFIG CHECKPOINT --out FILE.pkl`'
    try:
        content = fileio.load(str(path))
        if isinstance(content, list) and content and all(
                isinstance(sample, dict) and keys <= sample.keys() for sample in content):
            return collect(content)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f'{path} cannot be read as predictions ({type(error).__name__}: {error}): '
                         f'{remedy}') from error
    raise ValueError(f'{path} holds no predictions of a {kind}: {remedy}')


def read_truth(info: Mapping[str, Any], shape: tuple[int, int]) -> Truth:
    """Take the annotations out of what mmdet's datasets say of an image.

    Args:
        info: what ``dataset.get_data_info(index)`` returns.
        shape: height and width of the image in pixels.
    """
    objects = [item for item in info['instances'] if not item['ignore_flag']]
    crowds = [(item['bbox_label'], _crowd_mask(item, shape))
              for item in info['instances'] if item['ignore_flag']]
    boxes = np.array([item['bbox'] for item in objects], dtype=float).reshape(-1, 4)
    return Truth(boxes, np.array([item['bbox_label'] for item in objects], dtype=int), crowds)


def found_in(info: Mapping[str, Any], predictions: Mapping[Any, Detections]) -> Detections:
    """Take out what was found in an image.

    Args:
        info: what ``dataset.get_data_info(index)`` returns.
        predictions: by image id.

    Raises:
        ValueError: there is no prediction for it.
    """
    if info['img_id'] not in predictions:
        raise ValueError(f'there is no prediction for image {info["img_id"]!r} '
                         f'({info["img_path"]}): the predictions belong to another dataset')
    return predictions[info['img_id']]


def spread(total: int, count: int) -> list[int]:
    """Choose indices spread evenly over a dataset, at most all.

    Example:
        >>> spread(200, 4)
        [25, 75, 125, 175]
        >>> spread(3, 8)
        [0, 1, 2]
    """
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def draw_gallery(dataset: DetectionDataset, predictions: Mapping[Any, Detections],
                 indices: Sequence[int], score_threshold: float = 0.3, columns: int = 2,
                 longer_side: int = 640) -> Image.Image:
    """Draw images in pairs, ground truth on the left, predictions on the right.

    Args:
        dataset: where images and annotations come from.
        predictions: by image id, see :func:`read_predictions`.
        indices: which images of the dataset to draw, in this order.
        score_threshold: the least score of a prediction that is drawn.
        columns: pairs side by side.
        longer_side: of each image on the sheet, in pixels; smaller ones are enlarged, larger ones
            reduced.

    Returns:
        The sheet; its ``save`` writes it.

    Raises:
        ValueError: there are no indices, or there is no prediction for one of the images.
        OSError: an image cannot be read.
    """
    if not indices:
        raise ValueError('indices is empty: there is no image to draw')
    classes = dataset.metainfo.get('classes', ())
    font = load_font(15)
    pairs = []
    for index in indices:
        info = dataset.get_data_info(index)
        found = found_in(info, predictions).above(score_threshold)
        image = open_image(info['img_path'])
        truth = read_truth(info, image.size[::-1])
        crowds = f', {_count(truth.crowds, "crowd")}' if truth.crowds else ''
        pairs.append((
            add_caption(
                draw_truth(image, truth, classes, longer_side), font,
                f'{Path(info["img_path"]).name}: {_count(truth.boxes, "object")}{crowds}'),
            add_caption(
                draw_found(image, found, classes, longer_side), font,
                f'{_count(found.boxes, "detection")} with a score of {score_threshold:g} '
                'or more')))
    return _arrange_pairs(pairs, min(columns, len(pairs)))


def draw_truth(image: Image.Image, truth: Truth, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw annotations on a resized copy of an image, crowds hatched in grey."""
    canvas, scale = _resize(image, longer_side)
    for _, mask in truth.crowds:
        canvas = _hatch(canvas, mask)
    crowd_boxes = [_mask_box(mask) for _, mask in truth.crowds]
    boxes = np.array([*crowd_boxes, *truth.boxes], dtype=float).reshape(-1, 4) * scale
    texts = [f'crowd: {class_name(classes, label)}' for label, _ in truth.crowds]
    texts += [class_name(classes, label) for label in truth.labels]
    colours = [_CROWD for _ in crowd_boxes] + [_colour(label) for label in truth.labels]
    framed = [False for _ in crowd_boxes] + [True for _ in truth.boxes]
    _draw_boxes(canvas, boxes, texts, colours, framed)
    return canvas


def draw_found(image: Image.Image, found: Detections, classes: Sequence[str],
               longer_side: int) -> Image.Image:
    """Draw detections with their scores on a resized copy of an image."""
    canvas, scale = _resize(image, longer_side)
    # The best ones last, on top.
    order = np.argsort(found.scores, kind='stable')
    _draw_boxes(canvas, found.boxes[order] * scale,
                [f'{class_name(classes, found.labels[i])} {found.scores[i]:.2f}' for i in order],
                [_colour(found.labels[i]) for i in order], framed=[True] * len(order))
    return canvas


def add_caption(image: Image.Image, font: ImageFont.FreeTypeFont, caption: str) -> Image.Image:
    """Put a line of text over an image."""
    height = sum(font.getmetrics()) + 6
    panel = Image.new('RGB', (image.width, image.height + height), _BACKGROUND)
    ImageDraw.Draw(panel).text((0, 2), caption, font=font, fill=_INK)
    panel.paste(image, (0, height))
    return panel


def arrange(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange panels on a sheet, row by row."""
    columns = max(1, min(columns, len(panels)))
    rows = [panels[start:start + columns] for start in range(0, len(panels), columns)]
    width = max((panel.width for panel in panels), default=320) + _MARGIN
    heights = [max(panel.height for panel in row) + _MARGIN for row in rows]
    sheet = Image.new('RGB', (columns * width + _MARGIN, sum(heights) + _MARGIN), _BACKGROUND)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            sheet.paste(panel, (_MARGIN + column * width, top))
        top += height
    return sheet


def open_image(path: str | Path) -> Image.Image:
    """Read an image, turned as a camera says, which is how mmcv reads it."""
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert('RGB')


def _draw_boxes(canvas: Image.Image, boxes: np.ndarray, texts: Sequence[str],
                colours: Sequence[Colour], framed: Sequence[bool]) -> None:
    """Draw all frames, then the labels, so that no frame crosses a label."""
    draw = ImageDraw.Draw(canvas)
    font = load_font(14)
    for box, colour, frame in zip(boxes, colours, framed, strict=True):
        if frame:
            # A dark line beside the bright one, for bright backgrounds.
            draw.rectangle([*(box[:2] - 1), *(box[2:] + 1)], outline=_INK)
            draw.rectangle([*box], outline=colour, width=2)

    taken: list[np.ndarray] = []
    for box, text, colour in zip(boxes, texts, colours, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        # Ascenders and descenders get their room whether a text has them or not.
        size = np.array([right - left + 8, sum(font.getmetrics()) + 1])
        tag = _place_tag(box, size, np.array(canvas.size), taken, boxes)
        taken.append(tag)
        draw.rectangle([*tag], fill=colour, outline=_INK)
        draw.text((tag[0] + 4 - left, tag[1]), text, font=font, fill=_text_colour(colour))


def _place_tag(box: np.ndarray, size: np.ndarray, canvas_size: np.ndarray,
               taken: Sequence[np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Find where the label of a box hides least, of earlier labels first and of objects second.

    Returns:
        Corners x1, y1, x2, y2 of the label, inside the canvas.
    """
    left, top, right, bottom = box
    width, height = size
    corners = [(left, top - height), (left, bottom), (right - width, top - height),
               (right - width, bottom), (left, top), (left, bottom - height),
               (right, top), (left - width, top), (right, bottom - height),
               (left - width, bottom - height)]
    tags = []
    for corner in corners:
        corner = np.clip(np.round(corner), 0, np.maximum(canvas_size - size - 1, 0))
        tags.append(np.concatenate([corner, corner + size]))
    # The first of equals wins: above, if there is room.
    return min(tags, key=lambda tag: (sum(_overlap(tag, other) for other in taken),
                                      sum(_overlap(tag, other) for other in boxes)))


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    return float(np.prod(sides.clip(0)))


def _hatch(canvas: Image.Image, mask: np.ndarray) -> Image.Image:
    """Draw grey stripes over a region, given at the size of the original image."""
    inside = np.array(Image.fromarray(mask).resize(canvas.size, Image.Resampling.NEAREST))
    pixels = np.array(canvas)
    rows, columns = np.indices(inside.shape)
    stripes = inside & ((rows + columns) // 4 % 3 == 0)
    pixels[stripes] = _CROWD
    return Image.fromarray(pixels)


def _crowd_mask(item: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Decode the region of a crowd, (H, W) bool: run lengths, polygons, or else its box."""
    region = item.get('mask')
    if not region:
        mask = np.zeros(shape, dtype=bool)
        left, top, right, bottom = (round(corner) for corner in item['bbox'])
        mask[top:bottom, left:right] = True
        return mask
    compat.require('pycocotools', '2.0', 'detection')
    from pycocotools import mask as coco_mask
    if isinstance(region, list) or isinstance(region['counts'], list):
        region = coco_mask.frPyObjects(region, *shape)
    if isinstance(region, list):
        region = coco_mask.merge(region)
    return coco_mask.decode(region).astype(bool)


def _mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0, 0, 0, 0
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def _arrange_pairs(pairs: Sequence[tuple[Image.Image, Image.Image]], columns: int) -> Image.Image:
    """Arrange pairs on a sheet, row by row, under a heading for each column of panels."""
    font = load_font(20)
    width = max(panel.width for pair in pairs for panel in pair)
    rows = [pairs[start:start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(panel.height for pair in row for panel in pair) for row in rows]
    pair_width = 2 * width + _MARGIN
    heading = sum(font.getmetrics()) + _MARGIN
    sheet = Image.new('RGB', (
        columns * pair_width + (columns - 1) * 3 * _MARGIN + 2 * _MARGIN,
        heading + sum(heights) + (len(rows) - 1) * 2 * _MARGIN + 2 * _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    lefts = [_MARGIN + column * (pair_width + 3 * _MARGIN) for column in range(columns)]
    for left in lefts:
        draw.text((left, _MARGIN), 'ground truth', font=font, fill=_INK)
        draw.text((left + width + _MARGIN, _MARGIN), 'prediction', font=font, fill=_INK)
    top = _MARGIN + heading
    for row, height in zip(rows, heights, strict=True):
        for left, (truth, found) in zip(lefts, row, strict=False):
            sheet.paste(truth, (left, top))
            sheet.paste(found, (left + width + _MARGIN, top))
        top += height + 2 * _MARGIN
    return sheet


def _resize(image: Image.Image, longer_side: int) -> tuple[Image.Image, float]:
    """Resize a copy of an image; return it with the factor."""
    scale = longer_side / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS), scale


def _colour(label: int) -> Colour:
    """Give each class a colour, neighbours far apart: hue moves by the golden ratio."""
    # The same hues as on the pictures of inference.
    red, green, blue = colorsys.hsv_to_rgb(int(label) * 0.618034 % 1, 0.65, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def _text_colour(background: Colour) -> Colour:
    """Choose black or white, whichever stands out."""
    luminance = np.dot(background, (0.299, 0.587, 0.114))
    return (0, 0, 0) if luminance > 110 else (255, 255, 255)


def _count(items: Sequence, noun: str) -> str:
    return f'{len(items) or "no"} {noun}{"" if len(items) == 1 else "s"}'
