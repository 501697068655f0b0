"""Backbones of timm: maps, channels, weights; nothing is downloaded."""
import copy

import pytest
import torch
from torch.testing import assert_close

from spartan_mm.backbones import TIMMFeatures
from spartan_mm.errors import CheckpointError

timm = pytest.importorskip('timm', reason='needs timm')


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050', 'test_convnext'])
def test_maps_have_the_published_channels_and_strides(name):
    backbone = TIMMFeatures(name).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.out_channels, backbone.strides, strict=True)]
    assert backbone.strides == (8, 16, 32)


def test_other_maps():
    backbone = TIMMFeatures('resnet10t', out_indices=(1, 4))
    assert (backbone.out_channels, backbone.strides) == ((64, 512), (4, 32))


def test_channels_come_second():
    """Swin itself has them last."""
    backbone = TIMMFeatures('swin_tiny_patch4_window7_224', img_size=64, window_size=4, embed_dim=8,
                            depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]


def test_normalizes_as_the_model_was_trained():
    plain, normalized = TIMMFeatures('test_resnet').eval(), TIMMFeatures('test_resnet',
                                                                         normalize=True).eval()
    normalized.load_state_dict(plain.state_dict())  # the mean is no weight
    x = torch.rand(1, 3, 32, 32)
    assert_close(normalized(x), plain((x - 0.5) / 0.5))


def test_pretrained_weights_are_loaded_when_they_are_asked_for(tmp_path):
    trained = timm.create_model('test_resnet')
    torch.save(trained.state_dict(), tmp_path / 'weights.pth')
    backbone = TIMMFeatures('test_resnet', pretrained=True,
                            pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    stem = 'conv1.0.weight' if 'conv1.0.weight' in trained.state_dict() else 'conv1.weight'
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    assert not torch.equal(before[stem], trained.state_dict()[stem])
    backbone.init_weights()
    found = backbone.model.state_dict()
    assert_close({key: trained.state_dict()[key] for key in found}, dict(found))


@pytest.mark.parametrize('kept', ['', 'conv1'])
def test_pretrained_weights_that_lack_some_are_refused(tmp_path, kept):
    weights = timm.create_model('test_resnet').state_dict()
    file = tmp_path / 'weights.pth'
    torch.save({key if kept and key.startswith(kept) else f'other.{key}': value
                for key, value in weights.items()}, file)
    backbone = TIMMFeatures('test_resnet', pretrained=True,
                            pretrained_cfg_overlay=dict(file=str(file)))
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(CheckpointError, match='^the pretrained weights of test_resnet lack '):
        backbone.init_weights()
    assert_close(dict(backbone.state_dict()), before)


def test_without_pretrained_initialising_changes_nothing():
    backbone = TIMMFeatures('test_resnet')
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert_close(dict(backbone.state_dict()), before)


@pytest.mark.parametrize('settings, message', [
    (dict(model_name='resnet19'), "no model 'resnet19'; the closest names are .*resnet18"),
    (dict(out_indices=(7, )), r'test_resnet has no maps out_indices=\(7,\)'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='x')), 'pretrained_cfg_overlay')])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TIMMFeatures(**dict(model_name='test_resnet') | settings)


def test_norms_and_parts_stay_as_they_are():
    backbone = TIMMFeatures('hgnetv2_b0', (1, 2), norm_eval=True, frozen=('stem', )).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(x.mean() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    trained = {name for name, value in backbone.model.named_parameters() if value.grad is not None}
    assert trained and not any('.bn.' in name or name.startswith('stem') for name in trained)
    with pytest.raises(ValueError, match="no part to freeze called 'neck'; it has stem, stages_0"):
        TIMMFeatures('hgnetv2_b0', (1, 2), frozen=('neck', ))
