"""Image files that may be broken: decoding them, and going on without them in training."""

import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image, ImageOps

from ..errors import InputError
from ..runtime import FORMATS, MAX_PIXELS, MAX_PIXELS_VARIABLE, any_size, take_array
from .data_errors import DataError, MissingDataError, UndecodableError, show

# Also what else OpenCV reads, so that its size is looked at. No decoder of these starts programs.
_FORMATS = (*FORMATS, 'DIB', 'GIF', 'JPEG2000', 'PPM', 'SUN')

#: What to do about images that do not exist.
MISSING_REMEDY = ('check `data_root` and `data_prefix` (or `split`) of the dataset in the config, '
                  'and the names in its annotation file or list.')


def describe_image(info: dict, classes: Sequence[str] = ()) -> str:
    """Name an image by its path and, where they are known, its id and file, or its class."""
    described = f'image {info["img_path"]!r}'
    label = info.get('gt_label')
    if 'img_id' in info:
        described += f' (image id {info["img_id"]!r}'
        described += f' of {info["ann_file"]})' if 'ann_file' in info else ')'
    elif isinstance(label, int):
        name = f', {classes[label]}' if 0 <= label < len(classes) else ''
        described += f' (class {label}{name})'
    return described


def hint_at_name(paths: Iterable[str]) -> str:
    """Say what is strange about the names of images that do not exist; '' if nothing is."""
    for path in paths:
        if '\\' in path or re.search(r'(^|/)[A-Za-z]:/', path):
            return (f' {show(path)} is written as on Windows: separate folders by / and not by \\, '
                    'and leave out drives, in the annotation file or list.')
        parts = path.split('/')
        for top in ('/'.join(parts[:2]), '/'.join(parts[:3])) if path.startswith('/') else ():
            if top != path and not os.path.isdir(top):
                return (f' {show(path)} begins at {top}, which this machine does not have: is it '
                        'the path of another one?')
    return ''


def find_max_pixels() -> int:
    """Say how many pixels an image may have; a small file may claim to hold any number of them.

    Raises:
        DataError: The environment says something else than a number.
    """
    value = os.environ.get(MAX_PIXELS_VARIABLE) or str(MAX_PIXELS)
    if not value.isdecimal() or int(value) < 1:
        raise DataError(f'{MAX_PIXELS_VARIABLE}={value} must be a whole number from 1 on.')
    return int(value)


@contextmanager
def open_picture(content: bytes) -> Iterator[Image.Image | None]:
    """Open an image with Pillow, without decoding it, unless it is too large.

    NOTE: Pillow's own limit, which nobody can raise without touching the program, is off inside.
    OpenCV, which reads some formats that Pillow does not know, has one of 2^30 pixels.

    Args:
        content: What the file holds.

    Yields:
        The image; None if Pillow cannot read it.

    Raises:
        UndecodableError: It has more pixels than :func:`find_max_pixels` says.
    """
    with any_size():
        try:
            picture = Image.open(io.BytesIO(content), formats=_FORMATS)
        except Exception:  # Pillow has many; OpenCV may take what it refuses
            picture = None
        width, height = picture.size if picture else (0, 0)
        most = find_max_pixels()
        if width * height > most:
            raise UndecodableError(
                f'it is {width}x{height} pixels, {width * height:,} in all, and no more than '
                f'{most:,} are read; if it is what it should be, set '
                f'{MAX_PIXELS_VARIABLE}={width * height} in the environment')
        yield picture


def decode_image(content: bytes, flag: str = 'color', backend: str | None = None) -> np.ndarray:
    """Decode an image as mmcv does, whatever kind of picture it is.

    In colour, every kind becomes 8-bit BGR: grey and palette images are expanded, 16 bits are
    scaled to 8, and transparency is left out: what lies under it shows. The image is turned as its
    EXIF orientation says, unless the flag ends in 'ignore_orientation'.

    NOTE: mmcv's 'pillow' backend clips 16-bit grey to 255, which leaves a white picture; OpenCV
    decodes it here.

    Args:
        content: What the file holds.
        flag: mmcv's, such as 'color' or 'color_ignore_orientation'.
        backend: mmcv's, such as 'cv2' or 'pillow'; None for the one mmcv is set to.

    Returns:
        The image, (H, W, 3) unless the flag says otherwise.

    Raises:
        UndecodableError: There is no image in it, or a damaged one; the message is the reason.
    """
    if not content:
        raise UndecodableError('the file is empty')
    try:
        with open_picture(content) as picture:
            # Pillow's own reading of 16 bits; of a kind that it doesn't know, OpenCV may.
            deep = picture is not None and picture.mode.startswith('I')
            if picture is None and (backend or mmcv.image.io.imread_backend) == 'pillow':
                image = None
            else:
                image = mmcv.imfrombytes(content, flag=flag, backend=(
                    'cv2' if deep and backend == 'pillow' else backend))
    except DataError:
        raise
    except Exception as error:  # each decoder has exceptions of its own
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise UndecodableError(reason) from error
    if image is None:
        raise UndecodableError('it is of no known image format, or damaged')
    return image


