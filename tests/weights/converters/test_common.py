"""Reading foreign checkpoints safely, and writing all of a file or nothing."""
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters import common


@pytest.mark.parametrize('wrap', [
    lambda weights: weights,
    lambda weights: dict(epoch=3, model=weights),
    lambda weights: dict(model={f'module.{name}': value for name, value in weights.items()}),
    lambda weights: dict(ema=dict(module=weights), model={}),
], ids=['plain', 'model', 'model with module.', 'ema'])
def test_state_dict_is_found_in_a_checkpoint(wrap):
    weights = nn.Linear(2, 3).state_dict()
    found = common.pick_state_dict(wrap(weights), entries=('ema.module', 'model'))
    torch.testing.assert_close(found, dict(weights))


@pytest.mark.parametrize('checkpoint, message', [
    ([1, 2], 'holds no state dict, neither as a whole nor under model'),
    ({}, 'holds no state dict'),
    (dict(epoch=3, optim={}), 'these entries are not tensors: epoch, optim'),
    (dict(model=dict(weight='no')), 'not tensors: weight'),
])
def test_checkpoint_without_weights(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        common.pick_state_dict(checkpoint)


def test_names_of_several_tensors_are_joined_and_split():
    names = dict(joint=['a', 'b', 'c'], single=['d'])
    foreign = {name: torch.randn(4, 2) for name in 'abcd'}
    ours = common.rename(foreign, names)
    assert ours['joint'].shape == (12, 2)
    back = common.rename_back(ours, names)
    torch.testing.assert_close(back, foreign, rtol=0, atol=0)
    # safetensors refuses tensors that share memory.
    assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == 4


def test_foreign_objects_are_read_without_their_package(tmp_path, monkeypatch):
    """As the authors' checkpoints, which hold a config object beside the weights."""
    module = types.ModuleType('foreign_config')
    exec('class Config(dict):\n    pass\n\nclass Node(list):\n    def __init__(self, value):\n'
         '        self.value = value\n    def __reduce__(self):\n'
         '        return type(self), (self.value,), None, iter([1])', module.__dict__)
    monkeypatch.setitem(sys.modules, 'foreign_config', module)
    config = module.Config(path=Path('here'))
    config.content = dict(depth=module.Node(3), kind=dict)
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(config=config, model=dict(weight=torch.ones(2))), path)
    monkeypatch.delitem(sys.modules, 'foreign_config')

    state_dict = common.pick_state_dict(common.load_checkpoint(path))
    torch.testing.assert_close(state_dict, dict(weight=torch.ones(2)))


class _Attack:

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('call, arguments, name', [
    (open, ('made', 'w'), r'io\.open'), (os.system, ('touch made', ), r'posix\.system'),
    (eval, ('open("made", "w")', ), r'builtins\.eval'),
    (Path.touch, (Path('made'), ), 'getattr')])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch, call, arguments,
                                                          name):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(attack=_Attack(call, *arguments), model={}), 'checkpoint.pth')
    with pytest.raises(CheckpointError, match=rf'checkpoint\.pth is refused.*{name}'):
        common.load_checkpoint('checkpoint.pth')
    assert os.listdir() == ['checkpoint.pth']


@pytest.mark.parametrize('name', ['broken.pth', 'broken.safetensors'])
@pytest.mark.parametrize('content', [b'', b'no checkpoint at all', b'PK\x03\x04 a broken archive'])
def test_file_that_is_no_checkpoint(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf'{name} cannot be read as a checkpoint: '):
        common.load_checkpoint(path)


@pytest.mark.parametrize('name, message', [
    ('absent.pth', 'absent.pth does not exist'), ('.', 'is a folder, not a checkpoint')])
def test_no_file(tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        common.load_checkpoint(tmp_path / name)
