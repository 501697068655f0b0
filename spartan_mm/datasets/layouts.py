"""Folders of data as people have them: which format they are in, and what lies where.

Nothing is converted. What is found is told as the settings of datasets of this package.
"""
import codecs
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..text import count
from .coco_file import CocoFile, read_json
from .data_errors import DataError, join, read_lines, read_text, show
from .label_files import (
    CLASS_FILES,
    PICTURE_SUFFIXES,
    LabelError,
    labels_of,
    list_files,
    list_pictures,
    read_voc_file,
)

#: The share of the pictures that is held out for validation where none are meant for it.
VAL_SHARE = 0.2

# What parts of names say.
_ROLES = {**dict.fromkeys(('train', 'training', 'trainval'), 'train'),
          **dict.fromkeys(('val', 'valid', 'validation', 'eval', 'dev', 'minival'), 'val'),
          **dict.fromkeys(('test', 'testing'), 'test')}
_KNOWN = ("COCO's .json files, a Roboflow export, YOLO's data.yaml with labels/, Pascal VOC's "
          'Annotations/ and JPEGImages/, or a folder of pictures for each class')
# Folders that no class is called.
_NO_CLASSES = ('images', 'labels', 'masks', 'annotations', 'jpegimages', 'imagesets')
# Pictures that are looked for to find their folder.
_SAMPLE = 50


@dataclass
class Data:
    """A set of data: where it is, and what of it is for what.

    Args:
        root: Its folder.
        format: 'COCO', 'YOLO', 'Pascal VOC' or 'folders of classes'.
        classes: Names of the classes, in the order of the labels.
        splits: Settings of a dataset for 'train' and for 'val', and for 'test' if there is one,
            without ``data_root``, ``metainfo`` and ``pipeline``.
        notes: What to tell of it, a sentence each.
    """

    root: Path
    format: str
    classes: tuple[str, ...]
    splits: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        """What can be learned of it: 'detection' or 'classification'."""
        return 'classification' if self.format == 'folders of classes' else 'detection'


def is_data(path: str | Path) -> bool:
    """Whether a path is that of data: a folder, a COCO file or YOLO's ``data.yaml``.

    Raises:
        DataError: It is a file of JSON or YAML by its name alone.
    """
    path = Path(path)
    if path.is_dir():
        return True
    if not path.is_file() or path.suffix not in ('.json', '.yaml', '.yml'):
        return False
    content = read_json(str(path)) if path.suffix == '.json' else _read_yaml(path)
    keys = set(content) if isinstance(content, dict) else set()
    return bool(keys & {'images', 'annotations', 'names'}) and 'model' not in keys


def find_data(path: str | Path, seed: int = 0) -> Data:
    """Find out what data there is.

    Args:
        path: Its folder; or a COCO file, or YOLO's ``data.yaml``, where a folder has several.
        seed: Of the pictures that are held out for validation, where none are meant for it.

    Raises:
        DataError: It is of no known format, of several, or not whole; the message says what was
            found and what was expected.
    """
    path = Path(path)
    if path.is_file():
        candidates = [Path(os.path.abspath(path))]
        root = candidates[0].parent
        found = dict(COCO=candidates) if path.suffix == '.json' else dict(YOLO=candidates)
    else:
        root = Path(os.path.abspath(path))
        found = {name: files for name, find in (
            ('COCO', _find_coco_files), ('YOLO', _find_yolo), ('Pascal VOC', _find_voc))
            if (files := find(root))}
    if len(found) > 1:
        named = ' and '.join(f'{name} ({_show(files[0], root)})' for name, files in found.items())
        raise DataError(f'{path} has labels of {len(found)} formats, {named}, but must have one: '
                        'name the .json file or the data.yaml that is meant, or move the others '
                        'out of the folder')
    if not found:
        return _read_folders(root, path, seed)
    [(kind, files)] = found.items()
    read = {'COCO': _read_coco, 'YOLO': _read_yolo, 'Pascal VOC': _read_voc}[kind]
    data = read(root, files, path)
    if 'train' not in data.splits:
        raise DataError(f'{path} has pictures in the format of {kind} for '
                        f'{join(sorted(data.splits))}, but none to train on: a folder or file '
                        'called train')
    return _hold_out(data, seed)


