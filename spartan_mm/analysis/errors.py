"""What a detector gets wrong: objects it misses and false alarms, sorted by kind and drawn.

The kinds are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, section 2.2).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..inference import Detections, class_name, fit_text, load_font
from .gallery import DetectionDataset, found_in, open_image

#: Kinds of errors, each with what it is.
KINDS = {
    'missed': 'missed: objects that no detection finds',
    'background': 'false alarms on background: no object there',
    'class': 'wrong class: a detection of the right place',
    'location': 'bad localisation: right class, the box too far off',
    'class and location': 'wrong class and bad localisation',
    'duplicate': 'duplicates: the object has a better detection already',
}

#: The overlap (IoU) with an object, at most, of a false alarm that has nothing to do with it.
_UNRELATED = 0.1

#: How the boxes of a sheet are drawn: legible on photographs, and told apart by everybody.
_TRUE, _FOUND = '#56B4E9', '#E69F00'
_INK, _PAPER, _EMPTY = '#202020', '#FFFFFF', '#E6E6E6'
_MARGIN = 12
_DASH, _GAP = 7, 5  # pixels


@dataclass(frozen=True)
class DetectionError:
    """An object that was missed, or a false alarm.

    Args:
        kind: one of ``KINDS``.
        index: of the image in the dataset.
        severity: how bad it is, from 0 to 1. Of a false alarm, its score; of a missed object, what
            the best detection of it below the threshold lacks to 1.
        found_box: the detection, corners x1, y1, x2, y2 in pixels, shape (4,); of a missed object,
            the best one below the threshold, or None.
        found_label: its class index; None without a detection.
        score: its score; 0 without a detection.
        true_box: the object that is missed, or that the false alarm overlaps most; None for a false
            alarm on background.
        true_label: its class index; None without an object.
        overlap: IoU of detection and object; 0 if there are not both.
    """

    kind: str
    index: int
    severity: float
    found_box: np.ndarray | None = None
    found_label: int | None = None
    score: float = 0.
    true_box: np.ndarray | None = None
    true_label: int | None = None
    overlap: float = 0.

    @property
    def boxes(self) -> np.ndarray:
        """The boxes there are, shape (1, 4) or (2, 4)."""
        return np.stack([box for box in (self.true_box, self.found_box) if box is not None])

    def describe(self, classes: Sequence[str]) -> tuple[str, str]:
        """Say in two short lines what is wrong.

        Args:
            classes: names by class index.
        """
        if self.kind == 'missed':
            best = f'scored only {self.score:.2f}' if self.score else 'nothing found'
            return class_name(classes, self.true_label), best
        found = f'{class_name(classes, self.found_label)} {self.score:.2f}'
        if self.kind == 'background':
            return found, 'nothing there'
        overlap = f'IoU {self.overlap:.2f}'
        if self.kind in ('class', 'class and location'):
            return found, f'is {class_name(classes, self.true_label)}, {overlap}'
        return found, overlap

    def as_record(self, dataset: DetectionDataset) -> dict[str, Any]:
        """Describe it by a dict fit for JSON."""
        classes = dataset.metainfo.get('classes', ())
        record = dict(file=dataset.get_data_info(self.index)['img_path'], kind=self.kind,
                      severity=round(self.severity, 4))
        if self.found_box is not None:
            record.update(found_bbox=self.found_box.round(2).tolist(),
                          found_class=class_name(classes, self.found_label),
                          score=round(self.score, 4))
        if self.true_box is not None:
            record.update(true_bbox=self.true_box.round(2).tolist(),
                          true_class=class_name(classes, self.true_label))
        if len(self.boxes) == 2:
            record.update(iou=round(self.overlap, 4))
        return record


@dataclass(frozen=True)
class Comparison:
    """What was found in an image, beside what is annotated.

    Args:
        found: N detections, the best first.
        boxes: of the M objects, crowds left out, corners x1, y1, x2, y2 in pixels, shape (M, 4).
        labels: their class indices, shape (M,).
        overlaps: IoU of each detection with each object, shape (N, M).
        own: the same, 0 for objects of another class than the detection's, shape (N, M).
        in_crowd: whether a detection lies in a crowd of its class, shape (N,).
    """

    found: Detections
    boxes: np.ndarray
    labels: np.ndarray
    overlaps: np.ndarray
    own: np.ndarray
    in_crowd: np.ndarray


def find_errors(dataset: DetectionDataset, predictions: Mapping[Any, Detections],
                score_threshold: float = 0.3, iou_threshold: float = 0.5) -> list[DetectionError]:
    """Find missed objects and false alarms, the worst first.

    As in COCO's evaluation, the best detection first, each takes the object of its class that it
    overlaps most, of those that are left; detections in crowds are left out. A false alarm is, the
    first of these that holds:

    - a duplicate: it overlaps an object of its class by ``iou_threshold`` or more;
    - of the wrong class: it overlaps another object as much;
    - badly localised, of the right class or another: it overlaps an object by more than 0.1;
    - on background.

    An object that a false alarm of the wrong class or badly localised concerns is not counted as
    missed: it is one error, not two. Severities compare within a kind; of equally bad ones, the
    larger box is first.

    NOTE: TIDE's code looks for bad localisation first, so that of two objects that a detection
    overlaps, one of its class by 0.11 would count and another by 0.9 would not.

    Args:
        dataset: where annotations come from.
        predictions: by image id, see :func:`~spartan_mm.analysis.gallery.read_predictions`.
        score_threshold: the least score of a detection that counts.
        iou_threshold: the least overlap (IoU) of a detection with the object that it finds, above
            0.1 and at most 1.

    Raises:
        ValueError: there is no prediction for one of the images, or ``iou_threshold`` is out of its
            range.
    """
    check_overlap(iou_threshold)
    errors = []
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        compared = compare(info['instances'], found_in(info, predictions), iou_threshold)
        errors += _find_in_image(index, compared, score_threshold, iou_threshold)
    return sorted(errors, key=_badness, reverse=True)


def count_kinds(errors: Sequence[DetectionError]) -> dict[str, int]:
    """Count the errors of each kind, those that do not occur included."""
    counts = Counter(error.kind for error in errors)
    return {kind: counts[kind] for kind in KINDS}


def check_overlap(iou_threshold: float) -> None:
    """Refuse a threshold that is none.

    Raises:
        ValueError: it is not above 0.1 and at most 1.
    """
    if not _UNRELATED < iou_threshold <= 1:
        raise ValueError(f'iou_threshold={iou_threshold} must be above {_UNRELATED} and at most 1')


def match(overlaps: np.ndarray, threshold: float) -> np.ndarray:
    """Give each detection in turn the object that it overlaps most, of those that are left.

    Args:
        overlaps: of N detections, the best first, with M objects, shape (N, M).
        threshold: the least overlap, above 0.

    Returns:
        Of each detection the index of its object, or -1, shape (N,).
    """
    owned = np.full(len(overlaps), -1)
    overlaps = overlaps.copy()
    for row in np.flatnonzero((overlaps >= threshold).any(1)):
        best = overlaps[row].argmax()
        if overlaps[row, best] >= threshold:
            owned[row] = best
            overlaps[:, best] = 0
    return owned


def measure_overlaps(boxes: np.ndarray, others: np.ndarray, crowds: bool = False) -> np.ndarray:
    """Measure by how much boxes overlap.

    Args:
        boxes: corners x1, y1, x2, y2, shape (N, 4).
        others: the same, shape (M, 4).
        crowds: whether the others are crowds: the overlap is then the share of the box that lies in
            a crowd, in place of intersection over union.

    Returns:
        From 0 to 1, shape (N, M).
    """
    boxes, others = boxes[:, None].astype(float), others[None].astype(float)
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2],
                                                                    others[..., :2])
    common = sides.clip(0).prod(-1)
    area, other_area = ((box[..., 2:] - box[..., :2]).clip(0).prod(-1) for box in (boxes, others))
    total = np.broadcast_to(area, common.shape) if crowds else area + other_area - common
    return np.divide(common, total, out=np.zeros_like(common), where=total > 0)


def compare(instances: Sequence[Mapping[str, Any]], found: Detections, iou_threshold: float
            ) -> Comparison:
    """Lay what was found in an image beside what is annotated.

    Args:
        instances: annotations, as ``dataset.get_data_info(index)['instances']`` has them.
        found: detections in any order.
        iou_threshold: the least share of a detection in a crowd of its class that leaves it out.
    """
    order = np.argsort(-found.scores, kind='stable')
    found = Detections(found.boxes[order], found.labels[order], found.scores[order])
    (boxes, labels), (crowds, crowd_labels) = (
        (np.array([item['bbox'] for item in chosen], dtype=float).reshape(-1, 4),
         np.array([item['bbox_label'] for item in chosen], dtype=int))
        for chosen in ([item for item in instances if not item['ignore_flag']],
                       [item for item in instances if item['ignore_flag']]))
    overlaps = measure_overlaps(found.boxes, boxes)
    shares = measure_overlaps(found.boxes, crowds, crowds=True)
    in_crowd = ((shares >= iou_threshold) & (found.labels[:, None] == crowd_labels)).any(1)
    return Comparison(found, boxes, labels, overlaps, overlaps * (found.labels[:, None] == labels),
                      in_crowd)


def _find_in_image(index: int, compared: Comparison, score_threshold: float, iou_threshold: float
                   ) -> list[DetectionError]:
    found, overlaps, own = compared.found, compared.overlaps, compared.own
    other = overlaps - own
    counted = found.scores >= score_threshold
    owned = match(own[counted], iou_threshold)

    def describe(kind: str, severity: float, row: int | None, column: int | None) -> DetectionError:
        both = row is not None and column is not None
        detection = {} if row is None else dict(
            found_box=found.boxes[row], found_label=int(found.labels[row]),
            score=float(found.scores[row]))
        truth = {} if column is None else dict(
            true_box=compared.boxes[column], true_label=int(compared.labels[column]))
        return DetectionError(kind, index, float(severity), **detection, **truth,
                              overlap=float(overlaps[row, column]) if both else 0.)

    errors = []
    explained = set(owned.tolist())
    for row in np.flatnonzero((owned < 0) & ~compared.in_crowd[counted]):
        kind, column = _judge(own[row], other[row], iou_threshold)
        errors.append(describe(kind, found.scores[row], row, column))
        if kind in ('class', 'location'):
            explained.add(column)
    for column in sorted(set(range(len(compared.boxes))) - explained):
        weak = np.flatnonzero(~counted & (own[:, column] >= iou_threshold))
        row = weak[0] if len(weak) else None
        score = 0 if row is None else found.scores[row]
        errors.append(describe('missed', 1 - score, row, column))
    return errors


def _judge(own: np.ndarray, other: np.ndarray, iou_threshold: float) -> tuple[str, int | None]:
    """Tell the kind of a false alarm, and the object that it concerns, if any.

    Args:
        own: overlaps with the objects of its class, 0 for the others, shape (M,).
        other: overlaps with the objects of other classes, 0 for those of its own, shape (M,).
    """
    if own.max(initial=0) >= iou_threshold:
        return 'duplicate', int(own.argmax())
    if other.max(initial=0) >= iou_threshold:
        return 'class', int(other.argmax())
    if own.max(initial=0) > _UNRELATED:
        return 'location', int(own.argmax())
    if other.max(initial=0) > _UNRELATED:
        return 'class and location', int(other.argmax())
    return 'background', None


def _badness(error: DetectionError) -> tuple[float, float]:
    box = error.found_box if error.true_box is None else error.true_box
    return error.severity, float(np.prod(box[2:] - box[:2]))


def draw_errors(errors: Sequence[DetectionError], dataset: DetectionDataset, per_kind: int = 8,
                columns: int = 8, side: int = 180) -> Image.Image:
    """Draw the worst errors of each kind, each a part of its image.

    What is annotated is framed by a solid line, what was found by a dashed one in another colour.

    Args:
        errors: the worst first, see :func:`find_errors`.
        dataset: the one they were found in.
        per_kind: the largest number of pictures of each kind.
        columns: pictures side by side.
        side: of each picture, in pixels.

    Returns:
        The sheet; its ``save`` writes it. Without errors, it says so.

    Raises:
        OSError: an image cannot be read.
    """
    classes = dataset.metainfo.get('classes', ())
    counts = count_kinds(errors)
    parts = [_draw_heading(f'{len(errors)} errors' if errors else 'No errors', 20)]
    if errors:
        parts.append(_draw_legend())
    for kind, title in KINDS.items():
        worst = [error for error in errors if error.kind == kind][:per_kind]
        if not worst:
            continue
        order = ', the worst first' if len(worst) == counts[kind] else f', the {len(worst)} worst'
        parts.append(_draw_heading(f'{title} ({counts[kind]}{order})', 16))
        cells = []
        for error in worst:
            info = dataset.get_data_info(error.index)
            lines = (*error.describe(classes), Path(info['img_path']).name)
            cells.append(_draw_cell(open_image(info['img_path']), error, lines, side))
        parts += [_beside(cells[start:start + columns]) for start in range(0, len(cells), columns)]
    width = max(part.width for part in parts)
    sheet = Image.new('RGB', (width + 2 * _MARGIN,
                              sum(part.height + _MARGIN for part in parts) + _MARGIN), _PAPER)
    top = _MARGIN
    for part in parts:
        sheet.paste(part, (_MARGIN, top))
        top += part.height + _MARGIN
    return sheet


def _draw_heading(text: str, size: int) -> Image.Image:
    font = load_font(size)
    heading = Image.new('RGB', (int(font.getlength(text)) + 2, sum(font.getmetrics())), _PAPER)
    ImageDraw.Draw(heading).text((0, 0), text, font=font, fill=_INK)
    return heading


def _draw_legend() -> Image.Image:
    font = load_font(14)
    legend = Image.new('RGB', (360, sum(font.getmetrics()) + 8), _PAPER)
    draw = ImageDraw.Draw(legend)
    for left, text, found in ((2, 'annotated', False), (160, 'found', True)):
        _draw_box(draw, np.array([left, 3, left + 34, legend.height - 4]), found)
        draw.text((left + 44, 3), text, font=font, fill=_INK)
    return legend


def draw_error(image: Image.Image, error: DetectionError, side: int) -> Image.Image:
    """Draw the part of an image that an error is in.

    Args:
        image: the whole image.
        error: an error in it.
        side: the longer one of the picture, in pixels.
    """
    window = _choose_window(error.boxes, np.array(image.size))
    size = window[2:] - window[:2]
    scale = side / size.max()
    shown = tuple(np.maximum(1, (size * scale).round().astype(int)))
    part = image.crop(tuple(window)).resize(shown, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(part)
    for box, found in ((error.true_box, False), (error.found_box, True)):
        if box is not None:
            _draw_box(draw, ((box.reshape(2, 2) - window[:2]) * scale).ravel(), found)
    return part


def _draw_cell(image: Image.Image, error: DetectionError, lines: Sequence[str], side: int
               ) -> Image.Image:
    """Draw an error, with lines of text below."""
    font = load_font(13)
    height = sum(font.getmetrics())
    part = draw_error(image, error, side)
    cell = Image.new('RGB', (side, side + len(lines) * height + 4), _PAPER)
    cell.paste(_EMPTY, (0, 0, side, side))
    cell.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    text = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        text.text((0, side + 4 + number * height), fit_text(line, font, side), font=font,
                  fill=_INK if number < len(lines) - 1 else '#707070')
    return cell


def _choose_window(boxes: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Choose the square around boxes that shows them with what is around, inside of the image.

    Args:
        boxes: corners x1, y1, x2, y2 in pixels, shape (N, 4).
        image_size: width and height in pixels.

    Returns:
        Corners x1, y1, x2, y2 in whole pixels, shape (4,); no square where the image is too narrow.
    """
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(1.8 * (high - low).max(), 24.)
    size = np.minimum(np.ceil(side), image_size)
    start = np.clip(((low + high - size) / 2).round(), 0, image_size - size)
    return np.concatenate([start, start + size]).astype(int)


def _draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, found: bool) -> None:
    left, top, right, bottom = (float(corner) for corner in box)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        for first, last in _dash(start, end) if found else [(start, end)]:
            # A dark line below the bright one, for bright backgrounds.
            draw.line([first, last], fill=_INK, width=4)
            draw.line([first, last], fill=_FOUND if found else _TRUE, width=2)


def _dash(start: tuple[float, float], end: tuple[float, float]) -> list[tuple]:
    """Cut a line into dashes, one at each end."""
    start, end = np.array(start), np.array(end)
    length = np.abs(end - start).max()
    count = max(1, round((length + _GAP) / (_DASH + _GAP)))
    dash = min(1., _DASH / max(length, 1))
    places = np.linspace(0, 1 - dash, count) if count > 1 else [0.]
    return [(tuple(start + place * (end - start)), tuple(start + (place + dash) * (end - start)))
            for place in places]


def _beside(cells: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of equal size side by side."""
    width, height = cells[0].size
    row = Image.new('RGB', (len(cells) * (width + _MARGIN) - _MARGIN, height), _PAPER)
    for number, cell in enumerate(cells):
        row.paste(cell, (number * (width + _MARGIN), 0))
    return row
