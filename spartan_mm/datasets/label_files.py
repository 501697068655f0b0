"""Pictures with a file of labels each, YOLO's and Pascal VOC's, read as COCO's would have them.

Both give the content of a COCO annotation file, which :class:`.CocoFile` examines like any other,
and beside it what can be said of these formats alone.
"""
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.parsers import expat

from PIL import Image

from ..text import count
from .data_errors import (
    DataError,
    Finding,
    MissingDataError,
    join,
    name_culprits,
    read_lines,
    show,
)
from .images import open_picture

#: What the names of pictures end in.
PICTURE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
#: Text files that lie among labels and are none.
CLASS_FILES = ('classes.txt', 'labels.txt', 'obj.names')
# By how much the share of a picture may be beyond 0 and 1: what rounding does.
_SLACK = 1e-3
# EXIF orientations that turn a picture by a quarter.
_TURNED = (5, 6, 7, 8)


class LabelError(ValueError):
    """What is wrong with the labels of a picture."""


class Labels(NamedTuple):
    """What is read of the pictures of a dataset.

    Attributes:
        content: In the form of a COCO annotation file.
        findings: What is wrong or worth knowing beyond that.
    """

    content: dict[str, list[dict]]
    findings: list[Finding]


class _Box(NamedTuple):
    """An object: its label, its corners in pixels, where it stands in its file."""

    label: int
    corners: tuple[float, float, float, float]
    where: str
    difficult: bool = False


def list_pictures(folder: str | Path) -> list[str]:
    """List the pictures in a folder and those in it, by their path in it, in the order of names."""
    folder = Path(folder)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*')
                  if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
                  and not _is_hidden(path.relative_to(folder)))


def list_files(folder: str | Path, suffix: str) -> dict[str, Path]:
    """Find the files of labels in a folder and those in it, by their path without the suffix."""
    folder = Path(folder)
    return {path.relative_to(folder).with_suffix('').as_posix(): path
            for path in sorted(folder.rglob(f'*{suffix}'))
            if path.name not in CLASS_FILES and not _is_hidden(path.relative_to(folder))
            and path.is_file()}


def _is_hidden(path: Path) -> bool:
    """Whether a file is one that macOS or a notebook leaves beside others."""
    return any(part.startswith('.') for part in path.parts)


def labels_of(pictures: str | PurePosixPath) -> PurePosixPath:
    """Name the folder of YOLO's labels: ``labels`` for the last ``images`` in a path.

    Example:
        >>> str(labels_of('data/images/train'))
        'data/labels/train'
        >>> str(labels_of('data/train'))
        'data/train'
    """
    parts = PurePosixPath(pictures).parts
    if 'images' not in parts:
        return PurePosixPath(pictures)
    last = len(parts) - 1 - parts[::-1].index('images')
    return PurePosixPath(*parts[:last], 'labels', *parts[last + 1:])


def read_size(path: str | Path) -> tuple[int, int]:
    """Read the width and height of a picture, turned as its EXIF orientation says.

    Raises:
        LabelError: It cannot be read; the message is the reason.
    """
    try:
        with open(path, 'rb') as file:
            # What the sizes of all usual pictures stand in, without reading them whole.
            with Image.open(file) as picture:
                turned = picture.getexif().get(0x0112) in _TURNED
                return picture.size[::-1] if turned else picture.size
    except OSError as error:
        if not os.path.exists(path):
            raise LabelError('it does not exist') from error
        raise LabelError(error.strerror or ('the file is empty' if not os.path.getsize(path) else
                                            'it is of no known image format')) from error
    except Exception:  # Pillow refuses large ones, and has many errors for damaged ones
        try:
            with open_picture(Path(path).read_bytes()) as picture:
                if picture is not None:
                    return picture.size
        except DataError as error:
            raise LabelError(str(error)) from error
    raise LabelError('it is of no known image format, or damaged')


