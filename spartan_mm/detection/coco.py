"""COCO-format data that is checked before it is used, for COCO and for anybody's own set.

mmdet's ``CocoDataset`` drops what it does not understand: a box outside its image, an annotation of
a category it does not know, classes it cannot find. Here each of these is an error that names the
culprit, or, where the user says so, is dropped and counted in the log.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.logging import print_log

from ..datasets.coco_file import (
    MISSING_REMEDY,
    CocoFile,
    describe_image,
    no_garbage_collection,
    read_json,
)
from ..datasets.findings import DataError, join
from ..datasets.images import BadImages, load_image
from .coco_eval import ChoiceOfBackend


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """A COCO-format dataset whose annotation file is checked when it is loaded.

    For COCO itself it gives what mmdet's ``CocoDataset`` gives, boxes clipped to their image apart.
    For a set of one's own, ``data_root``, ``ann_file`` and ``data_prefix`` are enough: the classes
    are the categories of the annotation file. ``metainfo=dict(classes=...)`` selects some of them,
    in the order of the file.

    NOTE: mmdet numbers the classes in the order of the file's categories whatever the order in
    ``metainfo``, and closes the gap where a class is missing, in the dataset and in ``CocoMetric``;
    names then no longer belong to labels. So another order and a missing class are errors here.

    NOTE: boxes that reach beyond their image are clipped, as the official RT-DETR does when
    loading; mmdet leaves them. Boxes with a side between 0 and 1 pixel are valid but not trained
    on, in both.

    A pipeline's ``LoadImageFromFile`` becomes ``LoadCheckedImage``, which names a missing or broken
    image.

    Crowds (``iscrowd=1``) carry ``ignore_flag=1``, so that mmdet packs them apart from the ground
    truth: detectors of the DETR family do not train on them, and evaluation reads them from the
    annotation file.

    Args:
        invalid_boxes: what to do with boxes of no width or height, not finite, wholly outside their
            image, or with no area: 'error' to stop, 'drop' to leave them out and log their number.
            COCO train2017 has a few such boxes.
        allow_no_objects: accept a training set in which no image has an object (to be joined with
            others).
        bad_images: what to do about images that cannot be decoded: 'stop', or 'replace' to take
            another image in training and log a warning; None for 'stop' in test mode and 'replace'
            in training. A missing image always stops.
        max_bad_images: the share of the images that may be replaced before training stops.

    Raises:
        FileNotFoundError: there is no annotation file.
        DataError: the annotation file is not what it should be; the message names the file and the
            first culprits by id.
    """

    # No classes: what the config does not name comes from the annotation file.
    METAINFO: dict = {}

    def __init__(
        self,
        *args: Any,
        invalid_boxes: str = 'error',
        allow_no_objects: bool = False,
        bad_images: str | None = None,
        max_bad_images: float = 0.01,
        test_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        if invalid_boxes not in ('error', 'drop'):
            raise ValueError(f"invalid_boxes={invalid_boxes!r} must be 'error' or 'drop'.")
        self.invalid_boxes = invalid_boxes
        # NOTE: the config keeps mmcv's name, which mmdet's inferencers look for.
        kwargs['pipeline'] = [
            dict(step, type='LoadCheckedImage')
            if isinstance(step, Mapping) and step['type'] == 'LoadImageFromFile' else step
            for step in kwargs.get('pipeline', ())
        ]
        # mmdet's default names no folder of images.
        kwargs.setdefault('data_prefix', dict(img=''))
        self.allow_no_objects = allow_no_objects
        if test_mode and bad_images == 'replace':
            raise ValueError("bad_images='replace' is for training: in test mode, another image "
                             'would be evaluated against the annotations of the bad one.')
        self.bad_images = BadImages(bad_images or ('stop' if test_mode else 'replace'),
                                    max_bad_images)
        super().__init__(*args, test_mode=test_mode, **kwargs)

    def full_init(self) -> None:
        """Load the annotations, once."""
        if not self._fully_initialized:
            with no_garbage_collection():
                super().full_init()
            self.bad_images.share(len(self))

    def load_data_list(self) -> list[dict]:
        """Load and check the annotation file.

        Returns:
            One dict per image, in the order of the file, as ``parse_data_info`` makes it.
        """
        file = self.examine()
        file.raise_errors()
        for finding in file.findings:
            self._log(finding.message)

        self._metainfo['classes'] = file.classes
        if file.classes == CocoDataset.METAINFO['classes']:
            self._metainfo.setdefault('palette', CocoDataset.METAINFO['palette'])
        self.cat_ids = [category['id'] for category in file.categories]
        self.cat2label = {category_id: label for label, category_id in enumerate(self.cat_ids)}

        for i in file.clipped.nonzero()[0]:
            left, top, right, bottom = file.boxes[i].tolist()
            file.annotations[i]['bbox'] = [left, top, right - left, bottom - top]
        per_image = [[] for _ in file.images]
        self.cat_img_map = defaultdict(list)
        for annotation, index in zip(file.annotations, file.image_index, strict=True):
            per_image[index].append(annotation)
            self.cat_img_map[annotation['category_id']].append(annotation['image_id'])
        return [
            self.parse_data_info(
                dict(raw_img_info=dict(image, img_id=image['id']), raw_ann_info=image_annotations)
            )
            for image, image_annotations in zip(file.images, per_image, strict=True)
        ]

    def examine(self) -> CocoFile:
        """Read the annotation file and look for everything that is wrong with it.

        Raises:
            MissingDataError: there is no annotation file.
            DataError: it is no JSON file.
        """
        return CocoFile(read_json(self.ann_file, self.backend_args), self.ann_file,
                        self._metainfo.get('classes'), self.test_mode, self.invalid_boxes,
                        self.allow_no_objects)

    def filter_data(self) -> list[dict]:
        """Filter images by ``filter_cfg``; an error if none is left."""
        kept = super().filter_data()
        if not kept:
            raise DataError(
                f'{self.ann_file}: no image is left after filter_cfg={self.filter_cfg}.'
            )
        return kept

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on an image, or on another one in place of a bad one.

        Raises:
            DataError: the image, or too many of them, cannot be decoded, or it has not the
                annotated size.
        """
        return self.bad_images.fetch(super().prepare_data, idx, len(self))

    def get_data_info(self, idx: int) -> dict:
        """Get what the pipeline starts from, with the name of the annotation file for messages."""
        return dict(super().get_data_info(idx), ann_file=self.ann_file)

    def _log(self, message: str) -> None:
        print_log(f'{self.ann_file}: {message}', logger='current')


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """Load an image, or say which one is missing, broken or of another size than annotated.

    NOTE: mmcv's ``LoadImageFromFile`` lets the error of the file system or of the decoder through,
    and does not compare sizes: boxes then fall beside their objects, silently.

    Args:
        check_size: compare with ``height`` and ``width`` of the annotation, where there are any.
        kwargs: arguments of mmcv's ``LoadImageFromFile``, ``ignore_empty`` apart.
    """

    def __init__(self, check_size: bool = True, **kwargs: Any) -> None:
        if kwargs.pop('ignore_empty', False):
            raise ValueError(
                'LoadCheckedImage does not pass over images (`ignore_empty`): correct the '
                'annotation file.'
            )
        super().__init__(**kwargs)
        self.check_size = check_size

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']`` into ``results['img']``, (H, W, 3) BGR.

        Raises:
            FileNotFoundError: there is no such file.
            UndecodableError: it cannot be read or decoded.
            DataError: it has not the annotated size.
        """
        size = (results.get('width'), results.get('height'))
        image = load_image(
            results['img_path'], describe_image(results), MISSING_REMEDY, self.color_type,
            self.imdecode_backend, size if self.check_size and None not in size else None,
            self.backend_args)
        if self.to_float32:
            image = image.astype(np.float32)

        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{super().__repr__()[:-1]}, check_size={self.check_size})'


@METRICS.register_module()
class CheckedCocoMetric(ChoiceOfBackend, CocoMetric):
    """COCO's metrics, of all images of the annotation file and of nothing else.

    NOTE: mmdet's ``CocoMetric`` evaluates whatever predictions it is given. An image without any,
    because the test stopped early or a dataset left it out, gives a lower AP and no message; so do
    predictions that come twice, and classes of the dataset that the file does not have. Each is an
    error here. The file is examined as :class:`CheckedCocoDataset` does it, but for boxes of no
    size or outside their image, which count as objects that were not found, as in COCO's own code.

    NOTE: annotations are numbered anew: to pycocotools, an object with the id 0 is never found.

    Args:
        ann_file: the annotation file; None to take the ground truth from the data samples, which
            leaves nothing to compare the images with.
        missing_images: what to do if images of the file have no predictions: 'error' to stop,
            'leave_out' to evaluate the others alone and log their number, for a dataset with
            ``indices``.
        kwargs: arguments of mmdet's ``CocoMetric``, but for ``sort_categories``, and ``backend``,
            see :class:`ChoiceOfBackend`.

    Raises:
        FileNotFoundError: there is no annotation file.
        DataError: it is not what it should be.
    """

    def __init__(self, ann_file: str | None = None, missing_images: str = 'error',
                 **kwargs: Any) -> None:
        if missing_images not in ('error', 'leave_out'):
            raise ValueError(f"missing_images={missing_images!r} must be 'error' or 'leave_out'.")
        if kwargs.get('sort_categories'):
            raise ValueError('sort_categories is not for CheckedCocoMetric: its labels follow the '
                             'order of the categories in the file, as those of the dataset.')
        super().__init__(**kwargs)
        self.missing_images = missing_images
        self.ann_file = ann_file
        if ann_file is not None:
            content = read_json(ann_file, self.backend_args)
            file = CocoFile(content, ann_file, evaluation=True, invalid_boxes='keep')
            file.raise_errors()
            self._coco_api = _index(content)

    @property
    def dataset_meta(self) -> dict | None:
        """Meta information of the dataset."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: dict) -> None:
        """Take the dataset's meta information; check that its classes are those of the file.

        Raises:
            DataError: they are not.
        """
        if self.ann_file is not None and self._coco_api is not None:
            wanted = tuple(meta.get('classes', ()))
            names = [category['name'] for category in self._coco_api.dataset['categories']]
            if wanted != tuple(name for name in names if name in set(wanted)):
                raise DataError(
                    f'{self.ann_file}: the evaluator reads the categories {join(names)}, but the '
                    f'dataset to evaluate has the classes {join(wanted)}: give evaluator and '
                    'dataset the same annotation file.')
        self._dataset_meta = meta

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics of all predictions.

        Args:
            results: of each image, ground truth and predictions.

        Raises:
            DataError: predictions are missing, of unknown images, there twice, or not finite.
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
