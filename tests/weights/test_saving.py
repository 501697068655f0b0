"""The deploy form of whole models and its checkpoints; checkpoints are written whole."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

import spartan_mm
from spartan_mm.cli import main
from spartan_mm.errors import CheckpointError
from spartan_mm.files import UnwritableError
from spartan_mm.weights.forms import is_deployed, switch_to_deploy
from spartan_mm.weights.loading import load_for_inference
from spartan_mm.weights.safe_load import read_checkpoint
from spartan_mm.weights.saving import deploy_checkpoint, save_checkpoint

CONFIG = str(Path(__file__).parents[1] / 'data' / 'user_classifier.py')


@pytest.fixture(scope='module')
def classifier():
    torch.manual_seed(0)
    model = spartan_mm.get_model(Config.fromfile(CONFIG))
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2)
    return model.eval()


@pytest.fixture(scope='module')
def files(classifier, tmp_path_factory):
    """A checkpoint of the training, and of the deploy form."""
    folder = tmp_path_factory.mktemp('checkpoints')
    torch.save(dict(state_dict=classifier.state_dict(),
                    meta=dict(dataset_meta=dict(classes=list('ab')))),
               folder / 'trained.pth')
    deploy_checkpoint(copy.deepcopy(classifier), folder / 'trained.pth', folder / 'deploy.pth')
    return folder


def test_a_classifier_is_switched_by_its_parts(classifier):
    images = torch.rand(2, 3, 64, 64)
    deployed = switch_to_deploy(copy.deepcopy(classifier))
    assert is_deployed(deployed) and not deployed.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), classifier(images), rtol=1e-5, atol=1e-5)
    assert switch_to_deploy(deployed) is deployed
    with pytest.raises(RuntimeError, match='deploy form'):
        deployed.train()


def test_checkpoint_says_what_it_is_and_is_loaded_as_that(classifier, files):
    checkpoint = torch.load(files / 'deploy.pth', weights_only=True)
    assert checkpoint['meta'] == dict(
        deploy=True, dataset_meta=dict(classes=list('ab')))

    model = spartan_mm.get_model(Config.fromfile(CONFIG), pretrained=files / 'deploy.pth')
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images), rtol=1e-5, atol=1e-5)
    load_for_inference(model, files / 'deploy.pth')


def test_deploying_twice_is_refused(classifier, files):
    with pytest.raises(CheckpointError, match='deploy form already'):
        deploy_checkpoint(copy.deepcopy(classifier), files / 'deploy.pth', files / 'again.pth')
    assert not (files / 'again.pth').exists()


@pytest.mark.parametrize('name, error, message', [
    ('trained.pth/out.pth', UnwritableError, 'cannot be written'),
    ('out.safetensors', CheckpointError, 'cannot be written, it cannot hold')])
def test_what_cannot_be_written(classifier, files, tmp_path, name, error, message):
    checkpoint = read_checkpoint(files / 'trained.pth')
    torch.save(dict(checkpoint, meta=dict(made={1, 2})), tmp_path / 'trained.pth')
    with pytest.raises(error, match=message):
        deploy_checkpoint(copy.deepcopy(classifier), tmp_path / 'trained.pth', tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ['trained.pth']


def test_a_model_without_deploy_form():
    with pytest.raises(CheckpointError, match='Linear has no deploy form'):
        switch_to_deploy(nn.Linear(2, 2))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_written_checkpoints_are_read_again(tmp_path, suffix):
    path = tmp_path / 'folder' / f'weights{suffix}'
    # A tensor that is no whole block of memory.
    state_dict = dict(weight=torch.randn(4, 3).T, counter=torch.tensor(3))
    meta = dict(arch=dict(depth=18, expansion=0.5), dataset_meta=dict(classes=('café', 'tea')))
    save_checkpoint(dict(state_dict=state_dict, meta=meta), path)
    found = read_checkpoint(path)
    torch.testing.assert_close(found['state_dict'], state_dict, rtol=0, atol=0)
    assert found['meta'] == meta


def test_a_palette_of_numpy(classifier, files, tmp_path):
    meta = dict(score=np.float32(0.5),
                dataset_meta=dict(classes=('a', ), palette=np.array([[1, 2, 3]], np.uint8)))
    torch.save(dict(read_checkpoint(files / 'trained.pth'), meta=meta), tmp_path / 'trained.pth')
    deploy_checkpoint(copy.deepcopy(classifier), tmp_path / 'trained.pth',
                      tmp_path / 'out.safetensors')
    assert read_checkpoint(tmp_path / 'out.safetensors')['meta'] == dict(
        deploy=True, score=0.5, dataset_meta=dict(classes=('a', ), palette=[(1, 2, 3)]))


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_what_a_file_cannot_hold(tmp_path, name):
    checkpoint = dict(state_dict=dict(a=torch.ones(1)), meta=dict(made_by=lambda: None))
    with pytest.raises(CheckpointError, match=f'{name} cannot be written, it cannot hold'):
        save_checkpoint(checkpoint, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'weights.pth'
    path.write_text('old')

    def fail(checkpoint, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(UnwritableError, match=r'weights\.pth cannot be written: No space left'):
        save_checkpoint({}, path)
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(files, tmp_path, capsys):
    words = [CONFIG, str(files / 'trained.pth'), str(tmp_path / 'out.safetensors')]
    assert main(['deploy', *words]) == 0
    assert re.search(r'out\.safetensors: 0\.\d+ M parameters became 0\.\d+ M',
                     capsys.readouterr().out)
    assert read_checkpoint(words[2])['meta']['deploy']
    with pytest.raises(SystemExit, match='error: .*of the deploy form already'):
        main(['deploy', words[0], words[2], str(tmp_path / 'again.pth')])
