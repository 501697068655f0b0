"""What tests of looks into models have in common."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import spartan_mm


@pytest.fixture(scope='session')
def user_models(user_project):
    """Config and checkpoint of the user's models by their task; they are untrained."""
    found = {}
    for task in ('detector', 'classifier'):
        config, checkpoint = user_project / f'user_{task}.py', user_project / f'own_{task}.pth'
        read = Config.fromfile(config)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(read.default_scope):
            model = MODELS.build(read.model)
        torch.save(dict(state_dict=model.state_dict(),
                        meta=dict(dataset_meta=dict(classes=('square', 'disc')))), checkpoint)
        found[task] = str(config), str(checkpoint)
    return found


@pytest.fixture(scope='session')
def make_backbone():
    """Makes small backbones, with the given options."""
    def make(**options):
        return spartan_mm.SpaRTAN(dict(
            stem_channels=8, depths=(1, 2, 1, 1), channels=(8, 16, 24, 32),
            expand_ratios=(4, 4, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise'),
        ), **options).eval()
    return make
