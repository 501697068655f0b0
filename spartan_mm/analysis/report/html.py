"""A page of text, tables and pictures: one HTML file that loads nothing."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from ...requirements import require
from ...version import __version__
from ..style import Figure

# What torch installs, too.
jinja2 = require('jinja2', '3.0', 'analysis')

_TEMPLATE = Path(__file__).with_suffix('.html')

# An SVG file up to this size is taken as it is; of a larger one, the smaller of SVG and PNG.
_SMALL_SVG = 60_000  # bytes
_PNG_DPI = 200
# Pictures with a side up to this are shown pixel by pixel.
_COARSE = 64


@dataclass(frozen=True)
class Note:
    """A line of text.

    Args:
        text: The line.
        kind: 'note'; 'missing' if it says what is missing; 'heading' if it is one.
    """

    text: str
    kind: str = 'note'


@dataclass(frozen=True)
class Facts:
    """What something is called, and what it is."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table, its first column names, the others numbers; a long one is folded.

    Args:
        caption: What it shows.
        header: Of each column.
        rows: The cells as they are written.
        marked: Index of a row that stands out; None for none.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture that lies in the file.

    Args:
        source: The data URI.
        alt: What it shows, for those who do not see it.
        size: Width and height in pixels of the page, before it is fitted to the screen.
        caption: Lines of text.
        coarse: Whether it has so few pixels that each is to be seen.
    """

    source: str
    alt: str
    size: tuple[int, int]
    caption: tuple[str, ...] = ()
    coarse: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, as the screen has room.

    Args:
        pictures: The pictures.
        size: 'large', 'small', or 'wide' for one that is scrolled where the screen is narrower.
    """

    pictures: Sequence[Picture]
    size: str = 'large'


@dataclass(frozen=True)
class Pairs:
    """Pictures in pairs, each with a caption."""

    pairs: Sequence[tuple[str, Sequence[Picture]]]


@dataclass(frozen=True)
class Folded:
    """Text that is shown as it is, when somebody asks for it."""

    summary: str
    text: str


#: Something on a page; the template knows by its class how to show it.
Block = Note | Facts | Table | Pictures | Pairs | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading, and what it shows."""

    name: str
    title: str
    blocks: Sequence[Block]


def render(title: str, subtitle: str, cards: Sequence[tuple[str, str]],
           sections: Sequence[Section]) -> str:
    """Write a page; whatever the texts hold, it is shown as text.

    Args:
        title: Its heading.
        subtitle: A line below.
        cards: Numbers in large letters: what they are, and as they are written.
        sections: Its parts.

    Returns:
        HTML.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding='utf-8')).render(
        title=title, subtitle=subtitle, cards=cards, sections=sections, version=__version__,
        date=f'{datetime.now():%Y-%m-%d %H:%M}')


def embed_figure(figure: Figure) -> Picture:
    """Draw a figure into a picture, SVG or PNG, whichever is lighter."""
    def draw(form: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        # The same figure gives the same file: names in it are no random numbers.
        with matplotlib.rc_context({'svg.hashsalt': 'spartan_mm'}):
            figure.savefig(buffer, format=form, **options)
        return buffer.getvalue()

    content, kind = draw('svg', metadata=dict(Date=None)), 'svg+xml'
    if len(content) > _SMALL_SVG:
        raster = draw('png', dpi=_PNG_DPI)
        if len(raster) < len(content):
            content, kind = raster, 'png'
    titles = [axes.get_title(loc='left') or axes.get_title() for axes in figure.axes]
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return Picture(_as_uri(content, kind), ' '.join(', '.join(filter(None, titles)).split()),
                   (width, height))


def embed_image(image: Image.Image, caption: tuple[str, ...], alt: str | None = None) -> Picture:
    """Encode a picture; what has few pixels without loss.

    Args:
        image: The picture.
        caption: Lines of text.
        alt: What it shows; None if the caption says it.
    """
    coarse = max(image.size) <= _COARSE
    buffer = io.BytesIO()
    if coarse:
        image.save(buffer, 'PNG', optimize=True)
    else:
        # Full colour resolution: the frames are thin.
        image.save(buffer, 'JPEG', quality=85, subsampling=0, optimize=True)
    return Picture(_as_uri(buffer.getvalue(), 'png' if coarse else 'jpeg'),
                   alt or ', '.join(caption), image.size, caption, coarse)


def _as_uri(content: bytes, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
