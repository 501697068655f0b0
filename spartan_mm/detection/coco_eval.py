"""A choice of who computes COCO's metrics: pycocotools, or the same in C++."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from mmdet.evaluation.metrics import coco_metric

from ..requirements import require

BACKENDS = ('pycocotools', 'faster_coco_eval')


class ChoiceOfBackend:
    """To be inherited from before mmdet's ``CocoMetric``: who evaluates.

    The numbers are the same; faster_coco_eval matches detections with objects in C++, which takes a
    fraction of the time where there are many.

    Args:
        args: arguments of the metric.
        backend: 'pycocotools' or 'faster_coco_eval'.
        kwargs: arguments of the metric.

    Raises:
        ImportError: faster_coco_eval is to be used and not installed.
        ValueError: there is no such backend, or it is not the one that ``use_mp_eval`` is for.
    """

    def __init__(self, *args: Any, backend: str = 'pycocotools', **kwargs: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f'backend={backend!r} must be one of '
                             f'{", ".join(map(repr, BACKENDS))}.')
        if backend != 'pycocotools':
            if kwargs.get('use_mp_eval'):
                raise ValueError(f'use_mp_eval is for pycocotools, not for backend={backend!r}: '
                                 'give one of the two.')
            _require_faster()
        super().__init__(*args, **kwargs)
        self.backend = backend

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics of all predictions.

        Args:
            results: of each image, ground truth and predictions.
        """
        if self.backend == 'pycocotools':
            return super().compute_metrics(results)
        with _faster_evaluation():
            return super().compute_metrics(results)


def _require_faster():
    return require('faster_coco_eval', '1.6', 'faster-coco-eval')


@contextmanager
def _faster_evaluation() -> Iterator[None]:
    """Let mmdet's metric, which imports its evaluator by name, find the one in C++."""
    evaluator = coco_metric.COCOeval
    # By default it reports to a log that nobody reads.
    coco_metric.COCOeval = partial(_require_faster().COCOeval_faster, print_function=print)
    try:
        yield
    finally:
        coco_metric.COCOeval = evaluator
