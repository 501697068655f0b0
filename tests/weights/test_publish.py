"""Published files say all that inference needs, and nothing of where they come from."""

import copy
import hashlib
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.testing import assert_close

from spartan_mm import config_from, get_model
from spartan_mm.errors import CheckpointError
from spartan_mm.inference import Classifier, Detector, InputError, load_model
from spartan_mm.weights.forms import is_deployed
from spartan_mm.weights.publish import publish
from spartan_mm.weights.safe_load import read_checkpoint
from spartan_mm.weights.saving import deploy_checkpoint
from spartan_mm.weights.stored_config import as_text

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'tests' / 'data'
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


def make(task, **changes):
    """A user's config and a model of it."""
    config = Config.fromfile(DATA / f'user_{task}.py')
    config.merge_from_dict(changes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return config, MODELS.build(config.model)


def training_checkpoint(config, model, **meta):
    """What mmengine saves in a training with a moving average."""
    averaged, text = model.state_dict(), as_text(config.to_dict())
    trained = {f'module.{name}': torch.zeros_like(value) for name, value in averaged.items()}
    return dict(
        meta=dict(cfg=text, dataset_meta=dict(classes=('square', 'disc')), epoch=2,
                  iter=20, seed=1, time='today', experiment_name='mine', hostname='here') | meta,
        state_dict=averaged, ema_state_dict=dict(trained, steps=torch.tensor(20)),
        message_hub=dict(runtime_info=dict(cfg=text, last_ckpt='/home/me/1.pth')),
        optimizer=dict(state={}, param_groups=[]), param_schedulers=[dict(last_step=20)])


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A training's checkpoint, its model, and what was published of it."""
    folder = tmp_path_factory.mktemp('published')
    config, model = make('detector', **{
        'work_dir': '/home/me/runs', 'load_from': '/home/me/coco.pth',
        'test_dataloader.dataset.data_root': '/home/me/data/mine/',
        'val_evaluator.ann_file': r'C:\Users\me\val.json',
        'model.backbone.init_cfg': dict(type='CheckedPretrained', checkpoint='/home/me/b.pth')})
    torch.save(training_checkpoint(config, model), folder / 'epoch_2.pth')
    return folder / 'epoch_2.pth', model, publish(folder / 'epoch_2.pth', folder / 'détector')


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    config, model = make('classifier')
    stem = tmp_path_factory.mktemp('published') / 'classifier'
    return model, publish(model, stem, config, ('square', 'disc'))


def test_names_have_the_hash_of_the_content(detector):
    for path, suffix in zip(detector[-1], ('safetensors', 'pth'), strict=True):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.name == f'détector-{digest[:8]}.{suffix}'


def test_the_averaged_weights_and_nothing_of_the_training(detector):
    _, model, files = detector
    for path in files:
        checkpoint = read_checkpoint(path)
        assert checkpoint.keys() == {'meta', 'state_dict'}
        assert_close(dict(checkpoint['state_dict']), dict(model.state_dict()), rtol=0, atol=0)
        meta = checkpoint['meta']
        text = {'cfg'} if path.suffix == '.pth' else set()
        assert meta.keys() == text | {'config', 'dataset_meta', 'epoch', 'iter', 'mmengine_version',
                                      'spartan_mm_version'}
        assert meta['dataset_meta'] == dict(classes=('square', 'disc'))


def test_the_config_names_no_place_and_no_pretrained_file(detector):
    config = config_from(detector[-1].safetensors)
    assert not re.search('/home|Users|b.pth', config.pretty_text)
    assert 'work_dir' not in config and 'load_from' not in config
    assert config.test_dataloader.dataset.data_root == 'mine/'
    assert config.val_evaluator.ann_file == 'val.json'
    assert config.train_dataloader.dataset.data_root == 'pictures/'
    assert 'init_cfg' not in config.model.backbone
    assert config.optim_wrapper.optimizer.lr == 1e-3


def test_same_model_same_bytes(detector, tmp_path):
    source, _, files = detector
    for again in (source, files.safetensors):
        assert [path.name for path in publish(again, tmp_path / 'détector')] == \
            [path.name for path in files]


@pytest.mark.parametrize('kind', ['safetensors', 'pth'])
def test_inference_from_the_file_alone(detector, classifier, kind):
    for model, files, task in ((*detector[1:], Detector), (*classifier, Classifier)):
        path = str(getattr(files, kind))
        loaded = load_model(path, device='cpu')
        assert type(loaded) is task and loaded.classes == ('square', 'disc')
        assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert len(loaded([PICTURE])) == 1


@pytest.mark.parametrize('kind', ['safetensors', 'pth'])
def test_the_inferencers(detector, classifier, kind):
    from mmdet.apis import DetInferencer
    from mmpretrain import ImageClassificationInferencer
    inferencer = DetInferencer(weights=str(getattr(detector[-1], kind)), device='cpu',
                               show_progress=False)
    assert_close(inferencer.model.state_dict(), detector[1].state_dict(), rtol=0, atol=0)
    assert inferencer.model.dataset_meta['classes'] == ('square', 'disc')
    [found] = inferencer(PICTURE)['predictions']
    assert len(found['scores']) == 20

    path = str(getattr(classifier[-1], kind))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        [found] = ImageClassificationInferencer(config_from(path), pretrained=path)(PICTURE)
    assert found['pred_class'] in ('square', 'disc')


@pytest.mark.parametrize('form', ['trained', 'deploy'])
def test_our_detection_inferencer_takes_both_forms(detector, tmp_path, form):
    from spartan_mm.detection import DetInferencer
    source, model, files = detector
    if form == 'deploy':
        deploy_checkpoint(copy.deepcopy(model), source, tmp_path / 'deploy.pth')
        files = publish(tmp_path / 'deploy.pth', tmp_path / 'deploy')
    inferencer = DetInferencer(weights=str(files.safetensors), device='cpu', show_progress=False)
    assert is_deployed(inferencer.model) == (form == 'deploy')
    assert inferencer.model.dataset_meta['classes'] == ('square', 'disc')
    expected = Detector(str(files.pth), device='cpu').detect([PICTURE])[0]
    [found] = inferencer(PICTURE)['predictions']
    assert_close(torch.tensor(found['scores']), torch.from_numpy(expected.scores))


@pytest.mark.parametrize('form', ['trained', 'deploy'])
def test_the_classification_inferencer_takes_both_forms(classifier, tmp_path, form):
    from mmpretrain import ImageClassificationInferencer
    model, files = classifier
    if form == 'deploy':
        deploy_checkpoint(copy.deepcopy(model), files.pth, tmp_path / 'deploy.pth')
        files = publish(tmp_path / 'deploy.pth', tmp_path / 'deploy')
    built = get_model(config_from(files.pth), pretrained=files.pth)
    assert is_deployed(built) == (form == 'deploy')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        [found] = ImageClassificationInferencer(built)(PICTURE)
    [expected] = Classifier(str(classifier[1].pth), device='cpu').classify([PICTURE])
    assert_close(torch.from_numpy(found['pred_scores'][expected.labels]),
                 torch.from_numpy(expected.scores), rtol=1e-4, atol=1e-5)


def test_commands(detector, tmp_path, monkeypatch, capsys):
    def run(name, *words):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        if end.value.code:
            raise end.value
        return capsys.readouterr().out

    source, _, files = detector
    stem = tmp_path / 'new' / 'détector'
    output = run('model_converters/publish_model.py', source, stem, '--classes', 'a', 'b')
    [path] = stem.parent.glob('*.safetensors')
    assert str(path) in output and read_checkpoint(path)['meta']['dataset_meta'] == dict(
        classes=('a', 'b'))

    cv2.imwrite(str(tmp_path / 'picture.png'), PICTURE)
    run('infer.py', tmp_path / 'picture.png', path, '--out-dir', tmp_path / 'out', '--score-thr', 0)
    assert '"classes": [\n  "a",\n  "b"\n ]' in (tmp_path / 'out' / 'results.json').read_text()

    run('model_converters/publish_model.py', source, tmp_path / 'other', '--config',
        DATA / 'user_detector.py')
    [path] = tmp_path.glob('other-*.safetensors')
    assert config_from(path).val_evaluator.ann_file == 'pictures/annotations.json'

    with pytest.raises(SystemExit, match='error: none.pth was not published: .* does not exist'):
        run('model_converters/publish_model.py', 'none.pth', stem)
    with pytest.raises(SystemExit, match='2'):
        run('model_converters/publish_model.py', source, stem, '--config', 'none.py')
    assert capsys.readouterr().err.startswith('error: config none.py does not exist')


def test_a_palette_is_kept(tmp_path):
    config, model = make('detector', **{
        'test_dataloader.dataset.metainfo.palette': [(9, 9, 9)] * 2})
    checkpoint = training_checkpoint(config, model, dataset_meta=dict(
        classes=['a', 'b'], palette=np.array([[1, 2, 3], [4, 5, 6]])))
    torch.save(checkpoint, tmp_path / 'a.pth')
    files = publish(tmp_path / 'a.pth', tmp_path / 'a')
    assert read_checkpoint(files.pth)['meta']['dataset_meta'] == dict(
        classes=('a', 'b'), palette=[(1, 2, 3), (4, 5, 6)])
    # Classes of the config, with the colours of the config.
    files = publish(model, tmp_path / 'b', config)
    assert read_checkpoint(files.pth)['meta']['dataset_meta'] == dict(
        classes=('square', 'disc'), palette=[(9, 9, 9)] * 2)


def test_coco(tmp_path):
    config, model = make('detector', **{'model.bbox_head.num_classes': 80})
    meta = read_checkpoint(publish(model, tmp_path / 'a', config, 'coco').pth)['meta']
    assert meta['dataset_meta']['classes'][79] == 'toothbrush'
    assert len(meta['dataset_meta']['palette']) == 80


class TestEarlierFiles:
    """Files that 0.1.0 published, whose config is text, say and do the same."""

    CLASSIFIER = DATA / 'published' / 'classifier-9232700e.pth'
    DETECTOR = DATA / 'published' / 'detector-45eaf3ed.safetensors'

    def test_they_give_what_they_gave(self):
        [found] = Classifier(str(self.CLASSIFIER), device='cpu').classify([PICTURE])
        assert found.labels.tolist() == [1, 0]
        assert_close(found.scores.tolist(), [0.5249679, 0.47503206], rtol=1e-5, atol=1e-6)
        [found] = Detector(str(self.DETECTOR), device='cpu').detect([PICTURE])
        assert_close(found.scores[:3].tolist(), [0.41706634, 0.41671038, 0.41628304], rtol=1e-5,
                     atol=1e-6)
        assert_close(found.boxes[0].tolist(), [10.133775, 2.068517, 13.112092, 4.455558],
                     rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('path', [CLASSIFIER, DETECTOR], ids=['classifier', 'detector'])
    def test_published_again(self, path, tmp_path):
        before = read_checkpoint(path)
        assert isinstance(before['meta']['cfg'], str) and 'config' not in before['meta']
        for again in publish(path, tmp_path / 'again'):
            assert config_from(again).to_dict() == config_from(path).to_dict()
            checkpoint = read_checkpoint(again)
            assert isinstance(checkpoint['meta']['config'], dict)
            assert_close(checkpoint['state_dict'], before['state_dict'], rtol=0, atol=0)
            assert load_model(str(again), device='cpu').classes == ('square', 'disc')


def test_the_pickled_file_has_the_config_as_text_for_mmdet(detector):
    text = torch.load(detector[-1].pth, weights_only=True)['meta']['cfg']
    assert Config.fromstring(text, '.py').to_dict() == config_from(detector[-1].pth).to_dict()


@pytest.fixture(scope='module')
def nameless():
    """A training's checkpoint with a config that names no classes."""
    config, model = make('detector', **{'test_dataloader.dataset.type': 'CheckedCocoDataset'})
    del config.test_dataloader.dataset['metainfo']
    return training_checkpoint(config, model)


@pytest.mark.parametrize('change, message', [
    (lambda content: content['meta'].pop('cfg') and content.pop('message_hub'),
     'holds no config: name the one'),
    (lambda content: content['meta'].pop('dataset_meta'), 'names the classes'),
    (lambda content: content['meta']['dataset_meta'].update(classes=('a', 'b', 'c')),
     '3 classes are named, but the model has 2'),
    (lambda content: content.update(state_dict={'a': torch.ones(1)}), 'does not fit the config'),
    (lambda content: content.pop('state_dict'), "no 'state_dict'"),
], ids=['no config', 'no classes', 'more classes', 'another model', 'no weights'])
def test_what_is_missing_is_said(nameless, tmp_path, change, message):
    content = copy.deepcopy(nameless)
    change(content)
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message):
        publish(tmp_path / 'a.pth', tmp_path / 'published')
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_a_config_that_is_no_text(tmp_path):
    config, model = make('detector')
    config.test_evaluator = dict(type='CocoMetric', function=print)
    with pytest.raises(CheckpointError, match='cannot be written as plain text'):
        publish(model, tmp_path / 'a', config, ('a', 'b'))


def test_files_without_a_config(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(1))), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'a\.pth holds no config; name the config'):
        load_model(str(tmp_path / 'a.pth'))
    with pytest.raises(InputError, match='is a config without weights; name a checkpoint'):
        load_model(str(DATA / 'user_detector.py'))
