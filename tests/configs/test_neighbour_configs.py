"""Configs of other light backbones: which there are, and a training step of one of each kind."""
from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample

from spartan_mm import zoo
from spartan_mm.weights.initialize import without_pretrained

ALL = [name for name in zoo.list_models()
       if Path(zoo.config_path(name)).parent.name == 'neighbours']
PORTS = ['moganet_xt', 'unireplknet_a', 'casvit_xs', 'affnet_et', 'lsnet_t']
CONFIGS = Path(__file__).parents[2] / 'configs'


def take_step(config, batch):
    """Build a model, take a step, and tell what of it has not moved."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(without_pretrained(config.model)).train()
        with zoo.quiet():
            model.init_weights()
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        logs = model.train_step(batch, wrapper)
    assert all(value.isfinite().all() for value in logs.values())
    return {name for name, p in model.named_parameters() if torch.equal(p, before[name])}


def test_every_leaf_has_a_name():
    found = {path.stem: path for path in CONFIGS.glob('*/neighbours/*.py')}
    assert found.keys() == set(ALL)
    assert {f'rtdetr_{name}' for name in ALL if not name.startswith('rtdetr_')} < found.keys()
    for name, path in found.items():
        assert len(path.read_text().splitlines()) <= 25, name


@pytest.mark.parametrize('name', ['rtdetr_lsnet_t', 'rtdetr_swin_1g', 'rtdetr_van_b0',
                                  'rtdetr_efficientformerv2_s0'])
def test_head_and_schedule_are_those_of_spartan(name):
    config, ours = zoo.get_config(name), zoo.get_config('rtdetr_spartan_xt')
    assert config.train_cfg == ours.train_cfg
    assert config.optim_wrapper == ours.optim_wrapper
    for part in ('decoder', 'bbox_head', 'test_cfg', 'dn_cfg'):
        assert config.model[part] == ours.model[part], part


@pytest.mark.parametrize('name', PORTS)
def test_classifier_takes_a_step(name):
    batch = dict(inputs=torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
                 data_samples=[DataSample().set_gt_label(label) for label in (1, 700)])
    unmoved = take_step(zoo.get_config(name), batch)
    # What starts at zero, or with zeros behind it, moves later.
    assert not [key for key in unmoved if 'head' in key or 'stem' in key], unmoved


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rtdetr_swin_1g', 'rtdetr_van_b0',
                                  *(f'rtdetr_{name}' for name in PORTS)])
def test_detector_takes_a_step(name):
    config = zoo.get_config(name)
    config.merge_from_dict({
        'model.data_preprocessor.batch_augments': None, 'model.num_queries': 20,
        'model.decoder.num_layers': 1, 'model.neck.embed_dims': 32, 'model.neck.ffn_dims': 32,
        'model.decoder.embed_dims': 32, 'model.decoder.ffn_dims': 32,
        'model.decoder.in_channels': [32] * 3, 'model.bbox_head.embed_dims': 32})
    objects = InstanceData(bboxes=torch.tensor([[10., 10., 50., 60.]]), labels=torch.tensor([1]))
    samples = [DetDataSample(gt_instances=objects, metainfo=dict(
        img_shape=(96, 64), ori_shape=(96, 64), scale_factor=(1., 1.))) for _ in range(2)]
    batch = dict(inputs=[torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)] * 2,
                 data_samples=samples)
    unmoved = take_step(config, batch)
    assert not [key for key in unmoved if key.startswith('neck.input_projs')], unmoved
