"""All models: a pass calls every module that has parameters.

Hooks, adapters, pruning, quantisation and counters see modules that are called; a weight that is
used past its module escapes them.
"""
import copy
from pathlib import Path

import pytest
import torch
from mmengine.structures import InstanceData

from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.zoo import config_path, get_config, get_model, list_models, task_of

# Of other backbones one of each kind: heads and larger ones of the kind are the same modules.
MODELS = [name for task in ('classification', 'detection') for name in list_models(task=task)
          if Path(config_path(name)).parent.name != 'neighbours'] + [
    'moganet_xt', 'unireplknet_a', 'casvit_xs', 'affnet_et', 'lsnet_t']
SIZE = 64  # of the images: two positions on the coarsest map of all models
built = {}  # the name of the first model of these settings


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    """Each model as its config builds it."""
    config = get_config(request.param)
    config.model.pop('distillation', None)  # a teacher's is no other model
    other = built.setdefault(repr(config.model), request.param)
    if other != request.param:
        pytest.skip(f'the same model as {other}, trained otherwise')
    if task_of(request.param) == 'detection':
        config.model.data_preprocessor.pop('batch_augments', None)  # larger images take long
    return get_model(config)


@pytest.fixture
def batch(request):
    """Two images with an object each, as a data loader gives them."""
    inputs = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
    if task_of(request.node.callspec.params['model']) == 'classification':
        from mmpretrain.structures import DataSample
        samples = [DataSample().set_gt_label(1) for _ in inputs]
    else:
        from mmdet.structures import DetDataSample
        objects = InstanceData(bboxes=torch.tensor([[4., 8., 40., 60.]]), labels=torch.tensor([1]))
        samples = [DetDataSample(gt_instances=objects, metainfo=dict(
            img_id=index, img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), scale_factor=(1., 1.)))
            for index in range(len(inputs))]
    return dict(inputs=inputs, data_samples=samples)


def with_parameters(model):
    """Modules with parameters of their own, by name."""
    return {name: module for name, module in model.named_modules()
            if [*module.parameters(recurse=False)]}


@torch.no_grad()
def find_uncalled(model, batch, mode):
    """Names of modules with parameters that a pass doesn't call."""
    called, handles = set(), []
    for name, module in with_parameters(model).items():
        handles.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    model._run_forward(model.data_preprocessor(batch, model.training), mode=mode)
    for handle in handles:
        handle.remove()
    return with_parameters(model).keys() - called


def test_training_calls_every_module(model, batch):
    assert not find_uncalled(model.train(), batch, 'loss')


def test_evaluation_calls_every_module(model, batch):
    unused = set()
    if hasattr(model, 'decoder'):
        # Denoising is for training alone; so are the classes of layers other than the one that
        # predicts, and layers after it. The encoder's branches are the last.
        last, layers = model.decoder.eval_idx, model.decoder.num_layers
        names = {'decoder.layers': range(last + 1, layers),
                 'bbox_head.reg_branches': range(last + 1, layers),
                 **{f'bbox_head.{kind}_branches': {*range(layers)} - {last}
                    for kind in ('cls', 'quality')}}
        unused = {name for name in with_parameters(model) for part, numbers in names.items()
                  if any(f'{name}.'.startswith(f'{part}.{number}.') for number in numbers)}
        unused.add('dn_query_generator.label_embedding')
    assert find_uncalled(model.eval(), batch, 'predict') == unused


def test_deploy_form_calls_every_module(model, batch):
    assert not find_uncalled(switch_to_deploy(copy.deepcopy(model)), batch, 'predict')
