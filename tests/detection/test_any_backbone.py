"""Backbones that do not fit, and what is said of each: when it is built, or before the run."""
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from spartan_mm.backbones import TIMMFeatures
from spartan_mm.backbones.pyramid import probe
from spartan_mm.engine import BackboneCheckHook
from spartan_mm.errors import UsageError

DATA = Path(__file__).parents[1] / 'data'
SMALL_SWIN = dict(type='TIMMFeatures', model_name='swin_tiny_patch4_window7_224', embed_dim=8,
                  depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
SMALL_VIT = dict(type='mmpretrain.VisionTransformer', img_size=64, patch_size=16, out_indices=-1,
                 arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=32))
RESNET = dict(type='mmdet.ResNet', depth=18, base_channels=8)


@pytest.fixture
def build():
    """Builds the user's detector with another backbone; gives the model and its config."""
    def build(backbone, in_channels=None, levels=3):
        cfg = Config.fromfile(DATA / 'user_detector.py')
        cfg.model.backbone, cfg.model.neck.in_channels = backbone, in_channels
        cfg.model.decoder.in_channels = [32] * levels
        with DefaultScope.overwrite_default_scope('mmdet'):
            return MODELS.build(cfg.model), cfg
    return build


def timm_of(name, **settings):
    pytest.importorskip('timm', reason='needs timm')
    return dict(type='TIMMFeatures', model_name=name, **settings)


class TestWhenBuilt:

    @pytest.mark.parametrize('name, settings, message', [
        ('crossvit_tiny_240', dict(depth=([1, 1, 0], ) * 3),
         r'the maps of TIMMFeatures crossvit_tiny_240 have strides 17, 17, 17, and are no pyramid, '
         r'in which each has twice the stride of the one before, such as 8, 16, 32: choose other'),
        ('convit_tiny', dict(depth=4, embed_dim=16), r'convit_tiny have strides 16, 16, 16, and '),
        ('shvit_s1', {}, r'the finest map of TIMMFeatures shvit_s1 has stride 16 \(of 16, 32, 64\),'
                         r' too coarse for small objects: the first has to have stride 8'),
    ])
    def test_strides(self, build, name, settings, message):
        with pytest.raises(ValueError, match=message):
            build(timm_of(name, **settings))

    def test_other_pyramids_are_taken(self, build):
        for indices, strides in (((-4, -3, -2, -1), (4, 8, 16, 32)), ((-3, -2), (8, 16))):
            model, _ = build(timm_of('test_resnet', out_indices=indices), levels=len(indices))
            assert model.backbone.strides == strides

    @pytest.mark.parametrize('backbone, in_channels, message', [
        (dict(RESNET, out_indices=(1, 3)), [16, 32, 64], r'neck\.in_channels=\(16, 32, 64\), but '
         r'ResNet gives as many maps as out_indices=\(1, 3\) says: 2; make the two equally long'),
        (dict(type='mmpretrain.MobileNetV3', arch='small_050', out_indices=(3, )), [8, 16, 24],
         r'but MobileNetV3 gives as many maps as out_indices=\(3,\) says: 1'),
        (timm_of('test_resnet'), [1, 2, 3], r'but the maps of TIMMFeatures have out_channels='),
        (RESNET, None, r'neck\.in_channels is needed: ResNet has no out_channels'),
    ], ids=['mmdet', 'mmpretrain', 'timm', 'unknown'])
    def test_number_of_maps(self, build, backbone, in_channels, message):
        with pytest.raises(ValueError, match=message):
            build(backbone, in_channels)

    def test_levels_of_the_decoder(self, build):
        with pytest.raises(ValueError, match=re.escape(
                'decoder.in_channels=(32, 32, 32), but the maps of the neck have channels (32, 32):'
                ' set decoder.in_channels to these')):
            build(timm_of('test_resnet', out_indices=(-3, -2)))

    def test_argument_that_a_model_of_timm_does_not_take(self):
        with pytest.raises(ValueError, match=r"does not build test_resnet with maps and \{'img_size"
                                             r"': 640\}: .*img_size"):
            TIMMFeatures('test_resnet', img_size=640)


