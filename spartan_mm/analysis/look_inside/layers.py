"""The layers of a model by name: finding one, seeing what each gives, reading that as a map."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError

# How many names a message holds.
_MAX_LISTED = 12

# A class token, a distillation token or four registers before the tokens of the patches.
_MAX_EXTRA_TOKENS = 5


class LayerError(UsageError):
    """A layer that does not exist or cannot be looked at."""


@dataclass(frozen=True)
class LayerOutput:
    """What a layer gave in a forward pass.

    Args:
        name: With dots, from the model on.
        layer: The layer.
        output: Whatever its ``forward`` returned.
    """

    name: str
    layer: nn.Module
    output: Any

    def describe(self) -> str:
        """Say what the output is: a shape, or what stands in the place of one."""
        if isinstance(self.output, Tensor):
            return str(tuple(self.output.shape))
        if isinstance(self.output, tuple | list):
            return f'{len(self.output)} results'
        return type(self.output).__name__


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Find a layer by its name.

    Args:
        model: Where to look.
        name: With dots, as ``model.named_modules()`` has it, such as 'backbone.stages.3'.

    Raises:
        LayerError: If there is none of this name; the message lists names that exist, close ones
            first.

    Example:
        >>> find_layer(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1)), '1')
        Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
        >>> find_layer(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1)), '2')
        Traceback (most recent call last):
            ...
        spartan_mm.analysis.look_inside.layers.LayerError: Sequential has no layer '2'; it has: 0, 1
    """
    layers = {known: layer for known, layer in model.named_modules() if known}
    if name in layers:
        return layers[name]
    close = difflib.get_close_matches(name, layers, _MAX_LISTED // 2, 0.5)
    # Of the others, those that hold the most come first.
    others = sorted((other for other in layers if other not in close),
                    key=lambda other: other.count('.'))
    listed = [*close, *others][:_MAX_LISTED]
    left = len(layers) - len(listed)
    more = f', and {left} more' if left else ''
    raise LayerError(f'{type(model).__name__} has no layer {name!r}; it has: '
                     f'{", ".join(listed) or "none at all"}{more}')


@contextmanager
def recorded_outputs(model: nn.Module, within: nn.Module | None = None
                     ) -> Iterator[list[LayerOutput]]:
    """Collect what the layers give while the block runs the model.

    Args:
        model: What the names start from.
        within: The part of it whose layers count, itself left out; None for all.

    Yields:
        The list that is filled in the order in which the layers finish: a block comes after its
        parts. A layer that runs twice is in it twice; one whose weights alone are used is not.
    """
    names = {layer: name for name, layer in model.named_modules()}
    outputs: list[LayerOutput] = []

    def record(layer: nn.Module, _: Any, output: Any) -> None:
        outputs.append(LayerOutput(names[layer], layer, output))

    root = model if within is None else within
    handles = [layer.register_forward_hook(record) for layer in root.modules() if layer is not root]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def describe_layers(model: nn.Module, shape: tuple[int, int]) -> list[str]:
    """Say of each layer that runs what it gives for an image.

    Args:
        model: A detector, a classifier or a backbone.
        shape: Height and width of the image.

    Returns:
        A line for each layer with its name, its type and the shapes that it gives, one for each
        time that it runs; a block comes before its parts.
    """
    parameter = next(model.parameters())
    with torch.no_grad(), recorded_outputs(model) as outputs:
        model(parameter.new_zeros(1, 3, *shape))
    described: dict[str, list[str]] = {}
    for item in outputs:
        described.setdefault(item.name, []).append(item.describe())
    width = max(map(len, described), default=0)
    return [f'{name:<{width}}  {type(layer).__name__}  {", ".join(described[name])}'
            for name, layer in model.named_modules() if name in described]


def find_last_map(model: nn.Module, run: Callable[[], Tensor | None], size: tuple[int, int],
                  within: nn.Module | None = None) -> str:
    """Find the layer of the last map in a forward pass: the last stage of a backbone.

    Args:
        model: What the name starts from.
        run: Runs the model. If it returns a number, a layer that has a say in it is preferred,
            which the patches that leave a transformer that is read by its class token have not.
        size: Height and width of the input.
        within: The part of the model to look in; None for all of it.

    Returns:
        The name, see :func:`find_layer`.

    Raises:
        LayerError: No layer gives a map of more than one position.
    """
    with recorded_outputs(model, within) as outputs:
        target = run()
    maps: list[LayerOutput] = []
    for item in reversed(outputs):
        # The parts of a stage stand for less than the stage.
        if any(item.name.startswith(f'{other.name}.') for other in maps):
            continue
        try:
            if as_map(item.output, size).shape[2:].numel() > 1:
                maps.append(item)
        except LayerError:
            continue
    if not maps:
        part = model if within is None else within
        raise LayerError(f'no layer of {type(part).__name__} gives a map; name one')
    if target is None or not target.requires_grad:
        return maps[0].name
    gradients = torch.autograd.grad(target, [item.output for item in maps], allow_unused=True)
    return next((item.name for item, gradient in zip(maps, gradients, strict=True)
                 if gradient is not None and as_map(gradient, size).any()), maps[0].name)


def as_map(output: Any, size: tuple[int, int]) -> Tensor:
    """Read the output of a layer as a map.

    Tokens are taken for a grid in the proportions of the input, after up to five others, such as a
    class token. Maps with the channels last are told by the proportions, too.

    Args:
        output: (N, C, H', W'), (N, H', W', C) or (N, L, C).
        size: Height and width of the input.

    Returns:
        (N, C, H', W').

    Raises:
        LayerError: It is no map.

    Example:
        >>> as_map(torch.rand(1, 197, 384), (224, 224)).shape
        torch.Size([1, 384, 14, 14])
    """
    if not isinstance(output, Tensor):
        what = (f'{len(output)} results in a {type(output).__name__}'
                if isinstance(output, tuple | list) else f'a {type(output).__name__}')
        raise LayerError(f'it gives {what} instead of one map; name a layer inside of it')
    if output.dim() == 4:
        channels_last = not _fits(*output.shape[2:], size) and _fits(*output.shape[1:3], size)
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.dim() == 3:
        for extra in range(_MAX_EXTRA_TOKENS + 1):
            count = output.shape[1] - extra
            height = round((max(count, 0) * size[0] / size[1]) ** 0.5)
            if height and count % height == 0 and _fits(height, count // height, size):
                # (N, L, C) -> (N, C, H', W')
                return output[:, extra:].transpose(1, 2).unflatten(2, (height, -1))
    raise LayerError(f'it gives a tensor of shape {tuple(output.shape)}, which is no map of an '
                     f'input of {size[0]} x {size[1]} pixels')


def _fits(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether a map has the proportions of the input, but for rounding."""
    return abs(width - size[1] * height / size[0]) < 1
