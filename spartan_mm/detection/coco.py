"""COCO-format data that is checked before it is used, for COCO and for anybody's own set.

mmdet's ``CocoDataset`` drops what it does not understand: a box outside its image, an annotation of
a category it does not know, classes it cannot find. Here each of these is an error that names the
culprit, or, where the user says so, is dropped and counted in the log.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine import fileio
from mmengine.logging import print_log

_MAX_NAMED = 5
_IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
_ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')


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

    Raises:
        FileNotFoundError: there is no annotation file.
        ValueError: the annotation file is not what it should be; the message names the file and the
            first culprits by id.
    """

    # No classes: what the config does not name comes from the annotation file.
    METAINFO: dict = {}

    def __init__(
        self,
        *args: Any,
        invalid_boxes: str = 'error',
        allow_no_objects: bool = False,
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
        self.allow_no_objects = allow_no_objects
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Load and check the annotation file.

        Returns:
            One dict per image, in the order of the file, as ``parse_data_info`` makes it.
        """
        content = self._read()
        images, categories = content['images'], content['categories']
        annotations = content.get('annotations', [])

        self._check_images(images)
        self._choose_classes(categories)
        image_index = self._check_annotations(annotations, images, categories)
        annotations, image_index = self._check_boxes(annotations, images, image_index)
        self._check_objects(annotations)

        per_image = [[] for _ in images]
        self.cat_img_map = defaultdict(list)
        for annotation, index in zip(annotations, image_index, strict=True):
            per_image[index].append(annotation)
            self.cat_img_map[annotation['category_id']].append(annotation['image_id'])
        return [
            self.parse_data_info(
                dict(raw_img_info=dict(image, img_id=image['id']), raw_ann_info=image_annotations)
            )
            for image, image_annotations in zip(images, per_image, strict=True)
        ]

    def filter_data(self) -> list[dict]:
        """Filter images by ``filter_cfg``; an error if none is left."""
        kept = super().filter_data()
        if not kept:
            raise ValueError(
                f'{self.ann_file}: no image is left after filter_cfg={self.filter_cfg}.'
            )
        return kept

    def get_data_info(self, idx: int) -> dict:
        """Get what the pipeline starts from, with the name of the annotation file for messages."""
        return dict(super().get_data_info(idx), ann_file=self.ann_file)

    def _read(self) -> dict:
        """Read the annotation file and check its outermost shape."""
        if not fileio.exists(self.ann_file, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'There is no annotation file {self.ann_file!r}: check `data_root` and `ann_file` '
                'of the dataset in the config (a relative path starts at the working directory).'
            )
        with fileio.get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            with open(path, encoding='utf-8') as file:
                try:
                    content = json.load(file)
                except ValueError as error:
                    raise ValueError(f'{self.ann_file} is not a JSON file: {error}.') from error

        if not isinstance(content, dict):
            raise ValueError(
                f'{self.ann_file} holds a {type(content).__name__}, but COCO annotations are a '
                'dict with `images`, `annotations` and `categories`; a list is what a file of '
                'detection results holds.'
            )
        required = ['images', 'categories'] + ([] if self.test_mode else ['annotations'])
        absent = [key for key in required if key not in content]
        if absent:
            raise ValueError(f'{self.ann_file} has no {_join(absent)}: not a COCO annotation file.')
        empty = [key for key in ('images', 'categories') if not content[key]]
        if empty:
            raise ValueError(f'{self.ann_file} is empty: no {_join(empty)} in it.')
        return content

    def _check_images(self, images: Sequence[dict]) -> None:
        """Check that images have what is needed, a size, and an id of their own."""
        self._require_keys('image', images, _IMAGE_KEYS)
        sizeless = [
            image
            for image in images
            if not all(_is_number(image[side]) and image[side] > 0 for side in ('width', 'height'))
        ]
        self._fail_for(
            'image', sizeless, lambda image: f'is {image["width"]}x{image["height"]} pixels'
        )
        self._fail_for('image', _repeated(images), lambda _: 'has an id that another image has')

    def _choose_classes(self, categories: Sequence[dict]) -> None:
        """Set the classes, from the config or the file, and the labels of the category ids."""
        self._require_keys('category', categories, ('id', 'name'))
        self._fail_for(
            'category', _repeated(categories), lambda _: 'has an id that another category has'
        )
        self._fail_for(
            'category',
            _repeated(categories, 'name'),
            lambda _: 'has a name that another category has',
        )
        names = tuple(category['name'] for category in categories)
        classes = self._metainfo.get('classes', names)
        if isinstance(classes, str):
            raise ValueError(
                f'metainfo classes={classes!r} must be a tuple; a single class is written '
                f'dict(classes=({classes!r},)).'
            )
        classes = tuple(classes)

        absent = [name for name in classes if name not in names]
        if absent:
            raise ValueError(
                f'{self.ann_file} has no category {_join(absent)}, which `metainfo` of the config '
                f'lists among the classes; the categories of the file are {_join(names)}.'
            )
        chosen = [category for category in categories if category['name'] in classes]
        in_order = tuple(category['name'] for category in chosen)
        if classes != in_order:
            raise ValueError(
                f'The classes in `metainfo` of the config are not in the order of the categories '
                f'of {self.ann_file}, which numbers the labels: write classes={in_order}.'
            )

        self._metainfo['classes'] = classes
        if classes == CocoDataset.METAINFO['classes']:
            self._metainfo.setdefault('palette', CocoDataset.METAINFO['palette'])
        self.cat_ids = [category['id'] for category in chosen]
        self.cat2label = {category_id: label for label, category_id in enumerate(self.cat_ids)}

    def _check_annotations(
        self, annotations: Sequence[dict], images: Sequence[dict], categories: Sequence[dict]
    ) -> np.ndarray:
        """Check keys and ids of the annotations; return the index of each one's image, (A,)."""
        # pycocotools reads `iscrowd` of every annotation it evaluates with
        keys = _ANNOTATION_KEYS + (('iscrowd',) if self.test_mode else ())
        self._require_keys('annotation', annotations, keys)
        self._fail_for(
            'annotation', _repeated(annotations), lambda _: 'has an id that another annotation has'
        )
        if self.test_mode and any(annotation['id'] == 0 for annotation in annotations):
            self._log(
                'annotation id 0 is what pycocotools writes for "not matched", so a detection of '
                'that object counts as wrong; number annotations from 1.'
            )

        index_of = {image['id']: index for index, image in enumerate(images)}
        self._fail_for(
            'annotation',
            [item for item in annotations if item['image_id'] not in index_of],
            lambda item: (
                f'belongs to image {item["image_id"]!r}, which is not among the images of the file'
            ),
        )
        known = [category['id'] for category in categories]
        known_set = set(known)
        self._fail_for(
            'annotation',
            [item for item in annotations if item['category_id'] not in known_set],
            lambda item: (
                f'of image {_name(images[index_of[item["image_id"]]])} has the unknown category '
                f'id {item["category_id"]!r}; the categories of the file have ids {_join(known)}'
            ),
        )
        return np.array([index_of[item['image_id']] for item in annotations], dtype=int)

    def _check_boxes(
        self, annotations: Sequence[dict], images: Sequence[dict], image_index: np.ndarray
    ) -> tuple[Sequence[dict], np.ndarray]:
        """Handle invalid boxes and clip the others to their image; all boxes at once."""
        if not annotations:
            return annotations, image_index
        boxes = _numbers([item['bbox'] for item in annotations], (4,))
        areas = _numbers([item['area'] for item in annotations], ())
        if boxes is None or areas is None:
            self._fail_for(
                'annotation',
                [
                    item
                    for item in annotations
                    if _numbers([item['bbox']], (4,)) is None
                    or _numbers([item['area']], ()) is None
                ],
                lambda item: (
                    f'has bbox={item["bbox"]!r}, area={item["area"]!r}, which must be four numbers '
                    '(x, y, width, height) and a number'
                ),
            )
        sizes = np.array([(image['width'], image['height']) for image in images], dtype=float)
        sizes = sizes[image_index]

        finite = np.isfinite(boxes).all(1)
        boxes = np.where(finite[:, None], boxes, 0)
        sized = (boxes[:, 2:] > 0).all(1)
        top_left = boxes[:, :2].clip(0, sizes)
        bottom_right = (boxes[:, :2] + boxes[:, 2:]).clip(0, sizes)
        inside = (bottom_right > top_left).all(1)
        valid = finite & sized & inside & (areas > 0)

        if not valid.all():
            invalid = (~valid).nonzero()[0]
            if self.invalid_boxes == 'error':
                faults = [_box_fault(finite[i], sized[i], inside[i], sizes[i]) for i in invalid]
                self._fail_for(
                    'annotation',
                    [
                        dict(annotations[i], image=images[image_index[i]], fault=fault)
                        for i, fault in zip(invalid, faults, strict=True)
                    ],
                    lambda item: (
                        f'of image {_name(item["image"])} has bbox={item["bbox"]} '
                        f'(x, y, width, height), area={item["area"]}: {item["fault"]}'
                    ),
                    "Correct the file, or leave such boxes out: `invalid_boxes='drop'`.",
                )
            self._log(
                f'dropped {len(invalid)} of {len(annotations)} annotations with invalid boxes (ids '
                f'{_join(annotations[i]["id"] for i in invalid)}).'
            )

        # By how much a box reaches out on its worst side, 0 or less if it does not.
        excess = np.maximum(-boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - sizes).max(1)
        clipped = np.concatenate([top_left, bottom_right - top_left], axis=1)
        for i in (valid & (excess > 0)).nonzero()[0]:
            annotations[i]['bbox'] = clipped[i].tolist()
        far = (valid & (excess > 1)).nonzero()[0]
        if len(far):
            ids = _join(annotations[i]['id'] for i in far)
            self._log(
                f'{len(far)} of {len(annotations)} boxes reach more than a pixel beyond their '
                f'image and were clipped (annotation ids {ids}).'
            )

        if valid.all():
            return annotations, image_index
        kept = valid.nonzero()[0]
        return [annotations[i] for i in kept], image_index[kept]

    def _check_objects(self, annotations: Sequence[dict]) -> None:
        """Check that there is something to learn, or to evaluate against."""
        if any(item['category_id'] in self.cat2label for item in annotations):
            return
        if annotations:
            problem = (
                f'none of the {len(annotations)} annotations is of the classes '
                f'{_join(self.metainfo["classes"])}'
            )
        else:
            problem = 'there is no annotation in it'
        if self.test_mode:
            self._log(f'{problem}: detections can be written, but no AP be computed.')
        elif not self.allow_no_objects:
            raise ValueError(
                f'{self.ann_file}: {problem}, so there is nothing to train on. Check `ann_file`, '
                'or set `allow_no_objects=True` of the dataset if its images are meant to be '
                'without objects.'
            )

    def _require_keys(self, kind: str, items: Sequence[dict], keys: Sequence[str]) -> None:
        """Check that every item has the keys."""
        needed = set(keys)
        self._fail_for(
            kind,
            [item for item in items if not needed <= item.keys()],
            lambda item: f'has no {_join(key for key in keys if key not in item)}',
        )

    def _fail_for(
        self, kind: str, culprits: Sequence[dict], fault: Callable[[dict], str], remedy: str = ''
    ) -> None:
        """Raise a ``ValueError`` that names the culprits, if there are any."""
        if not culprits:
            return
        lines = [f'{kind} {_name(item)} {fault(item)}' for item in culprits[:_MAX_NAMED]]
        if len(culprits) > _MAX_NAMED:
            lines.append(f'... and {len(culprits) - _MAX_NAMED} more')
        raise ValueError(
            '\n  '.join([f'{self.ann_file}:', *lines]) + (f'\n{remedy}' if remedy else '')
        )

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
            ValueError: it cannot be decoded, or has not the annotated size.
        """
        path = results['img_path']
        described = f'image {path!r}'
        if 'img_id' in results:
            described += f' (image id {results["img_id"]!r}'
            described += f' of {results["ann_file"]})' if 'ann_file' in results else ')'

        try:
            content = fileio.get(path, backend_args=self.backend_args)
        except FileNotFoundError:
            raise FileNotFoundError(
                f'The {described} does not exist: check `data_root` and `data_prefix` of the '
                'dataset in the config, and `file_name` in the annotation file.'
            ) from None
        reason = 'the file is empty or of no known image format'
        try:
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
        except Exception as error:  # each decoder has exceptions of its own
            image = None
            if content:
                reason = f'{type(error).__name__}: {error}'
        if image is None:
            raise ValueError(f'The {described} cannot be decoded: {reason}.')

        annotated = (results.get('height'), results.get('width'))
        if self.check_size and None not in annotated and image.shape[:2] != annotated:
            raise ValueError(
                f'The {described} is {image.shape[1]}x{image.shape[0]} pixels, but annotated as '
                f'{annotated[1]}x{annotated[0]}. If the two are swapped, the file carries an EXIF '
                'orientation; to ignore it, set the color_type of the transform to '
                "'color_ignore_orientation'."
            )
        if self.to_float32:
            image = image.astype(np.float32)

        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{super().__repr__()[:-1]}, check_size={self.check_size})'


def _repeated(items: Sequence[dict], key: str = 'id') -> list[dict]:
    """List the items whose value under ``key`` an earlier one has."""
    values = [item[key] for item in items]
    if len(set(values)) == len(values):
        return []
    seen = set()
    return [item for item in items if item[key] in seen or seen.add(item[key])]


def _name(item: dict) -> str:
    """Name an image, annotation or category by id and, where it has one, by name."""
    name = item.get('file_name', item.get('name'))
    return repr(item.get('id')) + (f' ({name})' if name is not None else '')


def _join(values: Any) -> str:
    """List values, shortened where there are many."""
    values = [value if isinstance(value, str) else repr(value) for value in values]
    return ', '.join(values[:20]) + (f', ... ({len(values)} in all)' if len(values) > 20 else '')


def _numbers(values: list, shape: tuple[int, ...]) -> np.ndarray | None:
    """Make an array of values that have a shape each; None if one has not, or is no number."""
    try:
        array = np.array(values)
    except ValueError:
        return None
    fits = array.shape[1:] == shape and array.dtype.kind in 'iuf'
    return array.astype(float) if fits else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _box_fault(finite: bool, sized: bool, inside: bool, image_size: np.ndarray) -> str:
    """Say what is wrong with an invalid box; the first fault of several."""
    if not finite:
        return 'not finite'
    if not sized:
        return 'no width or no height'
    if not inside:
        return f'wholly outside the image, which is {image_size[0]:g}x{image_size[1]:g}'
    return 'no area'
