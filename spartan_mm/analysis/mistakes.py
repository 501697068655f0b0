"""A sheet of the pictures that a classifier got wrong."""

from collections.abc import Sequence

import numpy as np

from .. import compat
from .class_bars import shorten_name
from .confusion import Outcomes
from .gallery import open_image

compat.require('matplotlib', '3.6', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib.figure import Figure

_MAX_NAME = 16  # characters


def find_mistakes(outcomes: Outcomes) -> np.ndarray:
    """Find what is predicted wrong, the most confident mistakes first.

    Returns:
        Indices, shape (M,).
    """
    wrong = np.flatnonzero(outcomes.predicted != outcomes.truths)
    return wrong[np.argsort(-outcomes.scores[wrong].max(1), kind='stable')]


def draw_mistakes(outcomes: Outcomes, classes: Sequence[str], limit: int = 48,
                  columns: int = 8) -> Figure:
    """Draw the pictures that are predicted wrong, each with what it is and what it is taken for.

    Args:
        outcomes: predictions beside the truth.
        classes: names by class index.
        limit: the largest number of pictures; of more mistakes, the most confident ones are drawn.
        columns: pictures in a row.

    Returns:
        The figure; its ``savefig`` writes it. Without mistakes, it says so.

    Raises:
        OSError: a picture cannot be read.
    """
    wrong = find_mistakes(outcomes)
    shown = wrong[:limit]
    columns = max(1, min(columns, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(max(6, 1.9 * columns), 2.4 * rows + 0.8), dpi=100,
                    layout='constrained')
    figure.suptitle(_headline(len(wrong), len(shown), len(outcomes)), fontsize=13,
                    fontweight='bold')
    grid = figure.add_gridspec(rows, columns)
    for place, index in enumerate(shown):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        axes.imshow(open_image(outcomes.paths[index]), interpolation='nearest')
        axes.set_axis_off()
        scores = outcomes.scores[index]
        truth, predicted = outcomes.truths[index], outcomes.predicted[index]
        axes.set_title(f'true: {_short(classes[truth])} ({scores[truth]:.2f})\n'
                       f'taken for: {_short(classes[predicted])} ({scores[predicted]:.2f})',
                       fontsize=9)
    return figure


def _headline(wrong: int, shown: int, total: int) -> str:
    if not wrong:
        return f'None of {total} pictures is misclassified'
    order = 'the most confident first' if shown == wrong else f'the {shown} most confident'
    return f'{wrong} of {total} misclassified, {order}'


def _short(name: str) -> str:
    """Take the first of several names, cut where it is long."""
    return shorten_name(name.split(',')[0], _MAX_NAME)
