"""What a config's test pipeline does to images, as a rule that ``runtime.py`` follows."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from ..datasets.images import decoding_of
from ..errors import UsageError
from ..runtime import with_size
from ..weights.stored_config import find_test_dataset

# What leaves pixels as they are.
_HARMLESS = ('LoadAnnotations', 'PackDetInputs', 'PackInputs')

# The steps of mmcv, mmdet and mmpretrain that stretch an image, and the backend that is theirs.
_STRETCHES = {'Resize': 'cv2', 'FixScaleResize': 'cv2', 'FixShapeResize': 'cv2',
              'AntialiasedResize': 'pillow'}

# Whether a backend smooths before it shrinks; so does torchvision, unless told otherwise.
_ANTIALIAS = {'cv2': False, 'pillow': True}


class _UnknownError(Exception):
    """Why a step is beyond the rule."""


def describe_resize(cfg: Config, size: Sequence[int] | None = None) -> dict[str, Any]:
    """Describe how a config's test pipeline reads and resizes images.

    Args:
        cfg: The config.
        size: Height and width of the model's images, if they are to be other than the pipeline's.

    Returns:
        A dict fit for JSON:

        - ``rule``: 'stretch' to ``size``, height and width; or 'shorter side', which becomes
          ``size`` pixels long.
        - ``crop``: height and width of the centre that is cut out then; None for all.
        - ``interpolation``: 'nearest', 'bilinear' or 'bicubic'.
        - ``antialias``: True for Pillow's kernels, which smooth when an image shrinks, False for
          OpenCV's, which don't.
        - ``upright``: Whether images are turned as their EXIF orientation says.

    Raises:
        UsageError: The pipeline does something else to pixels.
    """
    loader, *steps = find_test_dataset(cfg).get('pipeline') or [{}]
    rule: dict[str, Any] = {}
    name = 'the pipeline'
    try:
        flag = decoding_of(loader)['flag'] if isinstance(loader, Mapping) else loader
        if flag not in ('color', 'color_ignore_orientation') or not loader:
            raise _UnknownError('it does not begin with LoadImageFromFile of coloured images')
        for name, step in _list_steps(steps):
            if name.startswith('CenterCrop'):
                rule['crop'] = _describe_crop(step, rule)
                continue
            resizing = _describe_step(name, step)
            if rule:
                raise _UnknownError('it follows another step that resizes')
            rule = resizing
        name = 'the pipeline'
        if 'rule' not in rule:
            raise _UnknownError('nothing in it resizes images')
        if loader.get('to_float32') and rule['interpolation'] == 'bicubic':
            raise _UnknownError('bicubic interpolation of floats (to_float32) leaves 0 to 255')
    except _UnknownError as error:
        raise UsageError(f'{name} of test_dataloader is beyond what runtime.py does: {error}. '
                         '--raw with --size exports without a rule for images') from None
    rule['upright'] = flag == 'color'
    return rule if size is None else with_size(rule, size)


def _list_steps(steps: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List the steps that change pixels, by name; those of torchvision have it behind theirs."""
    for step in steps:
        kind = step.get('type') if isinstance(step, Mapping) else step
        name = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
        if name == 'TorchvisionTransforms':
            yield from ((f'{each["type"]} of {name}', each) for each in step['transforms'])
        elif name not in _HARMLESS:
            yield name, step


def _describe_step(name: str, step: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a step that resizes."""
    interpolation = step.get('interpolation', 'bilinear')
    if name == 'Resize of TorchvisionTransforms':
        if step.get('max_size') is not None:
            raise _UnknownError('it limits the longer side (max_size)')
        size, antialias = step['size'], step.get('antialias', True)
        shape = [size] if isinstance(size, int) else [*size]
        rule = (dict(rule='shorter side', size=shape[0]) if len(shape) == 1
                else dict(rule='stretch', size=shape))
        if interpolation == 'nearest' or interpolation == 'bicubic' and not antialias:
            raise _UnknownError(f"torchvision's {interpolation} kernel without antialias is "
                                "neither Pillow's nor OpenCV's")
    elif name == 'ResizeEdge' or name in _STRETCHES:
        backend = step.get('backend', _STRETCHES.get(name, 'cv2'))
        if backend not in _ANTIALIAS:
            raise _UnknownError(f'its backend is {backend!r}, not cv2 or pillow')
        antialias = _ANTIALIAS[backend]
        if step.get('keep_ratio'):
            raise _UnknownError('it keeps the ratio of the sides (keep_ratio), so that images '
                                'differ in size')
        if name == 'ResizeEdge':
            if step.get('edge', 'short') != 'short':
                raise _UnknownError('it resizes another side than the shorter one')
            rule = dict(rule='shorter side', size=step['scale'])
        else:
            scale = ((step['width'], step['height']) if name == 'FixShapeResize'
                     else step.get('scale'))
            if scale is None:
                raise _UnknownError('it resizes by a factor (scale_factor), so that images differ '
                                    'in size')
            rule = dict(rule='stretch', size=_height_and_width(scale))
    else:
        raise _UnknownError('it is no step that is known')
    if interpolation not in ('nearest', 'bilinear', 'bicubic'):
        raise _UnknownError(f'its interpolation is {interpolation!r}, not nearest, bilinear or '
                            'bicubic')
    return dict(rule, crop=None, interpolation=interpolation, antialias=antialias)


def _describe_crop(step: Mapping[str, Any], rule: Mapping[str, Any]) -> list[int]:
    """Describe the crop of the centre of what a rule gave."""
    if rule.get('crop', 'nothing') is not None:
        raise _UnknownError('it does not follow the one step that resizes')
    crop = (_height_and_width(step['crop_size']) if 'crop_size' in step
            else _height_and_width(step['size'])[::-1])
    sides = rule['size'] if rule['rule'] == 'stretch' else [rule['size']] * 2
    if any(part > whole for part, whole in zip(crop, sides, strict=True)):
        raise _UnknownError('it cuts out more than there is, and pads')
    return crop


def _height_and_width(scale: int | Sequence[int]) -> list[int]:
    """Turn mmcv's width and height around; a number stands for both."""
    return [scale] * 2 if isinstance(scale, int) else [*scale][::-1]
