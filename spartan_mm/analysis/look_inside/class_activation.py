"""Class activation maps: where in an image a classifier or a detector finds what it says.

The paper's Figures 5 and 6. A method of pytorch-grad-cam weighs the channels of one layer by how
much they raise a number, and the sum of the weighted channels, where it is positive, is the map.
That number is

- of a classifier the logit of one class, before any softmax, as in the Grad-CAM paper;
- of a detector the sum of the log odds log(p / (1 - p)) of the scores p of the chosen detections:
  all that its own ``predict`` gives of one class, or of any, with at least a score. Where a score
  is the sigmoid of a logit, as RT-DETR's is, its log odds are this logit.

NOTE: the default is Grad-CAM for a classifier and LayerCAM for a detector. Grad-CAM weighs a
channel by the average of its gradients over all positions, which suits a score that is made of such
averages. The score of a detection hangs on a few positions, and channels that matter there light up
wherever else they are strong; LayerCAM weighs each position by its own gradient.

NOTE: RT-DETR hands selected queries and boxes to its decoder without a gradient, and so does each
decoder layer with its boxes. What remains, and what the maps show, is how the decoder reads the
maps at the places it looks at, not how these places were found.

NOTE: methods that mask the image and look at the new score (Score-CAM, Ablation-CAM) are left out:
they take hundreds of passes, and in a masked image a detector finds other boxes.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...drawing import add_caption, class_name
from ...engine.launch import choose_device
from ...errors import UsageError
from ...files import write_json, write_whole
from ...inference import Classifier, Detections, Detector, InputError, load_model
from ...requirements import require
from ...text import shorten
from ..models import read_config
from ..style import COLOUR_MAP, Figure, ScalarMappable, clear, colormaps, new_figure, write_figure
from .inputs import has_weights
from .layers import NOT_ON_ITS_OWN, LayerError, as_map, find_last_map, find_layer

#: What pytorch-grad-cam calls the methods. Those with 'eigen' take the first principal component of
#: the channels; 'eigencam' looks at no class at all, and the sign of its map is arbitrary.
METHODS = {
    'gradcam': 'GradCAM',
    'gradcam++': 'GradCAMPlusPlus',
    'xgradcam': 'XGradCAM',
    'hirescam': 'HiResCAM',
    'layercam': 'LayerCAM',
    'gradcamelementwise': 'GradCAMElementWise',
    'eigencam': 'EigenCAM',
    'eigengradcam': 'EigenGradCAM',
}

# pytorch-grad-cam decomposes a matrix with a row and a column for each position.
_MAX_EIGEN_POSITIONS = 6400

# Keeps the log odds of a score finite that is 1 in float32.
_SCORE_EPS = 1e-7

_MAX_ROWS = 20  # of a grid
_MIN_SIDE = 300  # pixels of the shorter side of a picture


@dataclass
class Explanation:
    """Where in an image a model finds a class.

    Args:
        picture: The image that the map lies over, in BGR order, shape (H, W, 3): for a detector as
            it came, for a classifier what is left of it after its pipeline, enlarged if small.
        map: From 0 to 1, shape (H, W); all zeros if nothing at the layer raises the number that is
            explained; None if there is no detection to explain.
        caption: The class and its score.
        found: Of a detector, the detections that are explained, in pixels of the picture.
        record: What else there is to say, fit for JSON.
    """

    picture: np.ndarray
    map: np.ndarray | None
    caption: str
    found: Detections | None = None
    record: dict[str, Any] = field(default_factory=dict)


class Explainer:
    """Makes class activation maps of a model.

    Args:
        model: A detector or classifier with its weights.
        layer: The name of the layer to look at; None for the last one in the backbone that gives a
            map with more than one position, its last stage. It must run once in a forward pass.
        method: One of ``METHODS``; None for 'gradcam' of a classifier and 'layercam' of a detector.
        score_threshold: The least score of a detection that is explained.
        top: The largest number of detections that are explained, best first; None for all.

    Raises:
        ImportError: Pytorch-grad-cam is not installed.
        LayerError: There is no such layer.
        ValueError: There is no such method.
    """

    def __init__(self, model: Detector | Classifier, layer: str | None = None,
                 method: str | None = None, score_threshold: float = 0.3,
                 top: int | None = None) -> None:
        library = require('pytorch_grad_cam', '1.5', 'analysis')
        if method is None:
            method = 'gradcam' if isinstance(model, Classifier) else 'layercam'
        if method not in METHODS:
            raise ValueError(f'method={method!r} must be one of {", ".join(METHODS)}')
        if layer is not None:
            find_layer(model.model, layer)
        self.model, self.layer, self.method = model, layer, method
        self.score_threshold, self.top = score_threshold, top
        # The arithmetic alone: layers are recorded here.
        self._cam = getattr(library, METHODS[method])(model.model, [])

    def explain(self, image: np.ndarray, label: int | None = None) -> Explanation:
        """Make a map.

        Args:
            image: In BGR order, shape (H, W, 3).
            label: The index of a class; None for the one that a classifier predicts, or for the
                detections of all classes.

        Raises:
            LayerError: The output of the layer is no map, or the layer does not run exactly once.
        """
        data = self.model.collate([image])
        seen = _as_picture(data['inputs'][0])
        inputs = self.model.model.data_preprocessor(data, False)
        explain = (self._explain_class if isinstance(self.model, Classifier)
                   else self._explain_detections)
        explanation = explain(image, seen, inputs, label)
        explanation.record.update(layer=self.layer, method=self.method)
        if explanation.map is not None and not explanation.map.any():
            explanation.caption += ' (nothing speaks for it)'
        return explanation

    def _explain_class(self, image: np.ndarray, seen: np.ndarray, inputs: Mapping[str, Any],
                       label: int | None) -> Explanation:
        ranked, = self.model.classify([image])
        label = int(ranked.labels[0]) if label is None else label
        score = float(ranked.scores[ranked.labels == label][0])
        raw, _ = self._make_map(lambda images: (self.model.model(images, mode='tensor')[:, label],
                                                None), inputs['inputs'])
        size = inputs['inputs'].shape[-2:]

        picture = _enlarge(seen)
        inside = _upsample(raw, size, len(picture) / len(seen))[:len(picture), :picture.shape[1]]
        name = class_name(self.model.classes, label)
        return Explanation(picture, _scale(inside), f'{name}  {score:.2f}',
                           record=dict(label=label, class_name=name, score=round(score, 4)))

    def _explain_detections(self, image: np.ndarray, seen: np.ndarray, inputs: Mapping[str, Any],
                            label: int | None) -> Explanation:
        picture, classes = _enlarge(image), self.model.classes
        name = None if label is None else class_name(classes, label)
        try:
            raw, found = self._make_map(
                partial(self._score_detections, inputs['data_samples'], label), inputs['inputs'])
        except _NothingFoundError as error:
            best, = error.args
            best = '' if best is None else f' (best {best:.2f})'
            return Explanation(picture, None, f'no {name or "detection"}{best}',
                               record=dict(class_name=name, detections=[]))
        # Padding to the right and below is not part of the image.
        height, width = seen.shape[:2]
        size = inputs['inputs'].shape[-2:]
        inside = cv2.resize(_upsample(raw, size)[:height, :width], picture.shape[1::-1])
        best, score = class_name(classes, found.labels[0]), f'{found.scores[0]:.2f}'
        number = len(found.labels)
        caption = (f'{best}  {score}' if number == 1 else
                   f'{number} × {best}, best {score}' if len(set(found.labels)) == 1 else
                   f'{number} detections, best {best} {score}')
        record = dict(class_name=name, detections=found.as_records())
        found = replace(found, boxes=found.boxes * (len(picture) / len(image)))
        return Explanation(picture, _scale(inside), caption, found, record)

    def _score_detections(self, samples: list, label: int | None, images: Tensor
                          ) -> tuple[Tensor, Detections]:
        """Sum the log odds of the chosen detections in one image."""
        with _undetached(self.model.model):
            sample, = self.model.model(images, [sample.clone() for sample in samples],
                                       mode='predict')
        found = sample.pred_instances
        if label is not None:
            found = found[found.labels == label]
        found = found[found.scores.argsort(descending=True)]
        best = found.scores[0].item() if len(found) else None
        found = found[found.scores >= self.score_threshold][:self.top]
        if not len(found):
            raise _NothingFoundError(best)
        chosen = Detections(*(found[key].detach().cpu().numpy()
                              for key in ('bboxes', 'labels', 'scores')), self.model.classes)
        return found.scores.float().logit(eps=_SCORE_EPS).sum(), chosen

    def _make_map(self, score: Callable[[Tensor], tuple[Tensor, Any]], images: Tensor
                  ) -> tuple[np.ndarray, Any]:
        """Make the map (H', W') of the layer, of one image (1, 3, H, W).

        NOTE: the library's own scaling is left out: it divides by the largest value plus 1e-7, of
        which little is left where gradients are small, as in the early layers of a detector, and
        with the padding in it.
        """
        size = tuple(images.shape[-2:])
        # Without it, the deploy form and frozen stages would have no gradients.
        images = images.detach().requires_grad_()
        if self.layer is None:
            self.layer = find_last_map(self.model.model, lambda: score(images)[0].sum(), size)
        outputs: list[Any] = []

        def record(_: nn.Module, __: Any, output: Any) -> Tensor | None:
            outputs.append(output)
            # A copy goes on, because the model may change it in place.
            return output.clone() if isinstance(output, Tensor) else None

        layer = find_layer(self.model.model, self.layer)
        with torch.enable_grad(), layer.register_forward_hook(record):
            total, found = score(images)
        try:
            activations, gradients = self._read_layer(outputs, total.sum(), size)
        except LayerError as error:
            raise LayerError(f'layer {self.layer} cannot be explained: {error}') from error
        return self._cam.get_cam_image(None, None, None, activations, gradients, False)[0], found

    def _read_layer(self, outputs: list[Any], total: Tensor, size: tuple[int, int]
                    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What the layer gave, (1, C, H', W'), and the gradients there if the method takes them."""
        if len(outputs) != 1:
            raise LayerError(f'it runs {len(outputs)} times in one pass; name a layer around it or '
                             'beside it' if outputs else f'it {NOT_ON_ITS_OWN}')
        output, = outputs
        activations = as_map(output, size)
        height, width = activations.shape[2:]
        if height * width == 1:
            raise LayerError('its map has a single position, which shows no place; name an '
                             'earlier layer')
        if 'eigen' in self.method and height * width > _MAX_EIGEN_POSITIONS:
            raise LayerError(f'its map has {height} x {width} positions, which takes {self.method} '
                             'a matrix with a row and a column for each; name a later layer, or '
                             'take another method')
        gradients = None
        if self.method != 'eigencam':
            if not total.requires_grad:
                raise LayerError('the model gives a score without a gradient; take the method '
                                 'eigencam, which needs none')
            if output.requires_grad:
                gradients, = torch.autograd.grad(total, output, allow_unused=True)
            if gradients is None:
                raise LayerError('no gradient of the score reaches it; name another layer')
            gradients = as_map(gradients, size).cpu().numpy()
        return activations.detach().cpu().numpy(), gradients


