"""SpaRTAN consists of ordinary modules: what tools do with those works here, too."""
import copy

import pytest
import torch
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from spartan_mm.analysis.sizes import measure_modules

from .toy import OPTIONS, LowRank, assert_near, compare_steps, images, make


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


# ------------------------------------------------------------------------------ hooks and wrappers


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_every_module_of_a_block_is_called(options):
    model, called = make(**options), []
    blocks = [block for stage in model.stages for block in stage.blocks]
    names = {module: name for block in blocks for name, module in block.named_modules()}
    for module in names:
        module.register_forward_hook(lambda module, *_: called.append(module))
    for training in (True, False):
        model.train(training)(images(2, 3, 32, 32))
        # Drop path twice: each mixer has a branch.
        assert sorted(map(names.get, called)) == sorted(
            [*names.values(), *['drop_path'] * len(blocks)])
        called.clear()


def test_hooks_see_the_maps_and_may_replace_them():
    model, seen = make(), []
    block = model.stages[1].blocks[0]
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block.cmixer.proj_out.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert_close(model(images(2, 3, 32, 32))[1], seen[0])


def test_backward_hooks_are_called():
    model, called = make(), []
    for name, module in convolutions(model).items():
        module.register_full_backward_hook(lambda *_, name=name: called.append(name))
    model(images(2, 3, 32, 32).requires_grad_())[-1].sum().backward()
    assert sorted(called) == sorted(convolutions(model))


def test_an_adapter_has_its_share_and_its_gradient():
    model, x = make(), images(2, 3, 32, 32)
    smixer = model.stages[0].blocks[0].smixer
    merged = copy.deepcopy(model)
    smixer.proj_out = adapter = LowRank(smixer.proj_out)
    with torch.no_grad():
        merged.stages[0].blocks[0].smixer.proj_out.weight.add_(
            torch.einsum('or, ri -> oi', *(conv.weight.flatten(1) for conv in (
                adapter.up, adapter.down)))[..., None, None])
    y = model(x)[1]
    assert_close(y, merged(x)[1])

    y.square().sum().backward()
    assert adapter.up.weight.grad.any() and adapter.down.weight.grad.any()
    assert adapter.conv.weight.grad is None


def test_pruned_entries_stay_without_effect():
    model, x = make(), images(2, 3, 32, 32)
    proj_in = model.stages[0].blocks[0].smixer.proj_in
    prune.l1_unstructured(proj_in, 'weight', 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        before = proj_in.weight_orig.detach().clone()
        model(x)[1].square().mean().backward()
        optimizer.step()
        assert_close(proj_in.weight_orig != before, proj_in.weight_mask.bool())

    expected = model.eval()(x)
    assert (proj_in.weight == 0).sum() == proj_in.weight.numel() // 2
    with torch.no_grad():
        proj_in.weight_orig += 1 - proj_in.weight_mask
    assert_close(model(x), expected, rtol=0, atol=0)


def test_a_normalised_weight_is_used():
    model, x = make().eval(), images(2, 3, 32, 32)
    expected = model(x)
    for conv in convolutions(model).values():
        parametrizations.weight_norm(conv)
    assert_close(model(x), expected)
    with torch.no_grad():
        model.stages[0].blocks[0].smixer.proj_out.parametrizations.weight.original0.mul_(2)
    assert (model(x)[0] - expected[0]).abs().max() > 0.1


class Counted(nn.Conv2d):
    """As training for quantisation has it: rounds its weight."""

    def forward(self, x):
        self.calls += 1
        return self._conv_forward(x, (64 * self.weight).round() / 64, self.bias)


def test_classes_of_convolutions_may_be_replaced():
    model, x = make(), images(2, 3, 32, 32)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for conv in convolutions(rounded).values():
            conv.weight.mul_(64).round_().div_(64)
    for conv in convolutions(model).values():
        conv.__class__, conv.calls = Counted, 0
    assert_close(model(x), rounded(x))
    assert [conv.calls for conv in convolutions(model).values()] == [1] * 31


def test_synchronised_batch_norms_take_the_place_of_others():
    model = make().eval()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in other.modules()) == 9
    x = images(2, 3, 32, 32)
    assert_close(other(x), model(x))


# ------------------------------------------------------------------------- functions of functions


def loss(model, parameters, image):
    return functional_call(model, parameters, (image[None], ))[1].square().sum()


@pytest.fixture
def model():
    """In evaluation: the images of a batch do not depend on each other."""
    return make().eval()


def test_second_derivatives():
    model = make()
    x = images(2, 3, 32, 32).requires_grad_()
    direction = images(2, 3, 32, 32).flip(0)

    def slope(x, **settings):
        return torch.autograd.grad(model(x)[1].square().mean(), x, **settings)[0]

    # How the slope changes along a direction: once more by autograd, and by a small step.
    changes, = torch.autograd.grad((slope(x, create_graph=True) * direction).sum(), x)
    step = 1e-6 * direction
    difference = (slope(x + step) - slope(x - step)) / 2e-6
    assert_near((changes * direction).sum(), (difference * direction).sum(), 1e-4)


def test_vmap_over_images(model):
    x = images(3, 2, 3, 32, 32)
    assert_close(vmap(model)(x)[1], torch.stack([model(batch)[1] for batch in x]))


def test_vmap_over_parameters(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    parameters, buffers = stack_module_state([model, other])
    x = images(2, 3, 32, 32)

    def forward(parameters, buffers):
        return functional_call(model, (parameters, buffers), (x, ))[1]

    assert_close(vmap(forward)(parameters, buffers), torch.stack([model(x)[1], other(x)[1]]))


def test_gradients_of_each_sample(model):
    x, parameters = images(3, 3, 32, 32), dict(model.named_parameters())
    grads = vmap(grad(loss, argnums=1), (None, None, 0))(model, parameters, x)
    for index, image in enumerate(x):
        expected = torch.autograd.grad(loss(model, parameters, image), [*parameters.values()])
        for name, wanted in zip(parameters, expected, strict=True):
            assert_near(grads[name][index], wanted, name=name)


@pytest.mark.parametrize('options, training', [
    *((options, True) for options in OPTIONS), ({}, False)], ids=str)
def test_symbolic_trace_is_the_same(options, training):
    model = make(drop_path_rate=0.5, **options).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for size in ((2, 3, 32, 32), (3, 3, 40, 64)) if training else ((2, 3, 40, 64), ):
        compare_steps(traced, model, images(*size))


# ------------------------------------------------------------------------------------------- tools


def test_multiply_adds_of_projections_and_of_the_refinement():
    size = 16  # of the first stage's map
    counts = measure_modules(make(), 4 * size, 4 * size)
    channels, hidden = 16, 64
    for name, per_position in {
            'smixer.proj_in': channels * channels // 2,
            'smixer.proj_out': channels * channels,
            'cmixer.proj_in': channels * 2 * hidden,
            'cmixer.refine': 9 * hidden,  # one channel in, one out
            'cmixer.proj_out': hidden * channels}.items():
        found = counts[f'stages.0.blocks.0.{name}'].multiply_adds
        assert found == per_position * size ** 2, name


def test_efficient_evaluation_of_batch_norms_is_the_same():
    """mmengine's: folds each batch norm into the convolution before it, at every call."""
    model, x = make().eval(), images(2, 3, 32, 32)
    expected = model(x)
    detector = nn.ModuleDict(dict(backbone=model))
    turn_on_efficient_conv_bn_eval(detector, 'backbone')
    norms = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: norms.append(1))
    assert_close(detector['backbone'](x), expected)
    assert not norms
