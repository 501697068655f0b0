"""Bars of a metric, one for each class."""

from collections.abc import Sequence

import numpy as np

from ...text import shorten
from ..style import COLOURS, Figure, finish, new_figure

_MAX_BARS = 80
_PALE = '#9CC9E8'


def draw_class_bars(metric: str, values: np.ndarray, classes: Sequence[str], counts: np.ndarray,
                    noun: str, behind: tuple[str, np.ndarray] | None = None) -> Figure:
    """Draw a metric of each class, the best first.

    Of more than 80 classes, the 40 best and the 40 worst are drawn; those without a value are left
    out.

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
    order = np.argsort(-values, kind='stable')
    order = order[np.isfinite(values[order])]
    if not len(order):
        raise ValueError(f'there are no {noun} of any class: there is no {metric} to draw')
    title = f'{metric} of each class'
    if len(order) > _MAX_BARS:
        title += f', the {_MAX_BARS // 2} best and the {_MAX_BARS // 2} worst of {len(order)}'
        order = np.concatenate([order[:_MAX_BARS // 2], order[-_MAX_BARS // 2:]])

    figure = new_figure(5.4, 1.3 + 0.27 * len(order))
    axes = figure.add_subplot()
    places = np.arange(len(order))
    ends = values
    if behind:
        ends = behind[1]
        axes.barh(places, ends[order], 0.78, color=_PALE, label=behind[0])
    axes.barh(places, values[order], 0.46 if behind else 0.66, color=COLOURS[0], label=metric)
    for place, index in zip(places, order, strict=True):
        axes.text(ends[index] + 0.01, place, f'{values[index]:.2f}', va='center', fontsize=9)
    axes.set_yticks(places, [f'{shorten(classes[i])} ({counts[i]})' for i in order],
                    fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    # Room for the number at the end of a full bar.
    axes.set_xlim(0, 1.08)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel(f'in brackets: {noun}')
    axes.tick_params(axis='y', length=0)
    finish(axes, title)
    axes.grid(visible=False, axis='y')
    if behind:
        figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    return figure