def read_yolo(pictures: str, labels: str, classes: Sequence[str],
              names: Sequence[str] | None = None) -> Labels:
    """Read labels as YOLO has them: a text for each picture, a line for each object.

    A line is ``class x y width height``, the centre and the size of the box as shares of the
    picture, or ``class x1 y1 x2 y2 x3 y3 ...``, a polygon, of which the box around it is taken. A
    picture without a text has no object.

    NOTE: Pixels are rounded to hundredths, which is what COCO's files have, and what six decimals
    hold for pictures up to 6,000 pixels: a box of whole pixels stays one.

    Args:
        pictures: Their folder.
        labels: The folder of the texts, laid out as that of the pictures; where the path of a
            picture in its folder has ``images`` in it, its text is where :func:`labels_of` says.
        classes: Names of the classes, by number.
        names: Paths of the pictures in their folder; None for all that are in it.
    """
    def find(name: str) -> Path:
        return Path(labels, labels_of(PurePosixPath(name).with_suffix('.txt')))

    def read(path: Path, size: tuple[int, int]) -> list[_Box]:
        return [_read_yolo_line(line.split(), size, classes, f'line {number}')
                for number, line in enumerate(read_lines(str(path)), start=1) if line.strip()]

    return _read('.txt', pictures, labels, names, find, read, classes)


def read_voc(pictures: str, annotations: str, classes: Sequence[str],
             names: Sequence[str] | None = None, first_pixel: int = 0) -> Labels:
    """Read annotations as Pascal VOC has them: an XML file for each picture.

    A picture without one has no object. Objects that are ``difficult`` become crowds, which are
    neither trained on nor counted, as in VOC's own evaluation.

    NOTE: PASCAL counts pixels from 1, and the last one belongs to the box: width is
    xmax - xmin + 1. Nearly all tools that write such files since count from 0 and write edges,
    so that width is xmax - xmin.

    Args:
        pictures: Their folder.
        annotations: The folder of the XML files.
        classes: Names of the classes.
        names: Paths of the pictures in their folder, or without what they end in, as in VOC's
            lists; None for all that are in it.
        first_pixel: 1 for PASCAL's own data, 0 for edges.
    """
    labels = {name: label for label, name in enumerate(classes)}

    def find(name: str) -> Path:
        return Path(annotations, PurePosixPath(name).with_suffix('.xml'))

    def read(path: Path, size: tuple[int, int]) -> list[_Box]:
        file = read_voc_file(path)
        if file.size not in (None, size):
            raise LabelError(
                f'its <size> is {file.size[0]}x{file.size[1]}, but the picture has {size[0]}x'
                f'{size[1]} pixels' + (': one of the two was turned' if file.size[::-1] == size
                                       else ''))
        return [_take_object(item, labels, first_pixel, f'object {number}')
                for number, item in enumerate(file.objects, start=1)]

    return _read('.xml', pictures, annotations, names, find, read, classes)


class VOCFile(NamedTuple):
    """What a file of annotations says."""

    #: Width and height, None where they are not known.
    size: tuple[int, int] | None
    #: Of each object its texts by name, those of its box among them.
    objects: list[dict[str, str]]
    #: Where it says that it is from.
    database: str


