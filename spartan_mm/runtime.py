"""Runs exported detectors and classifiers without torch: images in, boxes or classes out.

    python runtime.py model.onnx photos/ --out-dir outputs

This file is all that is needed: copy it where it is to run. Beside Python 3.10 it takes numpy,
Pillow 10.1, and onnxruntime for a model.onnx, openvino for a model.xml (with its model.bin) or
ai-edge-litert for a model.tflite (with its model.tflite.json); videos and cameras take
opencv-python, too.

    from runtime import Runtime

    runtime = Runtime('model.onnx')
    for found in runtime(['a.jpg', 'b.jpg'], batch_size=2):
        print(found.above(0.3).as_records())

What it knows of a model (task, classes, size, how images are resized) stands in the file, where
``spartan-mm export`` wrote it. Images reach the model as in training, to a grey level.
"""
import argparse
import colorsys
import glob
import io
import itertools
import json
import math
import os
import re
import secrets
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

#: The newest format of the metadata that is read here.
FORMAT = 1

#: Of the files that it runs.
SUFFIXES = ('.onnx', '.xml', '.tflite')

#: What Pillow calls the formats that are read, and no others: some decoders start programs.
FORMATS = ('BMP', 'JPEG', 'PNG', 'TIFF', 'WEBP')

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')

#: What a video may come over.
STREAMS = ('http', 'https', 'rtmp', 'rtsp', 'rtsps', 'srt', 'tcp', 'udp')

#: How often a camera or a stream that breaks off is opened again; the seconds before the first
#: time, which double.
TRIES, PAUSE = 5, 1.

#: How many pixels an image may have, unless this variable of the environment says otherwise.
MAX_PIXELS, MAX_PIXELS_VARIABLE = 200_000_000, 'SPARTAN_MM_MAX_PIXELS'

# Control characters, line ends, what turns the direction of writing, and bytes that are no UTF-8.
_UNPRINTABLE = re.compile(
    r'[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')

#: Of how many sizes of batches OpenVINO keeps what it compiled.
MAX_BATCHES = 4

#: What a file may be exported in; and what OpenVINO is to compute in, where it may choose.
PRECISIONS = {'fp32': 'f32', 'fp16': 'f16', 'bf16': 'bf16', 'int8': 'f32'}


class ExplainedError(Exception):
    """What is wrong with what was given, and what to do; the base of such errors.

    Its message is one line, whatever the names in it are; further arguments are lines below.
    """

    def __str__(self) -> str:
        return '\n  '.join(map(printable, self.args))


class RuntimeFileError(ExplainedError, ValueError):
    """A file, an argument or a machine that is not what it takes."""


class InputError(RuntimeFileError):
    """An image, a folder, a video or a config that nothing can be found in or with."""


