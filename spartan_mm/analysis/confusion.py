"""What a classifier or detector takes for what: predictions beside the truth, counted, drawn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import compat
from ..inference import Detections
from .errors import check_overlap, compare, match
from .gallery import DetectionDataset, found_in, read_samples

compat.require('matplotlib', '3.6', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib.figure import Figure

# Up to so many classes, each cell has its number, and each row and column its name.
_MAX_WRITTEN, _MAX_NAMED = 30, 100

#: What a detector's matrix has more: the row of surplus detections, the column of missed objects.
SURPLUS, MISSED = 'no object left', 'missed'


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of pictures whose class is known.

    Args:
        paths: the files, N of them.
        truths: class indices, shape (N,).
        scores: of each class, from 0 to 1, shape (N, K).
    """

    paths: tuple[str, ...]
    truths: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def predicted(self) -> np.ndarray:
        """Class indices of the highest scores, shape (N,)."""
        return self.scores.argmax(1)


def collect_outcomes(samples: Iterable[Mapping[str, Any]]) -> Outcomes:
    """Arrange predictions.

    Args:
        samples: mmpretrain's ``DataSample`` of a model's ``test_step``, or the dicts of the pickle
            file that ``tools/test.py --out`` writes; of one class each.
    """
    paths, truths, scores = [], [], []
    for sample in samples:
        paths.append(str(sample.get('img_path')))
        truths.append(int(sample.get('gt_label')))
        scores.append(torch.as_tensor(sample.get('pred_score')).detach().cpu().float().numpy())
    return Outcomes(tuple(paths), np.array(truths, dtype=int), np.array(scores))


def read_outcomes(path: str | Path) -> Outcomes:
    """Read predictions from the file that ``tools/test.py --out`` writes.

    The file is a pickle, which can hold code: read none from strangers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, nothing, or is damaged.
    """
    return read_samples(path, 'classifier', {'img_path', 'gt_label', 'pred_score'},
                        collect_outcomes)


def measure_tops(outcomes: Outcomes) -> dict[str, float]:
    """Measure how often the truth is the likeliest class, and among the five likeliest.

    Returns:
        The shares by name, 'top-1' and, where there are more than five classes, 'top-5'.
    """
    own = outcomes.scores[np.arange(len(outcomes)), outcomes.truths][:, None]
    # Of equal scores, the lower index comes first, as in the prediction itself.
    earlier = np.arange(outcomes.scores.shape[1]) < outcomes.truths[:, None]
    ranks = ((outcomes.scores > own) | (outcomes.scores == own) & earlier).sum(1)
    return {f'top-{count}': float((ranks < count).mean()) for count in (1, 5)
            if count < outcomes.scores.shape[1]}


def count_confusions(outcomes: Outcomes) -> np.ndarray:
    """Count how often each class is taken for each.

    Returns:
        Counts (K, K), a row for each true class and a column for each predicted one.
    """
    num_classes = outcomes.scores.shape[1]
    counts = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(counts, (outcomes.truths, outcomes.predicted), 1)
    return counts


