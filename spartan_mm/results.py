"""Files of results beside ``results.json``: lines of JSON, CSV, YOLO's labels, COCO's results."""
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .datasets.coco_file import read_json
from .errors import UsageError
from .runtime import Source, Writer, put, write_array, write_results, write_whole
from .text import join, printable

Add = Callable[[Mapping[str, Any]], None]


@contextmanager
def _growing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that others can read while it grows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb', 0) as file:
        yield file


@contextmanager
def write_lines(path: Path, head: Mapping[str, Any], failures: Mapping[str, str]) -> Iterator[Add]:
    """Write a line of JSON for each image."""
    with _growing(path) as file:
        yield lambda record: put(file, f'{json.dumps(record, ensure_ascii=False)}\n')


@contextmanager
def write_table(path: Path, head: Mapping[str, Any], failures: Mapping[str, str]) -> Iterator[Add]:
    """Write a row of CSV for each detection or class."""
    keys = ['file', 'frame', 'label', 'class_name', 'score']
    keys += ['x1', 'y1', 'x2', 'y2', 'track_id'] if 'score_threshold' in head else []
    with _growing(path) as file:
        def add(*rows: Mapping[str, Any]) -> None:
            text = io.StringIO()
            table = csv.DictWriter(text, keys, extrasaction='ignore', lineterminator='\n')
            table.writerows(rows)
            put(file, text.getvalue())

        add({key: key for key in keys})
        yield lambda record: add(*(
            dict(record, **found, **dict(zip(keys[5:], found.get('bbox', ()), strict=False)))
            for found in record.get('detections', record.get('predictions'))))


@contextmanager
def write_yolo(path: Path, head: Mapping[str, Any], failures: Mapping[str, str]) -> Iterator[Add]:
    """Write labels as YOLO's data sets have them: a file for each image or frame.

    A line has the class and the centre, width and height of a box, as parts of the image's. There
    is no score in it: it would be no label.

    Args:
        path: Of the names of the classes; labels lie beside it.
    """
    def add(record: Mapping[str, Any]) -> None:
        width, height = record['width'], record['height']
        lines = []
        for found in record['detections']:
            left, top, right, bottom = found['bbox']
            box = ((left + right) / 2 / width, (top + bottom) / 2 / height,
                   (right - left) / width, (bottom - top) / height)
            lines.append(' '.join([str(found['label']), *(f'{value:.6f}' for value in box)]))
        frame = f'_{record["frame"]:06}' if 'frame' in record else ''
        with write_whole(path.parent / _label_file(record['file'], frame)) as file:
            put(file, ''.join(f'{line}\n' for line in lines))

    with write_whole(path) as file:
        put(file, ''.join(f'{printable(name)}\n' for name in head['classes']))
    yield add


def _label_file(name: str, frame: str = '') -> str:
    name = Path(name.rpartition('://')[2])
    return name.with_name(f'{name.stem}{frame}.txt').as_posix()


def _coco_writer(ann_file: str | Path, source: Source, classes: Sequence[str]) -> Writer:
    """Make what writes COCO's results, with the ids of an annotation file.

    Raises:
        UsageError: An image of the source is not in it, or a class of the model; or either has no
            name of its own.
        DataError: It cannot be read.
    """
    if source.video is not None:
        raise UsageError('COCO results name images by their ids, and the frames of a video have '
                         'none: choose json, jsonl or csv')
    if not classes:
        raise UsageError('COCO results need the names of the classes, and the model does not know '
                         'them: choose json, jsonl or csv')
    content = read_json(str(ann_file))
    try:
        images = {image['file_name']: image['id'] for image in content['images']}
        categories = {category['name']: category['id'] for category in content['categories']}
    except (KeyError, TypeError):
        raise UsageError(f'{ann_file} is no annotation file of COCO: it lacks images with their '
                         'file_name and id, or categories with their name and id') from None
    lost = [name for name in map(source.name_of, source.images) if name not in images]
    if lost:
        raise UsageError(f'{ann_file} has no image {join(lost, 3)}: COCO results name images by '
                         'their ids in it')
    if strange := [name for name in classes if name not in categories]:
        raise UsageError(f'{ann_file} has no category {join(strange, 3)}, as the model has')

    @contextmanager
    def write(path: Path, head: Mapping[str, Any], failures: Mapping[str, str]) -> Iterator[Add]:
        with write_array(path, '[', lambda: '\n]\n') as add_result:
            def add(record: Mapping[str, Any]) -> None:
                for found in record['detections']:
                    left, top, right, bottom = found['bbox']
                    add_result(dict(
                        image_id=images[record['file']],
                        category_id=categories[found['class_name']],
                        bbox=[left, top, round(right - left, 2), round(bottom - top, 2)],
                        score=found['score']))

            yield add

    return write


#: Names of files by format.
FILES = {'json': 'results.json', 'jsonl': 'results.jsonl', 'csv': 'results.csv',
         'yolo': 'yolo/classes.txt', 'coco': 'results.coco.json'}


def find_writers(formats: Sequence[str], out_dir: Path, source: Source, detects: bool,
                 ann_file: str | Path | None = None, classes: Sequence[str] = ()
                 ) -> dict[Path, Writer]:
    """Find what writes results.

    Args:
        formats: Keys of :data:`FILES`.
        out_dir: Where to write.
        source: What is processed.
        detects: Whether results are boxes.
        ann_file: Says COCO's ids of images and categories.
        classes: Names of the model's classes, which COCO's results need.

    Raises:
        UsageError: A format is not for such results, or lacks what it needs.
    """
    if not detects and (boxes := {'yolo', 'coco'} & {*formats}):
        raise UsageError(f'results as {join(sorted(boxes))} have boxes, and a classifier gives '
                         'none: choose json, jsonl or csv')
    if ('coco' in formats) != (ann_file is not None):
        raise UsageError('COCO results need the annotation file that says the ids of images and '
                         'categories (ann_file, --ann-file), and no other results do')
    if 'yolo' in formats:
        own = Path(FILES['yolo']).name
        names = Counter([own, *map(_label_file, map(source.name_of, source.images))])
        if twice := sorted(name for name, times in names.items() if times > 1):
            raise UsageError(
                f'the YOLO labels of an image would overwrite {own}, the names of the classes: '
                'rename the image' if twice[0] == own else
                f'two images would share the YOLO labels {twice[0]}: rename one')
    writers = dict(json=write_results, jsonl=write_lines, csv=write_table, yolo=write_yolo)
    if 'coco' in formats:
        writers['coco'] = _coco_writer(ann_file, source, classes)
    return {out_dir / FILES[each]: writers[each] for each in formats}
