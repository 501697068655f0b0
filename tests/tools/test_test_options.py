"""What a test and a training refuse before they begin, and test-time augmentation."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


@pytest.fixture(autouse=True)
def in_project(user_project, monkeypatch):
    monkeypatch.chdir(user_project)


@pytest.fixture
def checkpoint(user_project, tmp_path):
    """Make a checkpoint of a config, with random weights."""
    def make(config):
        config = Config.fromfile(config)
        init_default_scope(config.default_scope)
        torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), tmp_path / 'own.pth')
        return tmp_path / 'own.pth'
    return make


@pytest.mark.parametrize('config, augmented', [
    ('user_detector.py', 'DetTTAModel'), ('user_classifier.py', 'AverageClsScoreTTA')])
def test_augmentation_at_test_time(config, augmented, checkpoint, run_here, tmp_path, monkeypatch):
    views = []
    merge = MODELS.get(f'{"mmdet" if "det" in config else "mmpretrain"}.{augmented}').merge_preds
    monkeypatch.setattr(
        f'{merge.__module__}.{augmented}.merge_preds',
        lambda self, batch: views.extend(map(len, batch)) or merge(self, batch))
    output = run_here('test', config, checkpoint(config), '--tta', '--work-dir', tmp_path)
    assert views == [2] * 4
    assert 'coco/bbox_mAP' in output or 'accuracy/top1' in output


@pytest.mark.parametrize('command', ['train', 'test', 'check-data'])
def test_an_evaluator_is_refused_before_the_work(command, fail_here, run_here, tmp_path):
    words = ['user_detector.py', '--cfg-options', 'val_evaluator.metric_items=[mAP_90]',
             'test_evaluator.metric_items=[mAP_90]']
    if command == 'test':
        words.insert(1, 'never_read.pth')
    if command == 'check-data':
        output = run_here(command, *words, '--out-dir', tmp_path, status=1)
        assert output.count('metric_items has no mAP_90') == 2
        return
    line, status = fail_here(command, *words)
    assert status and 'evaluator: metric_items has no mAP_90; take some of mAP, mAP_50' in line
