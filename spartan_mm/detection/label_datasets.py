"""Datasets of pictures with a file of labels each, as YOLO and Pascal VOC have them."""
import os
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS

from ..datasets.data_errors import DataError, Finding, MissingDataError, read_lines
from ..datasets.label_files import Labels, labels_of, read_voc, read_yolo
from .coco_dataset import CheckedCocoDataset


class _LabelDataset(CheckedCocoDataset):
    """What the two have in common: they are read as a COCO file, and checked as one."""

    #: The name of the folder of labels in ``data_prefix``.
    folder: str

    def __init__(self, *args: Any, data_prefix: dict | None = None, **kwargs: Any) -> None:
        prefix = dict(data_prefix) if isinstance(data_prefix, dict) else dict(img='')
        prefix.setdefault(self.folder, self.find_folder(str(prefix.get('img', ''))))
        super().__init__(*args, data_prefix=prefix, **kwargs)

    @staticmethod
    def find_folder(pictures: str) -> str:
        """Say where the labels are if nobody says it, by the folder of the pictures."""
        raise NotImplementedError

    @property
    def img_prefix(self) -> str:
        """The folder of the pictures."""
        return os.path.normpath(self.data_prefix['img'] or '.')

    @property
    def source(self) -> str:
        """The list of the pictures, or else their folder."""
        return self.ann_file or self.img_prefix

    def read_annotations(self) -> tuple[Any, list[Finding]]:
        """Read the files of labels as a COCO file would have them.

        Raises:
            MissingDataError: There is no folder of pictures, or no list.
            DataError: There is no picture, or nothing names the classes.
        """
        labels = self.read(self.img_prefix, os.path.normpath(self.data_prefix[self.folder] or '.'),
                           tuple(self._metainfo.get('classes') or ()), self._list())
        if self.allow_no_objects:
            return labels.content, [item for item in labels.findings if item.kind != 'no labels']
        return labels

    def read(self, pictures: str, folder: str, classes: tuple[str, ...],
             names: list[str] | None) -> Labels:
        """Read the files of labels; see :func:`.read_yolo`."""
        raise NotImplementedError

    def _list(self) -> list[str] | None:
        """Read the list of the pictures, if there is one, as paths in their folder."""
        if not self.ann_file:
            return None
        if not os.path.isfile(self.ann_file):
            raise MissingDataError(f'There is no list {self.ann_file!r}: check `data_root` and '
                                   '`ann_file` of the dataset in the config.')
        root = Path(self.img_prefix).absolute()
        names = []
        for line in map(str.strip, read_lines(self.ann_file)):
            path = Path(line)
            if path.is_absolute() and path.is_relative_to(root):
                path = path.relative_to(root)
            if line:
                names.append(path.as_posix())
        if not names:
            raise DataError(f'{self.ann_file} is empty.')
        return names


@DATASETS.register_module()
class CheckedYOLODataset(_LabelDataset):
    """Pictures with labels as YOLO has them, checked when they are loaded; see :func:`.read_yolo`.

    ``metainfo=dict(classes=...)`` names the classes by their numbers. ``data_prefix`` has ``img``,
    the folder of the pictures, and ``labels``, that of the texts; without, it is beside or in that
    of the pictures as YOLO finds it: ``labels/train`` for ``images/train``. ``ann_file`` may be a
    list of pictures, a path in ``img`` in each line.

    NOTE: The sizes of all pictures are read when the dataset is loaded, since the boxes are shares
    of them. That costs a tenth of a millisecond each on a local disk.

    The other arguments and errors are those of :class:`CheckedCocoDataset`. It is evaluated by
    ``CheckedCocoMetric(dataset=...)``.
    """

    folder = 'labels'

    @staticmethod
    def find_folder(pictures: str) -> str:
        """Put ``labels`` for the last ``images``."""
        return str(labels_of(pictures)) if pictures else ''

    def read(self, pictures: str, folder: str, classes: tuple[str, ...],
             names: list[str] | None) -> Labels:
        """Read the texts."""
        if not classes:
            raise DataError(f'{self.source}: the labels number the classes, but nothing names '
                            'them: set `metainfo=dict(classes=(...))` of the dataset in the '
                            'config.')
        return read_yolo(pictures, folder, classes, names)


@DATASETS.register_module()
class CheckedVOCDataset(_LabelDataset):
    """Pictures with annotations as Pascal VOC has them, checked when loaded; see :func:`.read_voc`.

    ``metainfo=dict(classes=...)`` names and orders the classes. ``data_prefix`` has ``img``, the
    folder of the pictures, and ``xml``, that of the annotations; without, it is ``Annotations`` for
    ``JPEGImages``, and else the same folder. ``ann_file`` may be a list of pictures, such as
    ``ImageSets/Main/train.txt``.

    The other arguments and errors are those of :class:`CheckedCocoDataset`. It is evaluated by
    ``CheckedCocoMetric(dataset=...)``.

    Args:
        first_pixel: 1 for PASCAL's own data, whose pixels are counted from 1; 0 for edges, which
            nearly all tools write.
    """

    folder = 'xml'

    def __init__(self, *args: Any, first_pixel: int = 0, **kwargs: Any) -> None:
        if first_pixel not in (0, 1):
            raise ValueError(f'first_pixel={first_pixel!r} must be 0 or 1.')
        self.first_pixel = first_pixel
        super().__init__(*args, **kwargs)

    @staticmethod
    def find_folder(pictures: str) -> str:
        """Put ``Annotations`` for ``JPEGImages``."""
        return pictures.replace('JPEGImages', 'Annotations')

    def read(self, pictures: str, folder: str, classes: tuple[str, ...],
             names: list[str] | None) -> Labels:
        """Read the XML files."""
        if not classes:
            raise DataError(f'{self.source}: nothing orders the classes: set '
                            '`metainfo=dict(classes=(...))` of the dataset in the config.')
        return read_voc(pictures, folder, classes, names, self.first_pixel)
