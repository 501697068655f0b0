"""Packages that are missing, too old or at odds are told of in a sentence."""
import sys

import pytest
import torch

from spartan_mm.errors import ExplainedError
from spartan_mm.requirements import require


@pytest.fixture
def write_package(tmp_path, monkeypatch):
    """Writes a package that can be imported in this test alone."""
    def write(content):
        (tmp_path / 'openmm_fake.py').write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    sys.modules.pop('openmm_fake', None)


def test_returns_the_module():
    assert require('torch', '2.0', 'all') is torch


@pytest.mark.parametrize('content, message', [
    ("__version__ = '1.4.9'", r'openmm_fake >= 2\.0, but 1\.4\.9 is installed.*\[extra\]'),
    ('import no_such_module', 'needs openmm_fake, .* it needs no_such_module; install'),
    ("assert False, 'MMCV==2.2.0 is used but incompatible.'",
     r'needs openmm_fake, .* refuses another package: MMCV==2\.2\.0'),
])
def test_says_what_is_wrong(write_package, content, message):
    write_package(content)
    with pytest.raises(ImportError, match=message):
        require('openmm_fake', '2.0', 'extra')


def test_missing():
    message = r"no_such_module >= 2\.0, .* not installed.*extra"
    with pytest.raises(ImportError, match=message) as caught:
        require('no_such_module', '2.0', 'extra')
    assert isinstance(caught.value, ExplainedError)


@pytest.mark.parametrize('version', ["'2.0'", "'2.10.0+cu130'", "'main'", 'None'])
def test_accepts(write_package, version):
    write_package(f'__version__ = {version}')
    assert require('openmm_fake', '2.0', 'extra').__name__ == 'openmm_fake'