def read_voc_file(path: str | Path) -> VOCFile:
    """Read a VOC file.

    A file with a document type, which may define entities, is refused unread: annotations have
    none, and a few lines of them can stand for gigabytes or for files of this machine.

    Raises:
        LabelError: It cannot be read, or is no such file.
    """
    objects: list[dict[str, str]] = []
    size: dict[str, str] = {}
    database: list[str] = []
    names: list[str] = []

    def refuse(*_: Any) -> None:
        raise LabelError('it has a document type (<!DOCTYPE>), which annotations have not, and is '
                         'not read for safety')

    def begin(name: str, _: dict) -> None:
        names.append(name)
        if len(names) > 100:
            raise LabelError('its elements are nested more than 100 deep')
        if names[1:] == ['object']:
            objects.append({})

    def take(text: str) -> None:
        match names[1:]:
            case ['object', name] | ['object', 'bndbox', name]:
                objects[-1][name] = objects[-1].get(name, '') + text
            case ['size', name]:
                size[name] = size.get(name, '') + text
            case ['source', 'database']:
                database.append(text)

    def end(name: str) -> None:
        names.pop()
        if not names and name != 'annotation':
            raise LabelError(f'it holds <{name}>, but VOC has <annotation>')

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.CharacterDataHandler = take
    try:
        parser.Parse(Path(path).read_bytes(), True)
    except expat.ExpatError as error:
        raise LabelError(f'no whole XML file: {error}') from error
    except OSError as error:
        raise LabelError(f'it cannot be read: {error.strerror or error}') from error
    except (LookupError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(f'no XML file: {error}') from error  # of an unknown encoding
    try:
        sides = int(float(size['width'])), int(float(size['height']))
    except (KeyError, ValueError, OverflowError):
        sides = (0, 0)
    # Some tools write zeros.
    return VOCFile(sides if min(sides) > 0 else None,
                   [{name: ' '.join(text.split()) for name, text in item.items()}
                    for item in objects], ''.join(database).strip())


def _read(suffix: str, pictures: str, folder: str, names: Sequence[str] | None,
          find: Callable[[str], Path], read: Callable[[Path, tuple[int, int]], list[_Box]],
          classes: Sequence[str]) -> Labels:
    """Read the labels of pictures; `find` names the file of one, `read` reads it."""
    if not os.path.isdir(pictures):
        raise MissingDataError(f'There is no folder {pictures!r}: check `data_root` and '
                               '`data_prefix` of the dataset in the config (a relative path starts '
                               'at the working directory).')
    present = list_pictures(pictures)
    files = list_files(folder, suffix) if os.path.isdir(folder) else {}
    findings: list[Finding] = []
    listed = names is not None
    if not listed:
        names = present
    else:
        names, missing = _complete(names, present)
        _add(findings, 'missing images', missing, f'of the list missing in {pictures}',
             'correct the list, or `data_prefix` of the dataset')
    if not names and not findings:
        found = f'{count(len(files), "file")} of labels, but ' if files else ''
        raise DataError(f'{pictures} has {found}no pictures ({", ".join(PICTURE_SUFFIXES)}).')

    # Two pictures with one file of labels: one of them has got those of the other.
    first: dict[Path, str] = {}
    twice = [f'{first[find(name)]} and {name}' for name in names
             if first.setdefault(find(name), name) != name]
    _add(findings, 'labels of two pictures', twice, 'with the file of labels of another one',
         'give them different names, or remove one')

    images, annotations = [], []
    unread: list[str] = []
    faulty: list[str] = []
    unlabelled: list[str] = []
    for name in names:
        try:
            width, height = read_size(Path(pictures, name))
        except LabelError as error:
            unread.append(f'{name}: {error}')
            continue
        images.append(dict(id=len(images) + 1, file_name=name, width=width, height=height))
        path = find(name)
        if not path.is_file():
            unlabelled.append(name)
            continue
        try:
            boxes = read(path, (width, height))
        except (LabelError, DataError) as error:
            faulty.append(f'{path}: {str(error).removeprefix(f"{path}: ").rstrip(".")}')
            continue
        for box in boxes:
            left, top, right, bottom = (round(value, 2) for value in box.corners)
            sides = round(right - left, 2), round(bottom - top, 2)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=len(images), category_id=box.label,
                name=f'{path.name} {box.where}', bbox=[left, top, *sides],
                area=sides[0] * sides[1], iscrowd=int(box.difficult)))

    _add(findings, 'undecodable image', unread, 'unreadable', 'replace or remove them')
    if faulty:
        findings.append(Finding('error', 'labels', name_culprits(faulty, str), len(faulty)))
    if len(unlabelled) == len(images) and not unread and files:
        findings.append(Finding(
            'error', 'no labels', f'none of {count(len(images), "picture")} in {pictures} has one '
            f'of the {count(len(files), "file")} of labels in {folder}: a picture NAME.jpg belongs '
            f'to NAME{suffix}, and here are {join(names, 2)} and {join(files, 2)}', len(images)))
    elif len(unlabelled) == len(images) and not unread:
        findings.append(Finding(
            'error', 'no labels', f'{count(len(images), "picture")} in {pictures}, but no file of '
            f'labels ({suffix}) in {folder}', len(images)))
    elif unlabelled:
        findings.append(Finding(
            'note', 'no file of labels', f'{len(unlabelled)} of {len(images)} pictures have no '
            f'file of labels and count as pictures without objects ({join(unlabelled, 5)})',
            len(unlabelled)))
    known = {find(name) for name in present}
    lonely = [path.name for path in files.values() if path not in known]
    if lonely and not listed and len(unlabelled) < len(images):
        findings.append(Finding(
            'warning', 'labels without a picture', f'{len(lonely)} of {len(files)} files of labels '
            f'in {folder} belong to no picture in {pictures} ({join(lonely, 5)})', len(lonely)))
    categories = [dict(id=label, name=name) for label, name in enumerate(classes)]
    return Labels(dict(images=images, annotations=annotations, categories=categories), findings)


