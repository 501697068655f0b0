"""Detections and classes in images, folders and videos: what ``tools/infer.py`` calls."""

import colorsys
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import cv2
import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from .datasets.data_errors import UndecodableError
from .datasets.images import decode_image
from .errors import ExplainedError
from .weights.loading import find_meta, load_for_inference
from .weights.stored_config import config_from, find_test_dataset
from .zoo import find_config, is_checkpoint

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


# Of a picture with bars, in pixels: the least longer side of the image, the least height of a bar
# with its text, and the largest size of the text.
_MIN_SIDE, _MIN_ROW, _MAX_TEXT = 240, 36, 40

# What a model makes of an image: a picture to look at, and a record fit for JSON.
Processed = tuple[np.ndarray, dict[str, Any]]


class InputError(ExplainedError, ValueError):
    """An image, a folder, a video or a config that nothing can be found in or with."""


@dataclass
class Detections:
    """What was found in one image.

    Args:
        boxes: corners x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        labels: class indices, shape (N,).
        scores: from 0 to 1, shape (N,), highest first.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def above(self, threshold: float) -> 'Detections':
        """Keep the detections with at least this score."""
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.labels[keep], self.scores[keep])

    def as_records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Describe each detection by a dict fit for JSON."""
        return [
            dict(bbox=[round(float(corner), 2) for corner in box], label=int(label),
                 class_name=class_name(classes, label), score=round(float(score), 4))
            for box, label, score in zip(self.boxes, self.labels, self.scores, strict=True)
        ]


@dataclass
class Classification:
    """What an image is taken for.

    Args:
        labels: class indices, shape (K,).
        scores: from 0 to 1, shape (K,), highest first.
    """

    labels: np.ndarray
    scores: np.ndarray

    def top(self, count: int) -> 'Classification':
        """Keep the classes with the highest scores."""
        return Classification(self.labels[:count], self.scores[:count])

    def as_records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Describe each class by a dict fit for JSON."""
        return [dict(label=int(label), class_name=class_name(classes, label),
                     score=round(float(score), 4))
                for label, score in zip(self.labels, self.scores, strict=True)]


@dataclass
class Source:
    """Where images come from.

    Args:
        root: the folder that the names in the results start from.
        images: image files, all under ``root``.
        video: a video file, in place of images.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    video: Path | None = None


@dataclass
class Report:
    """What a run over images or frames gave.

    Args:
        results: one dict for each image or frame, fit for JSON.
        failures: for each image that could not be read or written, and for a video that breaks
            off, what is wrong with it.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Model:
    """A model and the test pipeline of its config; subclasses are for a task each.

    Args:
        config: the config file or the name of a model; or a checkpoint that holds its config; or
            the config itself.
        checkpoint: the weights, a local path or a URL; None if ``config`` is a checkpoint that
            holds them.
        device: such as 'cpu' or 'cuda:0'; None for a GPU if there is one.

    Raises:
        FileNotFoundError: if the config or the checkpoint does not exist.
        InputError: if the config is for another task, or there are no weights.
        CheckpointError: if the checkpoint belongs to another architecture.
    """

    #: The default scope of the configs, what the model is called, and what it does.
    scope: ClassVar[str]
    kind: ClassVar[str]
    doing: ClassVar[str]

    def __init__(self, config: str | Config, checkpoint: str | None = None,
                 device: str | None = None) -> None:
        cfg, name = _read_config(config), _name_of(config)
        if checkpoint is None and not is_checkpoint(name):
            raise InputError(f'{name} is a config without weights; name a checkpoint, too')
        scope = cfg.get('default_scope')
        if scope != self.scope:
            raise InputError(f'{name} describes no {self.kind} (its default_scope is {scope!r}, '
                             f'not {self.scope!r})')
        with DefaultScope.overwrite_default_scope(scope):
            self._build(cfg, checkpoint or name, device)

    def _build(self, cfg: Config, checkpoint: str, device: str | None) -> None:
        # A pretrained backbone that the config names is not loaded: nothing calls init_weights().
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        meta = find_meta(load_for_inference(model, checkpoint))
        self.model = model.to(device or get_device()).eval()

        dataset = find_test_dataset(cfg)
        self.classes = _class_names(meta.get('dataset_meta') or {}, dataset, model)
        loader, *steps = dataset.pipeline
        self._decoding = dict(flag=loader.get('color_type', 'color'),
                              backend=loader.get('imdecode_backend'))
        self._float = loader.get('to_float32', False)
        self._pipeline = Compose(
            [step for step in steps if step['type'] != 'LoadAnnotations'])

    def read(self, path: Path) -> np.ndarray:
        """Read an image the way the config's pipeline does.

        Grey and palette images become colour, 16 bits are scaled to 8, transparency is left out,
        and the image is turned as its EXIF orientation says, see :func:`decode_image`.

        Returns:
            The image in BGR order, shape (H, W, 3).

        Raises:
            InputError: if the file cannot be read or is no image.
        """
        try:
            return decode_image(path.read_bytes(), **self._decoding)
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error.strerror or error}') from error
        except UndecodableError as error:
            raise InputError(f'{path} cannot be decoded as an image: {error}') from error

    def process(self, images: Sequence[np.ndarray], **options: Any) -> list[Processed]:
        """Make of each image a picture to look at and a record."""
        raise NotImplementedError

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
    def _predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Run a batch of images through the pipeline and the model."""
        return self.model.test_step(self.collate(images))


