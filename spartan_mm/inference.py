"""Detections and classes in images, folders and videos: ``spartan-mm infer``.

NOTE: The toolboxes' inferencers load what fits of a checkpoint, be it nothing; mmdet's
``inference_detector`` takes no batches. The models here insist on weights that fit.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from rich.progress import track

from .datasets.classes import find_names
from .datasets.images import decoding_of, list_images, take_image
from .drawing import class_colour, class_name, draw_bars, draw_boxes
from .engine.class_order import Match, load_in_order
from .errors import InputError
from .files import check_writable, write_json, write_whole
from .weights.loading import find_classes
from .weights.stored_config import config_from, find_test_dataset
from .zoo import find_config, is_checkpoint

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')

# What a model makes of an image: a picture to look at, and a record fit for JSON.
Processed = tuple[np.ndarray, dict[str, Any]]

# What says in the results which image or frame it is, and the image.
Named = tuple[dict[str, Any], np.ndarray]


class _Found:
    """Labels with scores, and perhaps boxes."""

    def select(self, index: Any) -> '_Found':
        """Keep some, as numpy indexes an array."""
        return type(self)(*(values[index] for values in vars(self).values()))

    def best_first(self) -> '_Found':
        """Sort by score; equals stay in their order."""
        return self.select(np.argsort(-self.scores, kind='stable'))

    def as_records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Describe each by a dict fit for JSON."""
        return [dict(label=int(label), class_name=class_name(classes, label),
                     score=round(float(score), 4))
                for label, score in zip(self.labels, self.scores, strict=True)]


@dataclass
class Detections(_Found):
    """What was found in one image.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        labels: Class indices, shape (N,).
        scores: From 0 to 1, shape (N,), highest first.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def above(self, threshold: float) -> 'Detections':
        """Keep the detections with at least this score."""
        return self.select(self.scores >= threshold)

    def as_records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        return [dict(bbox=[round(float(corner), 2) for corner in box], **record)
                for box, record in zip(self.boxes, super().as_records(classes), strict=True)]


@dataclass
class Classification(_Found):
    """What an image is taken for.

    Args:
        labels: Class indices, shape (K,).
        scores: From 0 to 1, shape (K,), highest first.
    """

    labels: np.ndarray
    scores: np.ndarray


@dataclass
class Source:
    """Where images come from.

    Args:
        root: The folder that the names in the results start from.
        images: Image files, all under ``root``.
        video: A video file, in place of images.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    video: Path | None = None


