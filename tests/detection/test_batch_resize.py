"""The batch takes a size drawn at random, and the samples with it."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch.nn import functional as F
from torch.testing import assert_close

from spartan_mm.detection import batch_resize
from spartan_mm.detection.batch_resize import RTDETR_SIZES, BatchRandomResize

BOX = [10.0, 8.0, 40.0, 32.0]


def make_sample(num_boxes, img_shape=(64, 64), box_type=torch.tensor):
    boxes = torch.tensor([BOX] * num_boxes).reshape(-1, 4)
    sample = DetDataSample(
        metainfo=dict(img_shape=img_shape, pad_shape=(64, 64), batch_input_shape=(64, 64),
                      scale_factor=(0.5, 0.25))
    )
    for name in ('gt_instances', 'ignored_instances'):
        boxes_of = boxes.clone() if box_type is torch.tensor else box_type(boxes.clone())
        setattr(sample, name, InstanceData(bboxes=boxes_of, labels=torch.zeros(num_boxes)))
    return sample


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'area'])
@pytest.mark.parametrize('size', [96, (48, 80)])
@pytest.mark.parametrize('box_type', [torch.tensor, HorizontalBoxes])
def test_images_and_samples_are_resized(size, interpolation, box_type):
    inputs = torch.rand(3, 3, 64, 64)
    samples = [make_sample(2, (64, 64), box_type), make_sample(0), make_sample(1, (32, 64))]
    resize = BatchRandomResize([size], interpolation)

    resized, samples = resize(inputs, samples)

    height, width = size = (96, 96) if size == 96 else size
    assert_close(resized, F.interpolate(inputs, size, mode=interpolation))
    expected = torch.tensor(BOX) * torch.tensor([width, height, width, height]) / 64
    for sample, num_boxes in zip(samples, (2, 0, 1), strict=True):
        for instances in (sample.gt_instances, sample.ignored_instances):
            boxes = instances.bboxes
            boxes = boxes.tensor if isinstance(boxes, HorizontalBoxes) else boxes
            assert_close(boxes, expected.expand(num_boxes, 4))
        assert sample.batch_input_shape == sample.pad_shape == size
        assert sample.scale_factor == (0.5 * width / 64, 0.25 * height / 64)
    assert [sample.img_shape for sample in samples] == [size, size, (height // 2, width)]


def test_same_size_changes_nothing():
    inputs, samples = torch.rand(1, 3, 64, 64), [make_sample(1)]
    resized, samples = BatchRandomResize([64])(inputs, samples)
    assert resized is inputs
    assert samples[0].gt_instances.bboxes.tolist() == [BOX]


def test_default_sizes_are_rtdetr_s():
    assert len(RTDETR_SIZES) == 13
    assert sorted({*RTDETR_SIZES}) == list(range(480, 801, 32))
    assert RTDETR_SIZES.count(640) == 3


def draw(seed=0, **kwargs):
    resize = BatchRandomResize(range(1, 1001), seed=seed, **kwargs)
    return [resize._draw_size()[0] for _ in range(50)]


def test_every_iteration_draws_for_itself_from_all_sizes():
    resize = BatchRandomResize(seed=0)
    sizes = [resize._draw_size()[0] for _ in range(2600)]
    counts = {size: sizes.count(size) / 200 for size in {*RTDETR_SIZES}}
    assert 2.6 < counts.pop(640) < 3.4
    assert len(counts) == 10
    assert 0.7 < min(counts.values()) and max(counts.values()) < 1.3


def test_draws_can_be_repeated_and_differ_by_rank_and_seed(monkeypatch):
    first = draw()
    torch.rand(1)
    assert draw() == first != draw(seed=1)
    monkeypatch.setattr(batch_resize, 'get_rank', lambda: 1)
    assert draw() != first
    torch.manual_seed(3)
    of_run = draw(seed=None)
    torch.manual_seed(4)
    assert draw(seed=None) != of_run


def test_stop_epoch():
    hub = MessageHub.get_instance('test_stop_epoch')
    resize = BatchRandomResize([32], stop_epoch=2)
    for epoch, side in enumerate([32, 32, 64, 64]):
        hub.update_info('epoch', epoch)
        assert resize(torch.rand(1, 3, 64, 64), [make_sample(1)])[0].shape[-1] == side


def test_in_the_data_preprocessor():
    """In training only, on a batch padded to one size."""
    preprocessor = MODELS.build(
        dict(type='DetDataPreprocessor', std=[255, 255, 255], mean=[0, 0, 0], bgr_to_rgb=True,
             batch_augments=[dict(type='BatchRandomResize', sizes=[32])])
    )
    inputs = [torch.full((3, 64, 64), 255, dtype=torch.uint8)] * 2
    for training, side in ((True, 32), (False, 64)):
        data = dict(inputs=inputs, data_samples=[make_sample(0), make_sample(1)])
        data = preprocessor(data, training=training)
        assert_close(data['inputs'], torch.ones(2, 3, side, side))
        assert data['data_samples'][0].batch_input_shape == (side, side)


def test_masks_are_refused():
    sample = make_sample(1)
    sample.gt_instances.masks = torch.zeros(1, 64, 64)
    with pytest.raises(NotImplementedError, match='with_mask'):
        BatchRandomResize([32])(torch.rand(1, 3, 64, 64), [sample])


@pytest.mark.parametrize('kwargs', [dict(sizes=[]), dict(interpolation='lanczos')])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match='BatchRandomResize'):
        BatchRandomResize(**kwargs)
