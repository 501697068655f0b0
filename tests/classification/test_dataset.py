"""Image folders and lists are read as they are meant, and what is wrong with them is named."""

import shutil

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

from spartan_mm.classification.dataset import CheckedImageFolder, CheckedImageNet
from spartan_mm.datasets.data_errors import DataError

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=8), dict(type='PackInputs')]


def write_picture(path, grey=0, side=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((side, side, 3), grey, np.uint8))


@pytest.fixture
def root(tmp_path):
    """Two classes, three pictures in training, two in validation."""
    for name in ('train/cat/a.JPEG', 'train/cat/deep/b.png', 'train/dog/c c.png',
                 'val/cat/d.png', 'val/dog/e.png'):
        write_picture(tmp_path / name)
    (tmp_path / 'train' / 'cat' / 'notes.txt').touch()
    (tmp_path / 'train' / '.hidden').mkdir()
    (tmp_path / 'train' / 'readme.txt').touch()
    return tmp_path


def build(root, **arguments):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return DATASETS.build(dict(type='CheckedImageFolder', data_root=str(root),
                                   pipeline=PIPELINE, **arguments))


def content(dataset):
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(info['img_path'], info['gt_label']) for info in infos]


class TestFolder:

    def test_folders_name_and_number_the_classes(self, root):
        dataset = build(root, split='train')
        assert dataset.metainfo['classes'] == ('cat', 'dog')
        assert content(dataset) == [(f'{root}/train/cat/a.JPEG', 0),
                                    (f'{root}/train/cat/deep/b.png', 0),
                                    (f'{root}/train/dog/c c.png', 1)]
        assert dataset[2]['data_samples'].gt_label.tolist() == [1]

    def test_other_names(self, root):
        dataset = build(root, split='train', metainfo=dict(classes=('Katze', 'Hund')))
        assert dataset.metainfo['classes'] == ('Katze', 'Hund')
        assert [label for _, label in content(dataset)] == [0, 0, 1]

    def test_prefix_in_place_of_split(self, root):
        assert content(build(root, data_prefix='val')) == content(build(root, split='val'))

    def test_empty_classes(self, root):
        (root / 'train' / 'bird').mkdir()
        (root / 'train' / 'emu').mkdir()
        (root / 'train' / 'emu' / 'notes.txt').touch()
        with pytest.raises(ValueError, match=r"train has class folders without a picture \(.*\): "
                                             r'bird, emu\. Fill them'):
            build(root, split='train')
        dataset = build(root, split='train', allow_empty_classes=True)
        assert dataset.metainfo['classes'] == ('bird', 'cat', 'dog', 'emu')
        assert [label for _, label in content(dataset)] == [1, 1, 2]

    def test_no_picture_at_all(self, tmp_path):
        (tmp_path / 'train' / 'cat').mkdir(parents=True)
        with pytest.raises(ValueError, match='train has class folders without a picture .*: cat'):
            build(tmp_path, split='train', allow_empty_classes=True)

    def test_no_class_folders(self, tmp_path):
        write_picture(tmp_path / 'train' / 'a.png')
        with pytest.raises(ValueError, match='train has no folders: put the pictures of each'):
            build(tmp_path, split='train')

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder '.*test': check `data_root`"):
            build(tmp_path, split='test')

    def test_another_number_of_classes(self, root):
        with pytest.raises(ValueError, match=r'val has 2 class folders \(cat, dog\), but '
                                             r'CheckedImageFolder has 3 classes by name \(a, b, c'):
            build(root, split='val', metainfo=dict(classes=('a', 'b', 'c')))

    def test_without_labels(self, root):
        dataset = build(root, split='val', with_label=False)
        assert [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))] == [
            f'{root}/val/cat/d.png', f'{root}/val/dog/e.png']
        (root / 'test').mkdir()
        with pytest.raises(ValueError, match='test has no picture in it'):
            build(root, split='test', with_label=False)


class TestList:

    @pytest.fixture
    def listed(self, root):
        (root / 'meta').mkdir()
        (root / 'meta' / 'val.txt').write_text('dog/e.png 0\n\ncat/d.png 1\n')
        return root

    def test_is_found_beside_the_split(self, listed):
        dataset = build(listed, split='val', classes=('dog', 'cat'))
        assert content(dataset) == [(f'{listed}/val/dog/e.png', 0), (f'{listed}/val/cat/d.png', 1)]
        assert len(dataset[0]['data_samples'].gt_label) == 1
        # Training has none.
        assert build(listed, split='train').metainfo['classes'] == ('cat', 'dog')

    def test_names_with_blanks(self, root):
        (root / 'list.txt').write_text('dog/c c.png 1')
        dataset = build(root, split='train', ann_file='list.txt', classes=('cat', 'dog'))
        assert content(dataset) == [(f'{root}/train/dog/c c.png', 1)]

    def test_needs_names(self, listed):
        with pytest.raises(ValueError, match=r'val.txt numbers the classes, but nothing names'):
            build(listed, split='val')
        (listed / 'names.txt').write_text('dog\ncat\n')
        dataset = build(listed, split='val', classes=str(listed / 'names.txt'))
        assert list(dataset.metainfo['classes']) == ['dog', 'cat']

    @pytest.mark.parametrize('line', ['dog/e.png', 'dog/e.png 2', 'dog/e.png -1', 'dog/e.png one',
                                      '1'])
    def test_faulty_line(self, listed, line):
        (listed / 'meta' / 'val.txt').write_text(f'dog/e.png 0\n{line}\n')
        with pytest.raises(ValueError, match=rf"label from 0 to 1, .* line 2 is '{line}'\."):
            build(listed, split='val', classes=('dog', 'cat'))

    def test_without_labels(self, root):
        (root / 'list.txt').write_text('cat/d.png\ndog/e.png')
        dataset = build(root, split='val', ann_file='list.txt', with_label=False)
        assert dataset.get_data_info(1)['img_path'] == f'{root}/val/dog/e.png'
        assert 'gt_label' not in dataset[1]['data_samples']

    def test_empty_or_missing(self, root):
        with pytest.raises(FileNotFoundError, match=r"no list '.*none.txt'"):
            build(root, split='val', ann_file='none.txt')
        (root / 'list.txt').write_text('\n')
        with pytest.raises(ValueError, match=r'list.txt is empty'):
            build(root, split='val', ann_file='list.txt')