class TestBeforeTheRun:

    @pytest.fixture
    def check(self, build):
        """Builds a detector, runs the hook, and gives what it says."""
        def check(*words):
            model, cfg = build(*words)
            cfg.test_dataloader.dataset.pipeline[2].scale = (96, 64)
            runner = type('Runner', (), dict(model=model.train(), cfg=cfg))
            before = {key: value.clone() for key, value in model.state_dict().items()}
            modes = [module.training for module in model.modules()]
            try:
                BackboneCheckHook().before_train(runner)
            except UsageError as error:
                return str(error)
            finally:
                assert modes == [module.training for module in model.modules()]
                after = model.state_dict()
                assert all(torch.equal(value, after[key]) for key, value in before.items())
        return check

    @pytest.mark.parametrize('backbone, in_channels, message', [
        (SMALL_SWIN, None,
         r"TIMMFeatures swin_tiny_patch4_window7_224 does not take images of 64x96 pixels: Input "
         r"height \(64\) doesn't match model \(224\); if it has these arguments, give it "
         r'img_size=\(64, 96\), or strict_img_size=False; else resize'),
        (timm_of('efficientformerv2_s0', embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1)), None,
         r'.* efficientformerv2_s0 does not take images of 64x96 pixels: .* img_size=\(64, 96\)'),
        (timm_of('test_resnet', in_chans=1), None,
         r'TIMMFeatures test_resnet takes images of 1 channel, and gets 3: set its in_channels=3'),
        (dict(SMALL_VIT, img_size=(64, 96), out_type='cls_token'), [32],
         r'VisionTransformer gives a tensor of shape \(1, 32\), and a neck takes maps \(N, C, H, W'
         r'\), no vectors or sequences of tokens: set its out_type'),
        (dict(SMALL_VIT, img_size=(64, 96), out_type='raw'), [32],
         r'VisionTransformer gives a tensor of shape \(1, 25, 32\)'),
        (dict(SMALL_VIT, img_size=(64, 96), out_type='featmap', out_indices=(0, 1, 2)), [32] * 3,
         r'the maps of VisionTransformer are 4x6, 4x6, 4x6, and the neck takes a pyramid'),
        (dict(RESNET, out_indices=(0, 1, 2)), [16, 32, 64],
         r'the maps of ResNet have channels \(8, 16, 32\), and the neck has in_channels=\(16, 32, '
         r"64\): set neck\.in_channels, or the backbone's out_indices"),
        (dict(RESNET, out_indices=(1, 2, 3)), [16, 32, 64], None),
        (dict(SMALL_SWIN, strict_img_size=False), None, None),
    ], ids=['swin', 'efficientformer', 'grey', 'vector', 'tokens', 'one size', 'out_indices',
            'fits', 'any size'])
    def test_what_is_said(self, check, backbone, in_channels, message):
        pytest.importorskip('timm', reason='needs timm')
        found = check(backbone, in_channels, len(in_channels or 'any'))
        assert found is None if message is None else re.match(message, found), found

    def test_fewer_maps_than_the_neck_has(self):
        class Backbone(nn.Conv2d):
            def forward(self, image):
                return [super().forward(image)]

        neck = nn.Identity()
        neck.in_channels = [4, 8]
        with pytest.raises(UsageError, match='Backbone gives 1 map, and the neck takes 2: set the'):
            probe(Backbone(3, 4, 1), neck, (3, 8, 8))


def test_the_model_itself_says_it(build):
    pytest.importorskip('timm', reason='needs timm')
    model, _ = build(SMALL_SWIN)
    with pytest.raises(ValueError, match='does not take images of 32x64 pixels: Input height'):
        model.eval()(torch.rand(1, 3, 32, 64))
