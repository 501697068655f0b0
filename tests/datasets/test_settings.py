"""Keys that nobody takes and values of a wrong form are named in one line, in both tasks."""
import json
import pickle
import re

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

import spartan_mm.classification
import spartan_mm.detection  # noqa: F401 - registers the datasets
from spartan_mm.cli import main
from spartan_mm.datasets.check import build_loader, check_config
from spartan_mm.datasets.classes import classes_of
from spartan_mm.datasets.data_errors import DataError
from spartan_mm.datasets.settings import (
    check_loaders,
    explain_build,
    find_argument_faults,
    find_datasets,
)

NAMES = ('disc', 'square', 'bar')


@pytest.fixture
def root(tmp_path):
    """Two annotation files of other categories, a folder for each class, and a list."""
    for name in ('a', 'b'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'train' / name / f'{name}.png'), np.zeros((8, 8, 3), np.uint8))
    for file, names in (('all', NAMES), ('two', NAMES[:2]), ('turned', NAMES[::-1])):
        (tmp_path / f'{file}.json').write_text(json.dumps(dict(
            images=[dict(id=1, file_name='train/a/a.png', width=8, height=8)],
            annotations=[dict(id=number, image_id=1, category_id=number, iscrowd=0, area=16,
                              bbox=[number, 0, 4, 4]) for number in range(1, len(names) + 1)],
            categories=[dict(id=number, name=name) for number, name in enumerate(names, 1)])))
    return tmp_path


def detector(root, file='all.json', **changes):
    return dict(type='CheckedCocoDataset', data_root=str(root), ann_file=file, **changes)


def classifier(root, **changes):
    return dict(type='CheckedImageFolder', data_root=str(root), data_prefix='train', **changes)


def make_config(dataset, loader=()):
    scope = 'mmpretrain' if 'Folder' in str(dataset) else 'mmdet'
    sampler = dict(type='DefaultSampler', shuffle=False)
    return Config(dict(default_scope=scope, train_dataloader=dict(
        batch_size=1, dataset=dataset, sampler=sampler) | dict(loader)))


def errors_of(cfg):
    return [finding.message for report in check_config(cfg) for finding in report.findings
            if finding.level == 'error']


