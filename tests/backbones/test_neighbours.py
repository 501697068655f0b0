"""Light backbones of others: maps, options, forms and sizes; the converters' tests have numbers."""
import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from spartan_mm import zoo
from spartan_mm.backbones import AFFNet, CASViT, LSNet, MogaNet, UniRepLKNet
from spartan_mm.backbones.layers import DropPath
from spartan_mm.weights.converters.names import shapes_of

TINY = {
    MogaNet: dict(depths=(1, 1, 1, 1), channels=(8, 16, 16, 24), expand_ratios=(2, 2, 2, 2)),
    UniRepLKNet: dict(depths=(1, 1, 1, 1), channels=(8, 16, 16, 24), kernel_sizes=(3, 13, 7, 5)),
    CASViT: dict(depths=(1, 1, 1, 1), channels=(8, 16, 16, 24)),
    LSNet: dict(depths=(1, 2, 2, 2), channels=(16, 16, 32, 64)),
    AFFNet: dict(stem_channels=16, depths=(1, 1, 1, 1), channels=(8, 16, 16, 24), mobile_ratio=2),
}
# Of the published models: parameters and multiply-adds of the classifier at its size, in M.
COUNTS = {
    'moganet_xt': (2_956_066, 782.121), 'moganet_t': (5_197_332, 1083.283),
    'unireplknet_a': (4_649_060, 674.684), 'unireplknet_f': (6_489_328, 946.948),
    'casvit_xs': (3_200_700, 547.005), 'casvit_s': (5_764_224, 912.249),
    'affnet_et': (1_436_264, 356.237), 'affnet_t': (2_654_232, 786.463),
    'affnet_base': (5_568_696, 1453.721), 'lsnet_t': (11_409_832, 315.147)}


def build(backbone, **options):
    """A small one, with other batch norms and scales than it starts from, for these to be seen."""
    model = backbone(TINY[backbone], **dict(out_indices=(0, 1, 2, 3)) | options)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or 'scale' in name or name in ('gamma', 'beta', 'sigma'):
                nn.init.uniform_(parameter, 0.2, 0.6)
    return model


@pytest.fixture(params=TINY, ids=lambda backbone: backbone.__name__)
def backbone(request):
    return request.param


@pytest.mark.parametrize('size', [(64, 64), (65, 97), (127, 71)])
def test_maps_of_any_size(backbone, size):
    model = build(backbone).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, *(-(-side // stride) for side in size))
        for channels, stride in zip(model.out_channels, model.strides, strict=True)]
    assert all(x.isfinite().all() for x in maps)


def test_what_is_too_small_is_refused(backbone):
    with pytest.raises(ValueError, match=f'{backbone.__name__} needs at least'):
        build(backbone)(torch.zeros(1, 3, 16, 16))


def test_deploy_form_computes_the_same(backbone):
    model = build(backbone).eval().double()
    x = torch.randn(2, 3, 70, 65, dtype=torch.float64)
    with torch.no_grad():
        expected, before = model(x), sum(p.numel() for p in model.parameters())
        model.switch_to_deploy()
        # AFFNet's filters are computed in float32.
        assert_close(model(x), expected, rtol=1e-5 if backbone is AFFNet else 1e-10, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) < before
    model.switch_to_deploy()
    with pytest.raises(RuntimeError, match='is in deploy form'):
        model.train()


def test_checkpointing_changes_nothing(backbone):
    models = [build(backbone), None]
    models[1] = backbone(TINY[backbone], out_indices=(0, 1, 2, 3), with_cp=True)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in models:
        sum(out.square().mean() for out in model.train()(x)).backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(),
                                  strict=True):
        assert one.grad is not None and one.grad.isfinite().all(), name
        assert_close(other.grad, one.grad, msg=name)
    assert_close(dict(models[1].named_buffers()), dict(models[0].named_buffers()))


def test_freezing(backbone):
    model = build(backbone, frozen_stages=2, norm_eval=False).train()
    frozen = [model.stem, model.stages[0], model.stages[1]]
    assert not any(p.requires_grad for part in frozen for p in part.parameters())
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(p.requires_grad for p in model.stages[2].parameters())
    assert model.stages[2].training
    model = build(backbone, norm_eval=True).train()
    assert not any(module.training for module in model.modules() if isinstance(module, _BatchNorm))


def test_later_stages_are_not_built(backbone):
    whole, part = build(backbone), build(backbone, out_indices=(0, -2)).eval()
    assert len(part.stages) == 3 and len(part.out_channels) == 2
    part.load_state_dict(whole.state_dict())  # strictly
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(part(x), tuple(whole.eval()(x)[i] for i in (0, 2)))


