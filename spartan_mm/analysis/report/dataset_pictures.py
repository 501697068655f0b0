"""What a dataset holds: objects of each class, sizes of boxes, images to look at."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...datasets.data_errors import DataError
from ...drawing import add_caption, arrange, open_image, resize
from ...files import write_whole
from ...text import printable, shorten
from ..mistakes.class_bars import new_class_rows
from ..mistakes.pictures import draw_truth
from ..mistakes.predictions import Truth
from ..style import COLOURS, Figure, colors, new_figure, write_figure

if TYPE_CHECKING:
    from ...datasets.check import Content, Report

#: COCO's bounds of small and medium objects: the square root of the area, in pixels.
_COCO_SIDES = (32, 96)


def describe(report: 'Report') -> str:
    """Say in lines what a dataset holds, and what was found."""
    content = report.content
    lines = [f'{report.split}: {printable(report.name)}']
    if content.infos:
        noun = 'labels' if content.boxes is None else 'objects'
        lines.append(f'  {len(content.infos)} images, {content.count_objects().sum()} {noun} of '
                     f'{len(content.classes)} classes')
    lines += [f'  {finding.level}: {finding.message}' for finding in report.findings]
    return '\n'.join(lines)


def write_pictures(reports: list['Report'], out_dir: Path) -> None:
    """Draw what there is to draw: classes.png, box_sizes.png and suspects_SPLIT_NUMBER.png."""
    contents = {report.split: report.content for report in reports if report.content.infos}
    for name, draw in (('classes', draw_class_counts), ('box_sizes', draw_box_sizes)):
        figure = draw(contents)
        if figure:
            write_figure(out_dir / f'{name}.png', figure)
    for number, report in enumerate(reports):
        suspects = report.suspects()
        if suspects:
            with write_whole(out_dir / f'suspects_{report.split}_{number}.png') as file:
                draw_suspects(report.content, suspects).save(file, 'PNG')


def draw_class_counts(contents: Mapping[str, 'Content']) -> Figure | None:
    """Draw how many objects of each class the datasets have, see :func:`new_class_rows`.

    Args:
        contents: The datasets by name; those of other classes than the first are left out.

    Returns:
        The figure; its ``savefig`` writes it. None if no dataset has classes.
    """
    contents = {name: content for name, content in contents.items() if content.classes}
    if not contents:
        return None
    classes = next(iter(contents.values())).classes
    counts = {name: content.count_objects() for name, content in contents.items()
              if content.classes == classes}
    figure, axes, order = new_class_rows(
        f'Objects of {len(classes)} classes', next(iter(counts.values())),
        [shorten(name) for name in classes], 9)
    height = 0.8 / len(counts)
    for number, (name, count) in enumerate(counts.items()):
        axes.barh(np.arange(len(order)) + (number + 0.5) * height - 0.4,
                  np.maximum(count[order], 0.5), height, color=COLOURS[number % len(COLOURS)],
                  label=f'{name}: {count.sum()} objects')
    axes.set(xscale='log', xlabel='objects (a bar of no length: none)')
    axes.set_xlim(left=0.5)
    # Below the frequent classes the bars are short.
    axes.legend(loc='lower right', frameon=False)
    return figure


def draw_box_sizes(contents: Mapping[str, 'Content']) -> Figure | None:
    """Draw width against height of the boxes, and the share of each of COCO's ranges of size.

    Args:
        contents: The datasets by name; those without boxes are left out.

    Returns:
        The figure; its ``savefig`` writes it. None if no dataset has boxes.
    """
    contents = {name: content for name, content in contents.items()
                if content.boxes is not None and len(content.boxes)}
    if not contents:
        return None
    figure = new_figure(6.2 * len(contents), 5.6)
    for place, (name, content) in enumerate(contents.items()):
        sides = (content.boxes[:, 2:] - content.boxes[:, :2]).clip(min=0.5)
        axes = figure.add_subplot(1, len(contents), place + 1)
        largest = max(4., sides.max() * 1.1)
        bins = np.geomspace(0.5, largest, 60)
        *_, drawn = axes.hist2d(*sides.T, bins=[bins, bins], norm=colors.LogNorm(), cmap='cividis')
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


def draw_suspects(content: 'Content', suspects: Mapping[str, str], limit: int = 24,
                  columns: int = 4, longer_side: int = 320) -> Image.Image:
    """Draw images to look at, with what is annotated in them, under what was found.

    Args:
        content: The dataset.
        suspects: Kinds of findings by the path of the image.
        limit: The largest number of images; of each kind, the first ones are drawn.
        columns: Images side by side.
        longer_side: Of each image on the sheet, in pixels.

    Returns:
        The sheet. An image that cannot be read is a grey field that says so.
    """
    index_of = {path: index for index, path in enumerate(content.paths)}
    panels = []
    for path, kind in _take_turns(suspects, limit):
        name = shorten(Path(path).name, 40)
        try:
            image = open_image(path)
        except (OSError, DataError):
            field = Image.new('RGB', (longer_side, longer_side * 3 // 4), (200, 200, 200))
            panels.append(add_caption(field, kind, name, 'cannot be read'))
            continue
        if content.boxes is None:
            picture = resize(image, longer_side)
        else:
            own = (content.image_index == index_of.get(path, -1)) & (content.labels >= 0)
            truth = Truth(content.boxes[own], content.labels[own], content.crowds[own])
            picture = draw_truth(image, truth, content.classes, longer_side)
        panels.append(add_caption(picture, kind, name))
    return arrange(panels, columns)


def _take_turns(suspects: Mapping[str, str], limit: int) -> list[tuple[str, str]]:
    """Choose images so that every kind has its share."""
    by_kind: dict[str, list[str]] = {}
    for path, kind in suspects.items():
        by_kind.setdefault(kind, []).append(path)
    share = max(1, limit // max(len(by_kind), 1))
    chosen = [(path, kind) for kind, paths in by_kind.items() for path in paths[:share]]
    return chosen[:limit]
