"""What a model gets wrong: a detector's missed objects and false alarms, a classifier's mistakes.

The kinds of a detector's errors are those of TIDE (Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020, section 2.2).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...drawing import class_name
from ...errors import UsageError
from ...inference import Detections
from .predictions import ClassifierResults, DetectorResults, Truth, read_truth

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


@dataclass
class DetectionError:
    """An object that was missed, or a false alarm.

    Args:
        kind: One of ``KINDS``.
        index: Of the image in the dataset.
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
    found_box: np.ndarray | None = None
    found_label: int | None = None
    score: float = 0.
    true_box: np.ndarray | None = None
    true_label: int | None = None
    overlap: float = 0.

    @property
    def severity(self) -> float:
        """How bad it is, from 0 to 1: a false alarm's score, what a missed object's lacks to 1."""
        return 1 - self.score if self.kind == 'missed' else self.score

    @property
    def boxes(self) -> np.ndarray:
        """The boxes there are, shape (1, 4) or (2, 4)."""
        return np.stack([box for box in (self.true_box, self.found_box) if box is not None])

    def describe(self, classes: Sequence[str]) -> tuple[str, str]:
        """Say in two short lines what is wrong; `classes` are names by class index."""
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

    def as_record(self, results: DetectorResults) -> dict[str, Any]:
        """Describe it by a dict fit for JSON."""
        record = dict(file=results.dataset.get_data_info(self.index)['img_path'], kind=self.kind,
                      severity=round(self.severity, 4))
        if self.found_box is not None:
            record.update(found_bbox=self.found_box.round(2).tolist(),
                          found_class=class_name(results.classes, self.found_label),
                          score=round(self.score, 4))
        if self.true_box is not None:
            record.update(true_bbox=self.true_box.round(2).tolist(),
                          true_class=class_name(results.classes, self.true_label))
        if len(self.boxes) == 2:
            record.update(iou=round(self.overlap, 4))
        return record


@dataclass(frozen=True)
class Overlaps:
    """What was found in an image, beside what is annotated.

    Args:
        index: Of the image in the dataset.
        found: N detections, the best first.
        truth: M objects, crowds left out.
        overlaps: IoU of each detection with each object, shape (N, M).
        own: The same, 0 for objects of another class than the detection's, shape (N, M).
        counted: Which detections have the least score, shape (N,).
        owned: Of each detection the index of the object of its class that it finds, or -1: the best
            first, each takes the one that it overlaps most, of those that are left. Shape (N,).
        alarms: Rows of those that count and find none, crowds of their class left out.
    """

    index: int
    found: Detections
    truth: Truth
    overlaps: np.ndarray
    own: np.ndarray
    counted: np.ndarray
    owned: np.ndarray
    alarms: np.ndarray


def compare(results: DetectorResults, score_threshold: float = 0.3, iou_threshold: float = 0.5
            ) -> Iterator[Overlaps]:
    """Match detections with objects, image by image, as COCO's evaluation does.

    Args:
        results: Predictions with their dataset.
        score_threshold: The least score of a detection that counts.
        iou_threshold: The least overlap (IoU) of a detection with the object that it finds, or
            share of it in the crowd that leaves it out, above 0.1 and at most 1.

    Raises:
        UsageError: There is no prediction for an image, or ``iou_threshold`` is out of its range.
    """
    if not _UNRELATED < iou_threshold <= 1:
        raise UsageError(f'iou_threshold={iou_threshold} must be above {_UNRELATED} and at most 1')
    for index in range(len(results.dataset)):
        info = results.dataset.get_data_info(index)
        found, truth = results.found_in(info).best_first(), read_truth(info)
        objects = ~truth.crowds
        overlaps = measure_overlaps(found.boxes, truth.boxes, truth.crowds)
        own = overlaps * (found.labels[:, None] == truth.labels)
        counted = found.scores >= score_threshold
        owned = match(own[:, objects] * counted[:, None], iou_threshold)
        in_crowd = (own[:, truth.crowds] >= iou_threshold).any(1)
        yield Overlaps(
            index, found,
            Truth(truth.boxes[objects], truth.labels[objects], truth.crowds[objects]),
            overlaps[:, objects], own[:, objects], counted, owned,
            np.flatnonzero(counted & (owned < 0) & ~in_crowd))


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


