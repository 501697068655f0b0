"""The effective receptive field: how much each pixel of the input counts for a layer's output.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
(NeurIPS 2016). The outputs of a layer at its central position, where they are positive, are summed
over the channels; the contribution of a pixel is the gradient of that sum, where it is positive,
summed over the colours and averaged over images. The figures are the sides of the smallest squares,
wherever they lie, that hold a share of all contributions.

NOTE: the sides are not comparable with RepLKNet's tables. Its shares are of
log10(1 + contribution), which changes the weight of small contributions; ours are of the
contributions themselves. Besides, RepLKNet's squares have their middle in that of the image, which
is up to half a stride off the central position of an even number of them, and it gives their area
in parts of the image's.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..style import COLOUR_MAP, Figure, clear, colors, new_figure, patches
from .inputs import read_picture
from .layers import NOT_ON_ITS_OWN, LayerError, as_map, find_last_map, find_layer

#: Shares of all contributions whose squares are reported.
SHARES = (0.2, 0.3, 0.5, 0.99)

# What is drawn reaches down to this part of the largest contribution.
_FLOOR = 1e-5

class _Reached(Exception):
    """The layer has run; the rest of the model need not."""


def choose_layer(model: nn.Module, images: Tensor, layer: str | None = None,
                 title: str = 'model') -> str:
    """Choose a layer, by default the last in the backbone that gives a map, and try it on images.

    Args:
        model: A backbone, or a model with one, in evaluation mode.
        images: (N, 3, H, W).
        layer: Its name, if it is chosen already.
        title: What to call the model in a message.

    Raises:
        UsageError: There is no such layer, it gives no map, or does not run; or the model refuses
            images of this size.
    """
    height, width = images.shape[-2:]
    try:
        with torch.no_grad():
            # A detector's head may want more than images.
            run = partial(getattr(model, 'backbone', model), images)
            layer = layer or find_last_map(model, run, (height, width))
            _map_of(model, layer, images)
    except (ValueError, AssertionError, RuntimeError) as error:
        problem = '' if isinstance(error, LayerError) else (
            f'the model does not run on images of {height}×{width}: ')
        raise UsageError(f'{title}: {problem}{error}') from error
    return layer


def measure_field(model: nn.Module, images: Iterable[Tensor], layer: str) -> np.ndarray:
    """Average the contributions of the input's pixels to a layer's central position.

    Args:
        model: A backbone, or a model with one, in evaluation mode.
        images: Batches (N, 3, H, W) as the model takes them, all of one size.
        layer: The name of the layer, see :func:`choose_layer`.

    Returns:
        Contributions, (H, W), none negative.

    Raises:
        LayerError: There is no such layer, it gives no map, or does not run; or nothing contributes
            to it.
        ValueError: There are no images.
    """
    total, count = 0., 0
    for batch in images:
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            output = _map_of(model, layer, batch)
            height, width = output.shape[2:]
            center = output[:, :, height // 2, width // 2].float().relu().sum()
            gradient, = torch.autograd.grad(center, batch)
        # In double precision, in which the sum over many images keeps small contributions.
        total = total + gradient.double().relu().sum((0, 1))
        count += len(batch)
    if not count:
        raise ValueError('images is empty: there is nothing to average over')
    field = (total / count).cpu().numpy()
    if not field.any():
        raise LayerError(f'no pixel contributes to the centre of layer {layer}, whose outputs may '
                         'all be negative there; name a layer after its activation')
    return field


def _map_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Run a model as far as a layer, and return the map that it gives when it runs first."""
    outputs = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    with find_layer(model, name).register_forward_hook(stop), suppress(_Reached):
        model(images)
    if not outputs:
        raise LayerError(f'layer {name} {NOT_ON_ITS_OWN}')
    try:
        return as_map(outputs[0], tuple(images.shape[-2:]))
    except LayerError as error:
        raise LayerError(f'layer {name} has no receptive field: {error}') from error


def find_square(field: np.ndarray, share: float) -> tuple[int, int, int]:
    """Find the smallest square that holds a share of the contributions.

    Args:
        field: Contributions, (H, W), none negative.
        share: From 0 to 1.

    Returns:
        Row and column of its first pixel, and its side, at most the longer side of the field.

    Example:
        >>> find_square(np.ones((9, 9)), 0.25)
        (0, 0, 5)
    """
    # Sums over all rectangles that begin in the first pixel.
    sums = np.pad(field.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    # But for the rounding of sums.
    wanted = share * sums[-1, -1] * (1 - 1e-9)

    def sums_of(side: int) -> np.ndarray:
        height, width = (min(side, length) for length in field.shape)
        return (sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
                + sums[:-height, :-width])

    side = 1 + bisect_left(range(1, max(field.shape)), True,
                           key=lambda side: sums_of(side).max() >= wanted)
    inside = sums_of(side)
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return int(row), int(column), side


def draw_fields(fields: Mapping[str, np.ndarray]) -> Figure:
    """Draw the fields of several models side by side, on a logarithmic scale, with their squares.

    Args:
        fields: Contributions (H, W) by what to call them; each is drawn relative to its largest.

    Raises:
        ValueError: There are no fields.
    """
    if not fields:
        raise ValueError('fields is empty: there is nothing to draw')
    figure = new_figure(3.9 * len(fields) + 1.1, 4.9, 'compressed')
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    norm = colors.LogNorm(_FLOOR, 1, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        height, width = field.shape
        image = axes.imshow(np.maximum(field / field.max(), _FLOOR), cmap=COLOUR_MAP, norm=norm,
                            interpolation='nearest' if max(field.shape) < 300 else 'antialiased')
        lines = []
        for share in SHARES:
            row, column, side = find_square(field, share)
            # A dark edge, for bright fields.
            for colour, line_width in (('black', 2.4), ('white', 1.)):
                axes.add_patch(patches.Rectangle(
                    (column - 0.5, row - 0.5), min(side, width), min(side, height), fill=False,
                    edgecolor=colour, linewidth=line_width))
            lines.append(f'{100 * share:g} %: {side} px')
        clear(axes)
        # What stands in brackets goes to a line of its own.
        axes.set_title(name.replace(' (', '\n('), fontsize=12, fontweight='bold')
        axes.set_xlabel('\n'.join('   '.join(part) for part in (lines[:2], lines[2:])), fontsize=11)
    scale = figure.colorbar(image, ax=panels, shrink=0.75, extend='min')
    scale.set_label("contribution, relative to the largest pixel's", fontsize=11)
    return figure


def read_square(path: Path, size: int) -> np.ndarray:
    """Read the middle of an image, its shorter side resized to `size`: (size, size, 3), BGR."""
    image = read_picture(path)
    scale = size / min(image.shape[:2])
    width, height = (max(size, round(side * scale)) for side in image.shape[1::-1])
    image = cv2.resize(image, (width, height),
                       interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top:top + size, left:left + size]
