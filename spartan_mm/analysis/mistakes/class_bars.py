"""Bars of a metric, one for each class."""

from collections.abc import Sequence

import numpy as np

from ...text import shorten
from ..style import COLOURS, Axes, Figure, finish, new_figure

_MAX_ROWS = 80
_PALE = '#9CC9E8'


def new_class_rows(title: str, values: np.ndarray, names: Sequence[str], width: float
                   ) -> tuple[Figure, Axes, np.ndarray]:
    """Make axes with a row for each class that has a value, the highest first.

    Of more than 80 such classes, the 40 first and the 40 last have a row.

    Returns:
        The figure, ``width`` inches wide; its axes; and the class index of each row.
    """
    order = np.argsort(-values, kind='stable')
    order = order[np.isfinite(values[order])]
    left_out = len(order) - _MAX_ROWS
    if left_out > 0:
        title += f', {left_out} in the middle left out'
        order = np.concatenate([order[:_MAX_ROWS // 2], order[-_MAX_ROWS // 2:]])
    figure = new_figure(width, 1.3 + 0.27 * len(order))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(order)), [names[index] for index in order], fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    finish(axes, title)
    axes.grid(visible=False, axis='y')
    return figure, axes, order


def draw_class_bars(metric: str, values: np.ndarray, classes: Sequence[str], counts: np.ndarray,
                    noun: str, behind: tuple[str, np.ndarray] | None = None) -> Figure:
    """Draw a metric of each class, see :func:`new_class_rows`.

    Args:
        metric: What to call it.
        values: From 0 to 1, NaN for none, shape (K,).
        classes: K names.
        counts: How many there are of each class, shape (K,).
        noun: What is counted, in the plural.
        behind: Name and values of a metric that is nowhere less, drawn paler behind it.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: No class has a value.
    """
    if not np.isfinite(values).any():
        raise ValueError(f'there are no {noun} of any class: there is no {metric} to draw')
    names = [f'{shorten(name)} ({count})' for name, count in zip(classes, counts, strict=True)]
    figure, axes, order = new_class_rows(f'{metric} of each class', values, names, 5.4)
    places, ends = np.arange(len(order)), values
    if behind:
        ends = behind[1]
        axes.barh(places, ends[order], 0.78, color=_PALE, label=behind[0])
    axes.barh(places, values[order], 0.46 if behind else 0.66, color=COLOURS[0], label=metric)
    for place, index in zip(places, order, strict=True):
        axes.text(ends[index] + 0.01, place, f'{values[index]:.2f}', va='center', fontsize=9)
    # Room for the number at the end of a full bar.
    axes.set(xlim=(0, 1.08), xticks=np.linspace(0, 1, 6), xlabel=f'in brackets: {noun}')
    if behind:
        figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    return figure