def measure_overlaps(boxes: np.ndarray, others: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """Measure by how much boxes overlap, as COCO's evaluation does.

    Args:
        boxes: Corners x1, y1, x2, y2, shape (N, 4).
        others: The same, shape (M, 4).
        crowds: Which of the others are crowds, shape (M,): the overlap is then the share of the box
            that lies in the crowd, in place of intersection over union.

    Returns:
        From 0 to 1, shape (N, M).
    """
    from pycocotools.mask import iou
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    return iou(*(np.hstack([box[:, :2], box[:, 2:] - box[:, :2]]).astype(float)
                 for box in (boxes, others)), crowds)


def find_errors(results: DetectorResults, score_threshold: float = 0.3, iou_threshold: float = 0.5
                ) -> list[DetectionError]:
    """Find missed objects and false alarms, the worst first; arguments as of :func:`compare`.

    A false alarm is, the first of these that holds:

    - a duplicate: it overlaps an object of its class by ``iou_threshold`` or more;
    - of the wrong class: it overlaps another object as much;
    - badly localised, of the right class or another: it overlaps an object by more than 0.1;
    - on background.

    An object that a false alarm of the wrong class or badly localised concerns is not counted as
    missed: it is one error, not two. Severities compare within a kind; of equally bad ones, the
    larger box is first.

    NOTE: TIDE's code looks for bad localisation first, so that of two objects that a detection
    overlaps, one of its class by 0.11 would count and another by 0.9 would not.
    """
    errors = [error for compared in compare(results, score_threshold, iou_threshold)
              for error in _find_in_image(compared, iou_threshold)]

    def badness(error: DetectionError) -> tuple[float, float]:
        box = error.found_box if error.true_box is None else error.true_box
        return error.severity, float(np.prod(box[2:] - box[:2]))
    return sorted(errors, key=badness, reverse=True)


def _find_in_image(compared: Overlaps, iou_threshold: float) -> Iterator[DetectionError]:
    found, truth, own = compared.found, compared.truth, compared.own
    other = compared.overlaps - own

    def describe(kind: str, row: int | None, column: int | None) -> DetectionError:
        error = DetectionError(kind, compared.index)
        if row is not None:
            error.found_box, error.found_label = found.boxes[row], int(found.labels[row])
            error.score = float(found.scores[row])
        if column is not None:
            error.true_box, error.true_label = truth.boxes[column], int(truth.labels[column])
        if row is not None and column is not None:
            error.overlap = float(compared.overlaps[row, column])
        return error

    explained = set(compared.owned.tolist())
    for row in compared.alarms:
        kind, column = _judge(own[row], other[row], iou_threshold)
        yield describe(kind, row, column)
        if kind in ('class', 'location'):
            explained.add(column)
    for column in sorted(set(range(len(truth.boxes))) - explained):
        weak = np.flatnonzero(~compared.counted & (own[:, column] >= iou_threshold))
        yield describe('missed', weak[0] if len(weak) else None, column)


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


def find_mistakes(results: ClassifierResults) -> np.ndarray:
    """Find what a classifier predicts wrong, the most confident mistakes first.

    Returns:
        Indices, shape (M,).
    """
    wrong = np.flatnonzero(results.predicted != results.truths)
    return wrong[np.argsort(-results.scores[wrong].max(1), kind='stable')]


def describe_mistake(results: ClassifierResults, index: int) -> tuple[str, str]:
    """Say in two lines what a picture is and is taken for; of several names, the first is taken."""
    return tuple(f'{verb} {results.classes[label].split(",")[0]} '
                 f'({results.scores[index, label]:.2f})'
                 for verb, label in (('is', results.truths[index]),
                                     ('taken for', results.predicted[index])))


def record_mistake(results: ClassifierResults, index: int) -> dict[str, Any]:
    """Describe a mistake by a dict fit for JSON."""
    return dict(file=results.paths[index], true_class=results.classes[results.truths[index]],
                predicted_class=results.classes[results.predicted[index]],
                score=round(float(results.scores[index].max()), 4))


def summarize_mistakes(results: ClassifierResults, limit: int) -> str:
    """Say how many mistakes there are, and which of them are shown, at most `limit`."""
    wrong, total = len(find_mistakes(results)), len(results.paths)
    if not wrong:
        return f'None of {total} pictures is misclassified'
    order = 'the most confident first' if wrong <= limit else f'the {limit} most confident'
    return f'{wrong} of {total} misclassified, {order}'