def count_detections(dataset: DetectionDataset, predictions: Mapping[Any, Detections],
                     score_threshold: float = 0.3, iou_threshold: float = 0.5) -> np.ndarray:
    """Count as what the objects of each class are detected.

    Detections find objects of their class first, as in COCO's evaluation; of what is left, the best
    first, each takes the object of another class that it overlaps most. Each object and each
    detection is counted once, so that the diagonal is what AP counts as right; detections in crowds
    are left out.

    NOTE: mmdet's ``confusion_matrix.py`` counts a detection once for every object that it overlaps
    and every one of several detections of an object, and takes crowds for objects.

    Args:
        dataset: where annotations and names of classes come from.
        predictions: by image id, see :func:`~spartan_mm.analysis.gallery.read_predictions`.
        score_threshold: the least score of a detection that counts.
        iou_threshold: the least overlap (IoU) of a detection with the object that it finds, above
            0.1 and at most 1.

    Returns:
        Counts (K + 1, K + 1): a row for each true class and one, ``SURPLUS``, for detections that
        no object is left for, duplicates among them; a column for each detected class and one for
        objects that are missed.

    Raises:
        ValueError: there is no prediction for one of the images, a prediction is of a class that
            the dataset has not, or ``iou_threshold`` is out of its range.
    """
    check_overlap(iou_threshold)
    num_classes = len(dataset.metainfo['classes'])
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found = found_in(info, predictions).above(score_threshold)
        if found.labels.max(initial=0) >= num_classes:
            raise ValueError(f'a prediction for {info["img_path"]} is of class '
                             f'{found.labels.max()}, but the dataset has {num_classes} classes: '
                             'the predictions belong to another dataset')
        compared = compare(info['instances'], found, iou_threshold)
        owned = match(compared.own, iou_threshold)
        left = np.flatnonzero((owned < 0) & ~compared.in_crowd)
        free = np.setdiff1d(np.arange(len(compared.boxes)), owned)
        taken = match(compared.overlaps[np.ix_(left, free)], iou_threshold)
        owned[left[taken >= 0]] = free[taken[taken >= 0]]

        predicted = compared.found.labels
        np.add.at(counts, (compared.labels[owned[owned >= 0]], predicted[owned >= 0]), 1)
        np.add.at(counts[-1], predicted[left[taken < 0]], 1)
        np.add.at(counts[:, -1], np.delete(compared.labels, owned[owned >= 0]), 1)
    return counts


def rank_confusions(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """List what is taken for what, the most frequent first.

    Args:
        counts: see :func:`count_confusions` and :func:`count_detections`.

    Returns:
        Row, column and count of each cell off the diagonal that is not 0.
    """
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind='stable')[:np.count_nonzero(wrong)]
    return [(int(row), int(column), int(counts[row, column]))
            for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)]


def draw_confusion(counts: np.ndarray, classes: Sequence[str],
                   surplus: bool = False) -> Figure:
    """Draw who is taken for whom.

    Args:
        counts: see :func:`count_confusions`, and :func:`count_detections` for ``surplus``.
        classes: names by class index.
        surplus: whether there is one row more than classes, for detections without an object,
            and one column more, for missed objects.

    Returns:
        The figure; its ``savefig`` writes it. A cell is the darker, the larger its share of its row
        is: of what is of its true class.

    Raises:
        ValueError: there is another number of names than of classes.
    """
    if len(classes) != len(counts) - surplus:
        raise ValueError(f'there are {len(counts) - surplus} classes in the counts, but '
                         f'{len(classes)} names')
    rows = [*classes, SURPLUS] if surplus else [*classes]
    columns = [*classes, MISSED] if surplus else rows
    total = counts.sum(1)
    shares = counts / np.maximum(total, 1)[:, None]
    named, written = len(classes) <= _MAX_NAMED, len(classes) <= _MAX_WRITTEN

    side = 3 + 0.55 * len(rows) if written else 3 + 0.15 * len(rows) if named else 12
    figure = Figure(figsize=(side + 1.5, side), dpi=100, layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, label='share of the row', shrink=0.8)
    axes.set_title(_headline(counts, surplus), loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel('predicted', fontsize=11)
    axes.set_ylabel('true', fontsize=11)
    if surplus:
        for draw_line in (axes.axhline, axes.axvline):
            draw_line(len(classes) - 0.5, color='0.4', linewidth=1)
    if named:
        size = 10 if written else 7
        positions = range(len(rows))
        axes.set_xticks(positions, columns, fontsize=size,
                        rotation=90 if max(map(len, columns)) > 3 else 0)
        axes.set_yticks(positions, [f'{name} ({count})' for name, count
                                    in zip(rows, total, strict=True)], fontsize=size)
    if written:
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, str(counts[row, column]), ha='center', va='center',
                      color='white' if shares[row, column] > 0.5 else 'black')
    return figure


def _headline(counts: np.ndarray, surplus: bool) -> str:
    right = counts.trace()
    if not surplus:
        return (f'{right} of {counts.sum()} right '
                f'({100 * right / max(counts.sum(), 1):.2f} %)')
    objects, detections = counts[:-1].sum(), counts[:, :-1].sum()
    return (f'{right} of {objects} objects found ({100 * right / max(objects, 1):.1f} %),\n'
            f'{right} of {detections} detections right '
            f'({100 * right / max(detections, 1):.1f} %)')
