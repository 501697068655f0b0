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

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional

from ...datasets.images import load_image
from ...errors import UsageError
from ..style import COLOUR_MAP, Figure, clear, colors, new_figure, patches
from .layers import LayerError, as_map, find_last_map, find_layer

#: Shares of all contributions whose squares are reported.
SHARES = (0.2, 0.3, 0.5, 0.99)

# What is drawn reaches down to this part of the largest contribution.
_FLOOR = 1e-5

# ImageNet's colours, as most backbones get them: red, green, blue.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class _Reached(Exception):
    """The layer has run; the rest of the model need not."""


def measure_field(model: nn.Module, images: Iterable[Tensor], layer: str | None = None
                  ) -> np.ndarray:
    """Average the contributions of the input's pixels to a layer's central position.

    Args:
        model: A backbone, or a model with one; brought to evaluation mode.
        images: Batches (N, 3, H, W) as the model takes them, all of one size.
        layer: The name of the layer; None for the last one in the backbone that gives a map.

    Returns:
        Contributions, (H, W), none negative.

    Raises:
        LayerError: There is no such layer, it gives no map, or does not run; or nothing contributes
            to it.
        ValueError: There are no images.
    """
    model.eval()
    total, count = 0., 0
    for batch in images:
        size = tuple(batch.shape[-2:])
        if layer is None:
            layer = find_default_layer(model, batch[:1])
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            output = as_map_of(layer, _run_to(model, layer, batch), size)
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


def find_default_layer(model: nn.Module, images: Tensor) -> str:
    """Find the last layer of the backbone that gives a map.

    Args:
        model: A backbone, or a model with one.
        images: (N, 3, H, W).
    """
    backbone = getattr(model, 'backbone', model)

    def run() -> None:
        with torch.no_grad():
            # A detector's head may want more than images.
            backbone(images)

    return find_last_map(model, run, tuple(images.shape[-2:]),
                         None if backbone is model else backbone)


def check_layer(model: nn.Module, images: Tensor, layer: str | None = None) -> str:
    """Check, before many images are measured, that a layer gives a map of such images.

    Args:
        model: A backbone, or a model with one, in evaluation mode.
        images: (N, 3, H, W).
        layer: Its name; None for the last one in the backbone that gives a map.

    Returns:
        The name of the layer.

    Raises:
        LayerError: There is no such layer, it gives no map, or does not run.
        UsageError: The model refuses images of this size.
    """
    size = tuple(images.shape[-2:])
    try:
        layer = layer or find_default_layer(model, images)
        with torch.no_grad():
            as_map_of(layer, _run_to(model, layer, images), size)
    except LayerError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:
        height, width = size
        raise UsageError(f'the model does not run on images of {height}×{width}: {error}'
                         ) from error
    return layer


def as_map_of(layer: str, output: Any, size: tuple[int, int]) -> Tensor:
    """See :func:`as_map`; an error names the layer."""
    try:
        return as_map(output, size)
    except LayerError as error:
        raise LayerError(f'layer {layer} has no receptive field: {error}') from error


def square_side(field: np.ndarray, share: float) -> int:
    """Find the smallest square that holds a share of the contributions.

    Args:
        field: Contributions, (H, W), none negative.
        share: From 0 to 1.

    Returns:
        The side of the square in pixels, at most the longer side of the field.

    Example:
        >>> square_side(np.ones((9, 9)), 0.25)
        5
    """
    return find_square(field, share)[2]


