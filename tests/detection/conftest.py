"""Small RT-DETRs and batches for the tests of the detector."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import spartan_mm.detection  # noqa: F401 - registers what the configs name

ASSIGNER = dict(
    type='HungarianAssigner',
    match_costs=[
        dict(type='FocalLossCost', weight=2.),
        dict(type='BBoxL1Cost', weight=5., box_format='xywh'),
        dict(type='IoUCost', iou_mode='giou', weight=2.),
    ])

SMALL = dict(
    type='RTDETR',
    num_queries=20,
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[0] * 3, std=[255] * 3,
                           bgr_to_rgb=True),
    backbone=dict(
        type='SpaRTAN', out_indices=(1, 2, 3), drop_path_rate=0.,
        arch=dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32),
                  expand_ratios=(2, 2, 2, 2),
                  conv_types=('full', 'full', 'depthwise', 'depthwise'))),
    neck=dict(type='HybridEncoder', in_channels=[16, 24, 32], embed_dims=32, ffn_dims=48,
              expansion=0.5, num_blocks=1),
    decoder=dict(in_channels=[32] * 3, embed_dims=32, num_layers=2, num_heads=4, ffn_dims=48),
    bbox_head=dict(type='RTDETRHead', num_classes=5, embed_dims=32),
    dn_cfg=dict(num_queries=8),
    train_cfg=dict(assigner=ASSIGNER),
    test_cfg=dict(max_per_img=10))


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Names without a scope are mmdet's, and the numbers drawn are always the same."""
    init_default_scope('mmdet')
    torch.manual_seed(0)


@pytest.fixture
def build():
    """Builds the small RT-DETR with some settings changed, its weights initialised."""
    from mmdet.registry import MODELS

    def build(**changes):
        config = Config(dict(model=copy.deepcopy(SMALL)))
        config.merge_from_dict({f'model.{name}': value for name, value in changes.items()})
        model = MODELS.build(config.model)
        model.init_weights()
        return model
    return build


@pytest.fixture
def assigner():
    """Settings of RT-DETR's matcher."""
    return copy.deepcopy(ASSIGNER)


@pytest.fixture
def make_samples():
    """Makes samples with so many random objects each."""
    from mmdet.structures import DetDataSample

    def make(counts, height=64, width=64, num_classes=5):
        samples = []
        for index, count in enumerate(counts):
            corners = torch.rand(count, 2, 2).sort(1).values.flatten(1)
            corners = corners * torch.tensor([width, height] * 2)
            corners[:, 2:] += 1
            samples.append(DetDataSample(
                gt_instances=InstanceData(bboxes=corners,
                                          labels=torch.randint(0, num_classes, (count,))),
                metainfo=dict(img_id=index, img_shape=(height, width), ori_shape=(height, width),
                              batch_input_shape=(height, width), scale_factor=(1., 1.))))
        return samples
    return make
