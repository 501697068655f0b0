"""COCO annotation files: read, examined from end to end, and described by findings.

What a dataset refuses, what ``spartan-mm check-data`` reports and what evaluation insists on is
said here once, in the same words.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from mmengine import fileio

from .data_errors import (
    DataError,
    Finding,
    MissingDataError,
    join,
    name_culprits,
    read_text,
    show,
)

_IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
_ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
#: What to say if a filter leaves nothing.
NOTHING_LEFT = 'no image is left after filter_cfg={}.'
# What pycocotools numbers with.
_LARGEST_ID = 2**63 - 1

@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Leave out the search for cycles while millions of objects without any are made.

    Python looks through all objects again and again as they become more: half the time that an
    annotation file of COCO's size takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@no_garbage_collection()
def read_json(path: str, backend_args: dict | None = None) -> Any:
    """Read an annotation file.

    Raises:
        MissingDataError: There is no such file.
        DataError: It is no JSON file.
    """
    if not fileio.exists(path, backend_args=backend_args):
        raise MissingDataError(
            f'There is no annotation file {path!r}: check `data_root` and `ann_file` of the '
            'dataset in the config (a relative path starts at the working directory).')
    try:
        return json.loads(read_text(path, backend_args))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f'{path}: not a JSON file: {error}.') from error


class CocoFile:
    """The content of a COCO annotation file, examined.

    A file is legal if it is a dict of lists of dicts with the keys that detection reads; ids are
    integers (those of images may all be strings), each of its own; images have a name and a size;
    annotations belong to an image and a category of the file and have four finite numbers for a
    box and one for an area; ``iscrowd`` and ``ignore`` are 0 or 1 where they stand. What else the
    file has is not looked at.

    Every check goes on with what passed the ones before it, so that one reading finds all faults.

    Args:
        content: What the file holds.
        name: What to call the file in messages.
        classes: The classes in use, in the order of the file's categories; None for all.
        evaluation: Whether predictions are to be compared with it, which needs ``iscrowd`` and can
            do without annotations.
        invalid_boxes: 'error' if a box of no width or height, not finite, wholly outside its
            image, or with no area is an error; 'drop' to leave such annotations out; 'keep' to
            keep what COCO's evaluation can handle, which are those of no size or outside.
        allow_no_objects: Whether no object at all is no error.
        classes_by_name: Whether the labels follow the order of ``classes``, of which the file may
            lack some; a category that it lacks has the id None.
        findings: What was found while the content was read.
    """

    @no_garbage_collection()
    def __init__(self, content: Any, name: str, classes: Sequence[str] | str | None = None,
                 evaluation: bool = False, invalid_boxes: str = 'error',
                 allow_no_objects: bool = False, classes_by_name: bool = False,
                 findings: Sequence[Finding] = ()) -> None:
        #: What was examined.
        self.content = content
        self.name = name
        self.evaluation = evaluation
        self.invalid_boxes = invalid_boxes
        self.findings: list[Finding] = [*findings]

        #: The sound images, categories and annotations; of the categories, those in use.
        self.images: list[dict] = []
        self.categories: list[dict] = []
        self.annotations: list[dict] = []
        #: Of each sound annotation, the index of its image, (A,), its label, -1 for a category
        #: that is not in use, (A,), its box clipped to the image, x1, y1, x2, y2, (A, 4), and
        #: whether clipping changed it, by whatever little, (A,).
        self.image_index = np.zeros(0, dtype=int)
        self.labels = np.zeros(0, dtype=int)
        self.boxes = np.zeros((0, 4))
        self.clipped = np.zeros(0, dtype=bool)

        if self._check_shape(content):
            self._check_images(content['images'])
            known = self._check_categories(content['categories'], classes, classes_by_name)
            self._check_annotations(content, known)
            if self.annotations:
                self._check_boxes()
            self._check_objects(allow_no_objects, content.get('annotations', []))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories in use."""
        return tuple(category['name'] for category in self.categories)

    @property
    def broken(self) -> bool:
        """Whether there are errors, so that something was left out."""
        return any(finding.level == 'error' for finding in self.findings)

    def raise_errors(self) -> None:
        """Stop at what is wrong.

        Raises:
            DataError: The first finding that is an error.
        """
        for finding in self.findings:
            if finding.level == 'error':
                raise DataError(f'{self.name}: {finding.message}')

    def _check_shape(self, content: Any) -> bool:
        """Check the outermost shape; say whether there is anything to check in it."""
        problem = None
        if not isinstance(content, dict):
            problem = (f'holds a {type(content).__name__}, but COCO annotations are a dict with '
                       '`images`, `annotations` and `categories`; a list is what a file of '
                       'detection results holds.')
        else:
            required = ['images', 'categories'] + ([] if self.evaluation else ['annotations'])
            strange = [key for key in ('images', 'categories', 'annotations')
                       if not isinstance(content.get(key, []), list)]
            if absent := [key for key in required if key not in content]:
                problem = f'has no {join(absent)}: not a COCO annotation file.'
            elif strange:
                problem = (f'`{strange[0]}` is a {type(content[strange[0]]).__name__}, but must be '
                           'a list of dicts.')
            elif empty := [key for key in ('images', 'categories') if not content[key]]:
                problem = f'is empty: no {join(empty)} in it.'
        if problem:
            self._add('error', 'not an annotation file', problem)
        return not problem

    def _check_images(self, images: list) -> None:
        """Check that images have what is needed, a size, and an id of their own."""
        images = self._keep_complete('image', images, _IMAGE_KEYS)
        images = self._keep_ids('image', images, (int, str))
        images = self._keep(
            'image', 'image without a name', images,
            lambda image: isinstance(image['file_name'], str) and image['file_name']
            and '\0' not in image['file_name'] and '://' not in image['file_name'],
            lambda image: f'has file_name={show(image["file_name"])}, which names no file' + (
                ': an address, whose image has to be downloaded into the folder of the images'
                if '://' in str(image['file_name']) else ''))
        images = self._keep(
            'image', 'image without a size', images,
            lambda image: _is_side(image['width']) and _is_side(image['height']),
            lambda image: (f'has width={show(image["width"])}, height={show(image["height"])}, '
                           'which must be whole numbers of pixels from 1 on'))

        names = [image['file_name'] for image in images]
        if len(set(names)) < len(names):
            twice = _repeated(images, 'file_name')
            self._add('warning', 'image listed twice',
                      f'{len(twice)} images have the file name of another one: '
                      f'{name_culprits(twice, _name)}.', len(twice),
                      [image['file_name'] for image in twice])
        self.images = images

    def _check_categories(self, categories: list, classes: Sequence[str] | str | None,
                          by_name: bool) -> list[dict]:
        """Check categories and choose the classes; return all sound categories."""
        listed = len(categories)
        categories = self._keep_complete('category', categories, ('id', 'name'))
        categories = self._keep_ids('category', categories, (int, ))
        categories = self._keep(
            'category', 'category without a name', categories,
            lambda category: isinstance(category['name'], str),
            lambda category: f'has name={show(category["name"])}, which must be a text')
        categories = self._keep_own('category', categories, 'name', 'a name')
        self.categories = categories
        if classes is None:
            return categories
        if isinstance(classes, str):
            self._add('error', 'classes', f'metainfo classes={classes!r} must be a tuple; a single '
                      f'class is written dict(classes=({classes!r},)).')
            return categories

        names, classes = self.classes, tuple(classes)
        absent = [name for name in classes if name not in names]
        if by_name and len(absent) < len(classes):
            of_name = {item['name']: item for item in categories}
            self.categories = [of_name.get(name, dict(id=None, name=name)) for name in classes]
            return categories
        self.categories = [item for item in categories if item['name'] in set(classes)]
        if len(categories) < listed:
            return categories  # one that was refused may be the one that is looked for
        if absent:
            self._add('error', 'classes', f'has no category {join(absent)}, which `metainfo` of '
                      'the config lists among the classes; the categories of the file are '
                      f'{join(names)}.', len(absent))
        elif classes != self.classes:
            self._add('error', 'classes', 'The classes in `metainfo` of the config are not in the '
                      'order of the categories of the file, which numbers the labels: write '
                      f'classes={self.classes}, or set `classes_by_name=True` of the dataset.')
        return categories

    def _check_annotations(self, content: dict, categories: list[dict]) -> None:
        """Check keys and ids of the annotations.

        What belongs to an image or category that was refused is left out without a word: the file
        has that image, and the fault is another one.
        """
        # pycocotools reads `iscrowd` of every annotation it evaluates with.
        keys = _ANNOTATION_KEYS + (('iscrowd',) if self.evaluation else ())
        annotations = self._keep_complete('annotation', content.get('annotations', []), keys)
        annotations = self._keep_ids('annotation', annotations, (int, ))
        if self.evaluation and any(item['id'] == 0 for item in annotations):
            self._add('warning', 'annotation id 0',
                      'annotation id 0 is what pycocotools writes for "not matched". '
                      "CheckedCocoMetric numbers annotations anew; with mmdet's CocoMetric, a "
                      'detection of that object counts as wrong.')

        index_of = {image['id']: index for index, image in enumerate(self.images)}
        images, others = (_refused_ids(content[kind], sound) for kind, sound in (
            ('images', self.images), ('categories', categories)))
        annotations = self._keep(
            'annotation', 'annotation of an unknown image', annotations,
            lambda item: _in(item['image_id'], index_of) or _may_be(item['image_id'], images),
            lambda item: (f'belongs to image {show(item["image_id"])}, which is not among the '
                          'images of the file'))
        annotations = [item for item in annotations if _in(item['image_id'], index_of)]
        known = {category['id'] for category in categories}
        ids = [item['id'] for item in content['categories'] if isinstance(item, dict)
               and 'id' in item]
        annotations = self._keep(
            'annotation', 'annotation of an unknown category', annotations,
            lambda item: _in(item['category_id'], known) or _may_be(item['category_id'], others),
            lambda item: (f'of image {_name(self.images[index_of[item["image_id"]]])} has the '
                          f'unknown category id {show(item["category_id"])}; the categories of the '
                          f'file have ids {join(ids)}'))
        annotations = [item for item in annotations if _in(item['category_id'], known)]
        for key in ('iscrowd', 'ignore'):
            annotations = self._keep(
                'annotation', f'{key} is no flag', annotations,
                # By identity first: nearly all have the same 0.
                lambda item, key=key: _is_flag(item.get(key, 0)),
                lambda item, key=key: f'has {key}={show(item[key])}, which must be 0 or 1')

        label_of = {category['id']: label for label, category in enumerate(self.categories)}
        self.annotations = annotations
        self.image_index = np.array([index_of[item['image_id']] for item in annotations], dtype=int)
        self.labels = np.array([label_of.get(item['category_id'], -1) for item in annotations],
                               dtype=int)

    def _check_boxes(self) -> None:
        """Handle invalid boxes and clip the others to their image; all boxes at once."""
        numbers = _numbers(self.annotations)
        if numbers is None:
            # One by one, to find out which.
            sound = np.array([_numbers([item]) is not None for item in self.annotations])
            self._drop('annotation', 'box of no numbers', self.annotations,
                       [self.annotations[i] for i in (~sound).nonzero()[0]],
                       lambda item: (f'has bbox={show(item["bbox"])}, area={show(item["area"])}, '
                                     'which must be four numbers (x, y, width, height) and a '
                                     'number'))
            self._select(sound)
            if not self.annotations:
                return
            numbers = _numbers(self.annotations)
        boxes, areas = numbers[:, :4], numbers[:, 4]
        sizes = np.array([(image['width'], image['height']) for image in self.images], dtype=float)
        sizes = sizes[self.image_index]

        with np.errstate(over='ignore', invalid='ignore'):
            far_corner = boxes[:, :2] + boxes[:, 2:]
            finite = (np.isfinite(numbers).all(1) & np.isfinite(far_corner).all(1)
                      & np.isfinite(boxes[:, 2] * boxes[:, 3]))
        boxes = np.where(finite[:, None], boxes, 0)
        far_corner = np.where(finite[:, None], far_corner, 0)
        sized = (boxes[:, 2:] > 0).all(1)
        top_left = boxes[:, :2].clip(0, sizes)
        bottom_right = far_corner.clip(0, sizes)
        inside = (bottom_right > top_left).all(1)
        valid = finite & sized & inside & (areas > 0)
        # pycocotools computes with what has no size or lies outside, not with these.
        usable = finite & (boxes[:, 2:] >= 0).all(1) & (areas >= 0)

        refused = ~usable if self.invalid_boxes == 'keep' else ~valid
        if refused.any():
            indices = refused.nonzero()[0]
            ids = join(self.annotations[i]['id'] for i in indices)

            def describe(i: int) -> str:
                item, image = self.annotations[i], self.images[self.image_index[i]]
                fault = _box_fault(finite[i], sized[i], boxes[i], inside[i], sizes[i])
                return (f'annotation {_name(item)} of image {_name(image)} has '
                        f'bbox={show(item["bbox"])} (x, y, width, height), '
                        f'area={show(item["area"])}: {fault}')

            if self.invalid_boxes == 'drop':
                level = 'warning'
                message = (f'dropped {len(indices)} of {len(self.annotations)} annotations with '
                           f'invalid boxes (ids {ids}).')
            else:
                level, remedy = 'error', 'Correct the file'
                if self.invalid_boxes == 'error':
                    remedy += (", or leave such boxes out: `invalid_boxes='drop'` of the dataset "
                               'in the config')
                message = name_culprits(indices, describe, f'{remedy}.')
            self._add(level, 'invalid box', message, len(indices), self._names_of(indices))

        # By how much a box reaches out on its worst side, 0 or less if it does not.
        excess = np.maximum(-boxes[:, :2], far_corner - sizes).max(1)
        far = (valid & (excess > 1)).nonzero()[0]
        if len(far) and self.invalid_boxes != 'keep':
            ids = join(self.annotations[i]['id'] for i in far)
            self._add('warning', 'box beyond its image',
                      f'{len(far)} of {len(self.annotations)} boxes reach more than a pixel beyond '
                      f'their image and were clipped (annotation ids {ids}).', len(far),
                      self._names_of(far))
        self.boxes = np.concatenate([top_left, bottom_right], axis=1)
        self.clipped = valid & (excess > 0)
        self._select(~refused)

    def _check_objects(self, allow_none: bool, annotations: list) -> None:
        """Check that there is something to learn, or to evaluate against."""
        if self.broken:
            return
        empty, *others = self.categories
        if (others and empty.get('supercategory') == 'none' and (self.labels > 0).any()
                and not (self.labels == 0).any()):
            self._add('warning', 'placeholder category',
                      f"category {_name(empty)} has no object and supercategory 'none': Roboflow's "
                      'exports begin with such a placeholder, which is no class. To leave it out, '
                      f'set classes={tuple(item["name"] for item in others)} in `metainfo` of the '
                      f'datasets and num_classes={len(others)} in the head.')
        if (self.labels >= 0).any():
            return
        if annotations:
            problem = (f'none of the {len(annotations)} annotations is of the classes '
                       f'{join(self.classes)}')
        else:
            problem = 'there is no annotation in it'
        if self.evaluation:
            self._add('warning', 'no objects',
                      f'{problem}: detections can be written, but no AP be computed.')
        elif not allow_none:
            self._add('error', 'no objects',
                      f'{problem}, so there is nothing to train on. Check `ann_file`, or set '
                      '`allow_no_objects=True` of the dataset if its images are meant to be '
                      'without objects.')

    def _keep_complete(self, kind: str, items: list, keys: Sequence[str]) -> list[dict]:
        """Keep the items that are dicts with all keys."""
        needed = set(keys)

        def is_complete(item: Any) -> bool:
            return type(item) is dict and needed <= item.keys()

        def describe(culprit: tuple[int, Any]) -> str:
            index, item = culprit
            if not isinstance(item, dict):
                return f'{kind} number {index} (from 0) is {show(item)}, not a dict'
            name = _name(item) if 'id' in item else f'number {index} (from 0)'
            return f'{kind} {name} has no {join(key for key in keys if key not in item)}'

        faulty = [(index, item) for index, item in enumerate(items) if not is_complete(item)]
        if not faulty:
            return items
        self._add('error', f'{kind} incomplete', name_culprits(faulty, describe), len(faulty))
        return [item for item in items if is_complete(item)]

    def _keep_ids(self, kind: str, items: list[dict], types: tuple[type, ...]) -> list[dict]:
        """Keep the items with an id of the right kind and of their own."""
        found = set(map(type, (item['id'] for item in items)))
        # One type for all: numpy would take numbers among texts for texts.
        wanted = next((candidate for candidate in types if candidate in found), types[0])
        named = ' or a text, the same for all' if str in types else ''
        items = self._keep(
            kind, f'{kind} id is no number', items,
            lambda item: type(item['id']) is wanted and (
                wanted is not int or -_LARGEST_ID <= item['id'] <= _LARGEST_ID),
            lambda item: f'has an id that is not an integer{named}')
        return self._keep_own(kind, items, 'id', 'an id')

    def _keep_own(self, kind: str, items: list[dict], key: str, what: str) -> list[dict]:
        """Keep the items whose value under a key no earlier one has."""
        return self._drop(kind, f'{kind} {key} repeated', items, _repeated(items, key),
                          lambda _: f'has {what} that another {kind} has')

    def _keep(self, kind: str, fault: str, items: list[dict], is_sound: Callable[[dict], Any],
              describe: Callable[[dict], str]) -> list[dict]:
        """Keep the sound items; the others are an error."""
        return self._drop(kind, fault, items, [item for item in items if not is_sound(item)],
                          describe)

    def _drop(self, kind: str, fault: str, items: list[dict], culprits: Sequence[dict],
              describe: Callable[[dict], str]) -> list[dict]:
        """Note an error that names the culprits, if there are any; return the other items."""
        if not culprits:
            return items
        names = [item['file_name'] for item in culprits if isinstance(item.get('file_name'), str)]
        message = name_culprits(culprits, lambda item: f'{kind} {_name(item)} {describe(item)}')
        self._add('error', fault, message, len(culprits), names)
        dropped = set(map(id, culprits))
        return [item for item in items if id(item) not in dropped]

    def _add(self, level: str, kind: str, message: str, count: int = 1,
             images: Sequence[str] = ()) -> None:
        self.findings.append(Finding(level, kind, message, count, tuple(images[:100])))

    def _names_of(self, indices: np.ndarray) -> list[str]:
        """Name the images of annotations, each once."""
        return list(dict.fromkeys(self.images[self.image_index[i]]['file_name'] for i in indices))

    def _select(self, keep: np.ndarray) -> None:
        """Leave annotations out of everything that is known of each."""
        if keep.all():
            return
        kept = keep.nonzero()[0]
        self.annotations = [self.annotations[i] for i in kept]
        self.image_index, self.labels = self.image_index[kept], self.labels[kept]
        if len(self.boxes):
            self.boxes, self.clipped = self.boxes[kept], self.clipped[kept]


