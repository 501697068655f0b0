"""A batch mixed with itself keeps the objects of both images."""
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch.testing import assert_close

from spartan_mm.detection import BatchMixUp

DATA = Path(__file__).parents[1] / 'data' / 'golden'


def make_samples(boxes, labels):
    return [DetDataSample(gt_instances=InstanceData(bboxes=of_image, labels=names),
                          ignored_instances=InstanceData(bboxes=of_image[:1], labels=names[:1]))
            for of_image, names in zip(boxes, labels, strict=True)]


def random_batch(size):
    return torch.rand(size, 3, 4, 4), make_samples(torch.rand(size, 2, 4), torch.zeros(size, 2))


def test_mixes_as_officially(monkeypatch):
    meta = json.loads((DATA / 'deim_mosaic.json').read_text())['meta']['mixup']
    golden = {name: torch.from_numpy(value)
              for name, value in np.load(DATA / 'deim_mosaic.npz').items() if 'mixup' in name}
    image = runpy.run_path(str(DATA / 'fill.py'))['image']
    images = torch.from_numpy(image((4, 3, 6, 5), 901))
    mix = BatchMixUp(prob=1.)
    monkeypatch.setattr(mix, '_draw_share', lambda: meta['beta'])
    mixed, samples = mix(images, make_samples(*(
        [golden[f'mixup_in_{kind}{i}'] for i in range(4)] for kind in ('boxes', 'labels'))))
    assert_close(mixed, golden['mixup_images'], rtol=1e-6, atol=1e-6)
    for number, sample in enumerate(samples):
        for kind, found in (('boxes', sample.gt_instances.bboxes),
                            ('labels', sample.gt_instances.labels)):
            assert_close(found, golden[f'mixup_{kind}{number}'], rtol=0, atol=0)
        before = sum(meta['counts'][image] > 0 for image in (number, number - 1))
        assert len(sample.ignored_instances) == before


def test_one_image_stays_as_it_is():
    images, samples = random_batch(1)
    mixed, (sample, ) = BatchMixUp(prob=1.)(images, samples)
    assert mixed is images and len(sample.gt_instances) == 2


def test_mixes_in_its_epochs_alone():
    hub = MessageHub.get_instance('test_mixes_in_its_epochs_alone')
    mix = BatchMixUp(prob=1., begin_epoch=1, stop_epoch=3)
    for epoch, count in enumerate([2, 4, 4, 2]):
        hub.update_info('epoch', epoch)
        images, samples = random_batch(3)
        mixed, samples = mix(images, samples)
        assert (mixed is images) == (count == 2)
        assert len(samples[0].gt_instances) == count


def test_draws_can_be_repeated_and_differ_by_rank(monkeypatch):
    def draw(seed=0):
        mix = BatchMixUp(seed=seed)
        return [mix._draw_share() for _ in range(200)]

    first = draw()
    shares = [share for share in first if share is not None]
    assert 130 < len(shares) < 170 and 0.45 <= min(shares) and max(shares) <= 0.55
    assert draw() == first != draw(1)
    monkeypatch.setattr('spartan_mm.detection.batch_mix.get_rank', lambda: 1)
    assert draw() != first


def test_bad_share():
    with pytest.raises(ValueError, match='BatchMixUp: ratio'):
        BatchMixUp(ratio=(0.5, 1.5))