@dataclass
class InferenceReport:
    """What a run over images or frames gave.

    Args:
        results: One dict for each image or frame, fit for JSON.
        failures: What is wrong with each image that could not be read or written, and with a video
            that breaks off.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Model:
    """A model and the test pipeline of its config; subclasses are for a task each.

    Args:
        config: The config file or the name of a model; or a checkpoint that holds its config; or
            the config itself.
        checkpoint: The weights, a local path or a URL; None if ``config`` is a checkpoint that
            holds them.
        device: Such as 'cpu' or 'cuda:0'; None for a GPU if there is one.
        match_classes: What to do if the config names other classes for its test data than the
            checkpoint: 'name' to put the outputs in the config's order, 'number' to keep those of
            the checkpoint, None to refuse.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        InputError: If the config is for another task, or there are no weights.
        CheckpointError: If the checkpoint belongs to another architecture or has other classes.
    """

    #: The default scope of the configs, what the model is called, and what it does.
    scope: ClassVar[str]
    kind: ClassVar[str]
    doing: ClassVar[str]

    def __init__(self, config: str | Config, checkpoint: str | None = None,
                 device: str | None = None, match_classes: Match = None) -> None:
        cfg, name, checkpoint, match_classes = find_weights(config, checkpoint, match_classes)
        if cfg.get('default_scope') != self.scope:
            raise InputError(f'{name} describes no {self.kind} (its default_scope is '
                             f'{cfg.get("default_scope")!r}, not {self.scope!r})')
        dataset = find_test_dataset(cfg)
        loader, *steps = dataset.pipeline
        self._decoding = decoding_of(loader)
        self._float = loader.get('to_float32', False)
        with DefaultScope.overwrite_default_scope(self.scope):
            self._pipeline = Compose([step for step in steps if step['type'] != 'LoadAnnotations'])
            # A pretrained backbone that the config names is not loaded: nothing calls
            # init_weights().
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
            classes = find_classes(load_in_order(model, cfg, checkpoint, match_classes))
            self.classes = find_names(model, classes, dataset, checkpoint)
        self.model = model.to(device or get_device()).eval()

    def read(self, image: Any) -> np.ndarray:
        """Read an image the way the config's pipeline does, see :func:`take_image`.

        Args:
            image: The path or the content of a file, a Pillow image or an array.

        Returns:
            The image in BGR order, shape (H, W, 3).

        Raises:
            InputError: If it cannot be read or is no image.
        """
        return take_image(image, **self._decoding)

    def collate(self, images: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        """Run images through the config's pipeline, which gives what ``test_step`` takes."""
        batch = []
        for image in images:
            size = image.shape[:2]
            image = image.astype(np.float32) if self._float else image
            batch.append(self._pipeline(dict(img=image, img_shape=size, ori_shape=size, img_id=0,
                                             img_path=None)))
        return {key: [item[key] for item in batch] for key in batch[0]}

    @torch.inference_mode()
    def run(self, batch: dict[str, list[Any]]) -> list[Any]:
        """Run a batch of :meth:`collate`, and say what was found in each image."""
        return [*map(self._take, self.model.test_step(batch))]

    def _predict(self, images: Any) -> list[Any]:
        """Run a batch of images through the pipeline and the model."""
        images = [*map(self.read, list_images(images))]
        return self.run(self.collate(images)) if images else []


class Detector(Model):
    """A detector: boxes, classes and scores. Everything else is said of :class:`Model`."""

    scope, kind, doing = 'mmdet', 'detector', 'detecting'

    def detect(self, images: Any) -> list[Detections]:
        """Find objects in images, whatever :meth:`read` takes; sizes may differ."""
        return self._predict(images)

    @staticmethod
    def _take(sample: Any) -> Detections:
        objects = sample.pred_instances.cpu().numpy()
        return Detections(objects.bboxes, objects.labels, objects.scores).best_first()

    def process(self, images: Any, score_threshold: float = 0.3
                ) -> list[Processed]:
        """Draw and describe the detections with at least a score."""
        images = [*map(self.read, list_images(images))]
        found = [detections.above(score_threshold) for detections in self.detect(images)]
        return [(draw_detections(image, detections, self.classes),
                 dict(detections=detections.as_records(self.classes)))
                for image, detections in zip(images, found, strict=True)]


class Classifier(Model):
    """A classifier: a score for each class. Everything else is said of :class:`Model`."""

    scope, kind, doing = 'mmpretrain', 'classifier', 'classifying'

    def classify(self, images: Any) -> list[Classification]:
        """Score all classes of images, whatever :meth:`read` takes.

        Sizes may differ as far as the config's pipeline makes them equal.
        """
        return self._predict(images)

    @staticmethod
    def _take(sample: Any) -> Classification:
        scores = sample.pred_score.float().cpu().numpy()
        return Classification(np.arange(len(scores)), scores).best_first()

    def process(self, images: Any, top: int = 5) -> list[Processed]:
        """Draw and describe the classes with the highest scores."""
        images = [*map(self.read, list_images(images))]
        found = [classes.select(slice(top)) for classes in self.classify(images)]
        return [(draw_classification(image, classes, self.classes),
                 dict(predictions=classes.as_records(self.classes)))
                for image, classes in zip(images, found, strict=True)]


