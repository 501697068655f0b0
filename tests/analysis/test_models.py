"""Models by name: each kind of name gives the model it says, and a wrong one says what is close."""

import pytest
import torch
from mmengine.config import Config

from spartan_mm import get_config, get_model
from spartan_mm.analysis.models import (
    find_entry,
    find_test_shape,
    load_named_model,
    packaged_models,
    read_config,
)
from spartan_mm.analysis.sizes import measure_modules
from spartan_mm.zoo import UnknownModelError


@pytest.mark.parametrize('name, shown, source, task, shape, parameters, has_spartan', [
    ('xt', 'SpaRTAN-XT', 'spartan_mm', 'backbone', (224, 224), 2029792, True),
    ('spartan_t', 'spartan_t', 'spartan_mm', 'classification', (256, 256), 3820296, True),
    ('rtdetr_r18vd', 'rtdetr_r18vd', 'spartan_mm', 'detection', (640, 640), 20184464, False),
    ('timm:resnet18', 'resnet18', 'timm', 'classification', (224, 224), 11689512, False),
    # Computes numbers while it is built.
    ('mmpretrain:van-tiny_3rdparty_in1k', 'van-tiny_3rdparty_in1k', 'mmpretrain', 'classification',
     (224, 224), 4105800, False),
    ('mmdet::detr/detr_r50_8xb2-150e_coco.py', 'detr_r50_8xb2-150e_coco', 'mmdet', 'detection',
     (800, 1333), 41575061, False),
])
def test_names(name, shown, source, task, shape, parameters, has_spartan):
    found = load_named_model(name, device='meta')
    assert (found.name, found.source, found.task, found.shape, found.has_spartan) == (
        shown, source, task, shape, has_spartan)
    assert sum(p.numel() for p in found.model.parameters()) == parameters
    assert all(p.is_meta for p in found.model.parameters()) and not found.model.training
    assert (found.config is None) == (name == 'xt' or source == 'timm')


def test_detector_that_reads_samples():
    """It runs on images alone, like any other."""
    found = load_named_model('mmdet:detr_r50_8xb2-150e_coco', device='meta')
    assert measure_modules(found.model, 64, 96)[''].multiply_adds > 1e9


@pytest.mark.parametrize('suffix', ['.py', '.pth'])
def test_files(user_project, tmp_path, suffix):
    path = user_project / 'user_classifier.py'
    config = Config.fromfile(path)
    model = get_model(config)
    checkpoint = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=config.pretty_text)), checkpoint)
    found = (load_named_model(checkpoint) if suffix == '.pth'
             else load_named_model(path, checkpoint))
    assert (found.source, found.task) == ('config', 'classification')
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found.model(images), model(images))


@pytest.mark.parametrize('name, message', [
    ('spartan-t', "there is no model 'spartan-t'; did you mean spartan_t,"),
    ('resnet18', 'mmpretrain:resnet18_8xb32_in1k.* timm:resnet18,'),
    ('zzzzqq', 'a model is given as the name of a model of this package'),
    ('none.py', '^config none.py does not exist$'),
    ('none.pth', '^checkpoint none.pth does not exist$'),
    ('timm:resnet0', 'timm .* has no model .*; the closest are timm:resnet'),
    ('mmpretrain:resnet18', 'closest are mmpretrain:resnet18_8xb32_in1k'),
    ('mmdet::detr/x.py', 'comes with no config .* mmdet::detr/detr_r50_8xb2-150e_coco.py'),
])
def test_unknown_names(name, message):
    with pytest.raises(UnknownModelError, match=message):
        load_named_model(name)


def test_config_of_no_model(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('a = 1')
    with pytest.raises(UnknownModelError, match='neither a detector nor a classifier'):
        load_named_model(path)


def test_configs_and_their_shapes():
    assert read_config('xt') is None
    config = read_config('rtdetr_spartan_t')
    assert config.to_dict() == get_config('rtdetr_spartan_t').to_dict()
    config.pop('test_dataloader')
    assert find_test_shape(config) is None


def test_metafiles():
    assert len(packaged_models('mmdet')) > 300
    assert find_entry('mmdet:detr_r50_8xb2-150e_coco') == find_entry(
        'mmdet::detr/detr_r50_8xb2-150e_coco.py')
    own = get_config('spartan_t').filename
    assert find_entry('spartan_t') == find_entry(own)
    assert find_entry('spartan_t')[1] == 'spartan_mm'
    assert find_entry('timm:resnet18') is find_entry('xt') is None