WRONG = [
    (detector, dict(data_prefix='images/'),
     r"data_prefix is 'images/', but must be a dict of texts, such as data_prefix=dict\(img="),
    (detector, dict(ann_file=['all.json', 'two.json']),
     r"ann_file is \['all.json', 'two.json'\], but must be a text, .* joined by dict\(type='Conc"),
    (detector, dict(img_prefix='images/'),
     r"img_prefix is no setting of CheckedCocoDataset: write data_prefix=dict\(img='...'\)"),
    (detector, dict(metainfo=['disc']), r"metainfo is \['disc'\], but must be a dict, such as"),
    (detector, dict(filter_cfg=True), r'filter_cfg is True, but must be a dict, such as'),
    (detector, dict(metainfo=dict(CLASSES=NAMES)), r'metainfo.CLASSES is not read: write cla'),
    (detector, dict(metainfo=dict(classes='disc')), r"classes='disc', which must be a tuple"),
    (detector, dict(metainfo=dict(classes=(1, 2))), r'classes is \(1, 2\), but must be a tuple'),
    (detector, dict(category=NAMES), r'category is no setting of CheckedCocoDataset, which takes'),
    (detector, dict(test_mode='yes'), r"test_mode is 'yes', but must be True or False"),
    (classifier, dict(data_prefix=3), r'data_prefix is 3, but must be a text, the name of a'),
    (classifier, dict(metainfo='names.txt'), r"metainfo is 'names.txt', but must be a dict"),
    (classifier, dict(classes=3), r"classes is 3, but must be a tuple of texts, .*, or a f"),
    (classifier, dict(indices='10'), r"indices is '10', but must be a whole number, or a"),
    (classifier, dict(data_root=['a']), r"data_root is \['a'\], but must be a text"),
    (classifier, dict(ann_files='list.txt'), r'ann_files is no setting of CheckedImageFolder, '),
]
PIPELINES = [
    (detector, dict(type='LoadImageFromFile'), r'pipeline is \{.*\}, but must be a list of dicts'),
    (detector, [None], r'pipeline\[0\] is None, but must be a dict'),
    (detector, ['Resize'], r"pipeline\[0\] is 'Resize', but must be a dict, such as"),
    (detector, [dict(scale=8)], r'pipeline\[0\] has no `type`'),
    (detector, [dict(type='DefaultFormatBundle')],
     r"pipeline\[0\] has type='DefaultFormatBundle', but there is no .* today it is PackDetInputs"),
    (detector, [dict(type='Resize', img_scale=(8, 8))],
     r'pipeline\[0\] \(Resize\) cannot be built: .*img_scale.*; img_scale is scale today'),
    (detector, [dict(type='RandomFlip', prob=2)], r'pipeline\[0\] \(RandomFlip\) cannot be b'),
    (classifier, None, r'pipeline is None, but must be a list of dicts'),
    (classifier, [dict(type='DefaultFormatBundle')], r'today it is .*\(mmpretrain: PackInputs'),
    (classifier, [dict(type='TorchvisionTransforms', transforms=[dict(type='Resise')])],
     r"pipeline\[0\] \(TorchvisionTransforms\) .*no transform 'Resise'"),
]
LOADERS = [
    (dict(samples_per_gpu=2), r'samples_per_gpu is no setting any more: write batch_size'),
    (dict(batch_size='2'), r"batch_size is '2', but must be a whole number from 1 on"),
    (dict(num_workers=-1), r'num_workers is -1, but must be a whole number from 0 on'),
    (dict(dataset=[{}, {}]), r"dataset is \[.*\], but must be a dict; several are joined by"),
    (dict(sampler='DefaultSampler'), r"sampler is 'DefaultSampler', but must be a dict, such as"),
    (dict(dataset=dict(type='RepeatDataset', times=2, dataset='a.json')),
     r"dataset\.dataset is 'a.json', but must be a dict"),
    (dict(dataset=dict(type='ConcatDataset', datasets=[None])), r'datasets\[0\] is None, but must'),
    (dict(dataset=dict(ann_file='a.json')), r'has no `type`, the name of a dataset'),
]


@pytest.mark.parametrize('make, changes, words', WRONG)
def test_datasets(root, make, changes, words):
    """In the config, where it is; in Python, with the name of the class."""
    settings = make(root) | changes
    cfg = make_config(settings)
    error, = errors_of(cfg)
    loader = pytest.raises(DataError, match=rf'^train_dataloader\.dataset\b.*{words}')
    with loader, DefaultScope.overwrite_default_scope(cfg.default_scope):
        build_loader(lambda loader: pytest.fail('built'), cfg, cfg.train_dataloader)
    with pytest.raises(DataError, match=words) as raised:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            DATASETS.build(settings)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('make, pipeline, words', PIPELINES)
def test_pipelines(root, make, pipeline, words):
    error, = errors_of(make_config(make(root, pipeline=pipeline)))
    assert re.match(rf'train_dataloader\.dataset\..*{words}', error)


@pytest.mark.parametrize('changes, words', LOADERS)
def test_loaders(root, changes, words):
    cfg = make_config(detector(root), changes)
    assert re.match(rf'train_dataloader.*{words}', errors_of(cfg)[0])
    if not isinstance(changes.get('dataset'), dict):
        with pytest.raises(DataError, match=rf'^train_dataloader\.{words}'):
            check_loaders(cfg)


def test_what_a_users_class_takes_by_itself_is_no_fault(root):
    from spartan_mm.detection import CheckedCocoDataset

    class Mine(CheckedCocoDataset):

        def __init__(self, *args, first=1, **kwargs):
            self.own = first, kwargs.pop('second', 2)
            super().__init__(*args, **kwargs)

    assert not errors_of(make_config(detector(root) | dict(type=Mine, first=3, second=4)))
    error, = errors_of(make_config(detector(root) | dict(type=Mine, third=3)))
    assert 'dataset.third is no setting of Mine, which takes ' in error


