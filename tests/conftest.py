"""What every test starts from."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

import spartan_mm  # noqa: F401 - before any test imports mmdet or mmcv

DATA = Path(__file__).parent / 'data'


@pytest.fixture(autouse=True)
def independent_tests():
    """Same random numbers, and mmengine's own scope, whatever ran before."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture(scope='session')
def user_project(tmp_path_factory):
    """A folder of a user: configs of a detector and a classifier, four pictures for each."""
    root = tmp_path_factory.mktemp('user') / 'my prøject'
    root.mkdir()
    shutil.copy(DATA / 'user_detector.py', root)
    shutil.copy(DATA / 'user_classifier.py', root)

    images, annotations = [], []
    for index, name in enumerate(['square', 'square', 'disc', 'disc']):
        height, width = 48 + 16 * index, 96
        picture = np.full((height, width, 3), 60 * index, np.uint8)
        cv2.rectangle(picture, (10, 10), (39, 39), (0, 128, 255), -1)
        folder = root / 'classes' / name
        folder.mkdir(parents=True, exist_ok=True)
        (root / 'pictures').mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f'{index}.png'), picture)
        cv2.imwrite(str(root / 'pictures' / f'{index}.png'), picture)
        images.append(dict(id=index, file_name=f'{index}.png', height=height, width=width))
        if index:  # the first picture has no object
            annotations.append(dict(id=index, image_id=index, category_id=3, bbox=[10, 10, 30, 30],
                                    area=900, iscrowd=0))
    categories = [dict(id=3, name='square'), dict(id=7, name='disc')]
    (root / 'pictures' / 'annotations.json').write_text(json.dumps(
        dict(images=images, annotations=annotations, categories=categories)))
    return root
