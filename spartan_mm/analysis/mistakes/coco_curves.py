"""COCO's evaluation taken apart: AP of each class, precision against recall."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import MMLogger

from ...text import shorten
from ..style import COLOUR_MAP, COLOURS, Figure, colormaps, finish, new_figure
from .class_bars import draw_class_bars
from .predictions import DetectorResults

#: What COCO sums an evaluation up in, in its order, each with what it is.
SUMMARY = {
    'AP': 'AP, IoU 0.50 to 0.95', 'AP50': 'AP50, IoU 0.50', 'AP75': 'AP75, IoU 0.75',
    'AP small': 'AP of small objects, area up to 32²',
    'AP medium': 'AP of medium objects, up to 96²', 'AP large': 'AP of large objects, beyond',
    'AR 1': 'recall with 1 detection an image', 'AR 10': 'recall with 10 detections',
    'AR 100': 'recall with 100 detections', 'AR small': 'recall of small objects',
    'AR medium': 'recall of medium objects', 'AR large': 'recall of large objects'}

#: COCO's sizes of objects, by their area; its thresholds of the IoU; where it takes the precision.
AREAS = ('all', 'small', 'medium', 'large')
THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)

# Up to so many classes, each has a colour of its own.
_MAX_LINES = 12
# Of more, so many of the best and of the worst.
_EXTREMES = 3


@dataclass(frozen=True)
class CocoResults:
    """What COCO's evaluation of boxes gives, of K classes.

    Args:
        classes: Names, in the order of the arrays, which is that of COCO's category ids.
        objects: How many objects of each class there are, crowds apart, shape (K,).
        precision: The highest one at each recall or a greater one, -1 for a class without objects:
            for each of ``THRESHOLDS``, ``RECALLS``, classes, ``AREAS`` and three numbers of
            detections an image, shape (10, 101, K, 4, 3).
        summary: COCO's twelve numbers by name, see ``SUMMARY``; -1 where there are no objects.
    """

    classes: tuple[str, ...]
    objects: np.ndarray
    precision: np.ndarray
    summary: dict[str, float]

    def curve(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Get precision against recall, for each class.

        Args:
            iou: The threshold; None to average over all of them.
            area: Size of the objects, one of ``AREAS``.

        Returns:
            Shape (101, K), NaN for a class without such objects.

        Raises:
            ValueError: There is no such threshold or size.
        """
        if area not in AREAS:
            raise ValueError(f'area={area!r} must be one of {", ".join(map(repr, AREAS))}')
        chosen = np.isclose(THRESHOLDS, THRESHOLDS if iou is None else iou)
        if not chosen.any():
            raise ValueError(f'iou={iou:g}: the evaluation has only the thresholds '
                             f'{", ".join(f"{value:g}" for value in THRESHOLDS)}')
        precision = self.precision[chosen, :, :, AREAS.index(area), -1]
        return np.where(precision.min((0, 1)) < 0, np.nan, precision.mean(0))

    def average_precision(self, iou: float | None = None, area: str = 'all') -> np.ndarray:
        """Average the precision over recalls, for each class, shape (K,); see :meth:`curve`."""
        return self.curve(iou, area).mean(0)


def evaluate(results: DetectorResults, truth: Any) -> CocoResults:
    """Evaluate detections the way COCO does.

    Args:
        results: Predictions with their dataset, which has the file's classes. Images of the file
            without a prediction are left out.
        truth: Annotations in COCO's format, or a dataset that gives them.

    Raises:
        FileNotFoundError: There is no annotation file.
        DataError: The file is not what it should be, or predictions and file do not belong
            together.
        ValueError: Nothing was detected in any image.
    """
    from ...detection import CheckedCocoMetric
    with _quiet_evaluators() as evaluators:
        source = dict(ann_file=str(truth)) if isinstance(truth, str | Path) else dict(dataset=truth)
        metric = CheckedCocoMetric(**source, proposal_nums=(1, 10, 100),
                                   missing_images='leave_out')
        metric.dataset_meta = dict(classes=results.classes)
        metric.compute_metrics([
            ({}, dict(img_id=image, bboxes=found.boxes, labels=found.labels, scores=found.scores))
            for image, found in results.predictions.items()])
    if not evaluators:
        raise ValueError(f'nothing was detected in any of {len(results.predictions)} images: there '
                         'is no precision to compute')

    [evaluator] = evaluators
    # pycocotools sorts the categories by id, in whatever order they were given.
    categories = evaluator.params.catIds
    images = set(evaluator.params.imgIds)
    annotations = evaluator.cocoGt.loadAnns(evaluator.cocoGt.getAnnIds(catIds=categories))
    objects = Counter(annotation['category_id'] for annotation in annotations
                      if annotation['image_id'] in images and not annotation.get('iscrowd'))
    return CocoResults(
        tuple(category['name'] for category in evaluator.cocoGt.loadCats(categories)),
        np.array([objects[category] for category in categories], dtype=int),
        evaluator.eval['precision'], dict(zip(SUMMARY, evaluator.stats.tolist(), strict=True)))


