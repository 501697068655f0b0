"""``spartan-mm train DATA``: a folder of data, a config of it, and the same training."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from spartan_mm.engine.launch import load_config
from spartan_mm.engine.train import find_best, train_config

from .picture_sets import CLASSES, make_sets

FORMATS = ('coco', 'roboflow', 'yolo', 'voc')
TINY = Path(__file__).parents[1] / 'data' / 'user_detector.py'
FLAGS = ('--model', TINY, '--epochs', 2, '--batch-size', 8, '--deterministic', '--seed', 3,
         '--cfg-options', 'optim_wrapper.optimizer.lr=0.004',
         'val_dataloader.batch_size=12')


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def trained(sets, tmp_path_factory):
    """The work dir of a training on each of the sets, a command of one line each."""
    from spartan_mm.cli import main
    root = tmp_path_factory.mktemp('runs')
    for name, folder in sets.items():
        words = ('train', folder, '--work-dir', root / name, *FLAGS)
        assert main([str(word) for word in words]) == 0
    return root


def read_run(work_dir):
    """The weights and the metrics of a training."""
    [log] = [path for path in work_dir.glob('*/vis_data/scalars.json')]
    metrics = [json.loads(line) for line in log.read_text().splitlines()]
    for record in metrics:
        record.pop('time', None), record.pop('data_time', None), record.pop('memory', None)
    return torch.load(find_best(work_dir), weights_only=False)['state_dict'], metrics


def read_boxes(config, split):
    """The classes, and of each picture its name, size, boxes and labels."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    return dataset.metainfo['classes'], [
        (Path(info['img_path']).name, info['width'], info['height'],
         [(item['bbox'], item['bbox_label'], item['ignore_flag']) for item in info['instances']])
        for info in infos]


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS[1:])
def test_formats_are_equal(trained, name):
    """Boxes, and after training weights, losses and AP, to the last digit."""
    for split in ('train', 'val'):
        classes, pictures = read_boxes(trained / 'coco' / 'config.py', split)
        assert classes == CLASSES and sum(len(picture[3]) for picture in pictures) > 12
        assert read_boxes(trained / name / 'config.py', split) == (classes, pictures)
    weights, metrics = read_run(trained / 'coco')
    assert metrics[-1]['coco/bbox_mAP'] > 0
    others, theirs = read_run(trained / name)
    assert theirs == metrics
    assert others.keys() == weights.keys()
    assert all(torch.equal(others[key], weights[key]) for key in weights)


@pytest.mark.slow
def test_the_config_alone_repeats_the_run(trained, tmp_path):
    (tmp_path / 'again').mkdir()
    shutil.copy(trained / 'yolo' / 'config.py', tmp_path / 'again')
    train_config(load_config(str(tmp_path / 'again' / 'config.py'), split='train'))
    weights, metrics = read_run(trained / 'yolo')
    others, theirs = read_run(tmp_path / 'again')
    assert theirs == metrics
    assert all(torch.equal(others[key], weights[key]) for key in weights)
    # It stays as it was, and the whole one lies beside it.
    assert (tmp_path / 'again' / 'config.py').read_text() == (
        trained / 'yolo' / 'config.py').read_text()
    assert (tmp_path / 'again' / 'whole_config.py').is_file()
