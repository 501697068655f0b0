"""What is served: a published checkpoint, a config with its weights, or an exported file."""
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..engine.class_order import Match
from ..engine.launch import choose_device
from ..errors import InputError, UsageError
from ..inference import Classification, Detections, load_model
from ..runtime import FORMATS, MAX_BATCHES, SUFFIXES, Runtime, RuntimeFileError, any_size
from .limits import Refusal

#: The most passes over a JPEG; a small file may have thousands, each as long as a whole picture.
MAX_SCANS = 64


@dataclass
class Prepared:
    """A picture that is ready for the model.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        content: What the model takes.
    """

    width: int
    height: int
    content: Any


class ServedModel:
    """What a server needs of a model; subclasses are for a kind of file each.

    Attributes:
        name: The file's.
        task: 'detection' or 'classification'.
        classes: Their names; empty if nobody knows them.
        max_batch: The most pictures in one pass; None for any number.
    """

    name: str
    task: str
    classes: Sequence[str]
    max_batch: int | None = None

    def prepare(self, content: bytes) -> Prepared:
        """Read a picture and make of it what the model takes; several threads may call this.

        Raises:
            ValueError: It cannot be read; the message is one line.
        """
        raise NotImplementedError

    def find(self, pictures: Sequence[Prepared]) -> list[Any]:
        """Run the model; one result for each picture."""
        raise NotImplementedError

    def describe(self, found: Any, score: float, top: int) -> list[dict[str, Any]]:
        """Describe a result by dicts fit for JSON, those of ``spartan-mm infer``."""
        return (found.above(score) if self.task == 'detection' else found.top(top)).as_records()


class _Checkpoint(ServedModel):
    """A model of torch."""

    def __init__(self, config: str, checkpoint: str | None, device: str | None, match_classes: Match
                 ) -> None:
        self._model = load_model(config, checkpoint, choose_device(device), match_classes)
        self.name = Path(checkpoint or config).name
        self.task, self.classes = self._model.task, self._model.classes

    def prepare(self, content: bytes) -> Prepared:
        image = self._model.read(content)
        return Prepared(*image.shape[1::-1], self._model.collate([image]))

    def find(self, pictures: Sequence[Prepared]) -> list[Detections | Classification]:
        batches = [picture.content for picture in pictures]
        return self._model.run({key: [batch[key][0] for batch in batches] for key in batches[0]})


class _Exported(ServedModel):
    """A file that ``spartan-mm export`` wrote."""

    def __init__(self, path: str, threads: int | None) -> None:
        try:
            self._runtime = Runtime(path, threads=threads)
        except RuntimeFileError as error:
            raise InputError(str(error)) from error
        if self._runtime.metadata['raw']:
            raise InputError(f'{path} was exported with --raw, which gives no results: export it '
                             'without')
        self.name, self.task = Path(path).name, self._runtime.task
        self.classes = self._runtime.classes
        # OpenVINO keeps what it compiled for so many sizes of batches: 1, 2, 4 and so on.
        self.max_batch = 2 ** (MAX_BATCHES - 1) if 'batch' in self._runtime.dynamic else 1

    def prepare(self, content: bytes) -> Prepared:
        image = self._runtime.read(content)
        return Prepared(*image.size, self._runtime.preprocess(image))

    def find(self, pictures: Sequence[Prepared]) -> list[Any]:
        return self._runtime.find([each.content for each in pictures],
                                  [(each.width, each.height) for each in pictures])


def load_served(file: str, checkpoint: str | None = None, device: str | None = None,
                match_classes: Match = None, threads: int | None = None) -> ServedModel:
    """Load what is to be served.

    Args:
        file: An exported .onnx, .xml or .tflite; or what :class:`~spartan_mm.inference.Model` calls
            config.
        checkpoint: See there, as the following.
        device: As there.
        match_classes: As there.
        threads: How many compute; None leaves it to the library.

    Raises:
        InputError: The file is not what it should be, or cannot be served.
        UsageError: An argument does not go with an exported file.
    """
    if Path(file).suffix in SUFFIXES:
        given = {'CHECKPOINT': checkpoint, '--device': device, '--match-classes': match_classes}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(f'{file} is an exported file, which has its weights and classes '
                             f'inside and runs on the processor: leave out {wrong[0]}')
        return _Exported(file, threads)
    if threads:
        torch.set_num_threads(threads)
    return _Checkpoint(file, checkpoint, device, match_classes)


def check_picture(content: bytes, max_pixels: int) -> None:
    """Look at the head of an image, before anything is decoded.

    Raises:
        Refusal: It is of no format that is taken, or decoding it would take too much.
    """
    if not content:
        raise Refusal(400, "the request has no picture: send a file's content, or a form with a "
                           'file')
    try:
        # Whether Pillow's own limit is there depends on what else runs in the process.
        with any_size(), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            tags = getattr(picture, 'tag_v2', {})
            # A small TIFF may consist of enormous tiles.
            sizes = [picture.size, (int(tags.get(322, 1)), int(tags.get(323, 1)))]
    except Exception:  # each format has exceptions of its own
        raise Refusal(400, 'what was sent is no BMP, JPEG, PNG, TIFF or WebP picture, or is '
                           'damaged') from None
    for width, height in sizes:
        if width * height > max_pixels:
            raise Refusal(413, f'the picture is {width}x{height} pixels, {width * height:,} in '
                               f'all, and no more than {max_pixels:,} are taken: send a smaller '
                               'one')
    scans = content.count(b'\xff\xda') if content.startswith(b'\xff\xd8') else 0
    if scans > MAX_SCANS:
        raise Refusal(413, f'the JPEG has {scans} scans, and no more than {MAX_SCANS} are decoded: '
                           'save it anew')
