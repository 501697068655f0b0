"""Small RT-DETRs and batches for the tests of the detector."""
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import spartan_mm.detection  # noqa: F401 - registers what the configs name

USER_DETECTOR = Path(__file__).parents[1] / 'data' / 'user_detector.py'
# Numbers that differ from each other where they mean different things.
CHANGES = {'backbone.drop_path_rate': 0., 'neck.ffn_dims': 48, 'decoder.ffn_dims': 48,
           'bbox_head.num_classes': 5, 'test_cfg.max_per_img': 10}

CONTENT = dict(
    images=[dict(id=7, file_name='cat.jpg', width=64, height=48),
            dict(id=3, file_name='dog.jpg', width=48, height=64),
            dict(id=9, file_name='none.jpg', width=40, height=40)],
    annotations=[
        dict(id=11, image_id=7, category_id=30, bbox=[1, 2, 30, 20], area=600, iscrowd=0),
        dict(id=12, image_id=3, category_id=5, bbox=[0, 0, 48, 64], area=100.5, iscrowd=1),
        dict(id=13, image_id=7, category_id=8, bbox=[5.5, 6, 10, 10], area=100, iscrowd=0),
    ],
    categories=[dict(id=5, name='dog'), dict(id=30, name='cat'), dict(id=8, name='bird')],
)


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Names without a scope are mmdet's, and the numbers drawn are always the same."""
    init_default_scope('mmdet')
    torch.manual_seed(0)


@pytest.fixture
def configure():
    """Makes the config of the small RT-DETR with some settings of the model changed."""
    def configure(**changes):
        config = Config.fromfile(USER_DETECTOR)
        config.merge_from_dict({f'model.{name}': value
                                for name, value in (CHANGES | changes).items()})
        return config
    return configure


@pytest.fixture
def build(configure):
    """Builds the small RT-DETR with some settings changed, its weights initialized."""
    from mmdet.registry import MODELS

    def build(**changes):
        model = MODELS.build(configure(**changes).model)
        model.init_weights()
        return model
    return build


@pytest.fixture
def assigner():
    """Settings of RT-DETR's matcher."""
    return Config.fromfile(USER_DETECTOR).model.train_cfg.assigner


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


@pytest.fixture
def content():
    """An annotation file of three images, one of them without objects."""
    return copy.deepcopy(CONTENT)