def load_explained(name: str, checkpoint: str | None = None,
                   device: str | None = None) -> Detector | Classifier:
    """Load a model whose maps are to be made, see :func:`load_model`.

    Raises:
        UnknownModelError: The name stands for nothing.
        UsageError: There are no weights, no config, or no such device.
    """
    device = choose_device(device)
    config = read_config(name)
    if config is None:
        raise UsageError(f'{name} has no config that says how images are prepared and what the '
                         'classes are; take a config of a detector or a classifier')
    if not has_weights(name, checkpoint):
        raise UsageError(f'{name} is a model without weights, and random ones explain nothing: '
                         f'name a checkpoint, too, as {name}=CHECKPOINT')
    return load_model(name if has_weights(name) else config, checkpoint, device)


def find_class(model: Detector | Classifier, name: str) -> int:
    """Find a class by its name, in whole or one of its synonyms, or by its index.

    A number is first looked for among the names.

    Args:
        model: Whose classes they are.
        name: As in ``model.classes``, but for capitals; or an index.

    Raises:
        UsageError: There is no such class; the message has the closest names.
    """
    names = {}
    for label, known in enumerate(model.classes):
        # ImageNet's are lists of synonyms.
        for synonym in (known, *known.split(',')):
            names.setdefault(synonym.strip().lower(), label)
    if name.strip().lower() in names:
        return names[name.strip().lower()]
    head = getattr(model.model, 'bbox_head', None) or getattr(model.model, 'head', None)
    count = len(model.classes) or getattr(head, 'num_classes', 0)
    if name.isdecimal() and int(name) < count:
        return int(name)
    close = difflib.get_close_matches(name.lower(), names, 4, 0.5)
    known = ([model.classes[label] for label in dict.fromkeys(names[other] for other in close)]
             or model.classes[:8])
    hint = f', such as {", ".join(known)}' if known else ', whose names are not known'
    raise UsageError(f'there is no class {name!r}: the {model.kind} has {count} '
                     f'(0 to {count - 1}){hint}')


