"""What a neck gets of a backbone, looked at before it costs a run."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..text import count, first_line


def describe(backbone: nn.Module) -> str:
    """Name a backbone, and what it wraps of another library."""
    wrapped = getattr(backbone, 'model_name', None)
    return type(backbone).__name__ + (f' {wrapped}' if isinstance(wrapped, str) else '')


def check_strides(backbone: nn.Module) -> None:
    """Check that maps are a pyramid, if the backbone publishes `out_channels` and `strides`.

    Raises:
        ValueError: The finest map is coarser than stride 8 (but for strides 16, 32 alone), or
            another one has not twice the stride of the one before it.
    """
    strides, channels = (getattr(backbone, key, None) for key in ('strides', 'out_channels'))
    # Of mmdet's ResNet, strides are those of its stages, and there are no out_channels.
    if not all(isinstance(each, list | tuple) for each in (strides, channels)):
        return
    remedy = 'choose other out_indices, or a backbone that has such maps'
    written = ', '.join(map(str, strides))
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:], strict=False)):
        raise ValueError(f'the maps of {describe(backbone)} have strides {written}, and are no '
                         'pyramid, in which each has twice the stride of the one before, such as '
                         f'8, 16, 32: {remedy}')
    # NOTE: Two maps from stride 16 on are D-FINE-N's, which trades small objects for speed.
    if strides and strides[0] > 8 and tuple(strides) != (16, 32):
        raise ValueError(f'the finest map of {describe(backbone)} has stride {strides[0]} (of '
                         f'{written}), too coarse for small objects: the first has to have stride '
                         f'8 or less, as in 8, 16, 32; {remedy}')


def check_maps(maps: Any, neck: nn.Module, name: str) -> None:
    """Check that maps are what a neck takes.

    Args:
        maps: What a backbone gave.
        neck: Its `in_channels` are the channels of as many maps. If it has `needs_pyramid`, each
            map has to be larger than the next.
        name: What to call the backbone.

    Raises:
        ValueError: They are not, or are no maps.
    """
    if not isinstance(maps, list | tuple):
        raise ValueError(f'{name} gives {_describe(maps)}, and a neck takes a tuple of maps (N, C, '
                         'H, W): set its out_indices')
    if wrong := [each for each in maps if not isinstance(each, Tensor) or each.ndim != 4]:
        raise ValueError(f'{name} gives {_describe(wrong[0])}, and a neck takes maps (N, C, H, W), '
                         'no vectors or sequences of tokens: set its out_type, if it has one, or '
                         'choose another backbone')
    if len(maps) != len(neck.in_channels):
        raise ValueError(f'{name} gives {count(len(maps), "map")}, and the neck takes '
                         f"{len(neck.in_channels)}: set the backbone's out_indices, or "
                         'neck.in_channels')
    channels = tuple(each.shape[1] for each in maps)
    if channels != tuple(neck.in_channels):
        raise ValueError(f'the maps of {name} have channels {channels}, and the neck has '
                         f'in_channels={tuple(neck.in_channels)}: set neck.in_channels, or the '
                         "backbone's out_indices")
    sizes = [tuple(each.shape[2:]) for each in maps]
    if getattr(neck, 'needs_pyramid', False) and any(
            1 < fine <= coarse for pair in zip(sizes, sizes[1:], strict=False)
            for fine, coarse in zip(*pair, strict=True)):
        written = ', '.join(f'{height}x{width}' for height, width in sizes)
        raise ValueError(f'the maps of {name} are {written}, and the neck takes a pyramid, each '
                         "larger than the next: set the backbone's out_indices, or choose another "
                         'backbone')


def probe(backbone: nn.Module, neck: nn.Module, size: tuple[int, int, int]) -> None:
    """Run a backbone on a black image, which changes nothing of it, and look at its maps.

    Args:
        backbone: The backbone.
        neck: See :func:`check_maps`.
        size: Channels, height and width of the image.

    Raises:
        UsageError: The backbone fails, or does not give what the neck takes.
    """
    first = next(backbone.parameters(), torch.zeros(()))
    image = torch.zeros(1, *size, dtype=first.dtype, device=first.device)
    training = [module for module in backbone.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            # Not by calling it: a compiled one would be compiled once more for this.
            check_maps(backbone.forward(image), neck, describe(backbone))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any library
        raise UsageError(_explain(error, backbone, size)) from error
    finally:
        for module in training:
            module.training = True


def refuse_size(name: str, size: Sequence[int], error: BaseException) -> str:
    """Say that a backbone does not run on images of a size, and what to do."""
    height, width = size
    reason = first_line(error).rstrip('.')
    return (f'{name} does not take images of {height}x{width} pixels: {reason}; if it has these '
            f'arguments, give it img_size=({height}, {width}), or strict_img_size=False; else '
            'resize images to what it takes')


def _explain(error: Exception, backbone: nn.Module, size: Sequence[int]) -> str:
    if isinstance(error, ValueError):
        return first_line(error)
    name, (channels, *sides) = describe(backbone), size
    stem = next((each for each in backbone.modules() if isinstance(each, nn.Conv2d)), None)
    if stem is not None and stem.in_channels != channels:
        return (f'{name} takes images of {count(stem.in_channels, "channel")}, and gets '
                f'{channels}: set its in_channels={channels} (in_chans of timm)')
    return refuse_size(name, sides, error)


def _describe(value: Any) -> str:
    return (f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor)
            else f'a {type(value).__name__}')
