"""Image folders that are checked before they are used, for ImageNet and for anybody's own set.

mmpretrain's ``CustomDataset`` warns of a class without pictures, takes any label in a list, and
leaves it to the decoder to say that a file is no picture. Here each of these is an error that names
the culprit.
"""

import os
from typing import Any

from mmengine import fileio
from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from mmpretrain.datasets.custom import find_folders, get_samples
from mmpretrain.registry import DATASETS

from ..datasets.data_errors import DataError, MissingDataError, join, name_culprits, read_lines
from ..datasets.images import (
    MISSING_REMEDY,
    BadImages,
    describe_image,
    load_image,
    with_checked_loader,
)
from ..datasets.part import Part, check_part, choose_part
from ..datasets.settings import find_argument_faults, raise_first, with_class_names


@DATASETS.register_module()
class CheckedImageFolder(CustomDataset):
    """Pictures in a folder for each class, or in a list, checked when they are loaded.

    With a folder for each class, the classes are numbered in the order of the folders' names, which
    name them unless ``metainfo`` does. With a list (``ann_file``), a line is the path of a picture
    and its label, and ``metainfo`` or ``classes`` must name the classes.

    Args:
        data_root: The folder that ``data_prefix`` and ``ann_file`` start from.
        split: A folder in ``data_root``, in place of ``data_prefix``, such as 'train'. If there is
            a list ``meta/<split>.txt`` beside it, it is used; else the folder has one for each
            class.
        ann_file: The list, if it lies elsewhere.
        allow_empty_classes: Accept class folders without pictures.
        bad_images: What to do about pictures that cannot be decoded: 'stop', or 'replace' to take
            another picture in training and log a warning; None for 'replace' if ``split`` is
            'train', else 'stop'. A missing picture always stops.
        max_bad_images: The share of the pictures that may be replaced before training stops.
        part: The part of the pictures of each class to take, where one folder is for training and
            validation, see :func:`.choose_part`; None for all.
        kwargs: Arguments of mmpretrain's ``CustomDataset``.

    Raises:
        FileNotFoundError: There is no such folder or list.
        DataError: They are not what they should be; the message names the first culprits.
    """

    def __init__(self,
                 data_root: str = '',
                 split: str = '',
                 ann_file: str = '',
                 allow_empty_classes: bool = False,
                 bad_images: str | None = None,
                 max_bad_images: float = 0.01,
                 part: Part = None,
                 **kwargs: Any) -> None:
        raise_first(find_argument_faults(
            type(self), dict(kwargs, data_root=data_root, split=split, ann_file=ann_file,
                             allow_empty_classes=allow_empty_classes), type(self).__name__))
        if isinstance(kwargs.get('classes'), str):
            kwargs['classes'] = read_lines(os.path.expanduser(kwargs['classes']))
        kwargs['metainfo'] = with_class_names(kwargs.get('metainfo'))
        kwargs['pipeline'] = with_checked_loader(kwargs.get('pipeline', ()))
        self.allow_empty_classes = allow_empty_classes
        check_part(part)
        self.part = part
        # NOTE: mmpretrain's evaluation does not set test_mode, so the name of the split decides.
        training = (part['name'] if part else split) == 'train' and not kwargs.get('test_mode')
        self.bad_images = BadImages(bad_images or ('replace' if training else 'stop'),
                                    max_bad_images)
        if split:
            kwargs.setdefault('data_prefix', split)
            listed = f'meta/{split}.txt'
            if not ann_file and fileio.exists(fileio.join_path(data_root, listed)):
                ann_file = listed
        super().__init__(data_root=data_root, ann_file=ann_file, **kwargs)

    def full_init(self) -> None:
        """Find the pictures, once."""
        if not self._fully_initialized:
            super().full_init()
            self.bad_images.share(len(self))

    def load_data_list(self) -> list[dict]:
        """Find the pictures.

        Returns:
            A dict for each with ``img_path``, and ``gt_label`` unless ``with_label`` is False.
        """
        if not fileio.isdir(self.img_prefix):
            raise MissingDataError(
                f'There is no folder {self.img_prefix!r}: check `data_root` and `split` (or '
                '`data_prefix`) of the dataset in the config (a relative path starts at the '
                'working directory).')
        if self.ann_file:
            samples = self._read_list()
        else:
            samples = self._find_samples() if self.with_label else self._find_pictures()
        if not self.with_label:
            return [dict(img_path=fileio.join_path(self.img_prefix, name)) for name in samples]
        return [dict(img_path=fileio.join_path(self.img_prefix, name), gt_label=label)
                for name, label in self._take_part(samples)]

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on a picture, or on another one in place of a bad one.

        Raises:
            FileNotFoundError: The picture does not exist.
            DataError: It, or too many of them, cannot be decoded.
        """
        return self.bad_images.fetch(self._prepare, idx, len(self))

    def _prepare(self, idx: int) -> Any:
        try:
            return super().prepare_data(idx)
        except Exception as error:
            # Whatever loads the pictures: the culprit is the file, or else the pipeline.
            self._check_picture(self.get_data_info(idx), error)
            raise

    def _find_samples(self) -> list[tuple[str, int]]:
        """Find the pictures in the class folders, and name the classes."""
        folders = [name for name in find_folders(self.img_prefix)[0] if not name.startswith('.')]
        if not folders:
            raise DataError(
                f'{self.img_prefix} has no folders: put the pictures of each class into one of its '
                "own, or list them in a file with a line '<path> <label>' for each (`ann_file`).")
        classes = self._metainfo.setdefault('classes', tuple(folders))
        if len(classes) != len(folders):
            raise DataError(
                f'{self.img_prefix} has {len(folders)} class folders ({join(folders)}), but '
                f'{type(self).__name__} has {len(classes)} classes by name ({join(classes)}). '
                'Correct the folder, or name its own classes: `metainfo=dict(classes=...)` of the '
                'dataset in the config.')

        labels = {name: label for label, name in enumerate(folders)}
        samples, empty = get_samples(self.img_prefix, labels, self.is_valid_file)
        if empty and not (self.allow_empty_classes and samples):
            raise DataError(
                f'{self.img_prefix} has class folders without a picture '
                f'({", ".join(sorted(self.extensions))}): {join(sorted(empty))}. Fill them, or '
                'remove them from training and validation alike, or accept them: '
                '`allow_empty_classes=True` of the dataset in the config.')
        return samples

    def _find_pictures(self) -> list[str]:
        """Find pictures without labels."""
        samples, _ = get_samples(self.img_prefix, None, self.is_valid_file)
        if not samples:
            raise DataError(f'{self.img_prefix} has no picture in it '
                            f'({", ".join(sorted(self.extensions))}).')
        return samples

    def _take_part(self, samples: list) -> list:
        """Take a part of the pictures of each class; of a single one, training has it."""
        if self.part is None:
            return samples
        of_class: dict[int, list] = {}
        for sample in samples:
            of_class.setdefault(sample[1], []).append(sample)
        taken = []
        for found in of_class.values():
            if len(found) > 1:
                taken += [found[i] for i in choose_part([name for name, _ in found], self.part)]
            elif self.part['name'] == 'train':
                taken += found
        return taken

    def _read_list(self) -> list:
        """Read the names and, unless ``with_label`` is False, the labels in ``ann_file``."""
        if not fileio.exists(self.ann_file):
            raise MissingDataError(f'There is no list {self.ann_file!r}: check `data_root` and '
                                   '`ann_file` of the dataset in the config.')
        lines = [(number, line.strip()) for number, line
                 in enumerate(read_lines(self.ann_file), start=1) if line.strip()]
        if not lines:
            raise DataError(f'{self.ann_file} is empty.')
        if not self.with_label:
            return [line for _, line in lines]

        classes = self._metainfo.get('classes')
        if classes is None:
            raise DataError(
                f'{self.ann_file} numbers the classes, but nothing names them: set '
                '`metainfo=dict(classes=...)` of the dataset in the config, or `classes` to a file '
                'with a name in each line.')
        samples, faulty = [], []
        for number, line in lines:
            name, _, label = line.rpartition(' ')
            if name.strip() and label.isdecimal() and int(label) < len(classes):
                samples.append((name.strip(), int(label)))
            else:
                faulty.append(f'line {number} is {line!r}')
        if faulty:
            raise DataError(
                f"{self.ann_file}: each line must be '<path> <label>' with a label from 0 to "
                f'{len(classes) - 1}, since there are {len(classes)} classes by name; but '
                f'{name_culprits(faulty, str)}.')
        return samples

    def _check_picture(self, info: dict, cause: Exception) -> None:
        """Raise an error that names a picture, if it does not exist or cannot be decoded."""
        try:
            load_image(info['img_path'], describe_image(info, self.metainfo.get('classes', ())),
                       MISSING_REMEDY)
        except DataError as error:
            raise error from cause


@DATASETS.register_module()
class CheckedImageNet(CheckedImageFolder):
    """ImageNet-1k, with mmpretrain's names of its classes.

    Under ``data_root``, ``train/`` and ``val/`` each with a folder for each synset; or the pictures
    anywhere in them and the lists ``meta/train.txt`` and ``meta/val.txt``, which the validation
    pictures need as their archive unpacks them.
    The arguments are those of :class:`CheckedImageFolder`.
    """

    METAINFO = dict(classes=IMAGENET_CATEGORIES)
