"""Pictures of a dataset: objects of each class, sizes of boxes, images to look at."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .. import compat
from ..datasets.check import Content

compat.require('matplotlib', '3.6', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..inference import load_font
from .class_bars import shorten_name
from .curves import COLOURS
from .gallery import Truth, add_caption, arrange, draw_truth, open_image

_MAX_CLASSES = 80
#: COCO's bounds of small and medium objects: the square root of the area, in pixels.
_COCO_SIDES = (32, 96)


def draw_class_counts(contents: Mapping[str, Content]) -> Figure:
    """Draw how many objects of each class the datasets have, the most frequent first.

    Of more than 80 classes, the 40 most frequent and the 40 least frequent are drawn.

    Args:
        contents: the datasets by name; those of other classes than the first are left out.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there is no dataset with classes.
    """
    contents = {name: content for name, content in contents.items() if content.classes}
    if not contents:
        raise ValueError('no dataset has classes: there is nothing to draw')
    classes = next(iter(contents.values())).classes
    counts = {name: content.count_objects() for name, content in contents.items()
              if content.classes == classes}
    order = np.argsort(-next(iter(counts.values())), kind='stable')
    left_out = len(order) - _MAX_CLASSES
    if left_out > 0:
        order = np.concatenate([order[:_MAX_CLASSES // 2], order[-_MAX_CLASSES // 2:]])

    figure = Figure(figsize=(9, 1.8 + 0.22 * len(order)), dpi=100, layout='constrained')
    axes = figure.add_subplot()
    places = np.arange(len(order))
    height = 0.8 / len(counts)
    for number, (name, count) in enumerate(counts.items()):
        axes.barh(places + (number + 0.5) * height - 0.4, np.maximum(count[order], 0.5), height,
                  color=COLOURS[number % len(COLOURS)], label=f'{name}: {count.sum()} objects')
    axes.set_yticks(places, [shorten_name(classes[i]) for i in order], fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xscale('log')
    axes.set_xlim(left=0.5)
    axes.set_xlabel('objects (a bar of no length: none)', fontsize=11)
    title = f'Objects of {len(classes)} classes'
    if left_out > 0:
        title += f', {left_out} in the middle left out'
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold')
    axes.grid(axis='x', color='0.88')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    # Below the frequent classes the bars are short.
    axes.legend(loc='lower right', frameon=False)
    return figure


def draw_box_sizes(contents: Mapping[str, Content]) -> Figure:
    """Draw width against height of the boxes, and the share of each of COCO's ranges of size.

    Args:
        contents: the datasets by name; those without boxes are left out.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there is no dataset with boxes.
    """
    contents = {name: content for name, content in contents.items()
                if content.boxes is not None and len(content.boxes)}
    if not contents:
        raise ValueError('no dataset has boxes: there is nothing to draw')
    figure = Figure(figsize=(6.2 * len(contents), 5.6), dpi=100, layout='constrained')
    for place, (name, content) in enumerate(contents.items()):
        sides = (content.boxes[:, 2:] - content.boxes[:, :2]).clip(min=0.5)
        axes = figure.add_subplot(1, len(contents), place + 1)
        largest = max(4., sides.max() * 1.1)
        bins = np.geomspace(0.5, largest, 60)
        *_, drawn = axes.hist2d(*sides.T, bins=[bins, bins], norm=LogNorm(), cmap='cividis')
        figure.colorbar(drawn, ax=axes, label='boxes')
        edge = np.geomspace(0.5, largest, 100)
        for side in _COCO_SIDES:
            axes.plot(edge, side**2 / edge, color='black', linewidth=1, linestyle='--')
        area = np.sqrt(sides.prod(1))
        small, medium, large = (
            100 * np.mean((area >= low) & (area < high))
            for low, high in zip((0, *_COCO_SIDES), (*_COCO_SIDES, np.inf), strict=True))
        axes.set(xscale='log', yscale='log', xlim=(0.5, largest), ylim=(0.5, largest),
                 xlabel='width in pixels', ylabel='height in pixels')
        axes.set_title(f'{name}: {len(sides)} boxes\n{small:.0f} % small, {medium:.0f} % medium, '
                       f'{large:.0f} % large (lines: 32² and 96²)', loc='left', fontsize=11)
    return figure


def draw_suspects(content: Content, suspects: Mapping[str, str], limit: int = 24,
                  columns: int = 4, longer_side: int = 320) -> Image.Image:
    """Draw images to look at, with what is annotated in them, under what was found.

    Args:
        content: the dataset.
        suspects: kinds of findings by the path of the image.
        limit: the largest number of images; of each kind, the first ones are drawn.
        columns: images side by side.
        longer_side: of each image on the sheet, in pixels.

    Returns:
        The sheet. An image that cannot be read is a grey field that says so.
    """
    index_of = {path: index for index, path in enumerate(content.paths)}
    font = load_font(13)
    panels = []
    for path, kind in _take_turns(suspects, limit):
        image = _open(path)
        index = index_of.get(path)
        if image is None:
            image = Image.new('RGB', (longer_side, longer_side * 3 // 4), (200, 200, 200))
            ImageDraw.Draw(image).text((8, 8), 'cannot be read', fill=(0, 0, 0), font=font)
        elif content.boxes is None or index is None:
            image = draw_truth(image, _no_truth(), (), longer_side)
        else:
            own = (content.image_index == index) & (content.labels >= 0) & ~content.crowds
            image = draw_truth(image, Truth(content.boxes[own], content.labels[own]),
                               content.classes, longer_side)
        panel = add_caption(image, font, shorten_name(Path(path).name, 40))
        panels.append(add_caption(panel, font, kind))
    return arrange(panels, columns)


def _take_turns(suspects: Mapping[str, str], limit: int) -> list[tuple[str, str]]:
    """Choose images so that every kind has its share."""
    by_kind: dict[str, list[str]] = {}
    for path, kind in suspects.items():
        by_kind.setdefault(kind, []).append(path)
    share = max(1, limit // max(len(by_kind), 1))
    chosen = [(path, kind) for kind, paths in by_kind.items() for path in paths[:share]]
    return chosen[:limit]


def _open(path: str) -> Image.Image | None:
    try:
        return open_image(path)
    except Exception:  # Pillow has many, and each means the same here
        return None


def _no_truth() -> Truth:
    return Truth(np.zeros((0, 4)), np.zeros(0, dtype=int))

