"""What a classifier or detector takes for what: predictions beside the truth, counted, drawn."""

import csv
import io
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ...requirements import require
from ..style import Figure, new_figure
from .errors import compare, match
from .predictions import ClassifierResults, DetectorResults

require('sklearn', '1.2', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of the package is touched
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

# Up to so many classes, each cell has its number, and each row and column its name.
_MAX_WRITTEN, _MAX_NAMED = 30, 100

#: What a detector's matrix has more: the row of surplus detections, the column of missed objects.
SURPLUS, MISSED = 'no object left', 'missed'


@dataclass(frozen=True)
class Confusions:
    """How often each class is taken for each.

    Args:
        counts: A row for each true class and a column for each predicted one, shape (K, K). A
            detector's have one row more, ``SURPLUS``, for detections that no object is left for,
            duplicates among them, and one column more, for objects that are missed.
        classes: K names.
        surplus: Whether they are a detector's.
    """

    counts: np.ndarray
    classes: tuple[str, ...]
    surplus: bool = False

    @property
    def rows(self) -> list[str]:
        """Names of the rows."""
        return [*self.classes, *[SURPLUS] * self.surplus]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [*self.classes, *[MISSED] * self.surplus]

    def rank(self) -> list[tuple[int, int, int]]:
        """List row, column and count of each cell off the diagonal, the most frequent first."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind='stable')[:np.count_nonzero(wrong)]
        return [(int(row), int(column), int(wrong[row, column]))
                for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]

    def summarize(self) -> str:
        """Say how much is right."""
        counts, right = self.counts, self.counts.trace()
        if not self.surplus:
            return f'{right} of {counts.sum()} right ({100 * right / max(counts.sum(), 1):.2f} %)'
        objects, detections = counts[:-1].sum(), counts[:, :-1].sum()
        return (f'{right} of {objects} objects found ({100 * right / max(objects, 1):.1f} %),\n'
                f'{right} of {detections} detections right '
                f'({100 * right / max(detections, 1):.1f} %)')

    def as_csv(self) -> str:
        """Write them as a table."""
        table = io.StringIO(newline='')
        writer = csv.writer(table)
        writer.writerow(['true \\ predicted', *self.columns])
        writer.writerows([name, *row]
                         for name, row in zip(self.rows, self.counts.tolist(), strict=True))
        return table.getvalue()

    def draw(self) -> Figure:
        """Draw who is taken for whom.

        Returns:
            The figure; its ``savefig`` writes it. A cell is the darker, the larger its share of its
            row is: of what is of its true class.
        """
        counts, total, number = self.counts, self.counts.sum(1), len(self.classes)
        named, written = number <= _MAX_NAMED, number <= _MAX_WRITTEN
        side = 3 + 0.55 * len(counts) if written else 3 + 0.15 * len(counts) if named else 12
        figure = new_figure(side + 1.5, side)
        axes = figure.add_subplot()
        display = ConfusionMatrixDisplay(counts / np.maximum(total, 1)[:, None]).plot(
            ax=axes, cmap='Blues', include_values=written, colorbar=False,
            im_kw=dict(vmin=0, vmax=1, interpolation='nearest'))
        figure.colorbar(display.im_, label='share of the row', shrink=0.8)
        for cell, text in np.ndenumerate(display.text_ if written else []):
            # The matrix is that of shares, and says nothing where nothing is.
            text.set_text(counts[cell]) if counts[cell] else text.remove()
        axes.set_title(self.summarize(), loc='left', fontsize=13, fontweight='bold')
        axes.set_xlabel('predicted', fontsize=11)
        axes.set_ylabel('true', fontsize=11)
        if self.surplus:
            for draw_line in (axes.axhline, axes.axvline):
                draw_line(number - 0.5, color='0.4', linewidth=1)
        places, size = range(len(counts)) if named else (), 10 if written else 7
        axes.set_xticks(places, self.columns if named else (), fontsize=size,
                        rotation=90 if max(map(len, self.columns)) > 3 else 0)
        names = [f'{name} ({count})' for name, count in zip(self.rows, total, strict=True)]
        axes.set_yticks(places, names if named else (), fontsize=size)
        return figure


def count_confusions(results: ClassifierResults) -> Confusions:
    """Count how often a classifier takes each class for each."""
    return Confusions(confusion_matrix(results.truths, results.predicted,
                                       labels=np.arange(len(results.classes))), results.classes)


def count_detections(results: DetectorResults, score_threshold: float = 0.3,
                     iou_threshold: float = 0.5) -> Confusions:
    """Count as what the objects of each class are detected; arguments as of :func:`compare`.

    Detections find objects of their class first, as in COCO's evaluation; of what is left, the best
    first, each takes the object of another class that it overlaps most. Each object and each
    detection is counted once, so that the diagonal is what AP counts as right; detections in crowds
    are left out.

    NOTE: mmdet's ``confusion_matrix.py`` counts a detection once for every object that it overlaps
    and every one of several detections of an object, and takes crowds for objects.

    Raises:
        UsageError: A prediction is of a class that the dataset has not.
    """
    classes = results.classes
    counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=int)
    for compared in compare(results, score_threshold, iou_threshold):
        owned, left, truth = compared.owned, compared.alarms, compared.truth.labels
        predicted = compared.found.labels
        highest = predicted[compared.counted].max(initial=0)
        if highest >= len(classes):
            path = results.dataset.get_data_info(compared.index)['img_path']
            raise UsageError(f'a prediction for {path} is of class {highest}, but the dataset has '
                             f'{len(classes)} classes: the predictions belong to another dataset')
        free = np.setdiff1d(np.arange(len(truth)), owned)
        taken = match(compared.overlaps[np.ix_(left, free)], iou_threshold)
        owned[left[taken >= 0]] = free[taken[taken >= 0]]
        found = owned[owned >= 0]
        np.add.at(counts, (truth[found], predicted[owned >= 0]), 1)
        np.add.at(counts[-1], predicted[left[taken < 0]], 1)
        np.add.at(counts[:, -1], np.delete(truth, found), 1)
    return Confusions(counts, classes, surplus=True)


def measure_tops(results: ClassifierResults) -> dict[str, float]:
    """Measure how often the truth is the likeliest class, and among the five likeliest.

    Returns:
        The shares by name, 'top-1' and, where there are more than five classes, 'top-5'.
    """
    own = results.scores[np.arange(len(results.truths)), results.truths][:, None]
    # Of equal scores, the lower index comes first, as in the prediction itself.
    earlier = np.arange(results.scores.shape[1]) < results.truths[:, None]
    ranks = ((results.scores > own) | (results.scores == own) & earlier).sum(1)
    return {f'top-{count}': float((ranks < count).mean()) for count in (1, 5)
            if count < results.scores.shape[1]}