def _hold_out(data: Data, seed: int) -> Data:
    """Share the pictures out, if there are none for validation."""
    if 'val' not in data.splits:
        part = dict(share=VAL_SHARE, seed=seed)
        train = data.splits['train']
        data.splits = {name: dict(train, part=dict(name=name, **part)) for name in ('train', 'val')}
        data.notes.append(f'no pictures are meant for validation: {VAL_SHARE:.0%} of all are held '
                          f'out for it, drawn with seed {seed}')
    return data


def _role(path: Path, root: Path) -> str | None:
    """Say what a file or folder is for by its name, or else by those of the folders it is in."""
    for part in (path.stem, *path.relative_to(root).parent.parts[::-1]):
        for word in re.findall('[a-z]+', part.lower()):
            if word in _ROLES:
                return _ROLES[word]
    return None


def _show(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _below(root: Path, depth: int) -> Iterator[Path]:
    """Go through a folder and those in it, so deep, in the order of names."""
    yield root
    if depth:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()
                             and not path.name.startswith('.')):
            yield from _below(folder, depth - 1)


def _find_coco_files(root: Path) -> list[Path]:
    found = [path for folder in _below(root, 2) for path in sorted(folder.glob('*.json'))
             if not path.name.startswith('.')]
    # Beside them, COCO has captions and keypoints, which take long to read.
    found = [path for path in found if path.name.startswith('instances')] or found
    return [path for path in found if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """Whether a file is one of COCO's, by how it begins; a broken one is, to be told of."""
    try:
        with open(path, 'rb') as file:
            start = file.read(1 << 16)
            if b'"images"' in start or b'"annotations"' in start:
                return True
            file.seek(-min(path.stat().st_size, 1 << 16), os.SEEK_END)
            end = file.read()
        return b'"images"' in end or b'"annotations"' in end
    except OSError:
        return False


def _read_coco(root: Path, files: Sequence[Path], path: Path) -> Data:
    by_role: dict[str | None, list[Path]] = {}
    for file in files:
        role = None if len(files) == 1 and path.is_file() else _role(file, root)
        by_role.setdefault(role, []).append(file)
    if len(files) == 1 and None in by_role:
        by_role = dict(train=files)
    several = next((found for found in by_role.values() if len(found) > 1), None)
    if several or None in by_role:
        named = join((_show(file, root) for file in several or by_role[None]), 5)
        raise DataError(f'{path} has {count(len(files), "file")} of COCO\'s format, and of {named} '
                        'it is not clear what for: expected is one with train in its name or '
                        'folder, and one with val; or name the one file that is meant')

    splits, classes, placeholder = {}, {}, ()
    for role, [file] in by_role.items():
        examined = CocoFile(read_json(str(file)), str(file), evaluation=role != 'train',
                            invalid_boxes='drop')
        examined.raise_errors()
        if role == 'train' and any(finding.kind == 'placeholder category'
                                   for finding in examined.findings):
            placeholder = examined.classes[:1]
        names = [image['file_name'] for image in examined.images]
        folder = _find_pictures(root, file, names)
        classes[role] = examined.classes
        splits[role] = dict(type='CheckedCocoDataset', ann_file=_show(file, root),
                            data_prefix=dict(img=_show(folder, root) + '/'))
    data = Data(root, 'COCO', (), splits)
    if placeholder:
        data.notes.append(f'the category {placeholder[0]!r}, which no object is of, is left out: '
                          "Roboflow's exports begin with it")
    first = next((classes[role] for role in ('train', 'val', 'test') if role in classes), ())
    data.classes = tuple(name for name in first if name not in placeholder)
    for role, names in classes.items():
        others = [name for name in names if name not in (*data.classes, *placeholder)]
        if others or set(data.classes).isdisjoint(names):
            raise DataError(f'{path} has two lists of classes: {_show(by_role["train"][0], root)} '
                            f'has {join(data.classes, 8)}, and {_show(by_role[role][0], root)} '
                            f'has {join(names, 8)}; {role} may have none that train has not')
    if any(tuple(name for name in names if name not in placeholder) != data.classes
           for names in classes.values()):
        data.notes.append('the files have their categories in different orders, or not all of '
                          'them: they are matched by name')
        for settings in splits.values():
            settings['classes_by_name'] = True
    return data


def _find_pictures(root: Path, file: Path, names: Sequence[str]) -> Path:
    """Find the folder in which the pictures of a COCO file are."""
    sample = names[::max(1, len(names) // _SAMPLE)]
    # A file that was named alone may lie beside the pictures' folder.
    near = [*_below(root.parent if root.name == 'annotations' else root, 3)]
    # What is for the same comes first: train/ and val/ may have files of the same names.
    role = _role(file, file.anchor)
    near.sort(key=lambda folder: (folder != file.parent,
                                  role is None or _role(folder, folder.anchor) != role))
    counts = [sum((folder / name).is_file() for name in sample) for folder in near]
    most = max(counts)
    if not most:
        raise DataError(f'{_show(file, root)} names {count(len(names), "picture")}, such as '
                        f'{show(names[0])}, but {root} has none of them in any of its folders')
    return near[counts.index(most)]


def _find_yolo(root: Path) -> list[Path]:
    named = [path for pattern in ('*.yaml', '*.yml') for path in sorted(root.glob(pattern))
             if is_data(path)]
    if named:
        return named
    text = next((path for folder in _below(root, 3) for path in folder.glob('*.txt')
                 if path.name not in CLASS_FILES and _looks_like_yolo(path)), None)
    return [text] if text else []


def _looks_like_yolo(path: Path) -> bool:
    """Whether a text begins with a line of numbers, as labels do; empty ones say nothing."""
    try:
        with open(path, 'rb') as file:
            line = file.read(4096).removeprefix(codecs.BOM_UTF8).split(b'\n')[0]
        numbers = [*map(float, line.split())]
        return len(numbers) >= 5
    except (OSError, ValueError):
        return False


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(str(path)))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, 'problem_mark', None)
        where = f' (line {mark.line + 1})' if mark else ''
        raise DataError(f'{path}: not a YAML file{where}: '
                        f'{getattr(error, "problem", None) or type(error).__name__}') from error


def _read_yolo(root: Path, files: Sequence[Path], path: Path) -> Data:
    if len(files) > 1:
        raise DataError(f'{path} has {len(files)} files that may describe it '
                        f'({join(_show(file, root) for file in files)}): name the one that is '
                        'meant')
    [file] = files
    if file.suffix == '.txt':
        return _read_bare_yolo(root, file, path)
    content = _read_yaml(file)
    classes = _read_names(content if isinstance(content, dict) else {}, file)
    if 'kpt_shape' in content:
        raise DataError(f'{file} has kpt_shape, so its labels are of poses, which are not read; '
                        'expected are boxes or polygons')
    base = root
    if content.get('path'):
        # What is written there is often the folder of another machine.
        written = str(content['path'])
        base = next((folder for name in (written, _slashed(written))
                     for folder in (root / name, Path(name)) if folder.is_dir()), root)
        base = Path(os.path.abspath(base))
    splits = {}
    for role in ('train', 'val', 'test'):
        given = content.get(role) or (content.get('valid') if role == 'val' else None)
        if not given:
            continue
        try:
            splits[role] = _yolo_settings(base, _find_given(given, base, root, f'{file}: {role}'))
        except DataError:
            if role != 'test':  # no training needs it
                raise
    if splits.get('train') == splits.get('val') and splits:
        del splits['val']
    return Data(base, 'YOLO', classes, splits)


def _find_given(given: Any, base: Path, root: Path, what: str) -> Path:
    """Find the folder or the list that a ``data.yaml`` names."""
    if not isinstance(given, str):
        raise DataError(f'{what} is {show(given)}, but must be a text, a folder of pictures or a '
                        'list of them')
    # Roboflow writes ../train/images for what lies in train/images.
    names = (given, _slashed(given), re.sub(r'^(\.\./)+', '', _slashed(given)))
    for name in names:
        for place in (base / name, root / name):
            if place.exists():
                return place
    labels = base / labels_of(given)
    found = len(list_files(labels, '.txt')) if labels.is_dir() else 0
    raise DataError(f'{what} is {given}, but there is no such folder or list in {base}' + (
        f'; {_show(labels, base)} has {count(found, "file")} of labels' if found else ''))


def _slashed(name: str) -> str:
    """Write a path of Windows as others have them."""
    return name.replace('\\', '/')


def _yolo_settings(base: Path, place: Path) -> dict[str, Any]:
    place = Path(os.path.normpath(place))
    if place.is_file():
        return dict(type='CheckedYOLODataset', ann_file=_show(place, base),
                    data_prefix=dict(img='', labels=''))
    pictures = _show(place, base)
    labels = labels_of(pictures).as_posix()
    if not (base / labels).is_dir():
        labels = pictures
    if not list_pictures(place):
        found = len(list_files(base / labels, '.txt')) if (base / labels).is_dir() else 0
        raise DataError(f'{place} has no pictures ({", ".join(PICTURE_SUFFIXES)})' + (
            f', but {labels} has {count(found, "file")} of labels' if found else ''))
    return dict(type='CheckedYOLODataset', data_prefix=dict(img=pictures, labels=labels))


def _read_names(content: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """Read the names of the classes, a list or a dict by number."""
    names, number = content.get('names'), content.get('nc')
    if isinstance(names, dict):
        numbers = [int(label) if isinstance(label, str) and label.isdecimal() else label
                   for label in names]
        if sorted(numbers, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f'{file}: names has the numbers {join(names, 8)}, but must have all '
                            f'from 0 to {len(names) - 1}')
        by_number = dict(zip(numbers, names.values(), strict=True))
        names = [by_number[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f'{file}: names is {show(names)}, but must list the names of the classes')
    strange = [name for name in names if isinstance(name, bool) or not isinstance(name, str | int)]
    if strange:
        raise DataError(f'{file}: the class {show(strange[0])} is no text; YAML reads words such '
                        'as no, on and null as something else: put it in quotes')
    names = tuple(map(str, names))
    if number is not None and number != len(names):
        raise DataError(f'{file} has nc: {show(number)}, but {count(len(names), "name")} '
                        f'({join(names, 8)}): the two must agree')
    _check_distinct(names, str(file))
    return names


def _check_distinct(names: Sequence[str], source: str) -> None:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise DataError(f'{source} names the class {join(dict.fromkeys(twice))} twice; names must '
                        'be different')


def _read_bare_yolo(root: Path, example: Path, path: Path) -> Data:
    """Read labels without a ``data.yaml``; a list of classes must lie beside them."""
    lists = [folder / name for folder in _below(root, 3) for name in CLASS_FILES
             if (folder / name).is_file()]
    if not lists:
        raise DataError(f'{path} has labels in the format of YOLO ({_show(example, root)}), but no '
                        'data.yaml, nor a classes.txt, that names the classes by their numbers')
    names = {file: tuple(line.strip() for line in read_lines(str(file)) if line.strip())
             for file in lists}
    if len({*names.values()}) > 1:
        one, other = [*names][:2] if names[lists[0]] != names[lists[1]] else (lists[0], lists[-1])
        raise DataError(f'{path} has two lists of classes: {_show(one, root)} has '
                        f'{join(names[one], 8)}, and {_show(other, root)} {join(names[other], 8)}')
    classes = names[lists[0]]
    if not classes:
        raise DataError(f'{lists[0]} is empty, but must name the classes, one in each line')
    _check_distinct(classes, str(lists[0]))
    folders = [folder for folder in _below(root, 3)
               if any(item.suffix.lower() in PICTURE_SUFFIXES for item in folder.iterdir())]
    if not folders:
        raise DataError(f'{path} has {count(len(list_files(root, ".txt")), "file")} of labels, but '
                        f'no pictures ({", ".join(PICTURE_SUFFIXES)})')
    roles = {_role(folder, root): folder for folder in folders}
    if len(roles) < len(folders) or (None in roles and len(folders) > 1):
        raise DataError(f'{path} has pictures in {join(_show(item, root) for item in folders)}: '
                        'name a data.yaml that says which are for training')
    if None in roles:
        roles['train'] = roles.pop(None)
    return Data(root, 'YOLO', classes, {role: _yolo_settings(root, folder)
                                        for role, folder in roles.items()})


def _find_voc(root: Path) -> list[Path]:
    return [found[0] for folder in _below(root, 3)
            if (found := [path for path in sorted(folder.glob('*.xml'))[:20] if _is_voc(path)])]


def _is_voc(path: Path) -> bool:
    try:
        with open(path, 'rb') as file:
            return b'<annotation' in file.read(4096)
    except OSError:
        return False


def _read_voc(root: Path, files: Sequence[Path], path: Path) -> Data:
    """Read annotations of VOC, with or without lists, or as Roboflow lays them out."""
    folders = [file.parent for file in files]
    splits: dict[str, dict[str, Any]] = {}
    if len(folders) == 1:
        common = _voc_settings(folders[0], root)
        lists = _find_voc_lists(_beside(folders[0]), root)
        splits = {role: dict(common, ann_file=_show(file, root)) for role, file in lists.items()}
        if not splits:
            splits = dict(train=common)
    else:
        for folder in folders:
            role = _role(folder, root)
            if role is None or role in splits:
                raise DataError(f'{path} has annotations of Pascal VOC in '
                                f'{join(_show(item, root) for item in folders)}, and it is not '
                                'clear what for: expected is Annotations/ with JPEGImages/, or '
                                'train/ and valid/ with pictures and annotations')
            splits[role] = _voc_settings(folder, root)
    for settings in splits.values():
        pictures = root / settings['data_prefix']['img']
        if not list_pictures(pictures):
            xml = settings['data_prefix']['xml']
            raise DataError(f'{path} has {count(len(list_files(root / xml, ".xml")), "file")} of '
                            f'labels in {xml}, but no pictures in '
                            f'{_show(pictures, root)} ({", ".join(PICTURE_SUFFIXES)})')
    classes, first_pixel = _read_voc_classes(root, folders)
    data = Data(root, 'Pascal VOC', classes, splits)
    if first_pixel:
        data.notes.append('these are annotations of PASCAL itself, whose pixels count from 1')
        for settings in splits.values():
            settings['first_pixel'] = 1
    return data


def _beside(annotations: Path) -> Path:
    """Name the folder in which pictures and lists are looked for."""
    return annotations.parent if annotations.name.lower() == 'annotations' else annotations


def _voc_settings(annotations: Path, root: Path) -> dict[str, Any]:
    base = _beside(annotations)
    near = {folder.name.lower(): folder for folder in sorted(base.iterdir()) if folder.is_dir()}
    pictures = next((near[name] for name in ('jpegimages', 'images', 'imgs')
                     if name in near and base != annotations), annotations)
    return dict(type='CheckedVOCDataset', data_prefix=dict(
        img=_show(pictures, root), xml=_show(annotations, root)))


def _find_voc_lists(base: Path, root: Path) -> dict[str, Path]:
    """Find the lists of pictures by what they are for, all in one folder."""
    for folder in (base / 'ImageSets' / 'Main', base / 'ImageSets', base, root):
        lists = {role: folder / f'{role}.txt' for role in ('train', 'val', 'test', 'trainval')}
        lists = {role: file for role, file in lists.items() if file.is_file()}
        both = lists.pop('trainval', None)
        if both and 'train' not in lists and 'val' not in lists:
            lists['train'] = both
        if lists:
            return lists
    return {}


def _read_voc_classes(root: Path, folders: Sequence[Path]) -> tuple[tuple[str, ...], int]:
    """Find the classes that objects have, in the order of a list if there is one; first pixel."""
    found: set[str] = set()
    first_pixel = 0
    for folder in folders:
        for file in list_files(folder, '.xml').values():
            try:
                content = read_voc_file(file)
            except LabelError as error:
                raise DataError(f'{file}: {error}') from error
            found.update(item['name'] for item in content.objects if item.get('name'))
            if re.match(r'The VOC\d* ?Database', content.database):
                first_pixel = 1
    listed = next((folder / name for folder in (root, *folders) for name in CLASS_FILES
                   if (folder / name).is_file()), None)
    if listed is None:
        if not found:
            raise DataError(f'{root} has annotations of Pascal VOC, but not one object in them')
        return tuple(sorted(found)), first_pixel
    classes = tuple(line.strip() for line in read_lines(str(listed)) if line.strip())
    others = sorted(found - {*classes})
    if others:
        raise DataError(f'{root} has two lists of classes: {_show(listed, root)} has '
                        f'{join(classes, 8)}, and the annotations have {join(others, 8)}, too')
    _check_distinct(classes, str(listed))
    return classes, first_pixel


def _read_folders(root: Path, path: Path, seed: int) -> Data:
    """Read a folder of pictures for each class, for a classifier."""
    if not any(root.iterdir()):
        raise DataError(f'{path} is empty, but must have {_KNOWN}')
    subfolders = [item for item in sorted(root.iterdir())
                  if item.is_dir() and not item.name.startswith('.')]
    roles: dict[str, Path] = {}
    for item in subfolders:
        if item.name.lower() in _ROLES:
            role = _ROLES[item.name.lower()]
            if role in roles:
                raise DataError(f'{path} has two folders for {role}, {roles[role].name} and '
                                f'{item.name}: put them together, or move one out of it')
            roles[role] = item
    classes = {role: _class_folders(folder) for role, folder in roles.items()}
    if not roles:
        classes = dict(train=_class_folders(root))
    loose = [name for name in list_pictures(root) if '/' not in name]
    loose += [name for name in classes.get('train', ()) if name.lower() in _NO_CLASSES]
    if not any(classes.values()) or len(classes.get('train', ())) == 1 or loose:
        pictures = len(list_pictures(root))
        what = f'{count(pictures, "picture")} without labels' if pictures else (
            f'{join(sorted(item.name for item in root.iterdir()), 5)}, but no pictures')
        raise DataError(f'{path} has {what}; expected are {_KNOWN}, two of them at least')
    if 'train' not in classes:
        raise DataError(f'{path} has pictures for {join(sorted(roles))}, but no folder called '
                        'train')
    names = tuple(classes['train'])
    for role, others in classes.items():
        if tuple(others) != names and role != 'test':
            raise DataError(f'{path} has two lists of classes: {_show(roles["train"], root)} has '
                            f'folders for {join(names, 8)}, and {_show(roles[role], root)} for '
                            f'{join(others, 8)}; they must be the same')
    splits = {role: dict(type='CheckedImageFolder', split=_show(roles[role], root) if roles
                         else '') for role in classes}
    return _hold_out(Data(root, 'folders of classes', names, splits), seed)


def _class_folders(folder: Path) -> list[str]:
    """List the folders in a folder, if there are pictures in them."""
    names = [item.name for item in sorted(folder.iterdir())
             if item.is_dir() and not item.name.startswith('.')]
    return names if any(list_pictures(folder / name) for name in names) else []
