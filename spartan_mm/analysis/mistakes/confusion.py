"""What a classifier or detector takes for what: predictions beside the truth, counted, drawn."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UsageError
from ...inference import Detections
from ...requirements import require
from ..style import Figure, new_figure
from .errors import check_overlap, compare, match
from .predictions import DetectionDataset, Outcomes, found_in

require('sklearn', '1.2', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of the package is touched
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

# Up to so many classes, each cell has its number, and each row and column its name.
_MAX_WRITTEN, _MAX_NAMED = 30, 100

#: What a detector's matrix has more: the row of surplus detections, the column of missed objects.
SURPLUS, MISSED = 'no object left', 'missed'


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
    return confusion_matrix(outcomes.truths, outcomes.predicted,
                            labels=np.arange(outcomes.scores.shape[1]))


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
        dataset: Where annotations and names of classes come from.
        predictions: By image id, see :func:`~.predictions.read_predictions`.
        score_threshold: The least score of a detection that counts.
        iou_threshold: The least overlap (IoU) of a detection with the object that it finds, above
            0.1 and at most 1.

    Returns:
        Counts (K + 1, K + 1): a row for each true class and one, ``SURPLUS``, for detections that
        no object is left for, duplicates among them; a column for each detected class and one for
        objects that are missed.

    Raises:
        UsageError: There is no prediction for one of the images, a prediction is of a class that
            the dataset has not, or ``iou_threshold`` is out of its range.
    """
    check_overlap(iou_threshold)
    num_classes = len(dataset.metainfo['classes'])
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found = found_in(info, predictions).above(score_threshold)
        if found.labels.max(initial=0) >= num_classes:
            raise UsageError(f'a prediction for {info["img_path"]} is of class '
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
        counts: See :func:`count_confusions` and :func:`count_detections`.

    Returns:
        Row, column and count of each cell off the diagonal that is not 0.
    """
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind='stable')[:np.count_nonzero(wrong)]
    return [(int(row), int(column), int(counts[row, column]))
            for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)]


def name_cells(counts: np.ndarray, classes: Sequence[str], surplus: bool = False
               ) -> tuple[list[str], list[str]]:
    """Name rows and columns of counts.

    Args:
        counts: See :func:`count_confusions`, and :func:`count_detections` for ``surplus``.
        classes: Names by class index.
        surplus: Whether there is one row more than classes, for detections without an object,
            and one column more, for missed objects.

    Raises:
        ValueError: There is another number of names than of classes.
    """
    if len(classes) != len(counts) - surplus:
        raise ValueError(f'there are {len(counts) - surplus} classes in the counts, but '
                         f'{len(classes)} names')
    return [*classes, *[SURPLUS] * surplus], [*classes, *[MISSED] * surplus]


def as_csv(counts: np.ndarray, classes: Sequence[str], surplus: bool = False) -> str:
    """Write counts as a table; arguments and errors as of :func:`name_cells`."""
    rows, columns = name_cells(counts, classes, surplus)
    table = io.StringIO(newline='')
    writer = csv.writer(table)
    writer.writerow(['true \\ predicted', *columns])
    writer.writerows([name, *row] for name, row in zip(rows, counts.tolist(), strict=True))
    return table.getvalue()


def draw_confusion(counts: np.ndarray, classes: Sequence[str], surplus: bool = False) -> Figure:
    """Draw who is taken for whom; arguments and errors as of :func:`name_cells`.

    Returns:
        The figure; its ``savefig`` writes it. A cell is the darker, the larger its share of its row
        is: of what is of its true class.
    """
    rows, columns = name_cells(counts, classes, surplus)
    total = counts.sum(1)
    named, written = len(classes) <= _MAX_NAMED, len(classes) <= _MAX_WRITTEN
    side = 3 + 0.55 * len(rows) if written else 3 + 0.15 * len(rows) if named else 12
    figure = new_figure(side + 1.5, side)
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(counts / np.maximum(total, 1)[:, None]).plot(
        ax=axes, cmap='Blues', include_values=written, colorbar=False,
        im_kw=dict(vmin=0, vmax=1, interpolation='nearest'))
    figure.colorbar(display.im_, label='share of the row', shrink=0.8)
    for cell, text in np.ndenumerate(display.text_ if written else []):
        # The matrix is that of shares, and says nothing where nothing is.
        text.set_text(counts[cell]) if counts[cell] else text.remove()
    axes.set_title(summarize_counts(counts, surplus), loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel('predicted', fontsize=11)
    axes.set_ylabel('true', fontsize=11)
    if surplus:
        for draw_line in (axes.axhline, axes.axvline):
            draw_line(len(classes) - 0.5, color='0.4', linewidth=1)
    places, size = range(len(rows)) if named else (), 10 if written else 7
    axes.set_xticks(places, columns if named else (), fontsize=size,
                    rotation=90 if max(map(len, columns)) > 3 else 0)
    names = [f'{name} ({count})' for name, count in zip(rows, total, strict=True)]
    axes.set_yticks(places, names if named else (), fontsize=size)
    return figure


def summarize_counts(counts: np.ndarray, surplus: bool = False) -> str:
    """Say how much is right."""
    right = counts.trace()
    if not surplus:
        return f'{right} of {counts.sum()} right ({100 * right / max(counts.sum(), 1):.2f} %)'
    objects, detections = counts[:-1].sum(), counts[:, :-1].sum()
    return (f'{right} of {objects} objects found ({100 * right / max(objects, 1):.1f} %),\n'
            f'{right} of {detections} detections right '
            f'({100 * right / max(detections, 1):.1f} %)')
