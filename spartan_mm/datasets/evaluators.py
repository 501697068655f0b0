"""Evaluators of a config, checked before a run: what their options mean shows only at its end.

mmdet's and mmpretrain's metrics read most of their options when all images have been predicted.
Here a metric of the same options evaluates one made-up prediction, which costs milliseconds.
"""
import difflib
import inspect
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from mmengine.registry import METRICS, MODELS, DefaultScope

from ..errors import UsageError
from ..text import first_line, join
from .classes import find_heads

COCO_METRICS = ('bbox', 'segm', 'proposal', 'proposal_fast')
COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@100', 'AR@300', 'AR@1000',
              'AR_s@1000', 'AR_m@1000', 'AR_l@1000')
#: Metrics that evaluate one prediction as they do many, and write nothing. Of what is derived from
#: them nobody knows what it needs.
REHEARSED = ('CheckedCocoMetric', 'CocoMetric', 'Accuracy', 'SingleLabelMetric', 'MultiLabelMetric',
             'ConfusionMatrix')
_PACKAGES = ('mmdet', 'mmpretrain', 'spartan_mm')
# What is made up if nobody knows how many classes there are: enough for any topk.
_MANY = 100


def check_evaluator(cfg: Config, split: str) -> None:
    """Refuse an evaluator that would fail after the work; fit Accuracy's topk to the classes.

    Args:
        cfg: Changed in place.
        split: 'val' or 'test'.

    Raises:
        UsageError: An option of the evaluator cannot be served; the message has the legal names.
    """
    for message in find_evaluator_faults(cfg, split):
        raise UsageError(message)


def find_evaluator_faults(cfg: Config, split: str) -> Iterator[str]:
    """Say of each metric of an evaluator why it would fail, see :func:`check_evaluator`."""
    for settings in find_metrics(cfg.get(f'{split}_evaluator')):
        if not isinstance(settings, Mapping):
            continue  # built already
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'), \
                METRICS.switch_scope_and_registry(settings.get('_scope_')) as registry:
            message = _find_fault(settings, registry, cfg.get('model') or {})
        if message:
            yield f'{split}_evaluator: {message}'


def find_metrics(evaluator: Any) -> Sequence[Any]:
    """List the metrics of an evaluator: one, several, or those of a class of its own."""
    if isinstance(evaluator, Mapping) and not isinstance(evaluator.get('metrics'), str | None):
        evaluator = evaluator['metrics']
    return evaluator if isinstance(evaluator, list | tuple) else [evaluator] if evaluator else []


def _find_fault(settings: dict, registry: Any, model: Mapping) -> str | None:
    name = settings.get('type')
    kind = registry.get(name) if isinstance(name, str) else name
    if kind is None:
        known = [*registry.module_dict, *METRICS.module_dict]
        near = difflib.get_close_matches(str(name), known, 3, 0.)
        return f'there is no metric of type {name!r}; the closest names are {join(near)}'
    if not _is_of(kind, _PACKAGES) or kind.__name__ not in REHEARSED:
        return None
    options = {key: value for key, value in settings.items() if key not in ('type', '_scope_')}
    legal = {parameter.name for base in kind.__mro__ if base is not object
             for parameter in inspect.signature(base.__init__).parameters.values()
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}
    unknown = [key for key in options if key not in legal]
    if unknown:
        return (f'{kind.__name__} has no option {join(unknown)}; it has '
                f'{join(sorted(legal - {"self"}), limit=30)}')
    numbers = {head.num_classes for head in find_heads(model)}
    classes = numbers.pop() if len(numbers) == 1 else None
    if 'topk' in options and classes:
        _fit_topk(settings, options, classes)
    # A model of the user may predict masks, whatever its parts are called.
    with MODELS.switch_scope_and_registry(model.get('_scope_')) as models:
        with_masks = 'mask' in str(model) or not _is_of(models.get(str(model.get('type'))),
                                                        _PACKAGES)
    message = None
    if kind.__name__.endswith('CocoMetric'):
        message = _find_coco_fault(options, with_masks)
    return message or _rehearse(kind, options, classes or _MANY, with_masks)


def _is_of(kind: Any, packages: Sequence[str]) -> bool:
    return inspect.isclass(kind) and kind.__module__.partition('.')[0] in packages