def test_what_a_users_class_reads_itself_has_any_form(root):
    from spartan_mm.detection import CheckedCocoDataset

    class Files(CheckedCocoDataset):

        def __init__(self, ann_file, split=0, metainfo=(), **kwargs):
            self.own = split, metainfo
            super().__init__(ann_file[0], **kwargs)

    class Numbers:

        def __init__(self, pipeline, classes=10, indices=range(2)):
            pass

    def faults(kind, **arguments):
        return [finding.message for finding in find_argument_faults(kind, arguments, 'it')]

    assert not faults(Files, ann_file=['a.json'], split=3, metainfo=NAMES)
    assert not faults(Numbers, pipeline=None, classes=3, indices=range(3))
    error, = faults(Files, ann_file=['a.json'], data_prefix='images/')
    assert error.startswith("it.data_prefix is 'images/', but must be a dict of texts")


def test_a_users_class_may_name_its_datasets(root):
    class Named:
        def __init__(self, dataset=None, datasets=()):
            pass

    for settings in (dict(dataset='cifar10'), dict(datasets=['one', 'two'])):
        assert [*find_datasets(make_config(dict(type=Named, **settings)), 'train')] == [
            ('train_dataloader.dataset', dict(type=Named, **settings))]
    inner = dict(type=Named)
    assert [*find_datasets(make_config(dict(type=Named, dataset=inner)), 'train')] == [
        ('train_dataloader.dataset.dataset', inner)]


def test_metainfo_that_nobody_reads_is_a_warning(root):
    report, = check_config(make_config(detector(root, metainfo=dict(classes=NAMES, colour='red'))))
    assert [finding.message for finding in report.findings if finding.kind == 'setting'] == [
        'train_dataloader.dataset.metainfo.colour is not read by CheckedCocoDataset, which knows '
        'classes, palette']


def test_an_error_of_the_user_keeps_its_traceback(root):
    cfg = make_config(detector(root))

    def build(loader):
        raise KeyError('mine')

    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times='2', dataset=detector(root))
    with DefaultScope.overwrite_default_scope('mmdet'), pytest.raises(
            DataError, match="^train_dataloader cannot be built: TypeError: .*'str'"):
        build_loader(Runner.build_dataloader, cfg, cfg.train_dataloader, seed=0)
    with pytest.raises(KeyError, match='mine'), DefaultScope.overwrite_default_scope('mmdet'):
        build_loader(build, cfg, cfg.train_dataloader)


@pytest.mark.parametrize('config', ['user_detector.py', 'user_classifier.py'])
def test_train_and_test_refuse(user_project, tmp_path, monkeypatch, config):
    monkeypatch.chdir(user_project)
    (tmp_path / 'any.pth').touch()
    for command, files in (('train', [config]), ('test', [config, str(tmp_path / 'any.pth')])):
        setting = f'{command}_dataloader.dataset.ann_file'
        with pytest.raises(SystemExit) as stopped:
            main([command, *files, '--work-dir', str(tmp_path / 'work'),
                  '--cfg-options', f'{setting}=3'])
        assert stopped.value.code.startswith(
            f'error: {setting} is 3, but must be a text, the path of one file')


# ------------------------------------------------------------------------------- joining datasets


def join(*parts, **wrapper):
    return dict(type='ConcatDataset', datasets=list(parts), **wrapper)


def build(dataset, scope='mmdet'):
    with DefaultScope.overwrite_default_scope(scope):
        return DATASETS.build(dataset)


@pytest.mark.parametrize('wrap', [
    lambda one, other: join(one, other),
    lambda one, other: join(dict(type='RepeatDataset', times=2, dataset=one), other),
    lambda one, other: join(one, dict(type='ClassBalancedDataset', oversample_thr=0.1,
                                      dataset=other))])
