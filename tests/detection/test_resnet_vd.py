import pytest
import torch
from mmdet.models.backbones import ResNetV1d
from torch.testing import assert_close

from spartan_mm.detection import ResNetVd


@pytest.mark.parametrize('depth, channels, parameters', [
    (18, (128, 256, 512), 11_199_968), (34, (128, 256, 512), 21_308_128),
    (50, (512, 1024, 2048), 23_474_016 + 53_248), (101, (512, 1024, 2048), 42_413_920 + 105_472)])
def test_maps_and_parameters(depth, channels, parameters):
    backbone = ResNetVd(depth=depth, out_indices=(1, 2, 3))
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert (backbone.out_channels, backbone.strides) == (channels, (8, 16, 32))
    with torch.no_grad():
        maps = backbone.eval()(torch.rand(1, 3, 70, 45))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, *size) for c, size in zip(channels, ((9, 6), (5, 3), (3, 2)), strict=True)]


@pytest.mark.parametrize('depth, added', [(50, set()), (18, {'layer1.0.downsample'})])
def test_is_mmdets_but_for_the_first_stage_of_shallow_ones(depth, added):
    more = ResNetVd(depth=depth).state_dict().keys() ^ ResNetV1d(depth=depth).state_dict().keys()
    assert {name.rsplit('.', 2)[0] for name in more} == added


def test_frozen_as_the_official_r50():
    backbone = ResNetVd(depth=50, frozen_stages=0, norm_cfg=dict(type='BN', requires_grad=False),
                        norm_eval=True)
    backbone.train()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 52
    assert not any(name.startswith('stem') or 'bn' in name for name in trained)
    assert not any(m.training for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_new_projection_takes_part():
    backbone = ResNetVd(depth=18).eval()
    before = backbone(torch.ones(1, 3, 32, 32))[0]
    torch.nn.init.zeros_(backbone.layer1[0].downsample[1].weight)
    with pytest.raises(AssertionError):
        assert_close(backbone(torch.ones(1, 3, 32, 32))[0], before)
