"""Detections and classes in images, folders, videos and streams: ``spartan-mm infer``.

NOTE: The toolboxes' inferencers load what fits of a checkpoint, be it nothing; mmdet's
``inference_detector`` takes no batches. The models here insist on weights that fit.
"""
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from . import runtime
from .datasets.classes import find_names
from .datasets.images import decoding_of, list_images, take_image
from .drawing import class_colour, draw_bars, draw_boxes
from .engine.class_order import Match, load_in_order
from .errors import InputError, UsageError
from .model_index import check_predicts
from .requirements import require
from .results import find_writers
from .runtime import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from .runtime import Classification, Detections, Report, Runtime, Source
from .tracking import WEAKEST, Tracker
from .weights.loading import find_classes
from .weights.stored_config import config_from, find_test_dataset
from .zoo import find_config, is_checkpoint


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
    task: ClassVar[str]

    def __init__(self, config: str | Config, checkpoint: str | None = None,
                 device: str | None = None, match_classes: Match = None) -> None:
        cfg, name, checkpoint, match_classes = find_weights(config, checkpoint, match_classes)
        if cfg.get('default_scope') != self.scope:
            raise InputError(f'{name} describes no {self.kind} (its default_scope is '
                             f'{cfg.get("default_scope")!r}, not {self.scope!r})')
        check_predicts(cfg, name)
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
        #: What it is read from.
        self.files = [name, checkpoint]

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

    def __call__(self, images: Any, batch_size: int | None = None) -> list[Any]:
        """Detect or classify, so many images at a time; all at once by default."""
        images = list_images(images)
        step = batch_size or max(len(images), 1)
        return [found for start in range(0, len(images), step) for found in self.run(
            self.collate([*map(self.read, images[start:start + step])]))]

    @torch.inference_mode()
    def run(self, batch: dict[str, list[Any]]) -> list[Any]:
        """Run a batch of :meth:`collate`, and say what was found in each image."""
        return [*map(self._take, self.model.test_step(batch))]

    def _take(self, sample: Any) -> Any:
        """Take what was found in an image out of what the toolbox says of it."""
        raise NotImplementedError


class Detector(Model):
    """A detector: boxes, classes and scores. Everything else is said of :class:`Model`."""

    scope, kind, task = 'mmdet', 'detector', 'detection'

    def detect(self, images: Any) -> list[Detections]:
        """Find objects in images, whatever :meth:`read` takes; sizes may differ."""
        return self(images)

    def _take(self, sample: Any) -> Detections:
        objects = sample.pred_instances.cpu().numpy()
        return Detections(objects.bboxes, objects.labels, objects.scores, self.classes
                          ).best_first()


class Classifier(Model):
    """A classifier: a score for each class. Everything else is said of :class:`Model`."""

    scope, kind, task = 'mmpretrain', 'classifier', 'classification'

    def classify(self, images: Any) -> list[Classification]:
        """Score all classes of images, whatever :meth:`read` takes.

        Sizes may differ as far as the config's pipeline makes them equal.
        """
        return self(images)

    def _take(self, sample: Any) -> Classification:
        scores = sample.pred_score.float().cpu().numpy()
        return Classification(np.arange(len(scores)), scores, self.classes).best_first()


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


def find_source(path: Any, out_dir: str | Path) -> Source:
    """See what there is to process, see :func:`spartan_mm.runtime.find_source`.

    Args:
        path: An image, a folder, a pattern, a video, a camera's number, a URL; or several images.
        out_dir: Where the results are to be written; if it lies in the folder, it is not searched.

    Raises:
        InputError: If there is nothing at ``path``, a folder has no images, or pictures would
            overwrite the input.
    """
    source = runtime.find_source(path, out_dir)
    runtime.check_places(source.pictures(Path(out_dir)).values(), [*source.images, source.video])
    return source


def find_images(path: Any, out_dir: str | Path) -> Source:
    """See what images there are, like :func:`find_source`.

    Raises:
        InputError: There as well, or if it is a video.
    """
    source = find_source(path, out_dir)
    if source.video is not None:
        raise InputError(f'{source.video_name} is a video; give an image or a folder of images')
    return source


def infer(model: Detector | Classifier | Runtime, source: Source, out_dir: str | Path,
          score_threshold: float = 0.3, batch_size: int = 1, top: int = 5, *,
          formats: Sequence[str] = ('json', ), ann_file: str | Path | None = None,
          pictures: bool = True, track: bool = False, tile: int | None = None) -> Report:
    """Process images, a video, a camera or a stream; write pictures and results.

    Pictures keep their names and subfolders; a video becomes an .mp4 file. See
    :func:`spartan_mm.runtime.process`.

    Args:
        model: What detects or classifies.
        source: What :func:`find_source` found.
        out_dir: Where to write.
        score_threshold: The least score of a detection that is written and drawn.
        batch_size: Number of images, frames or tiles in one pass through the model.
        top: Number of classes that are written and drawn; the classifier's counterpart of
            ``score_threshold``.
        formats: Of results: 'json', 'jsonl', 'csv', 'yolo', 'coco'.
        ann_file: COCO's annotation file with the ids that 'coco' needs.
        pictures: Whether to draw.
        track: Whether to follow objects from image to image, see :class:`Tracker`.
        tile: Side of the tiles in which small objects of large images are sought; None for none.

    Raises:
        InputError: If a video cannot be opened or has no frames.
        RuntimeFileError: If results cannot be written.
        UsageError: If an option is not for this model or lacks what it needs.
    """
    detects = model.task == 'detection'
    if not detects and (track or tile):
        raise UsageError('a classifier gives no boxes: tracks and tiles are for detectors')
    files = find_writers(formats, Path(out_dir), source, detects, ann_file, model.classes)
    if tile:
        require('sahi', '0.12', 'video')
        from .tiling import TiledDetector
        model = TiledDetector(model, tile, min(WEAKEST, score_threshold) if track
                              else score_threshold)
    return runtime.process(model, source, Path(out_dir), files, pictures, score_threshold, top,
                           batch_size, draw, partial(Tracker, score_threshold) if track else None)


def draw(image: np.ndarray | Image.Image, found: Detections | Classification) -> Image.Image:
    """Draw what was found in an image that a model has read."""
    if isinstance(image, Image.Image):
        image = np.asarray(image)[..., ::-1]
    drawn = (draw_detections if isinstance(found, Detections) else draw_classification)(image,
                                                                                      found)
    return Image.fromarray(np.ascontiguousarray(drawn[..., ::-1]))


def draw_detections(image: np.ndarray, detections: Detections) -> np.ndarray:
    """Draw boxes, class names and scores on a copy of an image, the highest score on top.

    The image is in BGR order, shape (H, W, 3).
    """
    canvas = np.array(image, order='C')
    order = np.argsort(detections.scores, kind='stable')
    draw_boxes(canvas, detections.boxes[order], [*map(detections.describe, order)],
               [class_colour(label)[::-1] for label in detections.labels[order]])
    return canvas


def draw_classification(image: np.ndarray, found: Classification) -> np.ndarray:
    """Draw a bar for each class beside an image, see :func:`draw_bars`; images are in BGR order."""
    names = [*map(found.name, found.labels)]
    colours = [*map(class_colour, found.labels)]
    return draw_bars(image[..., ::-1], names, found.scores, colours)[..., ::-1].copy()


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
