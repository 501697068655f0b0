"""Every batch of the recipe is mixed, by CutMix or by Mixup, in images and labels alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch.testing import assert_close

CONFIG = Path(__file__).parents[2] / 'configs' / 'classification' / 'spartan_xt_224.py'
BATCH = 4


@pytest.fixture
def preprocessor():
    np.random.seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        settings = Config.fromfile(CONFIG).model
        settings.data_preprocessor.update(mean=[0.], std=[1.], to_rgb=False)
        yield MODELS.build(settings).data_preprocessor


@pytest.fixture
def drawn(monkeypatch):
    """The parameters of the Beta distributions that are drawn from."""
    drawn = []
    beta = np.random.beta
    monkeypatch.setattr(np.random, 'beta', lambda *ab: drawn.append(ab) or beta(*ab))
    return drawn


def mix(preprocessor, training=True):
    """A batch whose image i has the value 2^i everywhere, and label i."""
    images = 2.**torch.arange(BATCH).view(-1, 1, 1, 1).expand(-1, 1, 20, 20)
    samples = [DataSample().set_gt_label(i) for i in range(BATCH)]
    batch = preprocessor(dict(inputs=images.clone(), data_samples=samples), training=training)
    return batch['inputs'], batch['data_samples']


def test_one_of_the_two_for_every_batch_with_equal_chance(preprocessor, drawn):
    batches = 300
    for _ in range(batches):
        mix(preprocessor)
    assert len(drawn) == batches
    assert set(drawn) == {(1.0, 1.0), (0.2, 0.2)}  # CutMix and Mixup
    assert 0.4 < drawn.count((1.0, 1.0)) / batches < 0.6


@pytest.mark.parametrize('alpha', [1.0, 0.2])
def test_labels_are_shared_like_the_pixels(preprocessor, drawn, alpha):
    really_mixed = 0
    for _ in range(40):
        images, samples = mix(preprocessor)
        if drawn.pop() != (alpha, alpha):
            continue
        scores = torch.stack([sample.gt_score for sample in samples])
        assert scores.shape == (BATCH, 1000)
        # What the labels say about the mean of the pixels, for either kind of mixing.
        assert_close(images.mean((1, 2, 3)), scores[:, :BATCH] @ 2.**torch.arange(BATCH))
        assert_close(scores.sum(1), torch.ones(BATCH))
        for image, score in zip(images, scores, strict=True):
            if score.count_nonzero() > 1:
                really_mixed += 1
                # CutMix leaves two values side by side, Mixup makes one of them.
                assert len(image.unique()) == (2 if alpha == 1. else 1)
    assert really_mixed


def test_evaluation_does_not_mix(preprocessor, drawn):
    images, samples = mix(preprocessor, training=False)
    assert not drawn
    assert_close(images.mean((1, 2, 3)), 2.**torch.arange(BATCH))
    assert [int(sample.gt_label) for sample in samples] == list(range(BATCH))