def decoding_of(loader: Mapping[str, Any]) -> dict[str, Any]:
    """Find how a pipeline's first step, which loads images, decodes them, for `decode_image`."""
    return dict(flag=loader.get('color_type', 'color'), backend=loader.get('imdecode_backend'))


def take_image(value: Any, flag: str = 'color', backend: str | None = None) -> np.ndarray:
    """Make an image of what people have: a file's path or content, a Pillow image, an array.

    Arrays are in BGR order, as OpenCV reads them. Grey becomes colour, and alpha is left out. Whole
    numbers of 16 bits are scaled to 8, as in files; numbers from 0 to 255 may be of any type.

    Args:
        value: The path or the content of a file; a Pillow image; or an array, (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4).
        flag: mmcv's, see :func:`decode_image`.
        backend: mmcv's, see :func:`decode_image`.

    Returns:
        The image, (H, W, 3) uint8 in BGR order; of a file as the flag says.

    Raises:
        InputError: It is none of these, cannot be read, or leaves open what its numbers mean.
    """
    name = f'the {type(value).__name__}'
    if isinstance(value, str | os.PathLike):
        name = str(value)
        if '://' in name:
            raise InputError(f'{name} is a URL: download it, and name the file')
        if os.path.exists(name) and not os.path.isfile(name):
            raise InputError(f'{name} is no file')
    try:
        if isinstance(value, str | os.PathLike):
            value = Path(value).read_bytes()
        if isinstance(value, bytes | bytearray | memoryview):
            return decode_image(bytes(value), flag, backend)
        if isinstance(value, Image.Image):
            image = value if 'ignore_orientation' in flag else ImageOps.exif_transpose(value)
            # What Pillow would clip to 8 bits goes the way of arrays.
            value = (np.asarray(image) if image.mode.startswith(('I', 'F'))
                     else np.asarray(image.convert('RGB'))[..., ::-1])
    except UndecodableError as error:
        raise InputError(f'{name} cannot be decoded as an image: {error}') from error
    except (OSError, ValueError) as error:
        raise InputError(f'{name} cannot be read: {getattr(error, "strerror", None) or error}'
                         ) from error
    if not isinstance(value, np.ndarray):
        raise InputError(f'{name} is no image: give the path or the content of a file, a Pillow '
                         'image or an array')
    return take_array(value)


def list_images(images: Any) -> list[Any]:
    """List what was given as images, one or many, for :func:`take_image`."""
    alone = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    if isinstance(images, alone) or isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, Mapping | torch.Tensor):
        return [images]  # which is refused where it is taken
    return list(images)


def load_image(path: str, described: str, remedy: str, flag: str = 'color',
               backend: str | None = None, annotated_size: tuple[int, int] | None = None,
               backend_args: dict | None = None) -> np.ndarray:
    """Load an image, or say in one sentence why not.

    Args:
        path: Where it is.
        described: What to call it in messages.
        remedy: What to check if it does not exist.
        flag: mmcv's, see :func:`decode_image`.
        backend: mmcv's, see :func:`decode_image`.
        annotated_size: The width and height that it must have, if they are known.
        backend_args: mmengine's, of the storage.

    Returns:
        The image, (H, W, 3) unless the flag says otherwise.

    Raises:
        MissingDataError: There is no such file.
        UndecodableError: It cannot be read or decoded.
        DataError: It has another size than annotated.
    """
    try:
        content = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        raise MissingDataError(f'The {described} does not exist: {remedy}{hint_at_name([path])}'
                               ) from None
    except OSError as error:
        raise UndecodableError(
            f'The {described} cannot be read: {error.strerror or error}.') from error
    try:
        image = decode_image(content, flag, backend)
    except UndecodableError as error:
        raise UndecodableError(f'The {described} cannot be decoded: {error}.') from error

    size = image.shape[1::-1]
    if annotated_size is not None and size != tuple(annotated_size):
        raise DataError(
            f'The {described} is {size[0]}x{size[1]} pixels, but annotated as '
            f'{annotated_size[0]}x{annotated_size[1]}. If the two are swapped, the file carries an '
            'EXIF orientation; to ignore it, set the color_type of the transform to '
            "'color_ignore_orientation'.")
    return image


