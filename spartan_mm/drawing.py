"""Boxes with labels, bars of scores, captions and sheets, drawn on pictures.

NOTE: The toolboxes' visualizers and torchvision's ``draw_bounding_boxes`` write in letters of one
size, tiny on a photograph, and on the object itself, which hides a small one. mmpretrain's shows
one class.
"""
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .datasets.data_errors import UndecodableError
from .datasets.images import decode_image
from .runtime import class_colour as class_colour
from .runtime import class_name as class_name
from .text import printable

Colour = tuple[int, int, int]

INK, PAPER, MARGIN = (32, 32, 32), (255, 255, 255), 12

# Of a picture with bars, in pixels: the least longer side of the image, the least height of a bar
# with its text, and the largest size of the text.
_MIN_SIDE, _MIN_ROW, _MAX_TEXT = 240, 36, 40


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib brings along, the same on every machine.

    Args:
        size: In pixels.
    """
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'), size)


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text where it is too long."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}…') > width:
        text = text[:-1]
    return f'{text}…'


def open_image(path: str | Path) -> Image.Image:
    """Read an image as the trainings do, see :func:`decode_image`.

    Raises:
        FileNotFoundError: There is no such file.
        UndecodableError: No image can be made of it.
    """
    try:
        return Image.fromarray(decode_image(Path(path).read_bytes())[..., ::-1])
    except UndecodableError as error:
        raise UndecodableError(f'{path} cannot be decoded as an image: {error}') from error


def resize(image: Image.Image, longer_side: int, coarse: bool = False) -> Image.Image:
    """Resize a copy of an image.

    Args:
        image: The image.
        longer_side: Of the copy, in pixels.
        coarse: Whether a pixel of a small image becomes a square.
    """
    scale = longer_side / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if coarse and scale > 1
                        else Image.Resampling.LANCZOS)


def draw_boxes(canvas: np.ndarray, boxes: np.ndarray, texts: Sequence[str],
               colours: Sequence[Colour], framed: Sequence[bool] | None = None) -> None:
    """Draw boxes, each with a label where it hides least. Lines and letters grow with the picture.

    Args:
        canvas: What to draw on, shape (H, W, 3).
        boxes: Corners x1, y1, x2, y2 in pixels, in any order, shape (N, 4); the last on top.
        texts: Of the labels.
        colours: Of frames and labels, their channels in the canvas's order.
        framed: Whether a box has a frame; all have by default.
    """
    size = np.array(canvas.shape[1::-1])
    font, line = load_font(max(11, size.min() // 36)), max(1, size.min() // 250)
    corners = np.nan_to_num(np.asarray(boxes, float)).reshape(-1, 2, 2)
    corners = np.sort(corners.clip(-size.max(), 2 * size.max()), axis=1)
    boxes = corners.round().astype(int).reshape(-1, 4)
    # All frames first: none crosses a label.
    for box, colour, frame in zip(boxes.tolist(), colours, framed or [True] * len(boxes),
                                  strict=True):
        if frame:
            # A dark line a pixel wider than the bright one, for bright backgrounds.
            for fill, width in ((INK, line + 1), (colour, line)):
                cv2.rectangle(canvas, box[:2], box[2:], fill, width)

    labels: list[np.ndarray] = []
    for box, text, colour in zip(boxes, texts, colours, strict=True):
        text = fit_text(' '.join(text.split()), font, size[0] - 8)
        label = Image.new('RGB', (round(font.getlength(text)) + 8, sum(font.getmetrics()) + 1),
                          colour)
        draw = ImageDraw.Draw(label)
        draw.text((4, 0), text, 'black', font)
        draw.rectangle((0, 0, label.width - 1, label.height - 1), outline=INK)
        labels.append(_place_label(box, np.array(label.size), size, labels, boxes))
        left, top = labels[-1][:2]
        place = canvas[top:top + label.height, left:left + label.width]
        place[:] = np.asarray(label)[:place.shape[0], :place.shape[1]]


def _place_label(box: np.ndarray, size: np.ndarray, canvas_size: np.ndarray,
                 labels: Sequence[np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Find where the label of a box hides least, of earlier labels first and of objects second.

    Returns:
        Corners x1, y1, x2, y2 of the label, inside the canvas.
    """
    left, top, right, bottom = box
    width, height = size
    corners = np.array([
        (left, top - height), (left, bottom), (right - width, top - height),
        (right - width, bottom), (left, top), (left, bottom - height), (right, top),
        (left - width, top), (right, bottom - height), (left - width, bottom - height)])
    corners = corners.clip(0, np.maximum(canvas_size - size, 0))
    places = np.concatenate([corners, corners + size], axis=1)
    hidden = [common_areas(places, np.reshape(others, (-1, 4))).sum(1)
              for others in (boxes, labels)]
    # The first of equals wins: above, if there is room.
    return places[np.lexsort(hidden)[0]]


