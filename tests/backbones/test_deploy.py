"""SpaRTAN's deploy form: the function of its training form, with less to compute."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.spartan import CMixer, modulate

from .toy import OPTIONS, assert_near, images, make


def deploy(model):
    """A copy in deploy form."""
    model = copy.deepcopy(model)
    model.switch_to_deploy()
    return model


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@torch.no_grad()
def test_equals_the_training_form(options):
    model = make(**options).eval()
    deployed = deploy(model)
    x = images(2, 3, 48, 64)
    for y, expected in zip(deployed(x), model(x), strict=True):
        assert_near(y, expected, 1e-10)

    single = copy.deepcopy(deployed).float()(x.float())
    for y, expected in zip(single, model(x), strict=True):
        assert_near(y.double(), expected, 1e-5)

    left = {name.rsplit('.', 1)[-1] for name, module in deployed.named_modules()
            if isinstance(module, _BatchNorm)}
    # The argmax of a channel mixer looks at what the norm gives.
    assert left == ({'norm2'} if options == dict(block_norm='BN') else set())
    assert not any('layer_scale' in name for name in deployed.state_dict())


@torch.no_grad()
def test_a_released_architecture_equals_its_training_form():
    torch.manual_seed(0)
    model = SpaRTAN('t').double().eval()
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name:
            nn.init.constant_(parameter, 0.3)
    x = images(1, 3, 64, 96)
    assert_near(deploy(model)(x)[0], model(x)[0], 1e-10)


@pytest.mark.parametrize('ratio, conv_type, folded', [
    (4, 'full', False), (2, 'depthwise', True), (3, 'depthwise', False)])
@torch.no_grad()
def test_modulation_is_folded_where_groups_hold_whole_pairs(ratio, conv_type, folded):
    torch.manual_seed(0)
    mixer = CMixer(8, ratio, conv_type).double().eval()
    nn.init.normal_(mixer.complex_weight)
    weight, wave = mixer.complex_weight, images(2, 8 * ratio, 5, 6)
    expected = mixer.refine(modulate(wave, weight))
    mixer.switch_to_deploy()
    assert (mixer.complex_weight is None) == folded
    assert_close(mixer.refine(wave if folded else modulate(wave, weight)), expected)


def test_has_fewer_tensors_and_parameters():
    model = make()
    deployed = deploy(model)
    assert len(deployed.state_dict()) < 0.7 * len(model.state_dict())
    assert sum(map(torch.numel, deployed.parameters())) < sum(map(torch.numel, model.parameters()))


def test_switching_twice_changes_nothing():
    model = deploy(make())
    before = copy.deepcopy(model.state_dict())
    model.switch_to_deploy()
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_refuses_training():
    model = deploy(make())
    assert not model.training and not model(images(1, 3, 32, 32))[0].requires_grad
    with pytest.raises(RuntimeError, match='deploy form.*cannot be trained'):
        model.train()
    model.eval()


def test_weights_load_into_a_deployed_model():
    deployed, fresh = deploy(make()), SpaRTAN(make().arch, out_indices=(0, 1)).double()
    fresh.switch_to_deploy()
    fresh.load_state_dict(deployed.state_dict())
    x = images(1, 3, 48, 64)
    assert_close(fresh(x), deployed(x), rtol=0, atol=0)


@pytest.mark.parametrize('channel_mixer, folded', [('cmixer', '.norm1.'), ('mlp', '.norm')])
@torch.no_grad()
def test_weights_with_the_affines_of_norms_in_the_convolutions(channel_mixer, folded):
    model = make(channel_mixer=channel_mixer)
    for name, parameter in model.stages.named_parameters():
        if '.blocks.' in name and folded in name:
            parameter.fill_(name.endswith('weight'))
    deployed, fresh = deploy(model), deploy(make(channel_mixer=channel_mixer))
    weights = {name: value for name, value in deployed.state_dict().items()
               if '.blocks.' not in name or folded not in name}
    assert len(weights) < len(deployed.state_dict())
    fresh.load_state_dict(weights)
    x = images(1, 3, 48, 64)
    assert_close(fresh(x), deployed(x), rtol=0, atol=0)


def test_affines_that_an_argmax_looks_at_are_not_made_up():
    deployed = deploy(make())
    weights = {name: value for name, value in deployed.state_dict().items()
               if '.blocks.' not in name or '.norm' not in name}
    with pytest.raises(RuntimeError, match=r'Missing key.*norm2\.weight'):
        deployed.load_state_dict(weights)


def test_weights_of_the_other_form_do_not_load():
    plain, deployed = make(), deploy(make())
    for model, other, message in (
            (plain, deployed, r'in deploy form, .* in training form: call switch_to_deploy'),
            (deployed, plain, r'in training form, .* load it before switch_to_deploy\(\)')):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(other.state_dict())


@pytest.mark.parametrize('height, width', [(16, 16), (17, 31), (32, 100), (63, 39)])
@torch.no_grad()
def test_any_height_and_width(height, width):
    model, x = make().eval(), images(1, 3, height, width)
    for y, expected in zip(deploy(model)(x), model(x), strict=True):
        assert_near(y, expected, 1e-10)


def test_a_too_small_image_is_refused():
    with pytest.raises(ValueError, match='at least 8 x 8'):
        deploy(make())(images(1, 3, 7, 8))


@torch.no_grad()
def test_an_empty_batch():
    assert deploy(make())(images(0, 3, 32, 32))[1].shape == (0, 24, 4, 4)


@pytest.mark.parametrize('deployed', [False, True], ids=['training form', 'deploy form'])
@torch.no_grad()
def test_bfloat16_weights(deployed):
    model, x = make(torch.float32).eval(), images(2, 3, 48, 64, dtype=torch.float32)
    expected = model(x)[1]
    y = (deploy(model) if deployed else model).bfloat16()(x.bfloat16())[1]
    assert y.dtype == torch.bfloat16
    assert ((y.float() - expected).abs() / expected.abs().max()).median() < 0.02


def test_hooks_of_all_modules_are_called():
    model, called = deploy(make()), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(images(1, 3, 32, 32))
    # The first is a list; the others would do nothing.
    missing = {name for name, _ in model.named_modules()} - called
    assert all(name == 'stages' or name.endswith('drop_path') for name in missing), missing