def explain_images(explainers: Mapping[str, Explainer], images: Sequence[Path],
                   out_dir: str | Path, classes: Sequence[str | None] = (None, )
                   ) -> dict[str, str]:
    """Explain images by several models; write an overlay for each, ``grid.png``, ``results.json``.

    Args:
        explainers: By the names of their models.
        images: Files.
        out_dir: Where to write.
        classes: Names or indices of the classes to explain, see :func:`find_class`; None for what
            the model itself finds.

    Returns:
        For each image that could not be read, what is wrong with it. The others are explained.

    Raises:
        UsageError: A model does not have one of the classes.
        LayerError: A layer cannot be explained.
    """
    out_dir = Path(out_dir)
    labels = {name: [None if wanted is None else find_class(explainer.model, wanted)
                     for wanted in classes] for name, explainer in explainers.items()}
    failures, rows, results, taken = {}, [], [], set()
    for path in track(images, description='explaining'):
        try:
            pictures = {name: explainer.model.read(path) for name, explainer in explainers.items()}
        except InputError as error:
            failures[str(path)] = str(error)
            continue
        for number, wanted in enumerate(classes):
            title = path.name if wanted is None else f'{path.name}: {wanted}'
            items = []
            for name, explainer in explainers.items():
                explanation = explainer.explain(pictures[name], labels[name][number])
                file = _free_name([path.stem, wanted, name], taken)
                with write_whole(out_dir / file) as stream:
                    draw_overlay(explanation, name).save(stream, 'PNG')
                items.append(explanation)
                results.append(dict(image=str(path), model=name, overlay=file,
                                    **explanation.record))
            if len(rows) < _MAX_ROWS:
                rows.append((title, items))
    if rows:
        write_figure(out_dir / 'grid.png', draw_grid(rows, list(explainers)),
                     bbox_inches='tight', pad_inches=0.1)
    write_json(out_dir / 'results.json', dict(results=results, failures=failures))
    return failures


