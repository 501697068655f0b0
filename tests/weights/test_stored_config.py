"""Configs inside of checkpoints: plain data or text, and no more harm in one than in the other."""
import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import save_file
from torch import nn

from spartan_mm import config_from
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.loading import load_for_inference
from spartan_mm.weights.stored_config import as_text, from_plain, to_plain
from spartan_mm.zoo import get_config

WEIGHTS = dict(weight=torch.ones(3, 2), bias=torch.zeros(3))


@pytest.mark.parametrize('value', [
    dict(a=[1, -2.5, None, True], b={'d': (1, ('e', ))}, c='texte à part'),
    {-1: 'a', (1, 2): {'$tuple': [1]}, None: set()},
    {'$dict': {'$set': 1}, 'plain': {1, 2}},
    (), [], {}, [[()]], 10**30, '',
])
def test_there_and_back(value):
    again = from_plain(json.loads(json.dumps(to_plain(value), allow_nan=False)))
    assert repr(again) == repr(value)


def test_a_whole_config():
    content = get_config('rtdetr_spartan_t').to_dict()
    again = from_plain(json.loads(json.dumps(to_plain(content))))
    assert again == content
    assert repr(again) == repr(content)
    assert Config.fromstring(as_text(again), '.py').to_dict() == content


@pytest.mark.parametrize('value, message', [
    (dict(a=print), 'builtin_function'), ([torch.ones(1)], 'Tensor'), (float('inf'), 'finite')])
def test_what_is_not_plain(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        to_plain(value)


def write(tmp_path, content, kind):
    """A checkpoint that holds this as its published config."""
    path = tmp_path / f'published.{kind}'
    if kind == 'pth':
        torch.save(dict(state_dict=WEIGHTS, meta=dict(config=content)), path)
    else:
        save_file(WEIGHTS, path, dict(meta=json.dumps(dict(config=content))))
    return str(path)


@pytest.fixture(params=['pth', 'safetensors'])
def publish(request, tmp_path):
    return lambda content: write(tmp_path, content, request.param)


@pytest.mark.parametrize('content, found', [
    (dict(model=dict(type='os.system', command='ls')), "type='os.system'"),
    (dict(a={'$tuple': [dict(type='subprocess.Popen')]}), "type='subprocess.Popen'"),
    (dict(a={'$dict': [['type', 'os.system']]}), "type='os.system'"),
    (dict(a=dict(type=['os.system'])), 'type='),
    (dict(a=dict(type='RTDETR', _scope_='this')), "it imports 'this'"),
    (dict(custom_imports=dict(imports=['this'])), "it imports 'this'"),
    (dict(custom_imports=dict(imports='os.path')), "it imports 'os.path'"),
    (dict(default_scope='this'), "it imports 'this'"),
    (dict(custom_imports=dict(imports=['no_such_module'])), "it imports 'no_such_module'"),
    (dict(a={'$tuple': [dict(type='RTDETR', trust_remote_code=True)]}), 'trust_remote_code=True'),
    (dict(default_scope='mmpretrain', model=dict(type='HuggingFaceClassifier')), 'HuggingFace'),
    (dict(a=dict(type='torch.PyTorchFileWriter', file_name='/any/path')), 'PyTorchFileWriter'),
])
def test_plain_data_that_would_run_code(publish, content, found):
    with pytest.raises(CheckpointError, match=rf'published\.\w+ is refused: .*run code \(.*{found}'
                       ):
        config_from(publish(content))


@pytest.mark.parametrize('content, message', [
    ({'$tuple': []}, ''), ({'$set': [[]]}, ''), (dict(a={'$set': 1, 'b': 2}), ''),
    (dict(a={'$object': 1}), r'unknown mark \$object'),
])
def test_plain_data_that_is_no_config(publish, content, message):
    with pytest.raises(CheckpointError, match=rf'config inside of .* cannot be used: .*{message}'):
        config_from(publish(content))


class TestMMEngine:
    """Its readers take text alone, and run it."""

    def test_the_config_is_the_same(self, publish):
        content = dict(default_scope='mmdet', model=dict(type='RTDETR', sizes=(1, 2)))
        path = publish(to_plain(content))
        text = CheckpointLoader.load_checkpoint(path)['meta']['cfg']
        assert Config.fromstring(text, '.py').to_dict() == config_from(path).to_dict() == content

    @pytest.mark.parametrize('content', [
        dict(model=dict(type='os.system', command='ls')),
        dict(a='{{$HOME:x}}'), dict(_base_='other.py'),
        {'import os\na': 1}, {'a = open("trace", "w"); b': 1},
    ])
    def test_it_runs_no_code(self, publish, content, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = CheckpointLoader.load_checkpoint(publish(content))['meta']['cfg']
        with pytest.raises(RuntimeError, match='is refused.* would run code'):
            Config.fromstring(text, '.py')
        assert not (tmp_path / 'trace').exists()

    def test_weights_beside_a_config_that_is_not_used(self, publish):
        path = publish(dict(a=dict(type='my.Own'), b={'$object': 1}))
        for load in (load_for_inference, load_checkpoint):
            model = nn.Linear(2, 3)
            load(model, path)
            torch.testing.assert_close(dict(model.state_dict()), WEIGHTS)


def test_weights_are_not_looked_for_elsewhere(publish):
    init_cfg = dict(type='Pretrained', checkpoint='https://example.org/a.pth')
    content = dict(model=dict(
        type='SpaRTAN', arch='xt', init_cfg=[init_cfg, dict(type='Constant', layer='Conv2d')],
        parts=[dict(type='TIMMFeatures', model_name='resnet10t', pretrained=True)]))
    model = config_from(publish(to_plain(content))).model
    assert model == dict(type='SpaRTAN', arch='xt',
                         parts=[dict(type='TIMMFeatures', model_name='resnet10t')])


def test_registered_parts_are_built(publish):
    content = dict(model=dict(type='SpaRTAN', arch='xt', out_indices=(1, 2)))
    config = config_from(publish(to_plain(copy.deepcopy(content))))
    assert config.model.out_indices == (1, 2)
    assert MODELS.build(config.model).out_indices == (1, 2)