def _fit_topk(settings: dict, options: dict, classes: int) -> None:
    """Leave out what is more than all classes: the label is always among them."""
    topk = options['topk']
    numbers = [topk] if isinstance(topk, int) else topk
    if isinstance(numbers, list | tuple) and all(isinstance(k, int) for k in numbers) and max(
            numbers, default=0) > classes:
        fitting = list(dict.fromkeys(min(k, classes) for k in numbers))
        print_log(f'topk={topk} of the evaluator is taken as {fitting}: the model has {classes} '
                  'classes', 'current', logging.WARNING)
        settings['topk'] = options['topk'] = fitting


def _find_coco_fault(options: Mapping, with_masks: bool) -> str | None:
    """Say what is wrong with the options of a CocoMetric."""
    metrics = options.get('metric', 'bbox')
    metrics = metrics if isinstance(metrics, list | tuple) else [metrics]
    for key, values, legal in (('metric', metrics, COCO_METRICS),
                               ('metric_items', options.get('metric_items'), COCO_ITEMS)):
        if values is None:
            continue
        if not _is_list(values, str):
            return f'{key}={values!r} must be a list of some of {join(legal, limit=20)}'
        unknown = [value for value in values if value not in legal]
        if unknown:
            return f'{key} has no {join(unknown)}; take some of {join(legal, limit=20)}'
    if 'segm' in metrics and not with_masks:
        return ("metric='segm' needs masks, which the model does not predict; take 'bbox', "
                "'proposal' or 'proposal_fast'")
    numbers = options.get('proposal_nums', (100, 300, 1000))
    if not _is_list(numbers, int) or min(numbers, default=0) < 1:
        return (f'proposal_nums={numbers!r} must be a list of numbers of detections, such as '
                '(1, 10, 100)')
    if {*metrics} - {'proposal_fast'} and (len(numbers) != 3 or 100 not in numbers):
        return (f'proposal_nums={tuple(numbers)} must be three numbers with 100 among them, whose '
                'AP is the one that counts, such as (1, 10, 100)')
    thresholds = options.get('iou_thrs')
    if thresholds is not None:
        values = np.atleast_1d(np.asarray(thresholds, dtype=object))
        if not values.size or not all(
                isinstance(value, float | int) and 0 < value <= 1 for value in values.flat):
            return f'iou_thrs={thresholds!r} must be numbers from 0 to 1, such as [0.5, 0.75]'
        if options.get('classwise') and values.size < 10:
            return (f'classwise=True shows the AP at 0.5 and 0.75, the first and sixth of ten '
                    f'iou_thrs, and there are {values.size}: leave one of the two out')
    return None


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _rehearse(kind: type, options: Mapping, classes: int, with_masks: bool) -> str | None:
    """Let a metric without a file evaluate a made-up prediction; say how it fails."""
    with tempfile.TemporaryDirectory() as folder, _silence():
        changes = {key: value for key, value in dict(
            ann_file=None, dataset=None, outfile_prefix=f'{folder}/results').items()
            if key in options}
        try:
            metric = kind(**{**options, **changes})
            metric.dataset_meta = dict(classes=tuple(f'class {i}' for i in range(classes)))
            metric.process({}, [_make_sample(classes, with_masks)])
            metric.compute_metrics(metric.results)
        except Exception as error:
            shown = ', '.join(f'{key}={value!r}' for key, value in options.items()
                              if key not in ('ann_file', 'dataset'))
            return (f'{kind.__name__}({shown}) cannot evaluate: {type(error).__name__}: '
                    f'{first_line(error)}; correct these options')
    return None


def _make_sample(classes: int, with_masks: bool) -> dict:
    """A prediction of one image, right and certain, of a detector and of a classifier at once."""
    box, label = [8., 8., 24., 24.], torch.tensor([0])
    found = dict(bboxes=torch.tensor([box]), scores=torch.ones(1), labels=label)
    instance = dict(bbox=box, bbox_label=0)
    if with_masks:
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[:, 8:24, 8:24] = True
        found['masks'] = mask
        instance['mask'] = [[8., 8., 24., 8., 24., 24., 8., 24.]]
    score = torch.zeros(classes)
    score[0] = 1.
    return dict(img_id=1, ori_shape=(32, 32), pred_instances=found, instances=[instance],
                pred_score=score, pred_label=label, gt_label=label, gt_score=score,
                num_classes=classes)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what metrics print and log to themselves.

    NOTE: ``logging.disable`` would not do: mmengine's loggers remember for good what it was when
    they were asked first.
    """
    MMLogger.handle = lambda logger, record: None
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        del MMLogger.handle
