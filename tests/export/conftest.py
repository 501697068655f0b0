"""A small detector and a small classifier, exported once for all tests."""
import os
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from mmengine.config import Config
from torch import nn

import spartan_mm
from spartan_mm.export import export_model


def enliven(model):
    """Weights with which every part of a model counts, where new ones are close to nothing."""
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or 'gamma' in name:
            nn.init.uniform_(parameter, 0.1, 0.5)
        elif 'reg_branches' in name and name.endswith('4.weight'):
            nn.init.normal_(parameter, std=0.2)
        elif 'cls_branches' in name and name.endswith('weight'):
            nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope='session')
def exported(user_project, tmp_path_factory):
    """Gives config, checkpoint, model and ONNX file, whose batch is free, of a user's model."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'exported'

    def give(task):
        # Exporters take a while for each layer.
        config, path = user_project / f'small_{task}.py', root / f'small_{task}.onnx'
        decoder = 'model = dict(decoder=dict(num_layers=1))' if task == 'detector' else ''
        config.write_text(f"_base_ = './user_{task}.py'\n{decoder}\n")
        checkpoint = root / f'{task}.pth'
        with FileLock(f'{root}_{task}.lock'), pytest.MonkeyPatch.context() as patch:
            patch.chdir(user_project)
            if not path.exists():
                root.mkdir(exist_ok=True)
                torch.manual_seed(0)
                model = enliven(spartan_mm.get_model(Config.fromfile(config)))
                torch.save(dict(state_dict=model.state_dict()), checkpoint)
                export_model(config, checkpoint, out_dir=root)
            model = spartan_mm.get_model(Config.fromfile(config), pretrained=checkpoint)
        return SimpleNamespace(config=config, checkpoint=checkpoint, model=model, path=path)

    return give
