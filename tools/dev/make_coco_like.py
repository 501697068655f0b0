"""Write an annotation file of COCO's size and make-up, to measure with.

By default as large as train2017: 118,287 images, 860,001 boxes, 80 classes, crowds and images
without objects among them; every image is a link to one small picture.
"""

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np

# What file systems allow at least of links to a file.
_LINKS = 30_000


def make_coco_like(root: str | Path, num_images: int = 118_287, num_boxes: int = 860_001,
                   with_images: bool = True) -> Path:
    """Make the annotation file and, if wanted, the images.

    Args:
        root: the folder, which gets ``annotations.json`` and ``images/``.
        num_images: number of images.
        num_boxes: number of annotations.
        with_images: whether to make the images, too.

    Returns:
        The annotation file.
    """
    root = Path(root)
    (root / 'images').mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    # COCO's ids have gaps, and its largest class 1,300 times the objects of its smallest.
    category_ids = np.sort(random.choice(90, 80, replace=False)) + 1
    shares = np.geomspace(1300, 1, 80)
    # One image in 100 has no object.
    image_of = random.integers(num_images // 100, num_images, num_boxes)
    label_of = random.choice(80, num_boxes, p=shares / shares.sum())
    corner = random.random((num_boxes, 2)) * (540, 380)
    side = np.exp(random.uniform(np.log(4), np.log(100), (num_boxes, 2)))
    boxes = np.concatenate([corner, side], 1).round(2)

    images = [dict(id=int(number) * 3 + 1, file_name=f'{number:012}.jpg', width=640, height=480,
                   license=1) for number in range(num_images)]
    annotations = [
        dict(id=number + 1, image_id=images[image]['id'], category_id=category, bbox=box,
             area=round(box[2] * box[3], 2), iscrowd=int(number % 86 == 0))
        for number, (image, category, box) in enumerate(zip(
            image_of.tolist(), category_ids[label_of].tolist(), boxes.tolist(), strict=True))]
    categories = [dict(id=int(number), name=f'class {number}') for number in category_ids]
    path = root / 'annotations.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                    categories=categories)))
    if with_images:
        picture = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        content = cv2.imencode('.jpg', cv2.resize(picture, (640, 480)))[1].tobytes()
        for number, image in enumerate(images):
            target = root / 'images' / image['file_name']
            if number % _LINKS == 0:
                source = target
                source.write_bytes(content)
            else:
                os.link(source, target)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder to make')
    parser.add_argument('--images', type=int, default=118_287, metavar='N')
    parser.add_argument('--boxes', type=int, default=860_001, metavar='N')
    args = parser.parse_args()
    print(make_coco_like(args.root, args.images, args.boxes))


if __name__ == '__main__':
    main()