def load_model(config: str | Config, checkpoint: str | None = None,
               device: str | None = None, match_classes: Match = None
               ) -> Detector | Classifier:
    """Load the detector or classifier that a config describes; see :class:`Model`."""
    cfg, name = _read_config(config)
    tasks = {task.scope: task for task in (Detector, Classifier)}
    if cfg.get('default_scope') not in tasks:
        raise InputError(
            f'{name} describes neither a detector nor a classifier (its default_scope is '
            f'{cfg.get("default_scope")!r}, not one of {", ".join(map(repr, tasks))})')
    return tasks[cfg.default_scope](config, checkpoint, device, match_classes)


def find_source(path: str | Path, out_dir: str | Path) -> Source:
    """See what there is to process.

    Args:
        path: An image, a video, or a folder that is searched for images, subfolders included.
        out_dir: Where the results are to be written; if it lies in the folder, it is not searched.

    Raises:
        InputError: If there is nothing at ``path``, a folder has no images, or the results would
            overwrite the input.
    """
    path, own_results = Path(path), Path(out_dir).resolve()
    if not path.exists():
        raise InputError(f'input {path} does not exist')
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f'input {path} is no file')
        is_video = path.suffix.lower() in VIDEO_SUFFIXES
        source = Source(path.parent, [] if is_video else [path], path if is_video else None)
    else:
        skip = own_results if path.resolve() in own_results.parents else None
        source = Source(path, sorted(
            file for file in path.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES
            # A link that leads nowhere is an image that is missing.
            and (file.is_file() or file.is_symlink() and not file.exists())
            and skip not in file.resolve().parents))
        if not source.images:
            raise InputError(f'folder {path} holds no images ({", ".join(IMAGE_SUFFIXES)})')
    inputs = [source.video] if source.video else source.images
    replaced = {(own_results / file.relative_to(source.root)).resolve() for file in inputs}
    if source.root.resolve() == own_results or replaced.intersection(
            file.resolve() for file in inputs):
        raise InputError(f'the results would overwrite the input in {source.root}: choose another '
                         'folder to write to')
    return source


def find_images(path: str | Path, out_dir: str | Path) -> Source:
    """See what images there are, like :func:`find_source`.

    Raises:
        InputError: There as well, or if it is a video.
    """
    source = find_source(path, out_dir)
    if source.video is not None:
        raise InputError(f'{path} is a video; give an image or a folder of images')
    return source


def infer(model: Detector | Classifier, source: Source, out_dir: str | Path,
          score_threshold: float = 0.3, batch_size: int = 1, top: int = 5) -> InferenceReport:
    """Process images or a video; write pictures and ``results.json``.

    Pictures keep their names and subfolders; a video becomes an .mp4 file.

    Args:
        model: What detects or classifies.
        source: What :func:`find_source` found.
        out_dir: Where to write.
        score_threshold: The least score of a detection that is written and drawn.
        batch_size: Number of images or frames in one pass through the model.
        top: Number of classes that are written and drawn; the classifier's counterpart of
            ``score_threshold``.

    Raises:
        InputError: If a video cannot be opened or has no frames. An image that cannot be read, one
            that cannot be written, and a video that breaks off, is noted in the report and in the
            file, and the others are processed.
    """
    out_dir = Path(out_dir)
    check_writable(out_dir / 'results.json')
    options = dict(top=top) if isinstance(model, Classifier) else dict(
        score_threshold=score_threshold)
    report, film = InferenceReport(), None
    images = (_read_images(model, source, report) if source.video is None
              else _read_frames(source.video, model.doing, report))
    try:
        while batch := list(islice(images, batch_size)):
            processed = model.process([image for _, image in batch], **options)
            for (name, image), (picture, record) in zip(batch, processed, strict=True):
                height, width = image.shape[:2]
                report.results.append(dict(name, width=width, height=height, **record))
                if source.video is not None:
                    film = film or _open_film(source.video, out_dir, picture)
                    film.write(picture)
                    continue
                try:
                    _write_image(out_dir / name['file'], picture)
                except InputError as error:
                    report.failures[name['file']] = str(error)
    finally:
        if film is not None:
            film.release()
    write_json(out_dir / 'results.json',
               dict(source=str(source.video or source.root), classes=list(model.classes), **options,
                    results=report.results, failures=report.failures))
    return report


