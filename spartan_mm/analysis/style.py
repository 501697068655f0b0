"""How the package's pictures look, and how they are written; here alone matplotlib is required."""

from pathlib import Path
from typing import Any

from ..files import write_whole
from ..requirements import require

require('matplotlib', '3.6', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib import colormaps, colors, patches, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

__all__ = ['COLOURS', 'COLOUR_MAP', 'Axes', 'Bbox', 'Figure', 'ScalarMappable', 'clear',
           'colormaps', 'colors', 'finish', 'new_figure', 'patches', 'ticker', 'write_figure']

#: The colours that Okabe and Ito chose to be told apart by everybody; yellow, which is too pale for
#: a line on white, left out.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')

#: The colours of a map, from nothing to the most; everybody tells them apart.
COLOUR_MAP = 'viridis'


class _PlainFigure(Figure):
    """Shows names as they are: what stands in them between two $ is no formula."""

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        # Powers of ten are matplotlib's own formulas.
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                for text in axis.get_ticklabels(which='both') if axis.get_scale() == 'log' else ():
                    text.set_parse_math(True)
        super().draw(renderer)


def new_figure(width: float, height: float, layout: str = 'constrained', dpi: int = 100) -> Figure:
    """Make an empty figure that needs no screen; its size is in inches."""
    figure = _PlainFigure((width, height), dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, title: str = '', size: float = 11) -> None:
    """Give axes what all of them have: a title on the left, a pale grid, no frame."""
    axes.set_title(title, loc='left', fontsize=size, fontweight='bold')
    axes.grid(color='0.88')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def clear(axes: Axes) -> None:
    """Take ticks and frame from axes that show a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def write_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Write a figure as PNG, the whole file or none.

    Args:
        path: The file.
        figure: What to write.
        options: Of ``Figure.savefig``.
    """
    with write_whole(path) as file:
        figure.savefig(file, format='png', **options)