def printable(text: Any) -> str:
    r"""Write what would steer a terminal, forge a line or break an encoding as an escape sequence.

    Example:
        >>> print(printable('cat\nerror: \x1b[2J.png'))
        cat\nerror: \x1b[2J.png
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode('unicode_escape').decode(), str(text))


def gist(error: BaseException) -> str:
    """Say what an error says first, or its kind if it says nothing."""
    reason = getattr(error, 'strerror', None) or str(error).strip() or type(error).__name__
    lines = reason.splitlines()
    # OpenVINO begins with where in its own code.
    return printable(next((line for line in lines if not line.startswith('Exception from')),
                          lines[0]))


@cache
def note(text: str) -> None:
    """Say something on the screen, once."""
    print(f'note: {text}', file=sys.stderr)


# --- Images ---------------------------------------------------------------------------------------


def read_image(value: Any, upright: bool = True) -> Image.Image:
    """Read an image in colour, whatever kind it is.

    Grey and palettes become colour, 16 bits are scaled to 8, alpha is left out: what lies under it
    shows.

    Args:
        value: The path or the content of a file; a Pillow image; or an array of numbers from 0 to
            255, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), in BGR order as OpenCV reads.
        upright: Whether to turn it as its EXIF orientation says.

    Raises:
        InputError: It is none of these, or cannot be read.
    """
    name = f'the {type(value).__name__}'
    try:
        if isinstance(value, str | os.PathLike):
            name = str(value)
            if '://' in name:
                raise InputError(f'{name} is a URL: download it, and name the file')
            if os.path.exists(name) and not os.path.isfile(name):
                raise InputError(f'{name} is no file')
            value = Path(value).read_bytes()
        if isinstance(value, bytes | bytearray | memoryview):
            value = _decode(bytes(value), name)
        if isinstance(value, Image.Image):
            # Older versions of Pillow do not tell 16 bits from 32.
            deep = value.mode.startswith('I;16') or value.mode == 'I' and value.format == 'PNG'
            if upright:
                with suppress(Exception):  # of EXIF that is damaged, as OpenCV does
                    value = ImageOps.exif_transpose(value)
            if not value.mode.startswith(('I', 'F')):
                image = value.convert('RGB')
                image.info = {}  # It is turned now.
                return image
            value = np.asarray(value)
            value = (value >> 8).astype(np.uint8) if deep else value
    except RuntimeFileError:
        raise
    except UnidentifiedImageError:
        raise InputError(f'{name} is of no known image format, or damaged') from None
    except Exception as error:  # each decoder has exceptions of its own
        raise InputError(f'{name} cannot be read: {gist(error)}') from error
    if not isinstance(value, np.ndarray):
        raise InputError(f'{name} is no image: give the path or the content of a file, a Pillow '
                         'image or an array')
    return Image.fromarray(np.ascontiguousarray(take_array(value)[..., ::-1]))


_any_size, _lock, _limit = 0, threading.Lock(), Image.MAX_IMAGE_PIXELS


@contextmanager
def any_size() -> Iterator[None]:
    """Take Pillow's own limit of pixels away, which nobody can raise without touching the program.

    Several threads may do so at a time: the last one brings it back.
    """
    global _any_size, _limit
    with _lock:
        if not _any_size:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _any_size += 1
    try:
        yield
    finally:
        with _lock:
            _any_size -= 1
            if not _any_size:
                Image.MAX_IMAGE_PIXELS = _limit


def _decode(content: bytes, name: str) -> Image.Image:
    """Open an image without decoding it, unless it claims to be enormous."""
    if not content:
        raise InputError(f'{name} is empty')
    with any_size():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    pixels = math.prod(image.size)
    most = int(os.environ.get(MAX_PIXELS_VARIABLE) or MAX_PIXELS)
    if pixels > most:
        raise InputError(f'{name} has {pixels:,} pixels, and no more than {most:,} are read; if '
                         f'that is right, set {MAX_PIXELS_VARIABLE}={pixels} in the environment')
    return image


def take_array(array: np.ndarray) -> np.ndarray:
    """Make (H, W, 3) uint8 of an array, its channels in their order, or say why not.

    Grey becomes colour, and alpha is left out. Whole numbers of 16 bits are scaled to 8, as in
    files; numbers from 0 to 255 may be of any type.

    Raises:
        InputError: It is of another shape, or it is open what its numbers mean.
    """
    described = f'an array of shape {array.shape} and type {array.dtype}'
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype.kind not in 'uif':
        raise InputError(f'{described} is no image: give uint8 of shape (H, W), (H, W, 1), '
                         '(H, W, 3) or (H, W, 4)')
    if not array.size:
        raise InputError(f'{described} has no pixels')
    if array.dtype != np.uint8:
        least, most = array.min(), array.max()
        deep = array.dtype == np.uint16
        if deep and most > 255:
            array = array >> 8
        # Not <, which NaN would pass.
        elif not (least >= 0 and most <= 255):
            raise InputError(f'{described} has values from {least:g} to {most:g}: give uint8, from '
                             '0 to 255')
        elif most and (deep or array.dtype.kind == 'f' and most <= 1):
            raise InputError(f'{described} has values up to {most:g}, which may be of 255 or of '
                             f'{65535 if deep else 1}: give uint8, from 0 to 255')
        array = array.round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array[..., :3], (*array.shape[:2], 3)))


def preprocess(image: Image.Image, rule: Mapping[str, Any]) -> np.ndarray:
    """Resize and crop an image as the test pipeline of the model's config does.

    Args:
        image: In RGB.
        rule: What the metadata say under 'resize'.

    Returns:
        RGB, shape (3, H, W), uint8.
    """
    width, height = image.size
    if rule['rule'] == 'stretch':
        rows, columns = rule['size']
    else:  # The shorter side becomes so long; the other is cut to whole pixels.
        side = rule['size']
        rows, columns = ((int(side * height / width), side) if width < height else
                         (side, int(side * width / height)))
    if rule['antialias']:
        method = getattr(Image.Resampling, rule['interpolation'].upper())
        pixels = np.asarray(image.resize((columns, rows), method))
    else:
        pixels = resize(np.asarray(image), rows, columns, rule['interpolation'])
    if rule['crop']:
        top, left = (round((whole - part) / 2) for whole, part
                     in zip((rows, columns), rule['crop'], strict=True))
        pixels = pixels[top:top + rule['crop'][0], left:left + rule['crop'][1]]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resize(pixels: np.ndarray, rows: int, columns: int, interpolation: str) -> np.ndarray:
    """Resize as OpenCV does, which takes few pixels for each, however far an image shrinks.

    Args:
        pixels: Shape (H, W, C), uint8.
        rows: New height.
        columns: New width.
        interpolation: 'nearest', 'bilinear' or 'bicubic'.

    Returns:
        Shape (rows, columns, C), uint8: OpenCV's own values, but for a few of bicubic ones, which
        are one off.
    """
    if interpolation == 'nearest':
        down, across = (np.minimum(np.arange(new) * (1 / (new / old)), old - 1).astype(int)
                        for old, new in ((pixels.shape[0], rows), (pixels.shape[1], columns)))
        return pixels[down[:, None], across]
    total, bilinear = 0, interpolation == 'bilinear'
    across = _find_taps(pixels.shape[1], columns, bilinear)
    for down, height in _find_taps(pixels.shape[0], rows, bilinear):
        line = sum(pixels[down[:, None], place] * width[:, None] for place, width in across)
        height = height[:, None, None]
        # Bilinear shares are whole numbers of 2048ths, and OpenCV cuts off last bits.
        total += (line >> 4) * height >> 16 if bilinear else line * height
    return (total + 2 >> 2 if bilinear else (total + 0.5).clip(0, 255)).astype(np.uint8)


def _find_taps(old: int, new: int, bilinear: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find which pixels along an axis make up the new ones, and their shares."""
    centres = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first, taps = np.floor(centres).astype(int), []
    for offset in (0, 1) if bilinear else (-1, 0, 1, 2):
        distance = np.abs(centres - first - offset)
        if bilinear:
            shares = np.rint(2048 * (1 - distance))
        else:  # Keys' kernel, with OpenCV's a
            a = -0.75
            shares = np.where(distance <= 1,
                              ((a + 2) * distance - a - 3) * distance**2 + 1,
                              a * (((distance - 5) * distance + 8) * distance - 4))
        taps.append(((first + offset).clip(0, old - 1), shares.astype(int if bilinear else 'f4')))
    return taps


def with_size(rule: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """Change a resize rule so that images of another size come of it.

    Where the centre is cropped, it remains the same part.

    Args:
        rule: What the metadata say under 'resize'.
        size: Height and width.
    """
    whole, crop = rule['size'], rule['crop']
    if rule['rule'] == 'stretch':
        whole = [round(side * new / part) for side, part, new
                 in zip(whole, crop or whole, size, strict=True)]
    else:
        whole = round(whole * max(size) / max(crop)) if crop else min(size)
    return dict(rule, size=whole, crop=crop and [*size])


# --- Results --------------------------------------------------------------------------------------


def class_name(names: Sequence[str], label: int) -> str:
    """Name a class, by its number if it has no name."""
    return names[label] if label < len(names) else f'class {label}'


def class_colour(label: int) -> tuple[int, int, int]:
    """Give each class a colour, neighbours far apart: hue moves by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(int(label) * 0.618034 % 1, 0.65, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


class _Found:
    """Labels with scores, and perhaps boxes."""

    def above(self, threshold: float) -> '_Found':
        """Keep those with at least this score."""
        return self.select(self.scores >= threshold)

    def top(self, number: int) -> '_Found':
        """Keep so many, the first."""
        return self.select(slice(number))

    def best_first(self) -> '_Found':
        """Sort by score; equals stay in their order."""
        return self.select(np.argsort(-self.scores, kind='stable'))

    def select(self, index: Any) -> '_Found':
        """Keep some, as numpy indexes an array."""
        return replace(self, **{key: value[index] for key, value in vars(self).items()
                                if key != 'names' and value is not None})

    def name(self, label: int) -> str:
        """Name a class, by its number if it has no name."""
        return class_name(self.names, label)

    def as_records(self) -> list[dict[str, Any]]:
        """Describe each by a dict fit for JSON."""
        return [dict(label=int(label), class_name=self.name(label), score=round(float(score), 4))
                for label, score in zip(self.labels, self.scores, strict=True)]


@dataclass
class Detections(_Found):
    """What was found in one image, best first.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        labels: Class indices, shape (N,).
        scores: From 0 to 1, shape (N,).
        names: Of all classes; may be empty.
        tracks: Numbers of the objects in a video, shape (N,), -1 where there is none yet; None if
            nobody follows them.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    names: Sequence[str] = ()
    tracks: np.ndarray | None = None

    def as_records(self) -> list[dict[str, Any]]:
        tracks = ([{}] * len(self.boxes) if self.tracks is None else
                  [dict(track_id=int(track) if track >= 0 else None) for track in self.tracks])
        return [dict(bbox=[round(float(corner), 2) for corner in box], **record, **track)
                for box, record, track in zip(self.boxes, super().as_records(), tracks,
                                              strict=True)]

    def describe(self, rank: int) -> str:
        """What a picture says of one: its class, score and track."""
        text = f'{self.name(self.labels[rank])} {self.scores[rank]:.2f}'
        followed = self.tracks is not None and self.tracks[rank] >= 0
        return printable(f'{text} #{self.tracks[rank]}' if followed else text)

    def to_supervision(self) -> Any:
        """Make ``supervision.Detections``, if supervision is installed."""
        import supervision
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels.astype(int),
            tracker_id=self.tracks,
            data={'class_name': np.array([self.name(label) for label in self.labels], str)})