def common_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Measure the areas that boxes, shape (N, 4), share with others, (M, 4): shape (N, M)."""
    boxes, others = boxes[:, None], others[None]
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2],
                                                                    others[..., :2])
    return sides.clip(0).prod(-1)


def draw_bars(image: np.ndarray, names: Sequence[str], scores: Sequence[float],
              colours: Sequence[Colour]) -> np.ndarray:
    """Draw a bar for each score beside an image.

    Args:
        image: RGB, shape (H, W, 3); of a small one, each pixel becomes a square.
        names: Of the bars.
        scores: From 0 to 1; a bar of the whole length stands for 1.
        colours: Of the bars.

    Returns:
        The picture, RGB.
    """
    factor = max(1, _MIN_SIDE // max(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = image.shape[:2]
    total_height = max(height, _MIN_SIDE, _MIN_ROW * len(names))
    row = min(total_height / max(len(names), 1), 2.6 * _MAX_TEXT)
    text = int(row / 2.6)
    length, margin = 16 * text, text

    canvas = Image.new('RGB', (width + length + 2 * margin, total_height), PAPER)
    canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (0, 0))
    draw, font, left = ImageDraw.Draw(canvas), load_font(text), width + margin
    for rank, (name, score, colour) in enumerate(zip(names, scores, colours, strict=True)):
        top = (rank + 0.15) * row
        percentage = f'{100 * score:.1f} %'
        room = length - font.getlength(percentage) - margin
        draw.text((left, top), fit_text(' '.join(name.split()), font, room), 'black', font)
        draw.text((left + length, top), percentage, 'black', font, anchor='ra')
        for share, fill in ((1., (230, 230, 230)), (max(float(score), 1 / length), colour)):
            draw.rectangle((left, top + 0.52 * row, left + length * share, top + 0.72 * row), fill)
    return np.array(canvas)


def add_caption(image: Image.Image, *lines: str, size: int = 13, width: int = 0, indent: int = 0,
                below: bool = False) -> Image.Image:
    """Put lines of text over an image or below it, cut where they are too long.

    Args:
        image: The image.
        lines: The text.
        size: Of the letters, in pixels.
        width: Of the whole in pixels, if it is to be more than the image's.
        indent: Of the text, in pixels.
        below: Whether the text goes below.
    """
    font, width = load_font(size), max(width, image.width)
    height = sum(font.getmetrics())
    panel = Image.new('RGB', (width, image.height + len(lines) * height + 6), PAPER)
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(lines):
        draw.text((indent, 2 + number * height + below * image.height),
                  fit_text(line, font, width - indent), INK, font)
    panel.paste(image, (0, 0 if below else len(lines) * height + 6))
    return panel


def arrange(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange panels on a sheet, row by row, with a margin around each."""
    columns = max(1, min(columns, len(panels)))
    rows = [panels[start:start + columns] for start in range(0, len(panels), columns)]
    width = max((panel.width for panel in panels), default=320) + MARGIN
    heights = [max(panel.height for panel in row) + MARGIN for row in rows]
    sheet = Image.new('RGB', (columns * width + MARGIN, sum(heights) + MARGIN), PAPER)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            sheet.paste(panel, (MARGIN + column * width, MARGIN + sum(heights[:number])))
    return sheet