class TestPictures:

    @pytest.mark.parametrize('broken', [b'no picture', b''])
    @pytest.mark.parametrize('backend', ['cv2', 'pillow'])
    def test_no_picture(self, root, broken, backend):
        (root / 'val' / 'dog' / 'e.png').write_bytes(broken)
        dataset = build(root, split='val')
        dataset.pipeline.transforms[0].imdecode_backend = backend
        dataset[0]
        with pytest.raises(ValueError, match=r"image '.*val/dog/e\.png' \(class 1, dog\) cannot "
                                             'be decoded: .*'):
            dataset[1]

    def test_in_training_another_takes_its_place(self, root):
        (root / 'train' / 'dog' / 'c c.png').write_bytes(b'')
        dataset = build(root, split='train')
        first, again = dataset[2]['data_samples'], dataset[2]['data_samples']
        assert first.img_path == again.img_path != str(root / 'train' / 'dog' / 'c c.png')
        assert dataset.bad_images.count == 1
        for stops in (dict(split='train', bad_images='stop'), dict(data_prefix='train')):
            with pytest.raises(DataError, match='c c.png.*cannot be decoded: the file is empty'):
                build(root, **stops)[2]

    def test_missing_picture(self, root):
        dataset = build(root, split='val')
        (root / 'val' / 'cat' / 'd.png').unlink()
        with pytest.raises(FileNotFoundError, match=r"image '.*val/cat/d\.png' \(class 0, cat\) "
                                                    'does not exist'):
            dataset[0]

    def test_an_error_of_the_pipeline_stays_what_it_is(self, root):
        dataset = build(root, split='val')
        dataset.pipeline.transforms[1] = lambda results: results['nothing']
        with pytest.raises(KeyError, match='nothing'):
            dataset[0]


class TestImageNet:

    def test_names(self, tmp_path):
        write_picture(tmp_path / 'val' / 'a.png')
        (tmp_path / 'meta').mkdir()
        (tmp_path / 'meta' / 'val.txt').write_text('a.png 207')
        dataset = CheckedImageNet(str(tmp_path), 'val', pipeline=[])
        assert dataset.metainfo['classes'][207] == IMAGENET_CATEGORIES[207] == 'golden retriever'
        assert content(dataset) == [(f'{tmp_path}/val/a.png', 207)]

    def test_folder_of_other_classes(self, root):
        with pytest.raises(ValueError, match=r'2 class folders .* CheckedImageNet has 1000 classes '
                                             r'by name \(tench.*, \.\.\. \(1000 in all\)'):
            CheckedImageNet(str(root), 'train', pipeline=[])
        dataset = CheckedImageNet(str(root), 'train', pipeline=[],
                                  metainfo=dict(classes=('cat', 'dog')))
        assert dataset.metainfo['classes'] == ('cat', 'dog')
        assert isinstance(dataset, CheckedImageFolder)


class TestTraining:
    """In a runner, with mmpretrain's own classifier and head."""

    @pytest.fixture
    def config(self, root, user_project, tmp_path):
        config = Config.fromfile(user_project / 'user_classifier.py')
        for split in ('train', 'val', 'test'):
            dataset = config[f'{split}_dataloader'].dataset
            dataset.type = 'CheckedImageFolder'
            dataset.data_root = str(root)
            dataset.split = 'train' if split == 'train' else 'val'
        config.custom_hooks = [dict(type='ClassCountCheckHook')]
        config.experiment_name = tmp_path.name
        config.work_dir = str(tmp_path / 'work_dir')
        return config

    def train(self, config):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            runner = Runner.from_cfg(config)
            runner.train()
        return runner

    def test_names_reach_the_checkpoint(self, config):
        runner = self.train(config)
        assert runner.train_dataloader.dataset.metainfo['classes'] == ('cat', 'dog')
        from spartan_mm.inference import load_model
        model = load_model(config.filename, f'{config.work_dir}/epoch_1.pth', 'cpu')
        assert model.classes == ('cat', 'dog')

    def test_another_number_of_classes_than_the_head(self, config, root):
        for split in ('train', 'val'):
            write_picture(root / split / 'emu' / 'x.png')
        with pytest.raises(ValueError, match=r'model.head \(LinearClsHead\) has num_classes=2, but '
                                             r'the dataset of train_dataloader, CheckedImageFolder '
                                             rf'of {root}/train, has 3 classes \(cat, dog, emu\)'):
            self.train(config)

    def test_other_classes_in_validation(self, config, root):
        shutil.move(root / 'val' / 'dog', root / 'val' / 'wolf')
        with pytest.raises(ValueError, match=rf"of {root}/train, and .* of {root}/val, differ: "
                                             "label 1 is 'dog' in the one and 'wolf'"):
            self.train(config)

    def test_a_broken_picture_stops_training(self, config, root):
        for path in (root / 'train').rglob('*.png'):
            path.write_text('no picture')
        with pytest.raises(ValueError, match=r"image '.*' \(class \d, .*\) cannot be decoded"):
            self.train(config)
