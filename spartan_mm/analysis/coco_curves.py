"""COCO's evaluation taken apart: AP of each class, precision against recall."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import MMLogger

from .. import compat
from ..inference import Detections

compat.require('matplotlib', '3.6', 'analysis')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .class_bars import draw_class_bars, finish, shorten_name
from .curves import COLOURS

#: What COCO sums an evaluation up in, in its order.
SUMMARY = ('AP', 'AP50', 'AP75', 'AP small', 'AP medium', 'AP large',
           'AR 1', 'AR 10', 'AR 100', 'AR small', 'AR medium', 'AR large')

#: COCO's sizes of objects, by their area.
AREAS = ('all', 'small', 'medium', 'large')

# Up to so many classes, each has a colour of its own.
_MAX_LINES = 12
# Of more, so many of the best and of the worst.
_EXTREMES = 3
_GREY = '0.75'


@dataclass(frozen=True)
class CocoResults:
    """What COCO's evaluation of boxes gives: its arrays, with T = 10 thresholds of the IoU, R = 101
    recalls, K classes, A = 4 sizes (see ``AREAS``), and M = 3 numbers of detections an image.

    Args:
        classes: names, in the order of the arrays, which is that of COCO's category ids.
        objects: how many objects of each class there are, crowds apart, shape (K,).
        thresholds: of the IoU, shape (T,).
        recalls: where the precision is given, shape (R,).
        precision: the highest one at each recall or a greater one, -1 for a class without objects,
            shape (T, R, K, A, M).
        summary: COCO's twelve numbers by name, see ``SUMMARY``; -1 where there are no objects.
    """

    classes: tuple[str, ...]
    objects: np.ndarray
    thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    summary: dict[str, float]

    def average_precision(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Average the precision over recalls, for each class.

        Args:
            iou: the threshold; None to average over all of them.
            area: size of the objects, one of ``AREAS``.

        Returns:
            Shape (K,), NaN for a class without such objects.

        Raises:
            ValueError: there is no such threshold or size.
        """
        return _mean(self._select(iou, area), axis=(0, 1))

    def curve(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Get precision against recall, for each class.

        Args:
            iou: the threshold; None to average over all of them.
            area: size of the objects, one of ``AREAS``.

        Returns:
            Shape (R, K), NaN for a class without such objects.

        Raises:
            ValueError: there is no such threshold or size.
        """
        return _mean(self._select(iou, area), axis=0)

    def _select(self, iou: float | None, area: str) -> np.ndarray:
        """Choose thresholds and size, and the most detections, (T, R, K)."""
        if area not in AREAS:
            raise ValueError(f'area={area!r} must be one of {", ".join(map(repr, AREAS))}')
        precision = self.precision[:, :, :, AREAS.index(area), -1]
        if iou is None:
            return precision
        found = np.isclose(self.thresholds, iou)
        if not found.any():
            raise ValueError(f'iou={iou:g}: the evaluation has only the thresholds '
                             f'{", ".join(f"{value:g}" for value in self.thresholds)}')
        return precision[found]


def evaluate(predictions: Mapping[Any, Detections], ann_file: str | Path,
             classes: Sequence[str]) -> CocoResults:
    """Evaluate detections the way COCO does.

    Args:
        predictions: by image id, see :func:`spartan_mm.analysis.gallery.read_predictions`. Images
            of the file that have none are left out.
        ann_file: annotations in COCO's format.
        classes: names by label, as the dataset has them.

    Raises:
        FileNotFoundError: there is no annotation file.
        DataError: the file is not what it should be, or predictions and file do not belong
            together.
        ValueError: nothing was detected in any image.
    """
    from ..detection.coco_metric import CheckedCocoMetric
    kept: list[Any] = []
    with _silence(), _keep_evaluators(kept):
        metric = CheckedCocoMetric(ann_file=str(ann_file), proposal_nums=(1, 10, 100),
                                   missing_images='leave_out')
        metric.dataset_meta = dict(classes=tuple(classes))
        metric.compute_metrics([
            ({}, dict(img_id=image, bboxes=found.boxes, labels=found.labels, scores=found.scores))
            for image, found in predictions.items()])
    if not kept:
        raise ValueError(f'nothing was detected in any of {len(predictions)} images: there is no '
                         'precision to compute')

    [evaluator] = kept
    # pycocotools sorts the categories by id, in whatever order they were given.
    categories = evaluator.params.catIds
    images = set(evaluator.params.imgIds)
    annotations = evaluator.cocoGt.loadAnns(evaluator.cocoGt.getAnnIds(catIds=categories))
    objects = Counter(annotation['category_id'] for annotation in annotations
                      if annotation['image_id'] in images and not annotation.get('iscrowd'))
    return CocoResults(
        tuple(category['name'] for category in evaluator.cocoGt.loadCats(categories)),
        np.array([objects[category] for category in categories], dtype=int),
        np.array(evaluator.params.iouThrs), np.array(evaluator.params.recThrs),
        evaluator.eval['precision'], dict(zip(SUMMARY, evaluator.stats.tolist(), strict=True)))


def draw_class_ap(results: CocoResults) -> Figure:
    """Draw the AP of each class, the best first, with AP50 behind it.

    Of more than 80 classes, the 40 best and the 40 worst are drawn; classes without objects are
    left out.

    Args:
        results: see :func:`evaluate`.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there are no objects of any class.
    """
    return draw_class_bars('AP', results.average_precision(), results.classes, results.objects,
                           'objects', ('AP50', results.average_precision(0.5)))


def draw_precision_recall(results: CocoResults) -> Figure:
    """Draw precision against recall, mean of the classes, a line for each threshold of the IoU.

    Args:
        results: see :func:`evaluate`.

    Returns:
        The figure; its ``savefig`` writes it.
    """
    figure, axes = _square('Precision and recall, mean of the classes')
    colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(results.thresholds)))
    for iou, colour in zip(results.thresholds, colours, strict=True):
        curve = _mean_of_classes(results.curve(iou))
        axes.plot(results.recalls, curve, color=colour, linewidth=1.6,
                  label=f'{iou:.2f}: {curve.mean():.3f}')
    figure.legend(loc='outside right upper', frameon=False, fontsize=9, title='IoU: AP',
                  title_fontsize=9)
    return figure


def draw_class_precision_recall(results: CocoResults, iou: float = 0.5) -> Figure:
    """Draw precision against recall, a line for each class, and their mean.

    Of more than 12 classes, the three best and the three worst have a colour; the others are grey.

    Args:
        results: see :func:`evaluate`.
        iou: the threshold.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there is no such threshold.
    """
    figure, axes = _square(f'Precision and recall of each class, IoU {iou:.2f}')
    curves, ap = results.curve(iou), results.average_precision(iou)
    order = np.argsort(-ap, kind='stable')
    order = order[np.isfinite(ap[order])]
    named = order
    if len(order) > _MAX_LINES:
        named = np.concatenate([order[:_EXTREMES], order[-_EXTREMES:]])
        for index in order[_EXTREMES:-_EXTREMES]:
            axes.plot(results.recalls, curves[:, index], color=_GREY, linewidth=0.7)
    # Black is the mean's.
    colours = COLOURS[:-1]
    for place, index in enumerate(named):
        axes.plot(results.recalls, curves[:, index], color=colours[place % len(colours)],
                  linestyle='--' if place >= len(colours) else '-', linewidth=1.4,
                  label=f'{shorten_name(results.classes[index])}: {ap[index]:.3f}')
    if len(order) > 1:
        mean = _mean_of_classes(curves)
        axes.plot(results.recalls, mean, color='black', linewidth=2.4,
                  label=f'mean: {mean.mean():.3f}')
    figure.legend(loc='outside right upper', frameon=False, fontsize=9,
                  title='class: AP', title_fontsize=9)
    return figure


def _square(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 4), dpi=100, layout='constrained')
    axes = figure.add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel('recall')
    axes.set_ylabel('precision')
    finish(axes, title)
    return figure, axes


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Average what is there; NaN where COCO's -1 says that nothing is."""
    there = values > -1
    total, count = np.where(there, values, 0).sum(axis), there.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _mean_of_classes(curves: np.ndarray) -> np.ndarray:
    """Average curves (R, K) over the classes that have objects."""
    return _mean(np.nan_to_num(curves, nan=-1), axis=1)


@contextmanager
def _keep_evaluators(kept: list[Any]) -> Iterator[None]:
    """Keep the evaluators that mmdet's metric makes and, the summary apart, throws away."""
    from mmdet.evaluation.metrics import coco_metric
    evaluator = coco_metric.COCOeval

    def make(*args: Any, **kwargs: Any) -> Any:
        kept.append(evaluator(*args, **kwargs))
        return kept[-1]

    coco_metric.COCOeval = make
    try:
        yield
    finally:
        coco_metric.COCOeval = evaluator


@contextmanager
def _silence() -> Iterator[None]:
    """Leave out what pycocotools prints and mmdet logs: the caller shows the numbers."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)