@dataclass
class Classification(_Found):
    """What an image is taken for, best first.

    Args:
        labels: Class indices, shape (K,).
        scores: From 0 to 1, shape (K,).
        names: Of all classes; may be empty.
    """

    labels: np.ndarray
    scores: np.ndarray
    names: Sequence[str] = ()

    def describe(self, rank: int) -> str:
        """What a picture says of one: its class and score."""
        return printable(f'{self.name(self.labels[rank])} {self.scores[rank]:.2f}')


# --- The libraries that run a file ----------------------------------------------------------------


class _OnnxRuntime:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, precision: str | None, threads: int | None,
                 providers: Sequence[str] | None) -> None:
        ort = _import('onnxruntime', path)
        providers = _check_known('provider', providers or ['CPUExecutionProvider'],
                                 ort.get_available_providers())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors
        with _loading(path, ort):
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        if self._session.get_providers()[0] != providers[0]:
            raise RuntimeFileError(f'{providers[0]} does not start here: its libraries are missing '
                                   'or do not fit onnxruntime')
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        _check_precision(path, precision, self.metadata, ort)
        kinds = {'tensor(uint8)': np.uint8, 'tensor(float)': np.float32}
        self.inputs = {each.name: (each.shape, kinds.get(each.type, np.int64))
                       for each in self._session.get_inputs()}
        self.outputs = [each.name for each in self._session.get_outputs()]

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(self.outputs, feed)


class _OpenVino:
    """A graph in OpenVINO.

    NOTE: left alone, OpenVINO computes in bfloat16 where a processor has it, on GPUs in float16.
    """

    def __init__(self, path: Path, precision: str | None, threads: int | None,
                 providers: Sequence[str] | None) -> None:
        if not path.with_suffix('.bin').is_file():
            raise RuntimeFileError(f'{path} has its weights in {path.stem}.bin, which is missing: '
                                   'keep the two together')
        ov = _import('openvino', path)
        core = ov.Core()
        device, = _check_known('device', providers or ['CPU'], [*core.available_devices, 'AUTO'])
        with _loading(path, ov):
            model = core.read_model(path)
            stored = model.get_rt_info()['model_info'] if model.has_rt_info('model_info') else {}
            self.metadata = {key: str(getattr(each, 'value', each)) for key, each in stored.items()}
            hint = PRECISIONS.get(precision or _written_precision(self.metadata), 'f32')
            settings = {'INFERENCE_PRECISION_HINT': hint}
            if threads:
                settings['INFERENCE_NUM_THREADS'] = threads
            self._graph, self._compiled = model, {}
            self._compile = lambda graph: core.compile_model(graph, device, settings)
            # Whether the batch alone is free: OpenVINO is faster where it knows the shapes.
            self._by_batch = all(side.is_dynamic != bool(place) for each in model.inputs
                                 for place, side in enumerate(each.partial_shape))
            first = self._compile_for(1)
        own, taken = _type_name(core, device), _type_name(first)
        if taken != hint:
            note(f'this device computes in {taken}, not in {hint}')
        elif hint == 'f32' and precision is None and own not in (hint, 'dynamic'):
            note(f'float32 is computed, as when the export was checked; {device} alone would take '
                 f'{own}, which is faster and less exact: precision bf16 or fp16 asks for it')
        self.inputs = {each.any_name: ([side.get_length() if side.is_static else str(side)
                                        for side in each.partial_shape],
                                       each.element_type.to_dtype()) for each in model.inputs}
        self.outputs = [each.any_name for each in model.outputs]

    def _compile_for(self, batch: int) -> Any:
        """Compile the graph for so many images, or once for all where sides are free, too."""
        batch = batch if self._by_batch else 0
        if batch not in self._compiled:
            if len(self._compiled) == MAX_BATCHES:
                del self._compiled[next(iter(self._compiled))]
            graph = self._graph.clone()
            if self._by_batch:
                graph.reshape({each.any_name: [batch, *[*each.partial_shape][1:]]
                               for each in graph.inputs})
            self._compiled[batch] = self._compile(graph)
        return self._compiled[batch]

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [*self._compile_for(len(feed['images']))(feed).values()]


class _LiteRt:
    """A graph in LiteRT, whose metadata lie beside it."""

    def __init__(self, path: Path, precision: str | None, threads: int | None,
                 providers: Sequence[str] | None) -> None:
        beside = Path(f'{path}.json')
        if not beside.is_file():
            raise RuntimeFileError(f'{path} is described in {beside.name}, which is missing: keep '
                                   'the two together')
        litert = _import('ai_edge_litert', path)
        _check_known('provider', providers or ['CPU'], ['CPU'])
        try:
            stored = json.loads(beside.read_bytes())
            self.metadata = {key: json.dumps(value) for key, value in stored.items()}
        except (AttributeError, ValueError):
            raise RuntimeFileError(f'{beside} is damaged: export {path.name} again') from None
        _check_precision(path, precision, self.metadata, litert)
        with _loading(path, litert):
            self._graph = import_module('ai_edge_litert.interpreter').Interpreter(
                str(path), num_threads=threads).get_signature_runner()
            given, number = self._graph.get_input_details(), len(self._graph.get_output_details())
        # There they are args_0, args_1, output_0 and so on.
        self._names = dict(zip(('images', 'orig_target_sizes'), sorted(given), strict=False))
        self.inputs = {name: (given[own]['shape'].tolist(), given[own]['dtype'])
                       for name, own in self._names.items()}
        outputs = stored.get('outputs')
        self.outputs = outputs if isinstance(outputs, list) and len(outputs) == number else []

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self._graph(**{self._names[name]: value.astype(self.inputs[name][1])
                               for name, value in feed.items()})
        return [found[f'output_{place}'] for place in range(len(self.outputs))]


