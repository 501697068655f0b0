"""Images are what the models themselves make of them; weights must be there or be waived."""

import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.testing import assert_close

from spartan_mm.analysis.look_inside.inputs import (
    GivenModel,
    has_weights,
    load_models,
    split_checkpoint,
)
from spartan_mm.analysis.models import load_named_model
from spartan_mm.datasets.data_errors import DataError
from spartan_mm.errors import UsageError
from spartan_mm.inference import load_model
from spartan_mm.zoo import UnknownModelError


def read_as(name, path):
    return GivenModel(name, load_named_model(name), {}).read(path)


def load_given(config, checkpoint):
    return load_models([f'{config}={checkpoint}'])[0]


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_as_the_model_sees_it(user_models, task, user_project):
    """What reaches the network in a prediction."""
    picture = user_project / 'pictures' / '1.png'
    model = load_model(*user_models[task], device='cpu')
    seen = []
    model.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([model.read(picture)])

    image = load_given(*user_models[task]).read(picture)
    assert image.std() > 0
    assert_close(image[None], seen[0], rtol=0, atol=0)


def test_backbone_alone(user_project):
    image = read_as('xt', user_project / 'pictures' / '0.png')  # black
    assert image.shape == (3, 224, 224)
    assert_close(image[:, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-3)


def test_timm(tmp_path):
    pytest.importorskip('timm')
    red = np.full((300, 400, 3), (0, 0, 255), np.uint8)  # BGR
    cv2.imwrite(str(tmp_path / 'red.png'), red)
    image = read_as('timm:resnet10t', tmp_path / 'red.png')
    assert image.shape == (3, 176, 176)
    assert_close(image[:, 80, 80], torch.tensor([2.2489, -2.0357, -1.8044]), rtol=0, atol=1e-3)


def test_unreadable(user_models, tmp_path):
    read = load_given(*user_models['classifier']).read
    (tmp_path / 'broken.png').write_text('no picture')
    with pytest.raises(DataError, match=r'broken\.png.* cannot be decoded'):
        read(tmp_path / 'broken.png')
    with pytest.raises(DataError, match=r'missing\.png.* does not exist'):
        read(tmp_path / 'missing.png')


def test_config_without_pipeline(user_models, tmp_path):
    config, _ = user_models['classifier']
    content = Config.fromfile(config)
    content.pop('test_dataloader')
    content.dump(tmp_path / 'short.py')
    with pytest.raises(UsageError, match='short has no test_dataloader'):
        read_as(str(tmp_path / 'short.py'), None)


def test_weights_are_asked_for(user_models):
    config, checkpoint = user_models['classifier']
    with pytest.raises(UsageError, match=r'model without weights: .*CHECKPOINT.*--random'):
        load_models([config])
    load_models([config], random=True)
    with pytest.raises(UnknownModelError):
        load_models(['none.py'])
    assert has_weights(checkpoint) and has_weights(config, checkpoint)
    assert has_weights('https://example.org/model.pth')
    assert not has_weights(config) and not has_weights('spartan_xt')


def test_digest():
    def digest_weights(model):
        return GivenModel('title', SimpleNamespace(model=model), {}).digest

    layer = torch.nn.BatchNorm2d(3)
    first = digest_weights(layer)
    assert first == digest_weights(torch.nn.BatchNorm2d(3))
    layer.running_mean[1] = 1e-7
    assert digest_weights(layer) != first
    assert len(digest_weights(layer.bfloat16())) == 16


def test_file_with_an_equals_sign(user_models, tmp_path):
    path = tmp_path / 'lr=1.pth'
    shutil.copy(user_models['classifier'][1], path)
    assert split_checkpoint(str(path)) == (str(path), None)
