"""Checkpoints that fit, and those that do not."""

import pytest
import torch
from torch import nn

from spartan_mm import SpaRTAN
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.loading import find_state_dict, load_all_weights, load_for_inference


def make_model(width=4, extra=False):
    layers = [nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)] + [nn.PReLU()] * extra
    return nn.Sequential(*layers)


def test_loads_weights_and_returns_the_rest(tmp_path):
    source, target = make_model(), make_model()
    meta = dict(dataset_meta=dict(classes=('cat', 'dog')))
    torch.save(dict(meta=meta, state_dict=source.state_dict()), tmp_path / 'checkpoint.pth')
    checkpoint = load_for_inference(target, str(tmp_path / 'checkpoint.pth'))
    assert checkpoint['meta'] == meta
    torch.testing.assert_close(target.state_dict(), source.state_dict())


@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: dict(state_dict={f'module.{key}': value for key, value in state.items()}),
    lambda state: {key: value for key, value in state.items() if 'num_batches' not in key},
], ids=['bare state dict', 'of a distributed model', 'without batch counters'])
def test_accepts(wrap):
    source, target = make_model(), make_model()
    load_all_weights(target, wrap(source.state_dict()), 'checkpoint')
    torch.testing.assert_close(target[0].weight, source[0].weight)


@pytest.mark.parametrize('model, message', [
    (make_model(extra=True), r'does not fit .* Sequential: 1 key is missing in it \(2\.'),
    (make_model()[:1], r'5 keys are unknown to the model \(1\.weight \| 1\.bias \| .* \| \.\.\.'),
    (make_model(width=6), r'6 keys are of another shape \(0\.weight: \(4, 3, 1, 1\) instead of '
                          r'\(6, 3, 1, 1\)'),
], ids=['missing', 'unexpected', 'shape'])
def test_other_architecture(model, message):
    with pytest.raises(CheckpointError, match=message):
        load_all_weights(model, make_model().state_dict(), 'checkpoint')


def test_another_spartan():
    t = nn.ModuleDict(dict(backbone=SpaRTAN('t')))
    xt = nn.ModuleDict(dict(backbone=SpaRTAN('xt')))
    message = r"a\.pth does not fit the config's ModuleDict: .* stage 3 has 12 blocks instead of 10"
    with pytest.raises(CheckpointError, match=f'{message}.*Use the other'):
        load_all_weights(xt, t.state_dict(), 'a.pth', 'Use the other')


@pytest.mark.parametrize('content, message', [
    (dict(ema=dict(module={})), r'no .state_dict. .* \(it has: ema\).*spartan-mm convert'),
    (dict(model={}, epoch=3), r'spartan-mm convert'),
    (dict(epoch=3), r'\(it has: epoch\)$'),
    (dict(state_dict={}), r'no .state_dict. with weights'),
    (dict(state_dict=dict(weight='no')), r'\(it has: weight\)$'),
    ([1, 2], r'\(it has: list\)'),
    ({}, r'\(it has: none\)'),
])
def test_no_weights(content, message):
    with pytest.raises(CheckpointError, match=message):
        load_all_weights(make_model(), content, 'checkpoint')


@pytest.mark.parametrize('wrap', [
    lambda weights: weights,
    lambda weights: dict(epoch=3, model=weights),
    lambda weights: dict(model={f'module.{name}': value for name, value in weights.items()}),
    lambda weights: dict(ema=dict(module=weights), model={}),
], ids=['plain', 'model', 'model with module.', 'ema'])
def test_weights_are_found_where_others_put_them(wrap):
    weights = dict(nn.Linear(2, 3).state_dict())
    found = find_state_dict(wrap(weights), 'a.pth', ('ema.module', 'model'))
    torch.testing.assert_close(found, weights)


class Mergeable(nn.Module):
    """Has other weights in its deploy form."""

    deploy = False

    def __init__(self):
        super().__init__()
        self.two = nn.Linear(2, 2)

    def switch_to_deploy(self):
        if not self.deploy:
            self.deploy = True
            self.one, self.two = nn.Linear(2, 1), None
        return self


class TestDeployedForm:

    @pytest.mark.parametrize('target', [Mergeable(), Mergeable().switch_to_deploy()],
                             ids=['trained form', 'deploy form'])
    def test_the_model_takes_the_form_of_the_weights(self, tmp_path, target):
        source = Mergeable().switch_to_deploy()
        torch.save(dict(meta=dict(deploy=True), state_dict=source.state_dict()), tmp_path / 'a.pth')
        load_for_inference(target, tmp_path / 'a.pth')
        assert target.deploy
        torch.testing.assert_close(target.state_dict(), source.state_dict())

    def test_a_deployed_model_does_not_go_back(self, tmp_path):
        torch.save(dict(state_dict=Mergeable().state_dict()), tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match=r'a\.pth does not fit the Mergeable, which is in '
                                                  'its deploy form already'):
            load_for_inference(Mergeable().switch_to_deploy(), tmp_path / 'a.pth')
