"""The layers of a model by name: finding one, seeing what each gives, reading that as a map."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError

# How many names a message holds.
_MAX_LISTED = 12

# A class token, a distillation token or four registers before the tokens of the patches.
_MAX_EXTRA_TOKENS = 5

#: What is wrong with a layer that a forward pass does not run.
NOT_ON_ITS_OWN = ('does not run on its own, what is around it uses its weights or leaves it out; '
                  'name a layer around it or beside it')


class LayerError(UsageError):
    """A layer that does not exist or cannot be looked at."""


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Find a layer by its name, with dots, such as 'backbone.stages.3'.

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
    raise LayerError(f'{type(model).__name__} has no layer {name!r}; it has: '
                     f'{", ".join(listed) or "none at all"}{f", and {left} more" if left else ""}')


@contextmanager
def _recorded_outputs(model: nn.Module, prefix: str = '') -> Iterator[list[tuple[str, Any]]]:
    """Collect name and output of each layer of a model, itself left out, while the block runs it.

    A block comes after its parts. A layer that runs twice is there twice; one whose weights alone
    are used is not.
    """
    outputs: list[tuple[str, Any]] = []

    def record(name: str, _: nn.Module, __: Any, output: Any) -> None:
        outputs.append((name, output))

    with ExitStack() as hooks:
        for name, layer in model.named_modules(prefix=prefix):
            if layer is not model:
                hooks.enter_context(layer.register_forward_hook(partial(record, name)))
        yield outputs


def describe_layers(model: nn.Module, shape: tuple[int, int]) -> list[str]:
    """Say of each layer that runs what it gives for an image of a height and a width.

    Returns:
        A line for each layer with its name, its type and the shapes that it gives, one for each
        time that it runs; a block comes before its parts.
    """
    parameter = next(model.parameters())
    with torch.no_grad(), _recorded_outputs(model) as outputs:
        model(parameter.new_zeros(1, 3, *shape))
    described: dict[str, list[str]] = {}
    for name, output in outputs:
        described.setdefault(name, []).append(_describe(output))
    width = max(map(len, described), default=0)
    return [f'{name:<{width}}  {type(layer).__name__}  {", ".join(described[name])}'
            for name, layer in model.named_modules() if name in described]


def find_last_map(model: nn.Module, run: Callable[[], Any], size: tuple[int, int]) -> str:
    """Find the layer of the last map in a forward pass: the last stage of a backbone.

    Args:
        model: A backbone, or a model with one.
        run: Runs it. If it returns a number with a gradient, a layer that has a say in it is
            preferred, which the patches that leave a transformer that is read by its class token
            have not.
        size: Height and width of the input.

    Returns:
        The name, see :func:`find_layer`.

    Raises:
        LayerError: No layer gives a map of more than one position.
    """
    backbone = getattr(model, 'backbone', model)
    with _recorded_outputs(backbone, '' if backbone is model else 'backbone') as outputs:
        target = run()
    maps: dict[str, Tensor] = {}
    for name, output in reversed(outputs):
        # The parts of a stage stand for less than the stage.
        if not any(name.startswith(f'{other}.') for other in maps):
            with suppress(LayerError):
                if as_map(output, size).shape[2:].numel() > 1:
                    maps.setdefault(name, output)
    if not maps:
        raise LayerError(f'no layer of {type(backbone).__name__} gives a map; name one')
    names = [*maps]
    if not getattr(target, 'requires_grad', False):
        return names[0]
    gradients = torch.autograd.grad(target, [*maps.values()], allow_unused=True)
    return next((name for name, gradient in zip(names, gradients, strict=True)
                 if gradient is not None and as_map(gradient, size).any()), names[0])


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
        raise LayerError(f'it gives {_describe(output)} instead of one map; name a layer inside of '
                         'it')
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
    raise LayerError(f'it gives a tensor of shape {_describe(output)}, which is no map of an '
                     f'input of {size[0]} x {size[1]} pixels')


def _fits(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether a map has the proportions of the input, but for rounding."""
    return abs(width - size[1] * height / size[0]) < 1


def _describe(output: Any) -> str:
    """Say what a layer gave: a shape, or what stands in the place of one."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    many = f'{len(output)} results in a' if isinstance(output, tuple | list) else 'a'
    return f'{many} {type(output).__name__}'
