"""Hard labels are smoothed, mixed ones are not."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch.testing import assert_close

from spartan_mm.classification import HardLabelSmoothLoss

CONFIG = Path(__file__).parents[2] / 'configs' / 'classification' / 'spartan_xt_224.py'


def test_hard_labels_are_smoothed():
    scores, labels = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    logs = scores.log_softmax(1)
    expected = -(0.8 * logs[torch.arange(5), labels] + 0.2 * logs.mean(1)).mean()
    loss = HardLabelSmoothLoss(0.2)
    assert_close(loss(scores, labels), expected)
    assert_close(loss(scores, labels, avg_factor=10), expected / 2)


def test_mixed_labels_are_taken_as_they_are():
    scores, labels = torch.randn(5, 7), torch.rand(5, 7)
    expected = -(labels * scores.log_softmax(1)).sum(1).mean()
    assert_close(HardLabelSmoothLoss(0.2)(scores, labels), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_scores(dtype):
    scores, labels = (100 * torch.randn(4, 7)).to(dtype), torch.rand(4, 7)
    loss = HardLabelSmoothLoss(0.2)
    assert_close(loss(scores, labels), loss(scores.float(), labels))


@pytest.mark.parametrize('value', [-0.1, 1.])
def test_bad_share(value):
    with pytest.raises(ValueError, match=f'label_smooth_val={value}'):
        HardLabelSmoothLoss(value)


@pytest.mark.parametrize('mixing, smoothing', [(True, 0.), (False, 0.2)])
def test_the_recipe_smooths_only_without_mixing(mixing, smoothing):
    settings = Config.fromfile(CONFIG).model
    if not mixing:
        settings.train_cfg = None
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(settings)
    samples = [DataSample().set_gt_label(label) for label in (3, 999)]
    batch = model.data_preprocessor(
        dict(inputs=torch.randint(0, 256, (2, 3, 32, 32)), data_samples=samples), training=True)
    found = model.eval()(**batch, mode='loss')['loss']

    target = torch.stack([sample.gt_score for sample in batch['data_samples']]) if mixing else (
        torch.tensor([3, 999]))
    with torch.no_grad():
        scores = model(batch['inputs'])
    assert_close(found, F.cross_entropy(scores, target, label_smoothing=smoothing))
