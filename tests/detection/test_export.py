"""Detectors in the hands of torch.export and torch.jit.trace: right at other sizes, or refused."""
import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.testing import assert_close

RESNET = {'backbone': dict(_delete_=True, type='ResNetVd', depth=18, out_indices=(1, 2, 3),
                           base_channels=8, stem_channels=8)}

DFINE = {'decoder.type': 'DFINEDecoder', 'bbox_head.type': 'DFINEHead',
         'decoder.num_points': [2, 4, 1]}


class Infer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, images):
        return self.model.infer(images)


@pytest.fixture
def infer(build):
    """Makes the module that is exported, with boxes that differ from their references."""
    def make(changes, deploy):
        # Few blocks: exporters take a while for each.
        model = build(**{'decoder.num_layers': 1, 'num_queries': 8} | changes)
        for branch in model.bbox_head.reg_branches:
            nn.init.normal_(branch[-1].weight, std=0.2)
        if deploy:
            model.switch_to_deploy()
        return Infer(model)
    return make


@pytest.mark.slow
@pytest.mark.parametrize('changes, deploy', [
    pytest.param(changes, deploy, id=f'{name}, {"deploy" if deploy else "training"} form')
    for name, changes in (('spartan', {}), ('resnet_vd', RESNET), ('dfine', DFINE))
    for deploy in (False, True) if deploy or name != 'dfine'])
@torch.no_grad()
def test_batch_and_size_of_an_exported_detector_are_free(infer, changes, deploy):
    module = infer(changes, deploy)
    batch, rows, columns = (Dim(name, min=1, max=64) for name in ('batch', 'rows', 'columns'))
    program = export(module, (torch.rand(2, 3, 96, 128), ), dynamic_shapes=(
        {0: batch, 2: 32 * rows, 3: 32 * columns}, )).module()
    for size in ((1, 3, 64, 64), (3, 3, 96, 64), (2, 3, 128, 160)):
        images = torch.rand(size)
        assert_close(program(images), module(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@torch.no_grad()
def test_a_traced_detector_is_right_or_fails(infer, deploy):
    module = infer({}, deploy)
    traced = torch.jit.trace(module, torch.rand(2, 3, 64, 96))
    for count in (1, 2, 3):
        images = torch.rand(count, 3, 64, 96)
        assert_close(traced(images), module(images), rtol=1e-4, atol=1e-5)
    for sides in ((96, 64), (64, 128), (96, 96)):
        with pytest.raises(RuntimeError, match=r'The expanded size of the tensor \((64|96)\)'):
            traced(torch.rand(2, 3, *sides))
