"""Which configs are plain data."""

import pytest
from mmengine.config import Config

from spartan_mm.engine.config_text import find_code
from spartan_mm.zoo import config_path


def test_a_config_is_data():
    assert find_code(Config.fromfile(config_path('rtdetr_spartan_t')).pretty_text) is None


@pytest.mark.parametrize('text', [
    "a = dict(type='mmdet.RTDETR', b=[1, -2.5, None, True], c={'d': (1, 'e')})",
    "collate_fn = dict(type='mmengine.dataset.pseudo_collate')",
    "a = dict(type='torchvision/Resize', size=range(3))",
    "optimizer = dict(type='torch.optim.AdamW', eps=inf)",
    'a = dict(function=<function f at 0x7f>)',  # no Python: cannot run
    'a = b\0',
])
def test_data(text):
    assert find_code(text) is None


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
])
def test_code(text):
    assert find_code(text)


def test_the_line_is_named():
    assert find_code('a = 1\nb = open("c")') == "line 2: open"
