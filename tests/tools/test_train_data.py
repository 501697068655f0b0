"""``spartan-mm train DATA``: a folder of data, a config of it, and the same training."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, DefaultScope
from PIL import Image

import spartan_mm
from spartan_mm.detection.to_coco import write_coco
from spartan_mm.engine.batch_size import choose
from spartan_mm.engine.data_config import prepare
from spartan_mm.engine.launch import load_config
from spartan_mm.engine.train import find_best, train_config
from spartan_mm.errors import UsageError
from spartan_mm.model_index import root

from .picture_sets import CLASSES, make_sets

FORMATS = ('coco', 'roboflow', 'yolo', 'voc')
TINY = Path(__file__).parents[1] / 'data' / 'user_detector.py'
FLAGS = ('--model', TINY, '--epochs', 2, '--batch-size', 8, '--deterministic', '--seed', 3,
         '--cfg-options', 'optim_wrapper.optimizer.lr=0.004', 'val_dataloader.batch_size=12')


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


@pytest.mark.parametrize('name', ['yolo', 'voc'])
def test_labels_become_coco_files(sets, tmp_path, name):
    from spartan_mm.cli import main
    assert main(['to-coco', str(sets[name]), '--out-dir', str(tmp_path)]) == 0
    for split in ('train', 'val'):
        found = []
        for folder, file in ((sets[name], tmp_path / f'{split}.json'),
                             (sets['coco'], f'annotations/instances_{split}2017.json')):
            content = json.loads(Path(sets['coco'], file).read_text())
            assert all((folder / image['file_name']).is_file() for image in content['images']
                       if folder != sets['coco'])
            names = {item['id']: item['name'] for item in content['categories']}
            images = {item['id']: Path(item['file_name']).name for item in content['images']}
            found.append((sorted(images.values()), sorted(
                (images[item['image_id']], names[item['category_id']], *item['bbox'])
                for item in content['annotations'])))
        assert found[0] == found[1] and found[0][1]


def test_pictures_without_boxes_are_not_converted(tmp_path, capsys):
    from spartan_mm.cli import main
    for place in ('train/cat', 'train/dog', 'val/cat', 'val/dog'):
        (tmp_path / place).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / place / 'a.png')
    assert main(['to-coco', str(tmp_path), '--out-dir', str(tmp_path / 'out')]) == 2
    assert 'there are no boxes to write' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_parts_for_a_test_are_written_outside_the_data(sets, tmp_path):
    shutil.copytree(sets['yolo'], tmp_path / 'mine')
    for name in ('images', 'labels'):
        shutil.copytree(tmp_path / 'mine' / name / 'val', tmp_path / 'mine' / name / 'test')
    with (tmp_path / 'mine' / 'data.yaml').open('a') as file:
        file.write('\ntest: images/test\n')
    with pytest.raises(UsageError, match='would then have labels of two formats'):
        write_coco(tmp_path / 'mine', tmp_path / 'mine' / 'annotations')
    assert not (tmp_path / 'mine' / 'annotations').exists()
    files = write_coco(tmp_path / 'mine', tmp_path / 'out')
    val, test = (json.loads(files[split].read_text()) for split in ('val', 'test'))
    assert val['annotations'] == test['annotations'] and [*files] == ['train', 'val', 'test']


@pytest.mark.parametrize('fitting, most, size', [(16, 8, 8), (5, 8, 4), (1, 8, 1), (1, 1, 1)])
def test_batches_that_fit(fitting, most, size):
    def step(images):
        if images > fitting:
            raise torch.OutOfMemoryError
        return images

    assert choose(step, 100, most) == size


def test_not_one_image_fits():
    def step(images):
        raise torch.OutOfMemoryError

    with pytest.raises(UsageError, match='too small for a step of one image: give a smaller --si'):
        choose(step, 100, 8)


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


@pytest.fixture
def begin(monkeypatch):
    """Runs the command, whose training ends before its first iteration; returns the runner."""
    from mmengine.runner import Runner
    runners = []
    monkeypatch.setattr(Runner, 'train', lambda runner: runners.append(runner))

    def run(*words):
        from spartan_mm.cli import main
        assert main(['train', *map(str, words)]) == 0
        return runners[-1]
    return run


class TestConfig:

    @pytest.mark.slow
    def test_of_a_model_by_name(self, sets, tmp_path, monkeypatch):
        """Its recipe, its sizes and its classes; nothing but the data is named by a path."""
        monkeypatch.chdir(tmp_path)
        path = prepare(sets['coco'], epochs=4, size=320)
        assert path == Path('work_dirs/rtdetr_spartan_t_coco/config.py')
        text = path.read_text()
        assert text.count(str(tmp_path)) == 0 and max(map(len, text.splitlines())) <= 100
        cfg = load_config(str(path), split='train')
        assert Path(cfg.work_dir) == tmp_path / path.parent
        assert cfg.model.bbox_head.num_classes == 2 and cfg.model.backbone.init_cfg is None
        assert 'all weights start from random numbers' in text
        assert cfg.train_cfg.max_epochs == 4 and cfg.train_dataloader.batch_size == 6
        recipe = Config.fromfile(root() / 'configs' / 'detection' / '_base_' / 'finetune.py')
        for part in ('optim_wrapper', 'param_scheduler', 'custom_hooks'):
            assert cfg[part] == recipe[part]
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            assert [step.scale for step in loader.dataset.pipeline if 'scale' in step] == [
                (320, 320)]
        assert {*cfg.model.data_preprocessor.batch_augments[0].sizes} == {*range(256, 385, 32)}

    def test_is_not_replaced_by_another(self, sets, tmp_path):
        path = prepare(sets['coco'], str(TINY), work_dir=tmp_path)
        text = path.read_text()
        assert prepare(sets['coco'], str(TINY), work_dir=tmp_path) == path
        with pytest.raises(UsageError, match='is there and says something else, be it edited'):
            prepare(sets['coco'], str(TINY), work_dir=tmp_path, epochs=5)
        assert path.read_text() == text

    def test_folders_with_quotes(self, sets, tmp_path):
        folder = tmp_path / "Ann's"
        folder.symlink_to(sets['yolo'], target_is_directory=True)
        path = prepare(folder, str(TINY), work_dir=tmp_path / "Bob's")
        cfg = load_config(str(path), split='train')
        assert (cfg.data_root, cfg.work_dir) == (str(folder), str(path.parent))

    def test_of_a_classifier(self, tmp_path, begin):
        for index in range(12):
            for split, name in (('train', 'disc'), ('train', 'square'), ('val', 'disc'),
                                ('val', 'square')):
                file = tmp_path / 'mine' / split / name / f'{index}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (32, 32), (20 * index, 0, 0)).save(file)
        runner = begin(tmp_path / 'mine', '--model', TINY.with_name('user_classifier.py'),
                       '--work-dir', tmp_path / 'out')
        assert len(runner.train_dataloader.dataset) == 24
        assert runner.train_dataloader.dataset.metainfo['classes'] == ('disc', 'square')
        assert runner.model.head.num_classes == 2

    @pytest.mark.parametrize('classifier', [True, False])
    def test_weights(self, sets, tmp_path, begin, capsys, classifier):
        """A classifier's are for the backbone, a detector's for all."""
        name = 'user_classifier.py' if classifier else 'user_detector.py'
        model = spartan_mm.get_model(Config.fromfile(TINY.with_name(name)))
        torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'weights.pth')
        runner = begin(sets['voc'], '--model', TINY, '--weights', tmp_path / 'weights.pth',
                       '--work-dir', tmp_path / 'out', '--batch-size', 'auto')
        if classifier:
            assert runner.cfg.get('load_from') is None
            assert runner.cfg.model.backbone.init_cfg.prefix == 'backbone.'
        else:
            assert runner.cfg.load_from == str(tmp_path / 'weights.pth')
        said = capsys.readouterr().out
        assert torch.cuda.is_available() or 'a batch has 2 images: without a GPU' in said

    def test_batch_size_is_found_once(self, sets, tmp_path, monkeypatch):
        """Or the same command would be refused when another number fits."""
        answers = iter([(5, 'in the 80 GiB that are free')])
        monkeypatch.setattr('spartan_mm.engine.data_config.find_batch_size',
                            lambda *_: next(answers))
        for _ in range(2):
            path = prepare(sets['yolo'], str(TINY), work_dir=tmp_path, batch_size='auto')
        assert Config.fromfile(path).train_dataloader.batch_size == 5
        assert 'GiB' not in path.read_text()

    def test_pictures_of_one_file_are_shared_out(self, sets, tmp_path, begin):
        folder = tmp_path / 'one'
        shutil.copytree(sets['roboflow'] / 'train', folder)
        runner = begin(folder, '--model', TINY, '--seed', 7, '--work-dir', tmp_path / 'out')
        train, val = (runner.build_dataloader(runner.cfg[f'{split}_dataloader']).dataset
                      for split in ('train', 'val'))
        names = [{info['img_path'] for info in map(part.get_data_info, range(len(part)))}
                 for part in (train, val)]
        assert [len(found) for found in names] == [38, 10] and not names[0] & names[1]
        evaluator = METRICS.build(runner.cfg.val_evaluator)
        assert len(evaluator._coco_api.dataset['images']) == 10
        assert train.metainfo['classes'] == CLASSES

    def test_processes(self, sets, tmp_path, monkeypatch):
        """The config is written once, and torchrun is started with the flags that are left."""
        monkeypatch.setattr('os.execvpe', lambda *command: (_ for _ in ()).throw(
            RuntimeError(command)))
        from spartan_mm.cli import main
        with pytest.raises(RuntimeError) as raised:
            main(['train', str(sets['yolo']), '--gpus', '3', '--model', str(TINY), '--epochs=2',
                  '--cfg-options', 'val_dataloader.num_workers=0', '--work-dir',
                  str(tmp_path / 'out'), '--save-every', '5'])
        _, command, environment = raised.value.args[0]
        assert command[:1] + command[2:] == [
            'bash', 'train.py', '3', str(tmp_path / 'out' / 'config.py'), '--save-every', '5']
        assert Path(command[1]).name == 'torchrun.sh' and environment['PYTHON']


class TestMistakes:

    @pytest.mark.parametrize('words, message, status', [
        (['typo'], "error: config typo does not exist, and there is no model 'typo'", 2),
        (['typo', '--epochs', '3'], 'error: --epochs goes with a folder of data, and typo is none: '
                                    'there is no such folder', 2),
        (['rtdetr_spartan_t', '--batch-size', '3'], 'error: --batch-size goes with a folder of '
         'data, and rtdetr_spartan_t is a config: change it there, or with --cfg-options', 2),
        (['YOLO', '--batch-size', 'none'], "none must be a whole number, at least 1, or 'auto'", 2),
        (['YOLO', '--batch-size', '50'], 'error: --batch-size 50 of 1 process is more than the 48 '
                                         'pictures to train on', 2),
        (['YOLO', '--model', 'spartan_t'], 'for detectors, and spartan_t is for classification', 2),
        (['YOLO', '--size', '100'], 'error: --size 100 must be a multiple of 32', 2),
        (['YOLO', '--model', TINY, '--cfg-options', 'custom_hooks.0.momentum=1'],
         'error: custom_hooks.0.momentum cannot be set beside data', 2),
        (['YOLO', '--weights', 'none.pth'], 'none.pth', 1),
        (['.'], 'error: . is empty, but must have COCO', 1)], ids=str)
    def test_end_in_a_line(self, sets, tmp_path, monkeypatch, fail_here, words, message, status):
        monkeypatch.chdir(tmp_path)
        said, code = fail_here('train', *(sets['yolo'] if word == 'YOLO' else word
                                          for word in words))
        assert message in said and code == status
        assert [*tmp_path.iterdir()] == []

    def test_one_picture(self, sets, tmp_path, monkeypatch, fail_here):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'one').mkdir()
        content = json.loads((sets['roboflow'] / 'train' / '_annotations.coco.json').read_text())
        content['images'] = content['images'][:1]
        content['annotations'] = [item for item in content['annotations'] if item['image_id'] == 1]
        (tmp_path / 'one' / 'all.json').write_text(json.dumps(content))
        name = content['images'][0]['file_name']
        shutil.copy(sets['roboflow'] / 'train' / name, tmp_path / 'one')
        said, code = fail_here('train', 'one', '--model', TINY)
        assert code == 1 and (
            'one/all.json: there is but one picture, and at least two are needed' in said)

    def test_faults_are_told_at_once(self, sets, tmp_path, monkeypatch, fail_here):
        shutil.copytree(sets['yolo'], tmp_path / 'mine')
        monkeypatch.chdir(tmp_path)
        for split in ('train', 'val'):
            file = next((tmp_path / 'mine' / 'labels' / split).glob('*.txt'))
            file.write_text('9 0.5 0.5 0.1 0.1\n')
        said, code = fail_here('train', 'mine', '--model', TINY)
        assert code == 1 and said.count('line 1 has class 9, but there are 2 classes') == 2


class TestPython:

    def test_train(self, sets, tmp_path, monkeypatch):
        monkeypatch.setattr('spartan_mm.engine.train.train_config', lambda cfg, **_: (
            tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_1.pth'))
        checkpoint = spartan_mm.train(str(TINY), data=sets['roboflow'], work_dir=tmp_path)
        assert checkpoint == tmp_path / 'epoch_1.pth'
        (tmp_path / 'best_coco_bbox_mAP_epoch_1.pth').touch()
        assert find_best(tmp_path).name.startswith('best_')
        with pytest.raises(UsageError, match='train needs data'):
            spartan_mm.train('rtdetr_spartan_t')
