"""What every test starts from."""

import gc
import io
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmengine
import numpy as np
import pytest
import torch
from filelock import FileLock
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin
from yapf.yapflib import yapf_api

from spartan_mm import cli, demo  # before any test imports mmdet or mmcv

DATA = Path(__file__).parent / 'data'

# A runner lays its config out four times and asks compilers for their versions, and each dataset
# collects garbage: together that takes longer than most trainings here.
yapf_api.FormatCode = lambda text, **style: (text, True)
mmengine.runner.runner.collect_env = dict


def pytest_collection_finish():
    gc.freeze()


def forget_runs(kind):
    """Drop the loggers, visualizers, scopes and so on that mmengine keeps by the names of runs."""
    kind._instance_dict.clear()
    for subclass in kind.__subclasses__():
        forget_runs(subclass)


@pytest.fixture(autouse=True)
def independent_tests():
    """Same random numbers, mmengine's own scope and no run of before, whatever ran before."""
    torch.manual_seed(0)
    # Two runs of a config in the same second have the same name, and the second takes the first's
    # logger, which writes to the output of an earlier test.
    forget_runs(ManagerMixin)
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
    """Gives a demo that ran with ``--quick``, its steps in this process, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def run_here(command, log, show):
        with open(log, 'w') as file, redirect_stdout(file), redirect_stderr(file):
            status = cli.main([Path(command[1]).stem, *command[2:]])
        for line in log.read_text().splitlines():
            show(line)
        return status

    def run(kind):
        root = base / f'quick_{kind.name}'
        places = dict(work_dir=root / 'out', data_root=root / 'data' / 'digits')
        output = root / 'output.json'
        handler = signal.getsignal(signal.SIGTERM)
        with FileLock(f'{root}.lock'), pytest.MonkeyPatch.context() as patch:
            if not output.exists():
                root.mkdir(exist_ok=True)
                patch.chdir(root)
                patch.setattr(demo, 'run_process', run_here)
                with (redirect_stdout(io.StringIO()) as stdout,
                      redirect_stderr(io.StringIO()) as stderr):
                    status = demo.main(kind, [
                        '--quick', '--work-dir', str(places['work_dir']), '--data-root',
                        str(places['data_root'])])
                signal.signal(signal.SIGTERM, handler)
                output.write_text(json.dumps(dict(
                    status=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())))
        return SimpleNamespace(**places, **json.loads(output.read_text()))

    return run