def overlay(explanation: Explanation) -> np.ndarray:
    """Lay the map in colours over the picture in grey, with the boxes of the detections.

    Returns:
        The picture in BGR order, shape (H, W, 3); as it is if there is no map.
    """
    canvas = explanation.picture.copy()
    if explanation.map is not None:
        grey = cv2.cvtColor(canvas, cv2.COLOR_BGR2GRAY)[..., None].astype(float)
        colours = 255 * colormaps[COLOUR_MAP](explanation.map)[..., 2::-1]
        canvas = np.uint8(np.round(0.45 * grey + 0.55 * colours))
    if explanation.found is not None:
        width = max(1, round(min(canvas.shape[:2]) / 300))
        boxes = np.round(explanation.found.boxes).astype(int).tolist()
        # A dark edge on either side, for bright maps.
        for grey, thickness in ((0, 3 * width), (255, width)):
            for box in boxes:
                cv2.rectangle(canvas, box[:2], box[2:], [grey] * 3, thickness)
    return canvas


def draw_overlay(explanation: Explanation, title: str) -> Image.Image:
    """Draw the overlay, pixel by pixel, under a title and a line with class and score."""
    picture = Image.fromarray(np.ascontiguousarray(overlay(explanation)[..., ::-1]))
    size = max(14, round(min(picture.size) / 24))
    return add_caption(picture, title, explanation.caption, size=size, indent=size // 2)


def draw_grid(rows: Sequence[tuple[str, Sequence[Explanation]]], names: Sequence[str]) -> Figure:
    """Draw images below each other and what several models make of them side by side.

    Args:
        rows: For each, what to call it and the explanations of all models.
        names: Of the models, a column each.
    """
    if not rows:
        raise ValueError('rows is empty: there is nothing to draw')
    # Relative to a column's width.
    heights = [max(item.picture.shape[0] / item.picture.shape[1] for item in items)
               for _, items in rows]
    side = 3.1
    figure = new_figure(side * (len(names) + 1) + 0.9,
                        side * sum(heights) + 0.45 * len(rows) + 0.5, 'compressed')
    grid = figure.subplots(len(rows), len(names) + 1, squeeze=False,
                           height_ratios=[height + 0.14 for height in heights])
    for axes, name in zip(grid[0], ['input', *names], strict=True):
        axes.set_title(shorten(name, 30), fontsize=12, fontweight='bold')
    for (title, items), line in zip(rows, grid, strict=True):
        shown = [(items[0].picture, title), *((overlay(item), item.caption) for item in items)]
        for axes, (picture, caption) in zip(line, shown, strict=True):
            axes.imshow(picture[..., ::-1])
            clear(axes)
            axes.set_xlabel(shorten(caption, 34), fontsize=11)
    scale = figure.colorbar(ScalarMappable(cmap=COLOUR_MAP), ax=grid[:, -1], fraction=0.06,
                            aspect=18, shrink=0.85)
    scale.set_ticks([0, 1], labels=['none', 'most'], fontsize=11)
    scale.set_label('contribution to the score', fontsize=11, labelpad=-18)
    return figure


class _NothingFoundError(Exception):
    """There is no detection to explain; its argument is the highest score there is, or None."""


class _NoDetach(TorchFunctionMode):
    """``tensor.detach()`` gives the tensor itself."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if function is Tensor.detach else function(*args, **(kwargs or {}))


@contextmanager
def _undetached(model: nn.Module) -> Iterator[None]:
    """Let gradients through ``predict_by_feat``, where mmdet's dense heads detach the scores."""

    def predict(method: Callable, *args: Any, **kwargs: Any) -> Any:
        with _NoDetach():
            return method(*args, **kwargs)

    heads = [module for module in model.modules() if hasattr(module, 'predict_by_feat')]
    for head in heads:
        head.predict_by_feat = partial(predict, head.predict_by_feat)
    try:
        yield
    finally:
        for head in heads:
            del head.predict_by_feat


def _free_name(parts: Sequence[str | None], taken: set[str]) -> str:
    """Make a file name of what a picture shows, another one than those that are taken."""
    stem = '-'.join(re.sub(r'[^\w.]+', '_', part) for part in parts if part is not None)
    names = (f'{stem}{ending}.png' for ending in chain([''], (f'-{n}' for n in count(2))))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _upsample(values: np.ndarray, size: Sequence[int], factor: float = 1.) -> np.ndarray:
    """Interpolate a map to a multiple of a size (H, W)."""
    height, width = (round(side * factor) for side in size)
    return cv2.resize(values.astype(np.float32), (width, height))


def _scale(values: np.ndarray) -> np.ndarray:
    """Leave out what is negative, and scale to at most 1."""
    values = np.maximum(values, 0)
    return values / (values.max() or 1)


def _as_picture(inputs: Tensor) -> np.ndarray:
    """Make a picture (H, W, 3) of what a pipeline gives, (3, H, W), before its normalisation."""
    picture = inputs.permute(1, 2, 0).float().numpy()
    if picture.min() < 0 or picture.max() <= 1:
        # Some pipelines normalise themselves.
        picture = 255 * (picture - picture.min()) / max(picture.max() - picture.min(), 1e-6)
    return np.uint8(picture.clip(0, 255).round())


def _enlarge(picture: np.ndarray) -> np.ndarray:
    """Repeat the pixels of a small picture, each a square, which hides nothing."""
    factor = -(-_MIN_SIDE // min(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
