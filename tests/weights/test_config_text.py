"""Which configs are plain data."""

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from spartan_mm.weights.config_text import CodeError, read_text
from spartan_mm.zoo import config_path


def test_a_config_is_data():
    config = Config.fromfile(config_path('rtdetr_spartan_t'))
    assert read_text(config.pretty_text) == config.to_dict()


@pytest.mark.parametrize('text', [
    "a = dict(type='mmdet.RTDETR', b=[1, -2.5, None, True], c={'d': (1, 'e')})",
    "collate_fn = dict(type='mmengine.dataset.pseudo_collate')",
    "a = dict(type='torchvision/Resize', size=set())",
    "a = dict({'b c': 1, -1: dict()}, )",
    "a = dict(type='torchvision.transforms.Resize')",
    "a = [dict(type='mmdet.RTDETR'), dict(type='torch.nn.modules.linear.Linear')]",
    "a = dict(type='mmseg.NotInstalled', _scope_='mmdet')",
    "a = dict(type='mmengine.hooks.checkpoint_hook.CheckpointHook')",
    "a = dict(type='spartan_mm.engine.nan_guard.FiniteNumbersHook')",
    "a = dict(type='my_function')",
    "custom_imports = dict(imports=['my.random'], allow_failed_imports=False)",
    "optimizer = dict(type='torch.optim.AdamW', eps=inf)",
])
def test_data(text):
    # As Python has it, apart from names that it lacks.
    names = dict(inf=float('inf'))
    exec(text, names)
    assert read_text(text).items() <= names.items()


@pytest.mark.parametrize('text', ['a = dict(function=<function f at 0x7f>)', 'a = b\0'])
def test_what_is_no_python_cannot_run(text):
    with pytest.raises((SyntaxError, ValueError)) as caught:
        read_text(text)
    assert not isinstance(caught.value, CodeError)


@pytest.mark.parametrize('text', [
    'import os',
    'from os import system',
    'exec("a = 1")',
    'x = exec',
    '__builtins__ = 1',
    'a = [__builtins__]',
    'a = "".__class__',
    'a = dict(b=[c for c in (1, 2)])',
    'a = lambda: 1',
    'a = f"{b}"',
    'a = b[0]',
    'a, b = 1, 2',
    'if 1:\n    a = 1',
    "_base_ = 'other.py'",
    'a = 1\nb = "{{$HOME:x}}"',
    'import os; a = {{ $HOME:1 }}',
    "a = dict(type='os.system', command='ls')",
    "a = {'type': 'subprocess.Popen'}",
    "a = dict(type='builtins.exec')",
    "a = dict(type='mmengine.utils.misc.subprocess.Popen')",
    "a = dict(type='torch.hub.load')",
    "a = dict(b=[dict(type='mmengine.fileio.load', file='x.pkl')])",
    "a = dict(type='mmengine.load', file='x.pkl')",
    "a = dict(type='mmengine.runner.Runner', work_dir='/')",
    "a = dict(type='mmengine.utils.misc.subprocess')",
    "a = dict(type='torch.PyTorchFileWriter', file_name='/any/path')",
    "a = dict(type='torch.nn.modules.module.warnings.warn')",
    "a = dict(type='torch.nn.functional.relu')",
    "a = dict(type='numpy.fromfile')",
    "a = dict(type='my.random.Net')",
    "a = dict(type='this')",
    "a = dict(type=['os.system'])",
    "a = dict(type=inf)",
    "kind = 'os.system'\nmodel = dict(type=kind, command='ls')",
    "model = dict([('type', 'os.system'), ('command', 'ls')])",
    "key = 'type'\nmodel = {key: 'os.system', 'command': 'ls'}",
    "a = [('type', 'os.system')]\nmodel = dict(a, command='ls')",
    "model = {'ty' 'pe': 'os.system'}",
    "model = {**dict(type='RTDETR')}",
    "model = dict(**dict(type='RTDETR'))",
    "model = dict({'type': 'os.system'})",
    "inf = 'os.system'",
    'dict = 1',
    'a = set([1])',
    'a = b = 1',
    "a = 'b' + 'c'",
    "custom_imports = dict(imports=['this'])",
    "custom_imports = dict(imports='os.path')",
    "custom_imports = dict(imports=['pip.__main__'])",
    "default_scope = 'this'",
    "a = dict(type='RTDETR', _scope_='this')",
    'a = ' + '-' * 100_000 + '1',
])
def test_code(text):
    with pytest.raises(CodeError):
        read_text(text)


@pytest.mark.parametrize('text, found', [
    ('a = 1\nb = open("c")', "line 2: open('c')"),
    ("a = {\n'type': 'os.system'}", "line 1: type='os.system'"),
])
def test_the_line_is_named(text, found):
    with pytest.raises(CodeError) as caught:
        read_text(text)
    assert str(caught.value) == found


def test_what_is_registered_may_be_built(monkeypatch):
    monkeypatch.setattr(Net, '__module__', 'my.random')
    monkeypatch.setitem(MODELS.module_dict, 'random', Net)
    assert read_text("a = [dict(type='random'), dict(type='my.random.Net')]")
    with pytest.raises(CodeError):
        read_text("a = dict(type='my.random.os')")


class Net:
    pass
