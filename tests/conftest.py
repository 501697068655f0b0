"""What every test starts from."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmengine
import numpy as np
import pytest
import torch
from filelock import FileLock
from mmengine.registry import DefaultScope
from yapf.yapflib import yapf_api

import spartan_mm  # noqa: F401 - before any test imports mmdet or mmcv

DATA = Path(__file__).parent / 'data'

# A runner lays its config out four times and asks compilers for their versions, and each dataset
# collects garbage: together that takes longer than most trainings here.
yapf_api.FormatCode = lambda text, **style: (text, True)
mmengine.runner.runner.collect_env = dict


def pytest_collection_finish():
    gc.freeze()


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


@pytest.fixture(scope='session')
def quick_demo(tmp_path_factory):
    """Gives a demo of ``tools/`` that ran with ``--quick``, once for the workers of all tests."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def run(name):
        root = base / f'quick_{name}'
        places = dict(work_dir=root / 'out', data_root=root / 'data' / 'digits')
        output = root / 'output.json'
        with FileLock(f'{root}.lock'):
            if not output.exists():
                root.mkdir(exist_ok=True)
                tool = DATA.parents[1] / 'tools' / f'{name}.py'
                done = subprocess.run(
                    [sys.executable, str(tool), '--quick', '--work-dir', str(places['work_dir']),
                     '--data-root', str(places['data_root'])], cwd=root, text=True,
                    capture_output=True, timeout=900, env=dict(os.environ, OMP_NUM_THREADS='1'))
                output.write_text(json.dumps(dict(
                    returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)))
        return SimpleNamespace(**places, **json.loads(output.read_text()))

    return run