def test_joined_files_of_other_categories(root, wrap):
    joined = wrap(detector(root, lazy_init=False), detector(root, 'two.json'))
    words = (rf'The classes of the dataset of train_dataloader, CheckedCocoDataset of '
             rf"{root}/all\.json, and of that of train_dataloader, CheckedCocoDataset of "
             rf"{root}/two\.json, differ: label 2 is 'bar' in the one and none in the other\. .*"
             'classes_by_name=True')
    with pytest.raises(DataError, match=words):
        classes_of(build(joined), 'train_dataloader')
    assert [text for text in errors_of(make_config(joined)) if re.match(words, text)]
    for split in ('train', 'val', 'test'):
        cfg = make_config(joined)
        cfg[f'{split}_dataloader'] = cfg.pop('train_dataloader')
        with pytest.raises(DataError, match=words.replace('train_', f'{split}_')):
            with DefaultScope.overwrite_default_scope('mmdet'):
                build_loader(Runner.build_dataloader, cfg, cfg[f'{split}_dataloader'])
    same = wrap(detector(root), detector(root))
    assert classes_of(build(same), 'train_dataloader') == NAMES
    assert not errors_of(make_config(same))


def test_joined_folders_of_other_classes(root):
    """mmengine refuses them without saying which classes; the check knows."""
    (root / 'train').rename(root / 'one')
    for name in ('a', 'c'):
        (root / 'two' / name).mkdir(parents=True)
        (root / 'two' / name / 'x.png').write_bytes((root / 'one' / 'a' / 'a.png').read_bytes())
    cfg = make_config(join(*(classifier(root) | dict(data_prefix=name) for name in ('one', 'two'))))
    with DefaultScope.overwrite_default_scope('mmpretrain'), pytest.raises(
            DataError, match=r"^train_dataloader: The classes of .*/one, and of .*/two, differ: "
                             r"label 1 is 'b' in the one and 'c' in the other"):
        build_loader(Runner.build_dataloader, cfg, cfg.train_dataloader)


class TestByName:

    NAMES = ('bar', 'disc', 'ring', 'square')

    def settings(self, root, file, **changes):
        return detector(root, file, classes_by_name=True, metainfo=dict(classes=self.NAMES),
                        **changes)

    def labels(self, dataset, index=0):
        return [item['bbox_label'] for item in dataset.get_data_info(index)['instances']]

    def test_files_are_joined(self, root):
        files = ('all.json', 'two.json', 'turned.json')
        joined = join(*(self.settings(root, file) for file in files))
        dataset = build(joined)
        assert classes_of(dataset, 'train_dataloader') == self.NAMES
        assert [self.labels(dataset, i) for i in range(3)] == [[1, 3, 0], [1, 3], [0, 3, 1]]
        assert not errors_of(make_config(joined))

    def test_without_the_option(self, root):
        with pytest.raises(DataError, match='has no category ring'):
            build(detector(root, metainfo=dict(classes=self.NAMES)))
        with pytest.raises(DataError, match='or set `classes_by_name=True` of the dataset'):
            build(detector(root, metainfo=dict(classes=NAMES[::-1])))
        with pytest.raises(DataError, match='has no category cat, dog'):
            build(detector(root, classes_by_name=True, metainfo=dict(classes=('cat', 'dog'))))

    def test_evaluation(self, root):
        import torch

        from spartan_mm.detection import CheckedCocoMetric
        dataset = build(self.settings(root, 'two.json', test_mode=True))
        info = dataset.get_data_info(0)
        for shift, expected in ((0, 1.), (1, 0.)):
            metric = CheckedCocoMetric(ann_file=str(root / 'two.json'))
            metric.dataset_meta = dataset.metainfo
            boxes = torch.tensor([item['bbox'] for item in info['instances']])
            metric.process({}, [dict(img_id=1, ori_shape=(8, 8), pred_instances=dict(
                bboxes=boxes, scores=torch.ones(2),
                labels=(torch.tensor(self.labels(dataset)) + shift) % 4))])
            assert metric.evaluate(1)['coco/bbox_mAP'] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize('content, words', [([], 'train_dataloader has no images: '),
                                            ([dict(own=lambda: 0)], 'cannot be built: ')])
def test_datasets_that_cannot_be_packed(content, words):
    dataset = BaseDataset(lazy_init=True)
    dataset.data_list = content
    with pytest.raises((AttributeError, pickle.PicklingError, ValueError)) as error:
        dataset._serialize_data()
    assert words in explain_build(error.value, 'train_dataloader').message
