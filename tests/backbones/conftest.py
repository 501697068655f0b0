"""The literal form of the backbone, for tests of the fast ones."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def oracle():
    """The module of the oracle, which no package imports."""
    path = Path(__file__).parents[1] / 'oracle' / 'spartan.py'
    spec = importlib.util.spec_from_file_location('spartan_oracle', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