def draw_detections(image: np.ndarray, detections: Detections,
                    classes: Sequence[str]) -> np.ndarray:
    """Draw boxes, class names and scores on a copy of an image, the highest score on top.

    The image is in BGR order, shape (H, W, 3).
    """
    canvas, labels, scores = np.array(image, order='C'), detections.labels, detections.scores
    order = np.argsort(scores, kind='stable')
    draw_boxes(canvas, detections.boxes[order],
               [f'{class_name(classes, labels[i])} {scores[i]:.2f}' for i in order],
               [class_colour(labels[i])[::-1] for i in order])
    return canvas


def draw_classification(image: np.ndarray, found: Classification,
                        classes: Sequence[str]) -> np.ndarray:
    """Draw a bar for each class beside an image, see :func:`draw_bars`; images are in BGR order."""
    names = [class_name(classes, label) for label in found.labels]
    colours = [class_colour(label) for label in found.labels]
    return draw_bars(image[..., ::-1], names, found.scores, colours)[..., ::-1].copy()


def _read_images(model: Model, source: Source, report: InferenceReport) -> Iterator[Named]:
    for path in track(source.images, description=model.doing):
        name = path.relative_to(source.root).as_posix()
        try:
            image = model.read(path)
        except InputError as error:
            report.failures[name] = str(error)
        else:
            yield dict(file=name), image


def _read_frames(path: Path, doing: str, report: InferenceReport) -> Iterator[Named]:
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise InputError(f'{path} cannot be opened as a video')
    length = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = takewhile(lambda frame: frame is not None, (video.read()[1] for _ in count()))
    done = 0
    # Some containers do not tell the length.
    for frame in track(frames, doing, total=length if length > 0 else None):
        yield dict(file=path.name, frame=done), frame
        done += 1
    if not done:
        raise InputError(f'{path} has no frame that can be decoded')
    # The length that a container tells is often an estimate, off by a frame or two.
    if done < length - max(2, length // 100):
        report.failures[path.name] = (f'{path} breaks off after {done} of {length} frames; those '
                                      'are processed')


def _open_film(video: Path, out_dir: Path, picture: np.ndarray) -> cv2.VideoWriter:
    """Begin a video as fast as another, of pictures as large as this one."""
    target = check_writable(out_dir / f'{video.stem}.mp4', video)
    target.parent.mkdir(parents=True, exist_ok=True)
    rate = cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FPS) or 25.
    film = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*'mp4v'), rate,
                           picture.shape[1::-1])
    if not film.isOpened():
        raise InputError(f'{target} cannot be written: this OpenCV has no video encoder')
    return film


def _write_image(path: Path, image: np.ndarray) -> None:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        path = path.with_name(f'{path.name}.png')
    # cv2.imwrite cannot write to names beyond ASCII on Windows.
    encoded, content = cv2.imencode(path.suffix, image)
    if not encoded:
        height, width = image.shape[:2]
        raise InputError(f'{path} cannot be written: {path.suffix} holds no picture of '
                         f'{width}x{height} pixels; its results are in results.json')
    with write_whole(path, flush=False) as file:
        file.write(content)


def find_weights(config: str | Config, checkpoint: str | None, match_classes: Match
                 ) -> tuple[Config, str, str, Match]:
    """Find what a model is made of, by the arguments of :class:`Model`.

    Returns:
        The config and what it is called, the checkpoint, and what to do about other classes.

    Raises:
        InputError: There are no weights.
    """
    cfg, name = _read_config(config)
    if checkpoint is None:
        if not is_checkpoint(name):
            raise InputError(f'{name} is a config without weights; name a checkpoint, too')
        # A checkpoint's own config is no second opinion.
        return cfg, name, name, 'number'
    return cfg, name, str(checkpoint), match_classes


def _read_config(config: str | Config) -> tuple[Config, str]:
    """Read a config, and say what it is called."""
    if isinstance(config, Config):
        return config, str(config.filename or 'config')
    return (config_from(config) if is_checkpoint(config)
            else Config.fromfile(find_config(config))), str(config)
