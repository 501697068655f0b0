"""The same sixty made-up pictures in every format that people have them in."""
import json
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np

CLASSES = ('disc', 'square & box')
SPLITS = dict(train=48, val=12)


def draw(folder, split, number):
    """Draw pictures of one to three shapes; return for each its name, size and objects."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([number, split == 'val'])
    described = []
    for index in range(number):
        # Sizes that divide nothing evenly.
        width, height = int(rng.integers(61, 90)), int(rng.integers(61, 90))
        picture = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        objects = []
        for _ in range(int(rng.integers(0 if index % 7 == 3 else 1, 4))):
            side = int(rng.integers(17, 40))
            left, top = (int(rng.integers(0, length - side + 1)) for length in (width, height))
            label = int(rng.integers(2))
            if label:
                picture[top:top + side, left:left + side] = (40, 200, 250)
            else:
                cv2.ellipse(picture, ((left + side / 2, top + side / 2), (side, side), 0),
                            (230, 90, 30), -1)
            objects.append((label, left, top, side, side))
        name = f'{split} {index:03d}.png'
        cv2.imwrite(str(folder / name), picture)
        described.append((name, width, height, objects))
    return described


def coco_of(pictures, placeholder=False):
    """The content of a COCO file."""
    names = [*(['shapes'] if placeholder else []), *CLASSES]
    images, annotations = [], []
    for number, (name, width, height, objects) in enumerate(pictures, start=1):
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for label, *box in objects:
            annotations.append(dict(
                id=len(annotations) + 1, image_id=number, category_id=label + placeholder, bbox=box,
                area=box[2] * box[3], iscrowd=0))
    return dict(images=images, annotations=annotations, categories=[
        dict(id=index, name=name, supercategory='none' if placeholder and not index else 'shapes')
        for index, name in enumerate(names)])


def write_yolo(folder, pictures):
    """Labels with six decimals, as tools write them; a picture without objects has none."""
    folder.mkdir(parents=True)
    for name, width, height, objects in pictures:
        lines = [f'{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} '
                 f'{w / width:.6f} {h / height:.6f}\r\n' for label, x, y, w, h in objects]
        if lines:
            (folder / name).with_suffix('.txt').write_text(''.join(lines), newline='')


def write_voc(folder, pictures):
    """Annotations with edges in pixels."""
    folder.mkdir(parents=True)
    for name, width, height, objects in pictures:
        items = ''.join(
            f'<object><name>{escape(CLASSES[label])}</name><difficult>0</difficult><bndbox>'
            f'<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>'
            '</bndbox></object>' for label, x, y, w, h in objects)
        (folder / name).with_suffix('.xml').write_text(
            f'<annotation><filename>{name}</filename><size><width>{width}</width>'
            f'<height>{height}</height><depth>3</depth></size>{items}</annotation>')


def make_sets(root):
    """Make the folders ``coco``, ``roboflow``, ``yolo`` and ``voc``; return them by name."""
    root = Path(root)
    drawn = {split: draw(root / 'drawn' / split, split, number) for split, number in SPLITS.items()}
    for split, pictures in drawn.items():
        source = root / 'drawn' / split
        text = json.dumps(coco_of(pictures))
        shutil.copytree(source, root / 'coco' / 'images' / split)
        (root / 'coco' / 'annotations').mkdir(exist_ok=True)
        (root / 'coco' / 'annotations' / f'instances_{split}2017.json').write_text(text)

        folder = root / 'roboflow' / dict(train='train', val='valid')[split]
        shutil.copytree(source, folder)
        (folder / '_annotations.coco.json').write_text(json.dumps(coco_of(pictures, True)))

        shutil.copytree(source, root / 'yolo' / 'images' / split)
        write_yolo(root / 'yolo' / 'labels' / split, pictures)

        shutil.copytree(source, root / 'voc' / 'JPEGImages', dirs_exist_ok=True)
        write_voc(root / 'voc' / f'of {split}', pictures)
        for file in (root / 'voc' / f'of {split}').iterdir():
            (root / 'voc' / 'Annotations').mkdir(exist_ok=True)
            file.rename(root / 'voc' / 'Annotations' / file.name)
        (root / 'voc' / f'of {split}').rmdir()
        lists = root / 'voc' / 'ImageSets' / 'Main'
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f'{split}.txt').write_text(''.join(f'{name[:-4]}\n' for name, *_ in pictures))
    (root / 'yolo' / 'data.yaml').write_text(
        'path: /somewhere/else\ntrain: images/train\nval: images/val\n'
        'names:\n  0: disc\n  1: square & box\n')
    shutil.rmtree(root / 'drawn')
    return {name: root / name for name in ('coco', 'roboflow', 'yolo', 'voc')}
