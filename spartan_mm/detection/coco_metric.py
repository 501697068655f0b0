"""COCO's metrics, of predictions that are checked, by pycocotools or by the same in C++."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric as mmdet_metric
from mmdet.registry import DATASETS, METRICS
from mmengine.logging import print_log

from ..datasets.coco_file import CocoFile, read_json
from ..datasets.data_errors import DataError, join
from ..requirements import require

BACKENDS = ('pycocotools', 'faster_coco_eval')


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """COCO's metrics, of all images of the annotation file and of nothing else.

    NOTE: mmdet's ``CocoMetric`` evaluates whatever predictions it is given. An image without any,
    because the test stopped early or a dataset left it out, gives a lower AP and no message; so do
    predictions that come twice, and classes of the dataset that the file does not have. Each is an
    error here. The file is examined as :class:`CheckedCocoDataset` does it, but for boxes of no
    size or outside their image, which count as objects that were not found, as in COCO's own code.

    NOTE: Annotations are numbered anew: to pycocotools, an object with the id 0 is never found.

    Args:
        ann_file: The annotation file; None to take the ground truth from `dataset`, or else from
            the data samples, which leaves nothing to compare the images with.
        dataset: A dataset of this package, or its config, whose annotations are the ground truth,
            where they are in no file of COCO's format.
        missing_images: What to do if images of the file have no predictions: 'error' to stop,
            'leave_out' to evaluate the others alone and log their number, for a dataset with
            ``indices``.
        backend: Who evaluates, 'pycocotools' or 'faster_coco_eval'. The numbers are the same; the
            latter matches detections with objects in C++, which takes a fraction of the time where
            there are many.
        kwargs: Arguments of mmdet's ``CocoMetric``, but for ``sort_categories``.

    Raises:
        FileNotFoundError: There is no annotation file.
        DataError: It is not what it should be.
        ImportError: The backend is faster_coco_eval, and that is not installed.
        ValueError: There is no such backend, or it is not the one that ``use_mp_eval`` is for.
    """

    def __init__(self, ann_file: str | None = None, missing_images: str = 'error',
                 backend: str = 'pycocotools', dataset: Any = None, **kwargs: Any) -> None:
        if missing_images not in ('error', 'leave_out'):
            raise ValueError(f"missing_images={missing_images!r} must be 'error' or 'leave_out'.")
        if kwargs.get('sort_categories'):
            raise ValueError('sort_categories is not for CheckedCocoMetric: its labels follow the '
                             'order of the categories in the file, as those of the dataset.')
        if backend not in BACKENDS:
            raise ValueError(f'backend={backend!r} must be one of '
                             f'{", ".join(map(repr, BACKENDS))}.')
        if backend != 'pycocotools':
            if kwargs.get('use_mp_eval'):
                raise ValueError(f'use_mp_eval is for pycocotools, not for backend={backend!r}: '
                                 'give one of the two.')
            _require_faster()
        super().__init__(**kwargs)
        # pycocotools compares them with numbers, which a list cannot do.
        self.iou_thrs = np.atleast_1d(np.asarray(self.iou_thrs, float))
        self.backend = backend
        self.missing_images = missing_images
        self.ann_file = ann_file
        strict = dict(evaluation=True, invalid_boxes='keep')
        if ann_file is not None and dataset is not None:
            raise ValueError('ann_file and dataset both name the ground truth: give one of them.')
        if dataset is not None:
            if isinstance(dataset, Mapping):
                dataset = DATASETS.build(dict(dataset, pipeline=[], lazy_init=True))
            file = dataset.examine(classes=None, classes_by_name=False, **strict)
            self.ann_file = file.name
        elif ann_file is not None:
            file = CocoFile(read_json(ann_file, self.backend_args), ann_file, **strict)
        else:
            return
        file.raise_errors()
        self._coco_api = _index(file.content)

    @property
    def dataset_meta(self) -> dict | None:
        """Meta information of the dataset."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: dict) -> None:
        """Take the dataset's meta information; a DataError if its classes aren't the file's."""
        if self.ann_file is not None and self._coco_api is not None:
            wanted = tuple(meta.get('classes', ()))
            names = [category['name'] for category in self._coco_api.dataset['categories']]
            if meta.get('classes_by_name') and not {*wanted}.isdisjoint(names):
                self.cat_ids = _find_ids(self._coco_api, wanted)
                if self.classwise and self.cat_ids != sorted(self.cat_ids):
                    raise DataError(
                        f'{self.ann_file}: `classwise` of the evaluator needs categories in the '
                        'order of the classes in `metainfo` of the dataset, by their ids.')
            elif wanted != tuple(name for name in names if name in set(wanted)):
                raise DataError(
                    f'{self.ann_file}: the evaluator reads the categories {join(names)}, but the '
                    f'dataset to evaluate has the classes {join(wanted)}: give evaluator and '
                    'dataset the same annotation file.')
        self._dataset_meta = meta

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics of the ground truth and predictions of all images.

        Raises:
            DataError: Predictions are missing, of unknown images, there twice, or not finite.
        """
        if not results:
            raise DataError(f'{self._source}: there are no predictions to evaluate.')
        if self._coco_api is not None:
            self._check_images([prediction['img_id'] for _, prediction in results])
        broken = [prediction['img_id'] for _, prediction in results
                  if not (np.isfinite(prediction['bboxes']).all()
                          and np.isfinite(prediction['scores']).all())]
        if broken:
            raise DataError(f'the predictions of {len(broken)} of {len(results)} images contain '
                            f'NaN or infinite values (image ids {join(broken)}): the model has '
                            'diverged, and no AP can be computed.')
        if self.backend == 'pycocotools':
            return super().compute_metrics(results)
        with _faster_evaluation():
            return super().compute_metrics(results)

    def _check_images(self, predicted: Sequence[Any]) -> None:
        """Compare the images that have predictions with those of the file."""
        expected = self._coco_api.get_img_ids()
        known, counts = set(expected), Counter(predicted)
        unknown = [image for image in counts if image not in known]
        if unknown:
            raise DataError(f'{self._source}: there are predictions of {len(unknown)} images that '
                            f'it does not have (image ids {join(unknown)}): give evaluator and '
                            'dataset the same annotation file.')
        twice = [image for image, count in counts.items() if count > 1]
        if twice:
            raise DataError(f'{self._source}: {len(twice)} images have predictions more than once '
                            f'(image ids {join(twice)}), so each of their objects counts as found '
                            'once and as wrong detections beyond that.')
        missing = [image for image in expected if image not in counts]
        if not missing:
            self.img_ids = expected
            return
        some = (f'{self._source}: {len(missing)} of {len(expected)} images have no predictions '
                f'(image ids {join(missing)})')
        if self.missing_images == 'error':
            raise DataError(
                f'{some}, which would only lower the AP. Evaluate all images: no `indices` and no '
                '`filter_cfg` in the dataset, nothing interrupted; or evaluate those alone that '
                "have predictions: `missing_images='leave_out'` of the evaluator.")
        print_log(f'{some} and are left out of the evaluation.', 'current')
        self.img_ids = list(counts)

    @property
    def _source(self) -> str:
        return self.ann_file or 'the ground truth of the data samples'


def _find_ids(api: COCO, names: Sequence[str]) -> list[int]:
    """Find the ids of categories by name; one that the file lacks gets an id without objects."""
    ids = {category['name']: category['id'] for category in api.dataset['categories']}
    for name in names:
        if name not in ids:
            ids[name] = max(ids.values()) + 1
            api.cats[ids[name]] = dict(id=ids[name], name=name)
    return [ids[name] for name in names]


def _index(content: dict) -> COCO:
    """Make pycocotools' index of an annotation file that was read already."""
    annotations = [dict(item, id=number)
                   for number, item in enumerate(content.get('annotations', []), start=1)]
    api = COCO()
    api.dataset = dict(content, annotations=annotations)
    with redirect_stdout(None):
        api.createIndex()
    api.img_ann_map, api.cat_img_map = api.imgToAnns, api.catToImgs
    return api


def _require_faster() -> ModuleType:
    return require('faster_coco_eval', '1.6', 'faster-coco-eval')


@contextmanager
def _faster_evaluation() -> Iterator[None]:
    """Let mmdet's metric, which imports its evaluator by name, find the one in C++."""
    evaluator = mmdet_metric.COCOeval
    # By default it reports to a log that nobody reads.
    mmdet_metric.COCOeval = partial(_require_faster().COCOeval_faster, print_function=print)
    try:
        yield
    finally:
        mmdet_metric.COCOeval = evaluator