def test_drop_path_rises_from_nothing(backbone):
    arch = dict(TINY[backbone], depths=(2, 2, 2, 2))
    rates = [module.rate for module in backbone(arch, drop_path_rate=0.7).modules()
             if isinstance(module, DropPath)]
    expected = [0.1 * i for i in range(8)]
    assert_close(rates, expected[2:] if backbone is AFFNet else expected)


@pytest.mark.parametrize('options, message', [
    (dict(arch='huge'), "arch='huge' is not available, choose from: "),
    (dict(arch=dict(depths=(1, ))), 'the arch dict must have the keys .* missing '),
    (dict(out_indices=(1, 0)), 'must be different stages in ascending'),
    (dict(frozen_stages=5), 'frozen_stages=5 is not available'),
    (dict(drop_path_rate=1.), r'drop_path_rate=1.0 is not in \[0, 1\)')])
def test_wrong_options(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        backbone(**dict(arch=TINY[backbone]) | options)


@pytest.mark.parametrize('backbone, change, message', [
    (MogaNet, dict(channels=(8, 16, 16, 20)), 'must be multiples of 8'),
    (UniRepLKNet, dict(kernel_sizes=(3, 13, 12, 5)), r'must be of 3, 5, 7, 9, 11, 13, 15, 17'),
    (LSNet, dict(channels=(16, 16, 32, 72)), 'must be multiples of 16'),
    (AFFNet, dict(channels=(8, 16, 16, 20)), 'must be multiples of 8'),
    (CASViT, dict(channels=(8, 16)), 'each stage needs one entry in every list'),
    (CASViT, dict(channels=(8, 16, 16, -8)), 'must be positive integers')])
def test_wrong_archs(backbone, change, message):
    with pytest.raises(ValueError, match=message):
        backbone(TINY[backbone] | change)


@pytest.mark.parametrize('backbone', [UniRepLKNet, CASViT], ids=['UniRepLKNet', 'CASViT'])
def test_norms_of_a_detectors_maps_start_fresh(backbone):
    classifier, model = build(backbone), build(backbone, out_norm=True).eval()
    fresh = copy.deepcopy(model.out_norms)
    model.load_state_dict(classifier.state_dict())  # strictly, as a detector starts
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = classifier.eval()(x)
        assert_close(model(x), tuple(norm(x) for norm, x in zip(fresh, plain, strict=True)))
    with pytest.raises(ValueError, match='MogaNet has no out_norm'):
        MogaNet(TINY[MogaNet], out_norm=True)


def test_biases_of_other_map_sizes_keep_their_meaning():
    attention = build(LSNet, bias_size=2).stages[3].blocks[1].mixer
    nn.init.uniform_(attention.biases)
    table, pairs = attention.biases, attention.bias_of_pairs(2, 2)
    for one in range(4):
        for other in range(4):
            rows, columns = abs(one // 2 - other // 2), abs(one % 2 - other % 2)
            assert_close(pairs[:, one, other], table[:, 2 * rows + columns])
    pairs = attention.bias_of_pairs(3, 5)
    assert_close(pairs[:, 0, 0], table[:, 0])
    assert_close(pairs[:, 0, 14], table[:, 3])  # the farthest pair
    assert_close(pairs[:, 0, 2], table[:, :2].mean(1))  # half the width away


@pytest.mark.parametrize('name', COUNTS)
def test_sizes_are_the_published_models(name):
    said = zoo.read_metafiles()[name]['Metadata']  # which its own test compares with the models
    assert said['Parameters'] == COUNTS[name][0]
    assert f"{said['Multiply-Adds'] / 1e6:.3f}" == f'{COUNTS[name][1]:.3f}'


@pytest.mark.parametrize('settings, parameters', [
    (dict(type='MogaNet', arch='xt'), 2_763_066), (dict(type='MogaNet', arch='t'), 4_940_332),
    (dict(type='UniRepLKNet', arch='a'), 4_327_420),
    (dict(type='UniRepLKNet', arch='f'), 6_103_560), (dict(type='CASViT', arch='xs'), 2_758_260),
    (dict(type='CASViT', arch='s'), 5_249_712), (dict(type='AFFNet', arch='et'), 775_168),
    (dict(type='LSNet', arch='t'), 11_024_064),
    (dict(type='LSNet', arch='t', out_indices=(0, 1, 2)), 2_869_856)])
def test_sizes_without_a_classifier(settings, parameters):
    shapes = shapes_of(lambda: MODELS.build(settings))
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    assert sum(shape.numel() for name, shape in shapes.items()
               if not name.endswith(buffers)) == parameters


def test_merged_size():
    model = UniRepLKNet('a')
    model.switch_to_deploy()
    assert sum(p.numel() for p in model.parameters()) == 4_115_660
