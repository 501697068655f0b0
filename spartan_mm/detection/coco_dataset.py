"""COCO-format data that is checked before it is used, for COCO and for anybody's own set.

mmdet's ``CocoDataset`` drops what it does not understand: a box outside its image, an annotation of
a category it does not know, classes it cannot find. Here each of these is an error that names the
culprit, or, where the user says so, is dropped and counted in the log.
"""

from collections import defaultdict
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.logging import print_log

from ..datasets.coco_file import NOTHING_LEFT, CocoFile, no_garbage_collection, read_json
from ..datasets.data_errors import DataError, Finding
from ..datasets.images import BadImages, LoadCheckedImage, with_checked_loader
from ..datasets.part import Part, check_part, take_part
from ..datasets.settings import find_argument_faults, raise_first, with_class_names
from ..engine.data_order import surrounded
from ..text import printable


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

    NOTE: Boxes that reach beyond their image are clipped, as the official RT-DETR does when
    loading; mmdet leaves them. Boxes with a side between 0 and 1 pixel are valid but not trained
    on, in both.

    A pipeline's ``LoadImageFromFile`` becomes ``LoadCheckedImage``, which names a missing or broken
    image.

    Crowds (``iscrowd=1``) carry ``ignore_flag=1``, so that mmdet packs them apart from the ground
    truth: detectors of the DETR family do not train on them, and evaluation reads them from the
    annotation file.

    Args:
        invalid_boxes: What to do with boxes of no width or height, not finite, wholly outside their
            image, or with no area: 'error' to stop, 'drop' to leave them out and log their number.
            COCO train2017 has a few such boxes.
        allow_no_objects: Accept a training set in which no image has an object (to be joined with
            others).
        classes_by_name: Number the classes as ``metainfo`` lists them, in whatever order the file
            has its categories, and accept that it lacks some: files of different categories can be
            joined.
        bad_images: What to do about images that cannot be decoded: 'stop', or 'replace' to take
            another image in training and log a warning; None for 'stop' in test mode and 'replace'
            in training. A missing image always stops.
        max_bad_images: The share of the images that may be replaced before training stops.
        part: The part of the images to take, where one file is for training and validation, see
            :func:`.take_part`; None for all.

    Raises:
        FileNotFoundError: There is no annotation file.
        DataError: The annotation file is not what it should be; the message names the file and the
            first culprits by id.
    """

    # No classes: what the config does not name comes from the annotation file.
    METAINFO: dict = {}

    def __init__(self, *args: Any, invalid_boxes: str = 'error', allow_no_objects: bool = False,
                 classes_by_name: bool = False, bad_images: str | None = None,
                 max_bad_images: float = 0.01, part: Part = None, test_mode: bool = False,
                 **kwargs: Any) -> None:
        if invalid_boxes not in ('error', 'drop'):
            raise ValueError(f"invalid_boxes={invalid_boxes!r} must be 'error' or 'drop'.")
        self.invalid_boxes = invalid_boxes
        raise_first(find_argument_faults(
            type(self), dict(kwargs, test_mode=test_mode, allow_no_objects=allow_no_objects,
                             classes_by_name=classes_by_name), type(self).__name__))
        check_part(part)
        self.part = part
        kwargs['metainfo'] = with_class_names(kwargs.get('metainfo'))
        kwargs['pipeline'] = with_checked_loader(kwargs.get('pipeline', ()))
        # mmdet's default names no folder of images.
        kwargs.setdefault('data_prefix', dict(img=''))
        self.allow_no_objects = allow_no_objects
        self.classes_by_name = classes_by_name
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
        if self.classes_by_name:
            self._metainfo['classes_by_name'] = True  # CheckedCocoMetric looks for it
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

    @property
    def source(self) -> str:
        """What the annotations are read from, for messages."""
        return self.ann_file

    def read_annotations(self) -> tuple[Any, list[Finding]]:
        """Read the annotations as a COCO file has them, unexamined; and what else is to be said.

        Raises:
            MissingDataError: There is no annotation file.
            DataError: It is no JSON file.
        """
        return read_json(self.ann_file, self.backend_args), []

    def examine(self, **options: Any) -> CocoFile:
        """Read the annotations and look for everything that is wrong with them.

        Args:
            options: Arguments of :class:`.CocoFile` that are to be others than the dataset's.

        Raises:
            MissingDataError: There is no annotation file.
            DataError: It is no JSON file.
        """
        content, findings = self.read_annotations()
        return CocoFile(take_part(content, self.part, self.source), self.source, **dict(
            classes=self._metainfo.get('classes'), evaluation=self.test_mode,
            invalid_boxes=self.invalid_boxes, allow_no_objects=self.allow_no_objects,
            classes_by_name=self.classes_by_name, findings=findings) | options)

    def filter_data(self) -> list[dict]:
        """Filter images by ``filter_cfg``; an error if none is left."""
        kept = super().filter_data()
        if not kept:
            raise DataError(f'{self.source}: {NOTHING_LEFT.format(self.filter_cfg)}')
        return kept

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on an image, or on another one in place of a bad one.

        Raises:
            DataError: The image, or too many of them, cannot be decoded, or it has not the
                annotated size.
        """
        with surrounded(self, range(len(self))):
            return self.bad_images.fetch(super().prepare_data, idx, len(self))

    def get_data_info(self, idx: int) -> dict:
        """Get what the pipeline starts from, with the name of the annotation file for messages."""
        return dict(super().get_data_info(idx), ann_file=self.source)

    def _log(self, message: str) -> None:
        print_log(printable(f'{self.source}: {message}'), logger='current')


# Its name is mmdet's, too.
TRANSFORMS.register_module(module=LoadCheckedImage)