def image_of_bytes(results: dict, transform: str, channels: int | None = None) -> np.ndarray:
    """Take the image of a pipeline's results, if it is what a transform can work on.

    Args:
        results: ``img`` is the image.
        transform: What to call the transform in the message.
        channels: The number of channels that it needs; None for any.

    Raises:
        TypeError: The image is not (H, W, channels) uint8.
    """
    image = results['img']
    if image.dtype != np.uint8 or image.ndim != 3 or channels not in (None, image.shape[2]):
        raise TypeError(
            f'{transform} needs a (H, W, {channels or "C"}) uint8 image, but '
            f'{results.get("img_path", "the image")} is {image.shape} {image.dtype}: put it before '
            'every transform that makes floats, and load with `to_float32=False` and '
            '`color_type="color"`.')
    return image


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """Load an image, or say which one is missing, broken or of another size than annotated.

    NOTE: mmcv's ``LoadImageFromFile`` lets the error of the file system or of the decoder through,
    and does not compare sizes: boxes then fall beside their objects, silently.

    Args:
        check_size: Compare with ``height`` and ``width`` of the annotation, where there are any.
        kwargs: Arguments of mmcv's ``LoadImageFromFile``, ``ignore_empty`` apart.
    """

    def __init__(self, check_size: bool = True, **kwargs: Any) -> None:
        if kwargs.pop('ignore_empty', False):
            raise ValueError(
                'LoadCheckedImage does not pass over images (`ignore_empty`): correct the '
                'annotation file.')
        super().__init__(**kwargs)
        self.check_size = check_size

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']`` into ``results['img']``, (H, W, 3) BGR.

        Raises:
            FileNotFoundError: There is no such file.
            UndecodableError: It cannot be read or decoded.
            DataError: It has not the annotated size.
        """
        size = (results.get('width'), results.get('height'))
        image = load_image(
            results['img_path'], describe_image(results), MISSING_REMEDY, self.color_type,
            self.imdecode_backend, size if self.check_size and None not in size else None,
            self.backend_args)
        if self.to_float32:
            image = image.astype(np.float32)

        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{super().__repr__()[:-1]}, check_size={self.check_size})'


def with_checked_loader(pipeline: Sequence) -> list:
    """Let a pipeline load images by :class:`LoadCheckedImage` in place of mmcv's loader.

    NOTE: the config keeps mmcv's name, which the toolboxes' inferencers look for.
    """
    return [dict(step, type='LoadCheckedImage')
            if isinstance(step, Mapping) and step.get('type') == 'LoadImageFromFile' else step
            for step in pipeline]


class BadImages:
    """What a dataset does about images that cannot be decoded.

    The count is shared by the workers of a data loader, each of which has a copy of the dataset.

    Args:
        action: 'stop' to raise, 'replace' to take another image of the dataset and warn. Which one
            depends on nothing but the index of the bad one, so a run can be repeated.
        max_share: The share of the dataset's images that may be bad before 'replace' raises, too;
            from 0 to 1. One is always allowed.

    Raises:
        ValueError: An argument has another value.
    """

    def __init__(self, action: str, max_share: float) -> None:
        if action not in ('stop', 'replace'):
            raise ValueError(f"bad_images={action!r} must be 'stop' or 'replace'.")
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_bad_images={max_share!r} must be a share, from 0 to 1.')
        self.action = action
        self.max_share = max_share
        self._seen: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of different bad images that were met, by all workers together."""
        return 0 if self._seen is None else int(self._seen.sum())

    def share(self, total: int) -> None:
        """Prepare to count among so many images, before there are workers."""
        if self.action == 'replace':
            self._seen = torch.zeros(total, dtype=torch.uint8).share_memory_()

    def fetch(self, prepare: Callable[[int], Any], index: int, total: int) -> Any:
        """Prepare an image, or another one in its place.

        Args:
            prepare: Prepares the image of an index.
            index: Which image is wanted; negative ones count from the end.
            total: Number of images.

        Raises:
            UndecodableError: It cannot be decoded, and the action is 'stop'.
            DataError: Too many cannot.
        """
        if self.action == 'stop':
            return prepare(index)
        if self._seen is None:
            self.share(total)
        others = np.random.default_rng(index % total)
        wanted = index
        while True:
            try:
                return prepare(wanted)
            except UndecodableError as error:
                self._note(wanted % total, total, error)
            wanted = int(others.integers(total))

    def _note(self, index: int, total: int, error: UndecodableError) -> None:
        """Count a bad image and warn of it, the first time that it is met."""
        if self._seen[index]:
            return
        self._seen[index] = 1
        count, limit = self.count, max(1, int(self.max_share * total))
        if count > limit:
            raise DataError(
                f'{count} of {total} images cannot be decoded, and no more than {limit} may be '
                f'replaced (max_bad_images={self.max_share:g} of the dataset); the last one: '
                f'{error}') from error
        print_log(f'{error} Another image takes its place. That makes {count} of {total} images; '
                  f'training stops at more than {limit}.', 'current', logging.WARNING)
