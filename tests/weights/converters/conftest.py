"""What the converters' tests share."""
import json
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden'


@pytest.fixture(scope='session')
def golden():
    """Gives the weights of a golden file, as the authors name them, in a dict that may change."""
    fill = runpy.run_path(str(GOLDEN / 'fill.py'))['fill_state_dict']

    @cache
    def read(case):
        shapes = json.loads((GOLDEN / f'{case}.json').read_text())['shapes']
        return {name: torch.from_numpy(value) for name, value in fill(shapes).items()}

    return lambda case: dict(read(case))