def _add(findings: list[Finding], kind: str, culprits: list[str], problem: str,
         remedy: str) -> None:
    if culprits:
        findings.append(Finding('error', kind, f'{count(len(culprits), "picture")} {problem} '
                                f'({join(culprits, 5)}): {remedy}', len(culprits)))


def _complete(names: Iterable[str], present: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find the pictures of a list, which may leave out what they end in; and what is missing."""
    by_name = {name: name for name in present}
    for name in present:
        by_name.setdefault(str(PurePosixPath(name).with_suffix('')), name)
    found = {name: by_name.get(name) for name in dict.fromkeys(names)}
    return ([name for name in found.values() if name],
            [name for name, picture in found.items() if not picture])


def _read_yolo_line(words: list[str], size: tuple[int, int], classes: Sequence[str],
                    where: str) -> _Box:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise LabelError(f'{where} is {show(" ".join(words))}, which has something else than '
                         'numbers') from None
    if len(numbers) == 6:
        raise LabelError(f'{where} has 6 numbers, as predictions have with their score; labels '
                         'have 5, or a class and the corners of a polygon')
    if len(numbers) < 5 or len(numbers) % 2 == 0:
        raise LabelError(f'{where} has {count(len(numbers), "number")}, but must have 5, `class x '
                         'y width height`, or a class and the corners of a polygon')
    label, *shares = numbers
    if not math.isfinite(label) or label != int(label) or not 0 <= label < len(classes):
        raise LabelError(f'{where} has class {words[0]}, but there are '
                         f'{count(len(classes), "class")}, from 0 to {len(classes) - 1} '
                         f'({join(classes, 5)})')
    if not all(-_SLACK <= share <= 1 + _SLACK for share in shares):
        pixels = ': are these pixels?' if max(shares) > 2 else ''
        raise LabelError(f'{where} is {show(" ".join(words))}, but all numbers behind the class '
                         f'must be shares of the picture, from 0 to 1{pixels}')
    if len(shares) == 4:
        x, y, width, height = shares
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        corners = (min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2]))
    return _Box(int(label), tuple(share * side for share, side in zip(
        corners, size * 2, strict=True)), where)


def _take_object(item: dict[str, Any], labels: dict[str, int], first_pixel: int,
                 where: str) -> _Box:
    name = item.get('name', '')
    if name not in labels:
        raise LabelError(f'{where} is {show(name)}, which is none of the {len(labels)} classes '
                         f'({join(labels, 5)})' if name else f'{where} has no <name>')
    corners = [item.get(key, '') for key in ('xmin', 'ymin', 'xmax', 'ymax')]
    try:
        left, top, right, bottom = map(float, corners)
    except ValueError:
        raise LabelError(f'{where} ({name}) must have <bndbox> with numbers for xmin, ymin, xmax, '
                         f'ymax, but has {show(", ".join(corners))}') from None
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise LabelError(f'{where} ({name}) has a box that is not finite')
    difficult = item.get('difficult', '').lower() in ('1', 'true', 'yes')
    return _Box(labels[name], (left - first_pixel, top - first_pixel, right, bottom), where,
                difficult)
