"""A classifier in the hands of torch.export: any batch, any size, in either form."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.export import Dim, export
from torch.testing import assert_close

CONFIG = Path(__file__).parents[1] / 'data' / 'user_classifier.py'


@pytest.mark.slow
@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@torch.no_grad()
def test_batch_and_size_of_an_exported_classifier_are_free(deploy):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile(CONFIG).model).eval()
    if deploy:
        model.backbone.switch_to_deploy()
    batch, rows, columns = (Dim(name, min=1, max=64) for name in ('batch', 'rows', 'columns'))
    program = export(model, (torch.rand(2, 3, 64, 96), ), dynamic_shapes=(
        {0: batch, 2: 32 * rows, 3: 32 * columns}, )).module()
    for size in ((1, 3, 64, 64), (3, 3, 96, 64), (2, 3, 128, 96)):
        images = torch.rand(size)
        assert_close(program(images), model(images))