@contextmanager
def _quiet_evaluators() -> Iterator[list[Any]]:
    """Keep the evaluators that mmdet's metric throws away, and leave out what both print."""
    from mmdet.evaluation.metrics import coco_metric
    evaluator, logger, kept = coco_metric.COCOeval, MMLogger.get_current_instance(), []
    level = logger.level

    def make(*args: Any, **kwargs: Any) -> Any:
        kept.append(evaluator(*args, **kwargs))
        return kept[-1]

    coco_metric.COCOeval = make
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(None):
            yield kept
    finally:
        coco_metric.COCOeval = evaluator
        logger.setLevel(level)


def draw_class_ap(results: CocoResults) -> Figure:
    """Draw the AP of each class with AP50 behind it, as :func:`~.class_bars.draw_class_bars`."""
    return draw_class_bars('AP', results.average_precision(), results.classes, results.objects,
                           'objects', ('AP50', results.average_precision(0.5)))


def draw_precision_recall(results: CocoResults) -> Figure:
    """Draw precision against recall, mean of the classes, a line for each threshold of the IoU."""
    colours = colormaps[COLOUR_MAP](np.linspace(0, 0.9, len(THRESHOLDS)))
    curves = [_mean_of_classes(results.curve(iou)) for iou in THRESHOLDS]
    return _draw_lines('Precision and recall, mean of the classes', 'IoU: AP', (
        (curve, dict(color=colour, linewidth=1.6, label=f'{iou:.2f}: {curve.mean():.3f}'))
        for iou, colour, curve in zip(THRESHOLDS, colours, curves, strict=True)))


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
    curves, ap = results.curve(iou), results.average_precision(iou)
    order = np.argsort(-ap, kind='stable')
    order = order[np.isfinite(ap[order])]
    named, lines = order, []
    if len(order) > _MAX_LINES:
        named = np.concatenate([order[:_EXTREMES], order[-_EXTREMES:]])
        lines = [(curves[:, index], dict(color='0.75', linewidth=0.7))
                 for index in order[_EXTREMES:-_EXTREMES]]
    # Black is the mean's.
    colours = COLOURS[:-1]
    lines += [(curves[:, index], dict(
        color=colours[place % len(colours)], linestyle='--' if place >= len(colours) else '-',
        linewidth=1.4, label=f'{shorten(results.classes[index])}: {ap[index]:.3f}'))
        for place, index in enumerate(named)]
    if len(order) > 1:
        mean = _mean_of_classes(curves)
        lines.append((mean, dict(color='black', linewidth=2.4, label=f'mean: {mean.mean():.3f}')))
    return _draw_lines(f'Precision and recall of each class, IoU {iou:.2f}', 'class: AP', lines)


def _draw_lines(title: str, explained: str, lines: Iterable[tuple[np.ndarray, dict[str, Any]]]
                ) -> Figure:
    """Draw curves over ``RECALLS``, each in its style, with a legend."""
    figure = new_figure(5.4, 4)
    axes = figure.add_subplot()
    for curve, style in lines:
        axes.plot(RECALLS, curve, **style)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel='recall', ylabel='precision')
    finish(axes, title)
    figure.legend(loc='outside right upper', frameon=False, fontsize=9, title=explained,
                  title_fontsize=9)
    return figure


def _mean_of_classes(curves: np.ndarray) -> np.ndarray:
    """Average curves (R, K) over the classes that have objects; NaN if none has."""
    there = curves[:, np.isfinite(curves).all(0)]
    return there.mean(1) if there.size else np.full(len(curves), np.nan)
