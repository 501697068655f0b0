"""What a model gets wrong: a detector's missed objects and false alarms, a classifier's mistakes.

The kinds of a detector's errors are those of TIDE (Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020, section 2.2).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...drawing import class_name, common_areas
from ...errors import UsageError
from ...inference import Detections
from .predictions import DetectionDataset, Outcomes, found_in

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


@dataclass(frozen=True)
class DetectionError:
    """An object that was missed, or a false alarm.

    Args:
        kind: One of ``KINDS``.
        index: Of the image in the dataset.
        severity: How bad it is, from 0 to 1. Of a false alarm, its score; of a missed object, what
            the best detection of it below the threshold lacks to 1.
        found_box: The detection, corners x1, y1, x2, y2 in pixels, shape (4,); of a missed object,
            the best one below the threshold, or None.
        found_label: Its class index; None without a detection.
        score: Its score; 0 without a detection.
        true_box: The object that is missed, or that the false alarm overlaps most; None for a false
            alarm on background.
        true_label: Its class index; None without an object.
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
            classes: Names by class index.
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
class Overlaps:
    """What was found in an image, beside what is annotated.

    Args:
        found: N detections, the best first.
        boxes: Of the M objects, crowds left out, corners x1, y1, x2, y2 in pixels, shape (M, 4).
        labels: Their class indices, shape (M,).
        overlaps: IoU of each detection with each object, shape (N, M).
        own: The same, 0 for objects of another class than the detection's, shape (N, M).
        in_crowd: Whether a detection lies in a crowd of its class, shape (N,).
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
        dataset: Where annotations come from.
        predictions: By image id, see :func:`~.predictions.read_predictions`.
        score_threshold: The least score of a detection that counts.
        iou_threshold: The least overlap (IoU) of a detection with the object that it finds, above
            0.1 and at most 1.

    Raises:
        UsageError: There is no prediction for one of the images, or ``iou_threshold`` is out of its
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


def worst_by_kind(errors: Sequence[DetectionError], limit: int
                  ) -> Iterator[tuple[str, Sequence[DetectionError]]]:
    """Choose at most so many errors of each kind that occurs, each kind with a heading."""
    for kind, title in KINDS.items():
        own = [error for error in errors if error.kind == kind]
        if own:
            order = 'the worst first' if len(own) <= limit else f'the {limit} worst'
            yield f'{title} ({len(own)}, {order})', own[:limit]


def check_overlap(iou_threshold: float) -> None:
    """Refuse a threshold that is none.

    Raises:
        UsageError: It is not above 0.1 and at most 1.
    """
    if not _UNRELATED < iou_threshold <= 1:
        raise UsageError(f'iou_threshold={iou_threshold} must be above {_UNRELATED} and at most 1')


def match(overlaps: np.ndarray, threshold: float) -> np.ndarray:
    """Give each detection in turn the object that it overlaps most, of those that are left.

    Args:
        overlaps: Of N detections, the best first, with M objects, shape (N, M).
        threshold: The least overlap, above 0.

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
        boxes: Corners x1, y1, x2, y2, shape (N, 4).
        others: The same, shape (M, 4).
        crowds: Whether the others are crowds: the overlap is then the share of the box that lies in
            a crowd, in place of intersection over union.

    Returns:
        From 0 to 1, shape (N, M).
    """
    boxes, others = boxes.astype(float), others.astype(float)
    common = common_areas(boxes, others)
    area, other_area = ((box[:, 2:] - box[:, :2]).clip(0).prod(-1) for box in (boxes, others))
    total = area[:, None] + (0 if crowds else other_area - common)
    total = np.broadcast_to(total, common.shape)
    return np.divide(common, total, out=np.zeros_like(common), where=total > 0)


def compare(instances: Sequence[Mapping[str, Any]], found: Detections, iou_threshold: float
            ) -> Overlaps:
    """Lay what was found in an image beside what is annotated.

    Args:
        instances: Annotations, as ``dataset.get_data_info(index)['instances']`` has them.
        found: Detections in any order.
        iou_threshold: The least share of a detection in a crowd of its class that leaves it out.
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
    return Overlaps(found, boxes, labels, overlaps, overlaps * (found.labels[:, None] == labels),
                      in_crowd)


def _find_in_image(index: int, compared: Overlaps, score_threshold: float, iou_threshold: float
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
        own: Overlaps with the objects of its class, 0 for the others, shape (M,).
        other: Overlaps with the objects of other classes, 0 for those of its own, shape (M,).
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


def find_mistakes(outcomes: Outcomes) -> np.ndarray:
    """Find what a classifier predicts wrong, the most confident mistakes first.

    Returns:
        Indices, shape (M,).
    """
    wrong = np.flatnonzero(outcomes.predicted != outcomes.truths)
    return wrong[np.argsort(-outcomes.scores[wrong].max(1), kind='stable')]


def describe_mistake(outcomes: Outcomes, index: int, classes: Sequence[str]) -> tuple[str, str]:
    """Say in two lines what a picture is, and what it is taken for.

    Args:
        outcomes: Predictions beside the truth.
        index: Of the picture.
        classes: Names by class index; of several names of a class, the first is taken.
    """
    return tuple(f'{verb} {classes[label].split(",")[0]} ({outcomes.scores[index, label]:.2f})'
                 for verb, label in (('is', outcomes.truths[index]),
                                     ('taken for', outcomes.predicted[index])))


def record_mistake(outcomes: Outcomes, index: int, classes: Sequence[str]) -> dict[str, Any]:
    """Describe a mistake by a dict fit for JSON."""
    return dict(file=outcomes.paths[index], true_class=classes[outcomes.truths[index]],
                predicted_class=classes[outcomes.predicted[index]],
                score=round(float(outcomes.scores[index].max()), 4))


def summarize_mistakes(outcomes: Outcomes, limit: int) -> str:
    """Say how many mistakes there are, and which of them are shown, at most `limit`."""
    wrong = len(find_mistakes(outcomes))
    if not wrong:
        return f'None of {len(outcomes)} pictures is misclassified'
    order = 'the most confident first' if wrong <= limit else f'the {limit} most confident'
    return f'{wrong} of {len(outcomes)} misclassified, {order}'
