"""Other backbones under RT-DETR, and SpaRTAN under another detector."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

import spartan_mm.detection  # noqa: F401
from spartan_mm.detection.rtdetr import with_in_channels

CONFIGS = Path(__file__).parents[2] / 'configs' / 'detection'
SIDE = 96


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


def train_and_predict(config):
    """Take one step with the config's optimizer, then detect; return the model and its groups."""
    model = MODELS.build(config.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    sample = DetDataSample(
        gt_instances=InstanceData(bboxes=torch.tensor([[10., 10., 50., 60.]]),
                                  labels=torch.tensor([1])),
        metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1., 1.)))
    data = dict(inputs=[torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)] * 2,
                data_samples=[sample, sample.clone()])
    logs = model.train().train_step(data, wrapper)
    assert all(value.isfinite().all() for value in logs.values())
    with torch.no_grad():
        results = model.eval().test_step(data)
    assert all(result.pred_instances.bboxes.isfinite().all() for result in results)
    return model, wrapper.optimizer.param_groups


@pytest.mark.slow
@pytest.mark.parametrize('name, channels', [
    ('resnet10t', (128, 256, 512)), ('mobilenetv3_small_050', (16, 24, 288))])
def test_rtdetr_on_timm(name, channels):
    """One line is changed, and weights aren't downloaded."""
    pytest.importorskip('timm', reason='needs timm')
    config = Config.fromfile(CONFIGS / 'rtdetr_timm.py')
    config.model.backbone.update(model_name=name, pretrained=False)
    config.model.data_preprocessor.batch_augments[0].sizes = (SIDE, )
    model, groups = train_and_predict(config)
    assert tuple(model.neck.in_channels) == channels
    of_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for group in groups:
        for parameter in group['params']:
            assert group['lr'] == (1e-5 if id(parameter) in of_backbone else 1e-4)


def test_rtdetr_on_timm_is_one_line_from_another_backbone():
    text = (CONFIGS / 'rtdetr_timm.py').read_text(encoding='utf-8')
    assert text.count('the one line to change') == 1
    config = Config.fromfile(CONFIGS / 'rtdetr_timm.py')
    assert config.model.backbone.pretrained and 'in_channels' not in config.model.neck


@pytest.mark.slow
def test_retinanet_with_spartan():
    config = Config.fromfile(CONFIGS / 'retinanet_spartan_t.py')
    config.model.backbone.init_cfg = None
    model, groups = train_and_predict(config)
    assert config.train_cfg.max_epochs == 12
    assert config.model.neck.in_channels == list(model.backbone.out_channels)
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for module_name, module in model.named_modules():
        norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
        for leaf, parameter in module.named_parameters(recurse=False):
            free = norm or leaf in ('bias', 'gamma')
            assert decay[id(parameter)] == (0. if free else 1e-4), f'{module_name}.{leaf}'


class TestChannels:

    @pytest.fixture
    def backbone(self):
        backbone = nn.Identity()
        backbone.out_channels = (8, 16)
        return backbone

    @pytest.mark.parametrize('neck', [dict(), dict(in_channels=None), dict(in_channels=[8, 16])])
    def test_are_the_backbones(self, backbone, neck):
        assert with_in_channels(dict(neck, type='x'), backbone) == dict(
            type='x', in_channels=(8, 16))

    def test_others_are_an_error(self, backbone):
        with pytest.raises(ValueError, match=r'neck\.in_channels=\(8, 32\).* of Identity have '
                                             r'out_channels=\(8, 16\)'):
            with_in_channels(dict(in_channels=[8, 32]), backbone)

    def test_are_needed_where_the_backbone_has_none(self):
        assert with_in_channels(dict(in_channels=[8]), nn.Identity()) == dict(in_channels=[8])
        with pytest.raises(ValueError, match=r'in_channels is needed: Identity has no out_chann'):
            with_in_channels(dict(), nn.Identity())
