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

from ...inference import Detections
from ...text import shorten
from ..style import COLOUR_MAP, COLOURS, Axes, Figure, colormaps, finish, new_figure
from .class_bars import draw_class_bars

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
        classes: Names, in the order of the arrays, which is that of COCO's category ids.
        objects: How many objects of each class there are, crowds apart, shape (K,).
        thresholds: Of the IoU, shape (T,).
        recalls: Where the precision is given, shape (R,).
        precision: The highest one at each recall or a greater one, -1 for a class without objects,
            shape (T, R, K, A, M).
        summary: COCO's twelve numbers by name, see ``SUMMARY``; -1 where there are no objects.
    """

    classes: tuple[str, ...]
    objects: np.ndarray
    thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    summary: dict[str, float]

    def curve(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Get precision against recall, for each class.

        Args:
            iou: The threshold; None to average over all of them.
            area: Size of the objects, one of ``AREAS``.

        Returns:
            Shape (R, K), NaN for a class without such objects.

        Raises:
            ValueError: There is no such threshold or size.
        """
        if area not in AREAS:
            raise ValueError(f'area={area!r} must be one of {", ".join(map(repr, AREAS))}')
        chosen = np.full(len(self.thresholds), True) if iou is None else np.isclose(
            self.thresholds, iou)
        if not chosen.any():
            raise ValueError(f'iou={iou:g}: the evaluation has only the thresholds '
                             f'{", ".join(f"{value:g}" for value in self.thresholds)}')
        precision = self.precision[chosen, :, :, AREAS.index(area), -1]
        return np.where(precision.min((0, 1)) < 0, np.nan, precision.mean(0))

    def average_precision(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Average the precision over recalls, for each class, shape (K,); see :meth:`curve`."""
        return self.curve(iou, area).mean(0)


def evaluate(predictions: Mapping[Any, Detections], ann_file: str | Path,
             classes: Sequence[str]) -> CocoResults:
    """Evaluate detections the way COCO does.

    Args:
        predictions: By image id, see :func:`~.predictions.read_predictions`. Images
            of the file that have none are left out.
        ann_file: Annotations in COCO's format.
        classes: Names by label, as the dataset has them.

    Raises:
        FileNotFoundError: There is no annotation file.
        DataError: The file is not what it should be, or predictions and file do not belong
            together.
        ValueError: Nothing was detected in any image.
    """
    from ...detection import CheckedCocoMetric
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
        results: See :func:`evaluate`.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: There are no objects of any class.
    """
    return draw_class_bars('AP', results.average_precision(), results.classes, results.objects,
                           'objects', ('AP50', results.average_precision(0.5)))


def draw_precision_recall(results: CocoResults) -> Figure:
    """Draw precision against recall, mean of the classes, a line for each threshold of the IoU.

    Args:
        results: See :func:`evaluate`.

    Returns:
        The figure; its ``savefig`` writes it.
    """
    figure, axes = _square('Precision and recall, mean of the classes')
    colours = colormaps[COLOUR_MAP](np.linspace(0, 0.9, len(results.thresholds)))
    for iou, colour in zip(results.thresholds, colours, strict=True):
        curve = _mean_of_classes(results.curve(iou))
        axes.plot(results.recalls, curve, color=colour, linewidth=1.6,
                  label=f'{iou:.2f}: {curve.mean():.3f}')
    return _explain(figure, 'IoU: AP')


def draw_class_precision_recall(results: CocoResults, iou: float = 0.5) -> Figure:
    """Draw precision against recall, a line for each class, and their mean.

    Of more than 12 classes, the three best and the three worst have a colour; the others are grey.

    Args:
        results: See :func:`evaluate`.
        iou: The threshold.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: There is no such threshold.
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
                  label=f'{shorten(results.classes[index])}: {ap[index]:.3f}')
    if len(order) > 1:
        mean = _mean_of_classes(curves)
        axes.plot(results.recalls, mean, color='black', linewidth=2.4,
                  label=f'mean: {mean.mean():.3f}')
    return _explain(figure, 'class: AP')


def _square(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(5.4, 4)
    axes = figure.add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel('recall')
    axes.set_ylabel('precision')
    finish(axes, title)
    return figure, axes


def _explain(figure: Figure, title: str) -> Figure:
    """Add the legend."""
    figure.legend(loc='outside right upper', frameon=False, fontsize=9, title=title,
                  title_fontsize=9)
    return figure


def _mean_of_classes(curves: np.ndarray) -> np.ndarray:
    """Average curves (R, K) over the classes that have objects; NaN if none has."""
    there = curves[:, np.isfinite(curves).all(0)]
    return there.mean(1) if there.size else np.full(len(curves), np.nan)


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