def _repeated(items: Sequence[dict], key: str) -> list[dict]:
    """List the items whose value under ``key`` an earlier one has."""
    values = [item[key] for item in items]
    if len(set(values)) == len(values):
        return []
    seen = set()
    return [item for item in items if item[key] in seen or seen.add(item[key])]


def _name(item: dict) -> str:
    """Name an image, annotation or category by id and, where it has one, by name."""
    name = item.get('file_name', item.get('name'))
    return show(item.get('id')) + (f' ({name if isinstance(name, str) else show(name)})'
                                   if name is not None else '')


def _in(value: Any, known: Any) -> bool:
    """Look an id up, whatever it is; neither True nor 1.0 is the id 1."""
    return type(value) in (int, str) and value in known


def _refused_ids(items: list, sound: list) -> set | None:
    """Collect the ids of items that were refused; None if one had none that can be known."""
    if len(items) == len(sound):
        return set()
    ids = [item.get('id') if isinstance(item, dict) else None for item in items]
    return {*ids} if {*map(type, ids)} <= {int, str} else None


def _may_be(value: Any, refused: set | None) -> bool:
    """Say whether an id may be that of an item that was refused."""
    return refused is None or _in(value, refused)


def _is_side(value: Any) -> bool:
    return (type(value) is int or type(value) is float and value.is_integer()) and (
        0 < value < 2**31)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _numbers(annotations: Sequence[dict]) -> np.ndarray | None:
    """Join boxes and areas, (A, 5); None if one is no number or a box has not four."""
    boxes, areas = [item['bbox'] for item in annotations], [item['area'] for item in annotations]
    if set(map(type, boxes)) - {list, tuple} or set(map(len, boxes)) - {4}:
        return None
    flat = list(chain.from_iterable(boxes))
    if set(map(type, chain(flat, areas))) - {int, float}:
        return None
    try:
        return np.concatenate([np.array(flat, dtype=float).reshape(-1, 4),
                               np.array(areas, dtype=float)[:, None]], axis=1)
    except OverflowError:  # an integer beyond what a float holds
        return None


def _box_fault(finite: bool, sized: bool, box: np.ndarray, inside: bool, image_size: np.ndarray
               ) -> str:
    """Say what is wrong with an invalid box; the first fault of several."""
    if not finite:
        return 'not finite'
    if (box[2:] < 0).any():
        return 'no width or no height, but a negative one: corners swapped?'
    if not sized:
        return 'no width or no height'
    if not inside:
        return f'wholly outside the image, which is {image_size[0]:g}x{image_size[1]:g}'
    return 'no area'