class Detector(Model):
    """A detector: boxes, classes and scores. Everything else is said of :class:`Model`."""

    scope, kind, doing = 'mmdet', 'detector', 'detecting'

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Find objects in a batch of images.

        Args:
            images: in BGR order, each of shape (H, W, 3); sizes may differ.

        Returns:
            Detections in pixels of the images as they came.
        """
        found = []
        for sample in self._predict(images):
            objects = sample.pred_instances.cpu().numpy()
            best_first = np.argsort(-objects.scores, kind='stable')
            found.append(Detections(objects.bboxes[best_first], objects.labels[best_first],
                                    objects.scores[best_first]))
        return found

    def process(self, images: Sequence[np.ndarray], score_threshold: float = 0.3
                ) -> list[Processed]:
        """Draw and describe the detections with at least a score."""
        found = [detections.above(score_threshold) for detections in self.detect(images)]
        return [(draw_detections(image, detections, self.classes),
                 dict(detections=detections.as_records(self.classes)))
                for image, detections in zip(images, found, strict=True)]


class Classifier(Model):
    """A classifier: a score for each class. Everything else is said of :class:`Model`."""

    scope, kind, doing = 'mmpretrain', 'classifier', 'classifying'

    def classify(self, images: Sequence[np.ndarray]) -> list[Classification]:
        """Score the classes of a batch of images.

        Args:
            images: in BGR order, each of shape (H, W, 3); sizes may differ, as far as the config's
                pipeline makes them equal.

        Returns:
            All classes of each image.
        """
        found = []
        for sample in self._predict(images):
            scores = sample.pred_score.float().cpu().numpy()
            best_first = np.argsort(-scores, kind='stable')
            found.append(Classification(best_first, scores[best_first]))
        return found

    def process(self, images: Sequence[np.ndarray], top: int = 5) -> list[Processed]:
        """Draw and describe the classes with the highest scores."""
        found = [classes.top(top) for classes in self.classify(images)]
        return [(draw_classification(image, classes, self.classes),
                 dict(predictions=classes.as_records(self.classes)))
                for image, classes in zip(images, found, strict=True)]


def load_model(config: str | Config, checkpoint: str | None = None,
               device: str | None = None) -> Detector | Classifier:
    """Load the detector or classifier that a config describes; see :class:`Model`."""
    scope = _read_config(config).get('default_scope')
    tasks = {task.scope: task for task in (Detector, Classifier)}
    if scope not in tasks:
        raise InputError(f'{_name_of(config)} describes neither a detector nor a classifier (its '
                         f'default_scope is {scope!r}, not one of {", ".join(map(repr, tasks))})')
    return tasks[scope](config, checkpoint, device)


def find_source(path: str | Path, out_dir: str | Path) -> Source:
    """See what there is to process.

    Args:
        path: an image, a video, or a folder that is searched for images, subfolders included.
        out_dir: where the results are to be written; if it lies in the folder, it is not searched.

    Raises:
        InputError: if there is nothing at ``path``, a folder has no images, or the results would
            overwrite the input.
    """
    path, own_results = Path(path), Path(out_dir).resolve()
    if not path.exists():
        raise InputError(f'input {path} does not exist')
    root = path if path.is_dir() else path.parent
    if root.resolve() == own_results:
        raise InputError(f'the results would overwrite the input in {root}: choose another folder '
                         'to write to')
    if path.is_dir():
        skip = own_results if path.resolve() in own_results.parents else None
        images = sorted(file for file in path.rglob('*')
                        if file.suffix.lower() in IMAGE_SUFFIXES
                        # A link that leads nowhere is an image that is missing.
                        and (file.is_file() or file.is_symlink() and not file.exists())
                        and skip not in file.resolve().parents)
        if not images:
            raise InputError(f'folder {path} holds no images ({", ".join(IMAGE_SUFFIXES)})')
        return Source(root, images)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return Source(root, video=path)
    return Source(root, [path])


def find_images(path: str | Path, out_dir: str | Path) -> Source:
    """See what images there are, like :func:`find_source`.

    Raises:
        InputError: there as well, or if it is a video.
    """
    source = find_source(path, out_dir)
    if source.video is not None:
        raise InputError(f'{path} is a video; give an image or a folder of images')
    return source


def infer(model: Detector | Classifier, source: Source, out_dir: str | Path,
          score_threshold: float = 0.3, batch_size: int = 1, top: int = 5) -> Report:
    """Process images or a video; write pictures and ``results.json``.

    Pictures keep their names and subfolders; a video becomes an .mp4 file.

    Args:
        model: what detects or classifies.
        source: what :func:`find_source` found.
        out_dir: where to write.
        score_threshold: the least score of a detection that is written and drawn.
        batch_size: number of images or frames in one pass through the model.
        top: number of classes that are written and drawn; the classifier's counterpart of
            ``score_threshold``.

    Raises:
        InputError: if a video cannot be opened or has no frames. An image that cannot be decoded,
            and a video that breaks off, is noted in the report and in the file, and the others
            are processed.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    options = dict(top=top) if isinstance(model, Classifier) else dict(
        score_threshold=score_threshold)
    process = _infer_images if source.video is None else _infer_video
    report = process(model, source, out_dir, batch_size, options)
    content = dict(source=str(source.video or source.root), classes=list(model.classes), **options,
                   results=report.results, failures=report.failures)
    # Bytes of a name that are no UTF-8 become escapes, which JSON reads as Python's own names.
    (out_dir / 'results.json').write_text(json.dumps(content, ensure_ascii=False, indent=1),
                                          encoding='utf-8', errors='backslashreplace')
    return report


