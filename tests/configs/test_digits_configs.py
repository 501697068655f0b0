"""The classifier of digits: built from the recipe's bases, and made for the detector of digits."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.testing import assert_close

from spartan_mm.backbones.spartan import DropPath

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture
def classifier():
    return Config.fromfile(CONFIGS / 'classification' / 'spartan_xt_digits.py')


@pytest.fixture
def detector():
    return Config.fromfile(CONFIGS / 'detection' / 'rtdetr_spartan_xt_digits.py')


def test_nothing_of_the_recipe_that_needs_long_training_is_left(classifier):
    init_default_scope('mmpretrain')
    model = MODELS.build(classifier.model)
    assert not model.data_preprocessor.batch_augments
    assert type(model.head.loss_module).__name__ == 'CrossEntropyLoss'
    assert {module.rate for module in model.modules() if isinstance(module, DropPath)} == {0}
    assert model.head.fc.out_features == 10


def test_images_reach_the_backbone_as_in_the_detector(classifier, detector):
    init_default_scope('mmpretrain')
    ours = MODELS.build(classifier.model).data_preprocessor
    with_detector = detector.model.data_preprocessor
    assert ours.mean.flatten().tolist() == with_detector.mean
    assert ours.std.flatten().tolist() == with_detector.std
    assert ours.to_rgb == with_detector.bgr_to_rgb


def test_the_detector_takes_the_backbone(classifier, detector, tmp_path):
    init_default_scope('mmpretrain')
    model = MODELS.build(classifier.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'classifier.pth')

    init_default_scope('mmdet')
    detector.model.backbone.init_cfg = dict(
        type='CheckedPretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone.')
    trained = MODELS.build(detector.model)
    trained.init_weights()
    assert_close(trained.backbone.state_dict(), model.backbone.state_dict())