def find_square(field: np.ndarray, share: float) -> tuple[int, int, int]:
    """Find the smallest square that holds a share of the contributions; see :func:`square_side`.

    Returns:
        Row and column of its first pixel, and its side.
    """
    # Sums over all rectangles that begin in the first pixel.
    sums = np.pad(field.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    # But for the rounding of sums.
    wanted = share * sums[-1, -1] * (1 - 1e-9)

    def best(side: int) -> tuple[float, int, int]:
        height, width = (min(side, length) for length in field.shape)
        inside = (sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
                  + sums[:-height, :-width])
        row, column = np.unravel_index(inside.argmax(), inside.shape)
        return inside[row, column], int(row), int(column)

    low, high = 1, max(field.shape)
    while low < high:
        middle = (low + high) // 2
        if best(middle)[0] >= wanted:
            high = middle
        else:
            low = middle + 1
    return *best(high)[1:], high


def draw_fields(fields: Mapping[str, np.ndarray], shares: Sequence[float] = SHARES) -> Figure:
    """Draw the fields of several models side by side, on a logarithmic scale, with their squares.

    Args:
        fields: Contributions (H, W) by what to call them; each is drawn relative to its largest.
        shares: Of the squares, see :func:`square_side`.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: There are no fields.
    """
    if not fields:
        raise ValueError('fields is empty: there is nothing to draw')
    figure = new_figure(3.9 * len(fields) + 1.1, 4.9, 'compressed')
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    norm = colors.LogNorm(_FLOOR, 1, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        image = axes.imshow(np.maximum(field / field.max(), _FLOOR), cmap=COLOUR_MAP, norm=norm,
                            interpolation='nearest' if max(field.shape) < 300 else 'antialiased')
        lines = []
        for share in shares:
            row, column, side = find_square(field, share)
            # A dark edge, for bright fields.
            for colour, line_width in (('black', 2.4), ('white', 1.)):
                axes.add_patch(patches.Rectangle(
                    (column - 0.5, row - 0.5), min(side, field.shape[1]), min(side, field.shape[0]),
                    fill=False, edgecolor=colour, linewidth=line_width))
            lines.append(f'{100 * share:g} %: {side} px')
        clear(axes)
        half = (len(lines) + 1) // 2
        # What stands in brackets goes to a line of its own.
        axes.set_title(name.replace(' (', '\n('), fontsize=12, fontweight='bold')
        axes.set_xlabel('\n'.join('   '.join(part) for part in (lines[:half], lines[half:])),
                        fontsize=11)
    scale = figure.colorbar(image, ax=panels, shrink=0.75, extend='min')
    scale.set_label("contribution, relative to the largest pixel's", fontsize=11)
    return figure


def read_square(path: Path, size: int) -> np.ndarray:
    """Read the middle of an image at a size.

    Args:
        path: The file.
        size: Side in pixels, to which the shorter side of the image is resized first.

    Returns:
        The image in BGR order, shape (size, size, 3).

    Raises:
        DataError: The file does not exist, cannot be read or is no image.
    """
    image = load_image(str(path), f'picture {str(path)!r}', 'Leave it out or replace it.')
    scale = size / min(image.shape[:2])
    width, height = (max(size, round(side * scale)) for side in image.shape[1::-1])
    image = cv2.resize(image, (width, height),
                       interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top:top + size, left:left + size]


def normalize(model: nn.Module, image: np.ndarray) -> Tensor:
    """Make of an image what a model takes, by its own data preprocessor if it has one.

    Args:
        model: Of mmdet or mmpretrain; any other gets red, green and blue with the mean and the
            deviation of its ``pretrained_cfg``, which timm's models have, or ImageNet's.
        image: In BGR order, shape (H, W, 3).

    Returns:
        (1, 3, H, W), on the device of the model.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    if hasattr(model, 'data_preprocessor'):
        return model.data_preprocessor(dict(inputs=[pixels], data_samples=None), False)['inputs']
    settings = getattr(model, 'pretrained_cfg', None) or {}
    mean, std = ([255 * value for value in settings[name]] if name in settings else default
                 for name, default in (('mean', _MEAN), ('std', _STD)))
    normalized = functional.normalize(pixels.flip(0).float(), mean, std)
    return normalized[None].to(next(model.parameters()).device)


def _run_to(model: nn.Module, name: str, images: Tensor) -> Any:
    """Run a model as far as a layer, and return what that gives when it runs first."""
    outputs = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    handle = find_layer(model, name).register_forward_hook(stop)
    try:
        model(images)
    except _Reached:
        return outputs[0]
    finally:
        handle.remove()
    raise LayerError(f'layer {name} does not run on its own, what is around it uses its weights or '
                     'leaves it out; name a layer around it or beside it')