def draw_detections(image: np.ndarray, detections: Detections,
                    classes: Sequence[str]) -> np.ndarray:
    """Draw boxes, class names and scores on a copy of an image.

    Args:
        image: in BGR order, shape (H, W, 3).
        detections: what to draw.
        classes: names by class index.
    """
    canvas = image.copy()
    height, width = canvas.shape[:2]
    thickness = max(1, round(min(height, width) / 300))
    scale = max(0.35, min(height, width) / 1200)
    # The best detections last, on top.
    for box, label, score in list(zip(detections.boxes, detections.labels, detections.scores,
                                      strict=True))[::-1]:
        colour = _colour(int(label))
        left, top, right, bottom = (int(round(float(corner))) for corner in box)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, thickness)

        text = f'{class_name(classes, label)} {score:.2f}'
        (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        # Above the box if there is room, and never beyond the picture.
        x = max(0, min(left, width - text_width))
        y = top - base if top >= text_height + 2 * base else max(top, 0) + text_height + base
        cv2.rectangle(canvas, (x, y - text_height - base), (x + text_width, y + base), colour, -1)
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1,
                    cv2.LINE_AA)
    return canvas


def draw_classification(image: np.ndarray, found: Classification,
                        classes: Sequence[str]) -> np.ndarray:
    """Draw a bar for each class beside an image, as long as its score is high.

    Args:
        image: in BGR order, shape (H, W, 3); a small one is enlarged.
        found: the classes to draw, in this order.
        classes: names by class index.

    Returns:
        The picture in BGR order.
    """
    factor = max(1, _MIN_SIDE // max(image.shape[:2]))
    # Each pixel a square, which hides nothing of a small image.
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = image.shape[:2]
    total_height = max(height, _MIN_SIDE, _MIN_ROW * len(found.labels))
    row = min(total_height / max(len(found.labels), 1), 2.6 * _MAX_TEXT)
    text = int(row / 2.6)
    panel, margin = 18 * text, text

    canvas = Image.new('RGB', (width + panel, total_height), 'white')
    canvas.paste(Image.fromarray(np.ascontiguousarray(image[..., ::-1])), (0, 0))
    draw, font = ImageDraw.Draw(canvas), load_font(text)
    length = panel - 2 * margin
    for rank, (label, score) in enumerate(zip(found.labels, found.scores, strict=True)):
        left, top = width + margin, rank * row + 0.15 * row
        percentage = f'{100 * score:.1f} %'
        room = length - font.getlength(percentage) - margin
        draw.text((left, top), fit_text(class_name(classes, label), font, room), 'black', font)
        draw.text((left + length, top), percentage, 'black', font, anchor='ra')
        bar = left, top + 0.52 * row, left + length, top + 0.72 * row
        draw.rectangle(bar, fill=(230, 230, 230))
        red_green_blue = _colour(int(label))[::-1]
        draw.rectangle((*bar[:2], left + max(length * float(score), 1), bar[3]), red_green_blue)
    return np.asarray(canvas)[..., ::-1].copy()


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib brings along, the same on every machine.

    Args:
        size: in pixels.
    """
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'), size)


def class_name(classes: Sequence[str], label: int) -> str:
    """Name a class, by its number if it has no name."""
    return classes[label] if label < len(classes) else f'class {label}'


def _infer_images(model: Model, source: Source, out_dir: Path, batch_size: int,
                  options: dict[str, Any]) -> Report:
    report = Report()
    for start in track(range(0, len(source.images), batch_size), description=model.doing):
        names, images = [], []
        for path in source.images[start:start + batch_size]:
            name = path.relative_to(source.root).as_posix()
            try:
                images.append(model.read(path))
                names.append(name)
            except InputError as error:
                report.failures[name] = str(error)
        processed = model.process(images, **options) if images else []
        for name, image, (picture, record) in zip(names, images, processed, strict=True):
            target = out_dir / name
            if target.suffix.lower() not in IMAGE_SUFFIXES:
                target = target.with_name(f'{target.name}.png')
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_image(target, picture)
            except InputError as error:
                report.failures[name] = str(error)
            height, width = image.shape[:2]
            report.results.append(dict(file=name, width=width, height=height, **record))
    return report


def _infer_video(model: Model, source: Source, out_dir: Path, batch_size: int,
                 options: dict[str, Any]) -> Report:
    path = source.video
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise InputError(f'{path} cannot be opened as a video')
    # Some containers tell neither rate nor length.
    rate = video.get(cv2.CAP_PROP_FPS) or 25.
    length = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = _frames(video)
    progress = iter(track(frames, description=model.doing, total=length if length > 0 else None))
    report, writer = Report(), None
    try:
        while batch := list(islice(progress, batch_size)):
            for image, (picture, record) in zip(batch, model.process(batch, **options),
                                                strict=True):
                if writer is None:
                    target = out_dir / f'{path.stem}.mp4'
                    writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*'mp4v'), rate,
                                             picture.shape[1::-1])
                    if not writer.isOpened():
                        raise InputError(f'{target} cannot be written: this OpenCV has no video '
                                         'encoder')
                writer.write(picture)
                height, width = image.shape[:2]
                report.results.append(dict(file=path.name, frame=len(report.results), width=width,
                                           height=height, **record))
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if not report.results:
        raise InputError(f'{path} has no frame that can be decoded')
    # The length that a container tells is often an estimate, off by a frame or two.
    if len(report.results) < length - max(2, length // 100):
        report.failures[path.name] = (f'{path} breaks off after {len(report.results)} of {length} '
                                      'frames; those are processed')
    return report


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        more, frame = video.read()
        if not more:
            return
        yield frame


def _write_image(path: Path, image: np.ndarray) -> None:
    # cv2.imwrite cannot write to names beyond ASCII on Windows.
    encoded, content = cv2.imencode(path.suffix, image)
    if not encoded:
        height, width = image.shape[:2]
        raise InputError(f'{path} cannot be written: {path.suffix} holds no picture of '
                         f'{width}x{height} pixels; its results are in results.json')
    path.write_bytes(content.tobytes())


def _read_config(config: str | Config) -> Config:
    if isinstance(config, Config):
        return config
    return config_from(config) if is_checkpoint(config) else Config.fromfile(find_config(config))


def _name_of(config: str | Config) -> str:
    return str(config.filename) if isinstance(config, Config) else config


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text where it is too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f'{text}…') > width:
        text = text[:-1]
    return f'{text}…'


def _class_names(dataset_meta: dict[str, Any], dataset: dict[str, Any],
                 model: torch.nn.Module) -> tuple[str, ...]:
    """Find the names of the classes: in the checkpoint, else in the config, else COCO's if 80."""
    for meta in (dataset_meta, dataset.get('metainfo', {}),
                 getattr(DATASETS.get(dataset.type), 'METAINFO', {})):
        classes = meta.get('classes') or meta.get('CLASSES')
        if classes:
            return (classes, ) if isinstance(classes, str) else tuple(classes)
    if getattr(getattr(model, 'bbox_head', None), 'num_classes', None) == 80:
        from mmdet.evaluation import get_classes
        return tuple(get_classes('coco'))
    return ()


def _colour(label: int) -> tuple[int, int, int]:
    """Give each class a colour, neighbours far apart: hue moves by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return int(255 * blue), int(255 * green), int(255 * red)
