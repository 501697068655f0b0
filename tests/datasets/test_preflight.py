"""A training says before it begins what would end it later."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset

from spartan_mm.cli import main
from spartan_mm.datasets.data_errors import DataError
from spartan_mm.datasets.preflight import PreflightHook, check_batches
from spartan_mm.detection import CheckedCocoDataset

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def make(tmp_path):
    def make(name='set.json', change=None):
        content = dict(
            images=[dict(id=number, file_name=f'{number}.png', width=8, height=8)
                    for number in range(3)],
            annotations=[dict(id=1, image_id=0, category_id=1, bbox=[0, 0, 4, 4], area=16,
                              iscrowd=0)],
            categories=[dict(id=1, name='disc'), dict(id=2, name='square')])
        for image in content['images']:
            cv2.imwrite(str(tmp_path / image['file_name']), np.zeros((8, 8, 3), np.uint8))
        if change is not None:
            change(content)
        (tmp_path / name).write_text(json.dumps(content))
        return CheckedCocoDataset(data_root=str(tmp_path), ann_file=name)
    return make


@pytest.fixture
def logged(monkeypatch):
    messages = []
    monkeypatch.setattr('spartan_mm.datasets.preflight.print_log',
                        lambda message, *_: messages.append(message))
    return messages


def make_runner(train, val=None, queries=2):
    loaders = [dataset and DataLoader(dataset) for dataset in (train, val)]
    return SimpleNamespace(model=SimpleNamespace(num_queries=queries), epoch=0, max_epochs=1,
                           train_dataloader=loaders[0], val_dataloader=loaders[1], train_loop=None,
                           val_loop=None if val is None else object())


def test_sums_up(make, logged):
    dataset = make()
    PreflightHook().before_train(make_runner(dataset, dataset))
    assert logged[0].endswith('set.json: 3 images, 1 labels of 2 classes')
    assert 'train data, images without objects: 2 of 3 images have no object' in logged
    assert ('train data, classes without objects: 1 of 2 classes have no object: square'
            in logged)


def test_more_objects_than_queries(make, logged):
    """The same line as check-data's."""
    def add(content):
        first, = content['annotations']
        content['annotations'] += [dict(first, id=number, bbox=[number, 0, 2, 2])
                                   for number in (2, 3)]

    PreflightHook().before_train(make_runner(make(change=add), queries=2))
    line, = (line for line in logged if 'the model has queries' in line)
    assert line.startswith('train data, more objects than queries: 1 images have more objects than '
                           'the model has queries (2) (')
    logged.clear()
    PreflightHook().before_train(make_runner(make(change=add), queries=3))
    assert not [line for line in logged if 'the model has queries' in line]


@pytest.mark.parametrize('own', [
    dict(instances=[dict(mask=[]), dict(bbox=(4, 4, 2, 2, 0.5), bbox_label=0)]),
    dict(img_path=None),
    dict(img_path=Path('0.png')), dict(frames=['0.png'])], ids=str)
def test_a_users_dataset_describes_images_in_its_own_way(own, logged, tmp_path, monkeypatch):
    class Own(list):
        metainfo = None

        def get_data_info(self, index):
            return dict(dict(img_path='0.png'), **own)

    monkeypatch.chdir(tmp_path)
    (tmp_path / '0.png').write_bytes(b'picture')
    PreflightHook().before_train(make_runner(Own([1])))


def test_missing_images_of_a_joined_set(make, tmp_path, logged):
    train, val = make(), make('val.json', lambda content: content['images'].append(
        dict(id=9, file_name='gone.png', width=8, height=8)))
    for runner in (make_runner(ConcatDataset([train, val])), make_runner(train, val)):
        with pytest.raises(DataError, match=r'_dataloader: .*val\.json: 1 of 4 images do not exist '
                                            r'\(.*gone\.png\): check `data_root`'):
            PreflightHook().before_train(runner)


@pytest.mark.parametrize('settings, words', [
    (dict(dataset=[]), 'val_dataloader has no images: '),
    (dict(dataset=[1], batch_size=2, drop_last=True), 'it has 1 image, too few for one of batch_'),
    (dict(dataset=[1], sampler=[]), 'its sampler, list, takes none of 1 image'),
    (dict(dataset=[1], batch_sampler=[]), 'takes none of 1 image'),
], ids=str)
def test_loaders_without_a_batch(settings, words):
    with pytest.raises(DataError, match=words):
        check_batches(DataLoader(**settings), 'val')


def test_loaders_with_a_batch(make):
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    check_batches(DataLoader(Stream()), 'train')
    check_batches(DataLoader([1], batch_size=2), 'train')
    endless = DataLoader([1], 2, sampler=InfiniteSampler([1], seed=0), drop_last=True)
    check_batches(endless, 'train')
    assert next(iter(endless)).tolist() == [1, 1]


@pytest.mark.parametrize('unit, loop', [('epoch', None), ('iter', Mock(IterBasedTrainLoop))])
def test_a_training_that_is_over(make, logged, unit, loop):
    runner = make_runner(make())
    runner.train_loop = loop
    vars(runner).update({unit: 7, f'max_{unit}s': 7})
    PreflightHook().before_train(runner)
    assert logged[0] == (f'nothing is left to do: {unit} 7 of 7 is done; to go on, set '
                         f'train_cfg.max_{unit}s higher')


def test_commands(user_project, tmp_path, monkeypatch, capfd):
    """check_dataset.py reports and train refuses, in the same words and without a traceback."""
    monkeypatch.chdir(user_project)

    def check(*arguments):
        monkeypatch.setattr(sys, 'argv', ['check_dataset.py', *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOLS / 'check_dataset.py'), run_name='__main__')
        return capfd.readouterr().out, stopped.value.code

    (user_project / 'pictures' / '3.png').rename(user_project / 'kept.png')
    try:
        checked, status = check('user_detector.py', '--out', tmp_path / 'report', '--decode',
                                '--workers', 1)
        with pytest.raises(SystemExit) as stopped:
            main(['train', 'user_detector.py', '--work-dir', str(tmp_path / 'work')])
    finally:
        (user_project / 'kept.png').rename(user_project / 'pictures' / '3.png')

    words = '1 of 4 images do not exist (pictures/3.png): check `data_root` and `data_prefix`'
    assert status == 1 and f'error: {words}' in checked
    report = json.loads((tmp_path / 'report' / 'report.json').read_text())
    # The datasets of training and validation, which that of the test is the same as.
    assert report['errors'] == 2 and len(report['datasets']) == 3
    assert report['datasets'][2]['dataset'].startswith('the same as val: CocoDataset of ')
    assert {path.suffix for path in (tmp_path / 'report').iterdir()} == {'.json', '.png'}
    # The line that Python prints when a command leaves with a text.
    line = stopped.value.code
    assert line.startswith('error: train_dataloader: ') and words in line and '\n' not in line