_ENGINES = dict(zip(SUFFIXES, (_OnnxRuntime, _OpenVino, _LiteRt), strict=True))


def _import(library: str, path: Path) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise RuntimeFileError(
            f'{path} needs {library}: pip install {library}' if error.name == library
            else f'{library} is installed, but does not start: {gist(error)}') from error


@contextmanager
def _loading(path: Path, library: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the libraries have many
        raise RuntimeFileError(f'{path} cannot be loaded by {library.__name__} '
                               f'{library.__version__}: {gist(error)}') from error


def _check_known(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise RuntimeFileError(f'there is no {kind} {unknown[0]} here, only {", ".join(known)}')
    return [*names]


def _type_name(place: Any, *device: str) -> str:
    return place.get_property(*device, 'INFERENCE_PRECISION_HINT').get_type_name()


def _check_precision(path: Path, precision: str | None, texts: Mapping[str, str],
                     library: Any) -> None:
    written = _written_precision(texts)
    if precision not in (None, 'fp32', written):
        raise RuntimeFileError(f'{path} computes in {written}, not {precision}: {library.__name__} '
                               'keeps to the graph; export it in that precision')


def _written_precision(texts: Mapping[str, str]) -> str:
    return texts.get('precision', 'fp32').strip('"')


# --- What a file says of itself -------------------------------------------------------------------


def parse_metadata(texts: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """Read what an exported file says of itself.

    Args:
        texts: JSON by key.
        path: What to call the file.

    Raises:
        RuntimeFileError: Somebody else wrote the file, something is missing or makes no sense, or
            it is newer than this program.
    """
    if not {'format', 'spartan_mm'} & {*texts}:
        raise RuntimeFileError(f'{path} is no file of `spartan-mm export`: it says neither how '
                               'images are resized nor what comes out')
    metadata = {}
    for key, text in texts.items():
        try:
            metadata[key] = json.loads(text)
        except ValueError:  # of other keys, others may have written them
            if key in _SOUND:
                raise RuntimeFileError(f'the metadata of {path} are damaged: {key} is '
                                       f'{text[:60]!r}; export it again') from None
    number = metadata.get('format')
    if isinstance(number, int) and number > FORMAT:
        raise RuntimeFileError(f'{path} has metadata of format {number}, and this runtime.py reads '
                               f'{FORMAT}: take the one of spartan_mm '
                               f'{metadata.get("spartan_mm", "that wrote it")}')
    if missing := [key for key in _SOUND if key not in metadata]:
        raise RuntimeFileError(f'the metadata of {path} lack {", ".join(missing)}: export it again')
    for key, is_sound in _SOUND.items():
        try:
            sound = is_sound(metadata)
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise RuntimeFileError(f'the metadata of {path} make no sense: {key} is '
                                   f'{json.dumps(metadata[key])[:200]}; export it again')
    return metadata


def _is_size(value: Any) -> bool:
    return len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_rule(rule: Any, images: Mapping[str, Any]) -> bool:
    stretches, crop = rule['rule'] == 'stretch', rule['crop']
    whole = rule['size'] if stretches else [rule['size']] * 2
    result = crop or (whole if stretches else images['size'])
    return (_is_size(whole) and _is_size(result)
            and ('size' in images['dynamic'] or result == images['size'])
            and not any(part > side for part, side in zip(crop or whole, whole, strict=True))
            and rule['rule'] in ('stretch', 'shorter side')
            and rule['interpolation'] in ('nearest', 'bilinear', 'bicubic')
            and isinstance(rule['antialias'], bool))


# What has to be in the metadata, and whether it makes sense.
_SOUND = {
    'format': lambda all: all['format'] == FORMAT,
    'task': lambda all: all['task'] in ('detection', 'classification'),
    'classes': lambda all: all['classes'] is None or _are_texts(all['classes']),
    'input': lambda all: _is_size(all['input']['size']) and _are_texts(all['input']['dynamic']),
    'raw': lambda all: isinstance(all['raw'], bool),
    'outputs': lambda all: _are_texts(all['outputs']) and (
        all['raw'] or {*all['outputs']} >= {'scores'} | (
            {'labels', 'boxes'} if all['task'] == 'detection' else set())),
    'resize': lambda all: (all['raw'] if all['resize'] is None
                           else _is_rule(all['resize'], all['input'])),
}


# --- The runtime ----------------------------------------------------------------------------------


class Runtime:
    """An exported model.

    Args:
        path: The .onnx file, the .xml of OpenVINO, or the .tflite of LiteRT.
        precision: What OpenVINO computes in: 'fp32', 'fp16' or 'bf16'; None for what was exported.
        threads: How many compute; None leaves it to the library.
        providers: Of ONNX Runtime, such as ['CUDAExecutionProvider']; of OpenVINO its device, such
            as ['GPU']. None for the processor.
        size: Height and width of the model's images, where the file leaves them open.

    Attributes:
        metadata: What the file says of itself, by key.
        task: 'detection' or 'classification'.
        classes: Their names; empty if nobody knows them.
        size: Height and width of the model's images.
        dynamic: What may change: 'batch', 'size'.
        seconds: How long the model itself has run.

    Raises:
        RuntimeFileError: The file, the machine or an argument is not what it takes.
    """

    def __init__(self, path: str | Path, precision: str | None = None, threads: int | None = None,
                 providers: Sequence[str] | None = None, size: Sequence[int] | None = None) -> None:
        self.path, self.seconds = Path(path), 0.
        if self.path.suffix not in _ENGINES:
            raise RuntimeFileError(f'{path} is of no known kind: give a .onnx, .xml or '
                                   '.tflite file')
        if not self.path.is_file():
            raise RuntimeFileError(f'{path} {"is no file" if self.path.exists() else "is missing"}')
        if precision not in (None, *PRECISIONS):
            raise RuntimeFileError(f'precision {precision} is none of {", ".join(PRECISIONS)}')
        if threads is not None and threads < 1:
            raise RuntimeFileError(f'threads={threads} must be 1 or more')
        self._engine = _ENGINES[self.path.suffix](self.path, precision, threads, providers)
        self.metadata = parse_metadata(self._engine.metadata, path)
        self.task, self.classes = self.metadata['task'], self.metadata['classes'] or []
        self.size, self.dynamic = self.metadata['input']['size'], self.metadata['input']['dynamic']
        self._rule = self.metadata['resize']
        batch, _, *sides = self._engine.inputs.get('images', [()])[0] or (0, 0)
        if {*self.metadata['outputs']} - {*self._engine.outputs} or len(sides) != 2 or any(
                isinstance(side, int) and side != own for side, own
                in zip(sides, self.size, strict=True)):
            raise RuntimeFileError(f'the metadata of {path} are those of another graph, with other '
                                   'inputs, outputs or another size: export it again')
        #: How many images the graph takes; None for any number.
        self._batch = batch if isinstance(batch, int) else None
        if size is not None:
            self._check_size(size)
            self.size, self._rule = [*size], self._rule and with_size(self._rule, size)

    @property
    def files(self) -> list[Path]:
        """What it is read from, perhaps."""
        return [self.path, self.path.with_suffix('.bin'), Path(f'{self.path}.json')]

    def run(self, images: np.ndarray, sizes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Run the bare graph.

        Args:
            images: RGB, shape (N, 3, H, W), uint8.
            sizes: Width and height of the originals, shape (N, 2), in whose pixels boxes are to be;
                by default those of the images.

        Returns:
            Arrays by name, whose first axis is N.

        Raises:
            RuntimeFileError: The graph does not take these images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
            raise RuntimeFileError(f'images are (N, 3, H, W) uint8, not {images.shape} '
                                   f'{images.dtype}')
        number, _, height, width = images.shape
        self._check_size((height, width))
        if self._batch not in (None, number):
            raise RuntimeFileError(f'{self.path} takes batches of {self._batch}, not of {number}: '
                                   'export with --dynamic batch')
        feed = dict(images=np.ascontiguousarray(images, self._engine.inputs['images'][1]))
        if 'orig_target_sizes' in self._engine.inputs:
            feed['orig_target_sizes'] = np.array([[width, height]] * number if sizes is None
                                                 else sizes, np.int64).reshape(number, 2)
        start = time.perf_counter()
        try:
            outputs = self._engine.run(feed)
        except Exception as error:  # the libraries have many
            raise RuntimeFileError(f'{self.path} fails on {number} images of {height}x{width} '
                                   f'pixels: {gist(error)}') from error
        self.seconds += time.perf_counter() - start
        return dict(zip(self._engine.outputs, outputs, strict=True))

    def read(self, image: Any) -> Image.Image:
        """Read an image as training does, see :func:`read_image`."""
        return read_image(image, (self._rule or {}).get('upright', True))

    def preprocess(self, image: Any) -> np.ndarray:
        """Make of an image, whatever :meth:`read` takes, what the graph takes.

        Returns:
            RGB, shape (3, H, W), uint8.
        """
        if self._rule is None:
            raise RuntimeFileError(f'{self.path} has no rule for resizing: call run(), with images '
                                   'of its size')
        return preprocess(self.read(image), self._rule)

    def __call__(self, images: Any, batch_size: int = 1) -> Any:
        """Detect or classify.

        Args:
            images: One, whatever :meth:`read` takes, or an iterable of them; sizes may differ.
            batch_size: How many go through the model together, if it leaves that open.

        Returns:
            :class:`Detections` or :class:`Classification` of one image, a list of them of many.
        """
        alone = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
        if (isinstance(images, alone) or not isinstance(images, Iterable)
                or isinstance(images, np.ndarray) and images.ndim < 4):
            return self([images])[0]
        waiting, found = iter(images), []
        while batch := list(itertools.islice(waiting, self._batch or batch_size)):
            found += self._predict([self.read(image) for image in batch])
        return found

    def _predict(self, images: Sequence[Image.Image]) -> list[Any]:
        if self.metadata['raw']:
            raise RuntimeFileError(f'{self.path} was exported with --raw: call run(), which gives '
                                   f'{", ".join(self._engine.outputs)}')
        return self.find([*map(self.preprocess, images)], [image.size for image in images])

    def find(self, ready: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Any]:
        """Detect or classify in a batch.

        Args:
            ready: What :meth:`preprocess` makes of images.
            sizes: Width and height of these.

        Returns:
            :class:`Detections` or :class:`Classification` of each.

        Raises:
            RuntimeFileError: The graph does not take these images together.
        """
        if len({image.shape for image in ready}) > 1:
            raise RuntimeFileError('the shorter sides of images become equal, the longer ones need '
                                   'not: set the batch size to 1')
        outputs = self.run(np.stack(ready), sizes)
        if self.task == 'detection':
            return [Detections(*each, self.classes) for each in zip(
                *(outputs[key] for key in ('boxes', 'labels', 'scores')), strict=True)]
        return [Classification(np.arange(len(scores)), scores, self.classes).best_first()
                for scores in outputs['scores']]

    def _check_size(self, size: Sequence[int]) -> None:
        images, text = self.metadata['input'], 'x'.join(map(str, size))
        least, multiple = images.get('min_size', 1), images.get('multiple_of', 1)
        if 'size' not in self.dynamic:
            if [*size] != self.size:
                raise RuntimeFileError(f'{self.path} takes {"x".join(map(str, self.size))} pixels '
                                       f'(height x width), not {text}: export it with --dynamic '
                                       'size, or with that --size')
        elif min(size) < least or any(side % multiple for side in size):
            raise RuntimeFileError(f'{self.path} takes sides that are multiples of {multiple} from '
                                   f'{least} pixels on, not {text}')


# --- The command ----------------------------------------------------------------------------------


@dataclass
class Source:
    """Where images come from: files below a folder; or a video, a camera's number, or a URL."""

    root: Path
    images: Sequence[Path] = ()
    video: Path | int | str | None = None

    def name_of(self, image: Path) -> str:
        """Say what results call an image."""
        return Path(os.path.relpath(image, self.root)).as_posix()

    @property
    def video_name(self) -> str:
        """What results call the video, the camera or the stream."""
        if isinstance(self.video, str):  # without passwords and keys
            url = urlsplit(self.video)
            return f'{url.scheme}://{url.netloc.rpartition("@")[2]}{url.path}'
        return self.video.name if isinstance(self.video, Path) else f'camera {self.video}'

    def __str__(self) -> str:
        if self.video is None:
            return str(self.root)
        return self.video_name if isinstance(self.video, str) else str(self.video)

    def pictures(self, out_dir: Path) -> dict[str, Path]:
        """Say where what is drawn goes, by what results call it."""
        if self.video is None:
            return {name: path if path.suffix.lower() in IMAGE_SUFFIXES
                    else path.with_name(f'{path.name}.png')
                    for name in map(self.name_of, self.images) for path in [out_dir / name]}
        stem = Path(self.video_name).stem
        stem = re.sub(r'[^\w.-]+', '_', stem) if isinstance(self.video, str) else stem
        return {self.video_name: out_dir / f'{stem}.mp4'}


def find_source(words: Any, out_dir: str | Path) -> Source:
    """See what there is to process.

    Args:
        words: One or several of these: an image; a folder, which is searched; a pattern, such as
            'photos/*.jpg'. Or one of these: a video, the number of a camera, the URL of a stream.
        out_dir: Where the results go; if it lies in a folder, it is not searched.

    Raises:
        InputError: There is nothing of that name, or there are no images.
    """
    words = [words] if isinstance(words, str | int | os.PathLike) else words
    words = [*map(str, words)]
    for word in words:
        if word.isdecimal() and len(words) == 1 and not os.path.exists(word):
            return Source(Path(), video=int(word))
        if '://' in word and not os.path.exists(word):
            return _find_stream(word, alone=len(words) == 1)
    files, own = [], Path(out_dir).resolve()
    for word in words:
        path = Path(word)
        if path.is_dir():
            skip = own if path.resolve() in own.parents else None
            found = sorted(file for file in path.rglob('*')
                           if file.suffix.lower() in IMAGE_SUFFIXES
                           # A link that leads nowhere is an image that is missing.
                           and (file.is_file() or file.is_symlink() and not file.exists())
                           and skip not in file.resolve().parents)
            if not found:
                raise InputError(f'folder {path} holds no images ({", ".join(IMAGE_SUFFIXES)})')
        elif os.path.lexists(path):
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(word, recursive=True)
                           if Path(file).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES)
            if not found:
                raise InputError(f'input {path} does not exist' + (
                    ': no image or video has a name of this pattern' if glob.has_magic(word)
                    else ''))
        files += found
    if strange := [file for file in files if file.exists() and not file.is_file()]:
        raise InputError(f'input {strange[0]} is no file')
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    if videos and len(files) > 1:
        raise InputError(f'{videos[0]} is a video: give it alone')
    if len(words) == 1 and os.path.isdir(words[0]):
        root = words[0]
    elif len(files) == 1:
        root = files[0].parent
    else:
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return Source(Path(root), [] if videos else [*dict.fromkeys(files)], *videos)


def _find_stream(word: str, alone: bool) -> Source:
    try:
        url = urlsplit(word)
    except ValueError as error:
        raise InputError(f'input {word} is no URL: {error}') from None
    source = Source(Path(), video=word)
    if url.scheme not in STREAMS:
        raise InputError(f'input {source} is no file, and no stream of {", ".join(STREAMS)}')
    if Path(url.path).suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f'{source} is a URL: download it, and name the file')
    if not alone:
        raise InputError(f'{source} is a stream: give it alone')
    return source


class Video:
    """The frames of a video, a camera or a stream.

    Args:
        source: What :func:`find_source` found.

    Attributes:
        live: Whether it has no end of its own.
        rate: Frames a second.
        length: How many there are, or 0 if nobody knows; often an estimate.

    Raises:
        RuntimeFileError: OpenCV is missing, or what it opens is no video.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.name = source, source.video_name
        try:
            import cv2
        except ImportError:
            raise RuntimeFileError(f'{self.name} needs OpenCV: pip install opencv-python-headless'
                                   ) from None
        self._cv2 = cv2
        self._open()
        if not self._video.isOpened():
            raise InputError({
                int: f'{self.name} cannot be opened: there is none of this number, or another '
                     'program has it',
                str: f'{self.name} cannot be opened: nobody answers, or what comes is no video',
            }.get(type(source.video), f'{source.video} cannot be opened as a video: it is damaged, '
                                      'or holds no pictures'))
        rate = self._video.get(self._cv2.CAP_PROP_FPS)
        self.rate = rate if 1 <= rate <= 1000 else 25.
        self.length = max(0, int(self._video.get(self._cv2.CAP_PROP_FRAME_COUNT)))
        self.live = not isinstance(source.video, Path) and not self.length

    def _open(self) -> None:
        # OpenCV and FFmpeg have much to say, in lines of their own.
        os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
        level, video = self._cv2.getLogLevel(), self._source.video
        self._cv2.setLogLevel(0)
        try:
            self._video = self._cv2.VideoCapture(str(video) if isinstance(video, Path) else video)
        finally:
            self._cv2.setLogLevel(level)

    def frames(self, failures: dict[str, str]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Read frame by frame.

        What is live and breaks off is opened again, :data:`TRIES` times.

        Args:
            failures: Where to note that it breaks off.

        Yields:
            What results call a frame; the frame, (H, W, 3) in BGR order.

        Raises:
            InputError: There are none.
        """
        done, tries = 0, 0
        try:
            while True:
                frame = self._video.read()[1]
                if frame is not None:
                    yield dict(file=self.name, frame=done), frame
                    done, tries = done + 1, 0
                elif self.live and done and tries < TRIES:
                    tries += 1
                    print(printable(f'note: {self.name} broke off after {done} frames; it is opened'
                                    f' again, {tries} of {TRIES} times'), file=sys.stderr)
                    time.sleep(PAUSE * 2 ** (tries - 1))
                    self._video.release()
                    self._open()
                else:
                    break
        finally:
            self._video.release()
        if not done:
            raise InputError(f'{self.name} has no frame that can be decoded')
        if self.live:
            failures[self.name] = (f'{self.name} broke off after {done} frames and did not come '
                                   'back; those are processed')
        # The length that a container tells is often an estimate, off by a frame or two.
        elif done < self.length - max(2, self.length // 100):
            failures[self.name] = (f'{self._source} breaks off after {done} of {self.length} '
                                   'frames; those are processed')

    def write(self, path: Path) -> AbstractContextManager[Callable[[Image.Image], None]]:
        """Open a film as fast as this one; gives what adds a picture to it."""
        return _film(self._cv2, path, self.rate)


@contextmanager
def _film(cv2: Any, path: Path, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    film, size, added = None, None, 0

    def add(picture: Image.Image) -> None:
        nonlocal film, size, added
        if film is None:
            size = picture.size
            film = cv2.VideoWriter(file.name, cv2.VideoWriter_fourcc(*'mp4v'), rate, size)
            if not film.isOpened():
                raise RuntimeFileError(f'{path} cannot be written: this OpenCV has no encoder')
        # A stream may come back in another size.
        picture = picture if picture.size == size else picture.resize(size)
        film.write(np.asarray(picture)[..., ::-1])
        added += 1

    with write_whole(path) as file:
        try:
            yield add
        finally:
            if film is not None:
                film.release()
        # OpenCV says nothing about a full disk.
        written = cv2.VideoCapture(file.name)
        held = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.release()
        if held < added:
            raise RuntimeFileError(f'{path} cannot be written: it took {held} of {added} frames, '
                                   'perhaps for want of space; the results are in their files')


@dataclass
class Report:
    """What a run over images or frames gave.

    Args:
        images: Number of images or frames.
        objects: Number of detections.
        speed: Images a second, with reading and writing.
        model_ms: Milliseconds that an image took in the model, with its preprocessing.
        failures: What is wrong with each image that could not be read or drawn, with a video that
            breaks off, and with results that could not be written.
    """

    images: int = 0
    objects: int | None = None
    speed: float = 0.
    model_ms: float = 0.
    failures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        what = (f'{self.images} images classified' if self.objects is None else
                f'{self.objects} detections in {self.images} images')
        return f'{what}, {self.speed:.1f} a second; the model takes {self.model_ms:.1f} ms for one'


def draw(image: Image.Image, found: Detections | Classification) -> Image.Image:
    """Draw boxes with their classes, or the classes alone, on a copy of an image."""
    image = image.copy()
    canvas, size = ImageDraw.Draw(image), max(11, min(image.size) // 36)
    font, line = ImageFont.load_default(size), max(1, min(image.size) // 250)
    height = round(1.4 * size)
    for rank in reversed(range(len(found.scores))):  # the best on top
        text, colour = found.describe(rank), class_colour(found.labels[rank])
        left, top = 0, rank * height
        if isinstance(found, Detections):
            box = np.nan_to_num(found.boxes[rank]).clip(0, max(image.size)).tolist()
            canvas.rectangle(box, outline=colour, width=line)
            left, top = box[0], max(0, box[1] - height)
        canvas.rectangle((left, top, left + font.getlength(text) + 6, top + height), fill=colour)
        canvas.text((left + 3, top + height / 2), text, 'black', font, anchor='lm')
    return image


#: Opens a file of results. It gets the file's path, what all results have in common, and the
#: failures, which are complete at its end; it gives what adds the record of an image.
Writer = Callable[[Path, Mapping[str, Any], Mapping[str, str]],
                  AbstractContextManager[Callable[[Mapping[str, Any]], None]]]


def process(model: Any, source: Source, out_dir: Path, files: Mapping[Path, Writer],
            pictures: bool = True, score_threshold: float = 0.3, top: int = 5, batch_size: int = 1,
            draw: Callable[[Any, Any], Image.Image] = draw,
            follow: Callable[[float], Callable[[Detections], Detections]] | None = None) -> Report:
    """Process images, a video, a camera or a stream; write results and pictures.

    One batch after the other is read, processed and written: no more is held in memory. Ctrl-C or
    SystemExit ends what is live, and keeps what was seen.

    Args:
        model: A :class:`Runtime`, or another with its `task`, `classes` and `files`, which can
            `read` and be called.
        source: What :func:`find_source` found.
        out_dir: Where pictures go; they keep their names and subfolders.
        files: What else to write, and what opens it.
        pictures: Whether to draw.
        score_threshold: The least score of a detection that counts.
        top: Number of classes of a classifier that count.
        batch_size: How many images go through the model together.
        draw: Draws what was found in an image.
        follow: Makes, for so many frames a second, what follows detections from one to the next,
            and chooses those that count.

    Raises:
        RuntimeFileError: The results have no place, or a video has no frames. An image that cannot
            be read or drawn is noted, and the others are processed; results that cannot be written
            any further, for want of space for example, are noted, and those before are kept.
    """
    detects, drawn = model.task == 'detection', source.pictures(out_dir) if pictures else {}
    check_places([*files, *drawn.values()], [*source.images, source.video, *model.files, __file__])
    options = dict(score_threshold=score_threshold) if detects else dict(top=top)
    head = dict(source=str(source), classes=[*model.classes], **options)
    report, seconds = Report(objects=0 if detects else None), 0.
    failures = report.failures
    video = None if source.video is None else Video(source)
    track = follow(30. if video is None else video.rate) if follow else None
    named = _read_images(model, source, failures) if video is None else (
        (name, model.read(frame)) for name, frame in video.frames(failures))

    def find() -> Iterator[tuple[dict[str, Any], Any, Any]]:
        nonlocal seconds
        while batch := list(itertools.islice(named, batch_size)):
            begin = time.perf_counter()
            found = model([image for _, image in batch], batch_size)
            seconds += time.perf_counter() - begin
            for (name, image), each in zip(batch, found, strict=True):
                # JSON has no other numbers.
                each = each.select(np.isfinite(each.boxes).all(1)) if detects else each
                yield name, image, (track(each) if track else each.above(score_threshold)
                                    if detects else each.top(top))

    with ExitStack() as stack:
        add_frame = stack.enter_context(video.write(*drawn.values())) if video and drawn else None
        add_results = [stack.enter_context(write(path, head, failures))
                       for path, write in files.items()]
        stack.enter_context(closing(named))
        start = time.perf_counter()
        try:
            for name, image, found in find():
                width, height = (image.size if isinstance(image, Image.Image)
                                 else image.shape[1::-1])
                record = dict(name, width=width, height=height, **{
                    'detections' if detects else 'predictions': found.as_records()})
                try:
                    for add in add_results:
                        add(record)
                except (OSError, RuntimeFileError) as error:
                    failures['results'] = (
                        f'the results cannot be written any further: {gist(error)}; those of the '
                        f'first {report.images} images are kept')
                    break
                if add_frame:
                    add_frame(draw(image, found))
                elif pictures:
                    _write_picture(drawn[name['file']], draw(image, found), name, failures)
                report.images += 1
                report.objects = report.objects + len(found.scores) if detects else None
                report.speed = _show(start, report.images, video.length if video else
                                     len(source.images))
        except (KeyboardInterrupt, SystemExit):
            if video is None or not video.live:
                raise
    report.model_ms = 1000 * seconds / max(report.images, 1)
    return report


_shown = 0.


def _show(start: float, number: int, total: int) -> float:
    """Say now and then how far a command is; return how many images it does a second."""
    global _shown
    now, live = time.perf_counter(), sys.stderr.isatty()
    speed = number / max(now - start, 1e-9)
    if now - max(start, _shown) > (0.2 if live else 60):
        _shown = now
        text = f'{number} of {total or "?"} images, {speed:.1f} a second'
        print(f'\r{text:60}' if live else text, end='\r' if live else '\n', file=sys.stderr,
              flush=True)
    return speed


def _read_images(model: Any, source: Source, failures: dict[str, str]
                 ) -> Iterator[tuple[dict[str, Any], Any]]:
    for path in source.images:
        try:
            yield dict(file=source.name_of(path)), model.read(path)
        except InputError as error:
            failures[source.name_of(path)] = str(error)


def _write_picture(path: Path, picture: Image.Image, name: Mapping[str, Any],
                   failures: dict[str, str]) -> None:
    """Write a picture, or note why not."""
    content, suffix = io.BytesIO(), path.suffix.lower()
    try:
        # Deflate at its fastest: it takes a fifth of the time.
        picture.save(content, Image.registered_extensions()[suffix], quality=95, compress_level=1)
        with write_whole(path) as file:
            put(file, content.getvalue())
    except RuntimeFileError as error:
        failures[name['file']] = str(error)
    except Exception as error:  # each encoder has exceptions of its own
        failures[name['file']] = (f'{path} cannot be written: {gist(error)}; its results are in '
                                  'their file')


def check_places(places: Iterable[Path], sources: Iterable[Any]) -> None:
    """Check that what is to be written has a place and is nothing that is read.

    Raises:
        RuntimeFileError: It is, or its place is taken by what is no regular file.
    """
    files = [file for file in sources if isinstance(file, str | Path) and os.path.exists(file)]
    read = {(found.st_dev, found.st_ino) for found in map(os.stat, files)}
    for path in places:
        if os.path.exists(path):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in read:
                raise InputError(f'the results would overwrite {path}, which is read: choose '
                                 'another folder to write to')
            if not stat.S_ISREG(found.st_mode):
                raise RuntimeFileError(f'{path} cannot be written: it is there and no regular file')
        elif os.path.islink(path):
            raise RuntimeFileError(f'{path} cannot be written: it is a link that leads nowhere')


@contextmanager
def write_array(path: Path, begin: str, end: Callable[[], str]) -> Iterator[Callable[[Any], None]]:
    """Write a JSON array item by item; gives what adds one.

    Args:
        path: The file; it takes its name when it is whole.
        begin: Goes before the items.
        end: Says what goes behind them.
    """
    starts: deque[int] = deque(maxlen=1000)
    with write_whole(path) as file:
        put(file, begin)
        first = file.tell()

        def add(item: Any) -> None:
            start = file.tell()
            put(file, f'{"," * (start > first)}\n  {json.dumps(item, ensure_ascii=False)}')
            starts.append(start)

        yield add
        while True:
            try:
                put(file, end())
                break
            except OSError:
                if not starts:
                    raise
                # On a full disk the last items give their room to the end.
                file.seek(starts.pop())
                file.truncate()
        os.fsync(file.fileno())


def write_results(path: Path, head: Mapping[str, Any], failures: Mapping[str, str]
                  ) -> AbstractContextManager[Callable[[Mapping[str, Any]], None]]:
    """Open a ``results.json``, a :data:`Writer`."""
    return write_array(
        path, f'{json.dumps(head, indent=1, ensure_ascii=False)[:-2]},\n "results": [',
        lambda: f'\n ],\n "failures": {json.dumps(failures, ensure_ascii=False)}\n}}\n')


def put(file: IO[bytes], content: str | bytes) -> None:
    """Write all of a text or of bytes at the end of an unbuffered file, or nothing of it."""
    start = file.tell()
    rest = content.encode(errors='backslashreplace') if isinstance(content, str) else content
    try:
        while rest:
            rest = rest[file.write(rest):]
    except BaseException:
        file.seek(start)
        file.truncate()
        raise


@contextmanager
def write_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing, without a buffer, that takes its name only when it is whole.

    A link is written through; permissions are those of the file that is replaced, or the usual
    ones.
    """
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f'.{secrets.token_hex(4)}.unfinished{target.suffix}')
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, 'xb', 0, opener=lambda *args: os.open(*args, mode)) as file:
            yield file
        os.replace(unfinished, target)
    except OSError as error:
        raise RuntimeFileError(f'{path} cannot be written: {gist(error)}') from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The status: 0; 1 if something could not be read, run or written; 130 after Ctrl-C. Wrong
        arguments leave with 2.
    """
    parser = argparse.ArgumentParser(
        prog='runtime.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('model', metavar='MODEL', help='model.onnx, model.xml of OpenVINO, or model.tflite')
    add('input', nargs='+', metavar='INPUT', help="images, folders, patterns ('photos/*.jpg'); or "
        'one video, the number of a camera (0), or the URL of a stream')
    add('--out-dir', type=Path, default=Path('outputs'), metavar='DIR',
        help='where pictures and results.json go (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='write the results here, and no pictures')
    add('--score-thr', type=float, default=0.3, metavar='SCORE',
        help='least score of a detection (default: %(default)s)')
    add('--top', type=_positive, default=5, metavar='N',
        help='number of classes that a classifier names (default: %(default)s)')
    add('--batch-size', type=_positive, default=1, metavar='N',
        help='images that go through the model together (default: %(default)s)')
    add('--threads', type=_positive, metavar='N', help='threads that compute')
    add('--precision', choices=PRECISIONS, help='for OpenVINO; by default that of the export')
    add('--provider', metavar='NAME', help='such as CUDAExecutionProvider, or GPU for OpenVINO')
    add('--size', type=_positive, nargs=2, metavar=('H', 'W'),
        help='size of the images in the model, where it is open')
    for stream in (sys.stdout, sys.stderr):  # whatever is printed, no encoding fails on it
        getattr(stream, 'reconfigure', dict)(errors='backslashreplace')
    args = parser.parse_args(argv)
    try:
        source = find_source(args.input, args.out_dir)
        runtime = Runtime(args.model, args.precision, args.threads,
                          args.provider and [args.provider], args.size)
        place = args.json or args.out_dir / 'results.json'
        report = process(runtime, source, args.out_dir, {place: write_results}, not args.json,
                         args.score_thr, args.top, args.batch_size)
        print(printable(f'{report}; see {args.json or args.out_dir}'))
        problems = [*report.failures.values()]
    except RuntimeFileError as error:
        problems = [error]
    except KeyboardInterrupt:
        print('stopped by Ctrl-C', file=sys.stderr)
        return 130
    for problem in problems:
        print(printable(f'error: {problem}'), file=sys.stderr)
    return int(bool(problems))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{printable(text)} must be a whole number, at least 1')
    return int(text)


if __name__ == '__main__':
    sys.exit(main())
