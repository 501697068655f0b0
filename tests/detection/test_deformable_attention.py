import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVAttention
from torch.testing import assert_close

from spartan_mm.detection import MultiScaleDeformableAttention
from spartan_mm.detection.deformable_attention import sample_multi_scale

SHAPES = [(6, 9), (3, 5), (2, 3)]
GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
META = json.loads((GOLDEN / 'rtdetrv2_attention.json').read_text())['meta']
LENGTH = sum(height * width for height, width in SHAPES)


def pair():
    settings = dict(embed_dims=16, num_heads=4, num_levels=3, num_points=2, dropout=0.)
    ours, theirs = MultiScaleDeformableAttention(**settings), MMCVAttention(
        **settings, batch_first=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs():
    """Queries, their positions, memory, and references, some of them beyond the border."""
    return [torch.randn(2, 7, 16), torch.randn(2, 7, 16), torch.randn(2, LENGTH, 16),
            torch.rand(2, 7, 4) * 1.4 - 0.2]


def test_equals_mmcv_in_values_and_gradients():
    ours, theirs = pair()
    grads, outputs, tensors = [], [], inputs()
    for module in (ours, theirs):
        query, position, memory, reference = leaves = [x.clone().requires_grad_() for x in tensors]
        output = ours(*leaves, SHAPES) if module is ours else theirs(
            query, value=memory, query_pos=position, spatial_shapes=torch.tensor(SHAPES),
            reference_points=reference[:, :, None].expand(-1, -1, 3, -1),
            level_start_index=torch.tensor([0, 54, 69]))
        output.square().sum().backward()
        outputs.append(output)
        grads.append([x.grad for x in (*leaves, *module.parameters())])
    assert_close(*outputs)
    assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_forms_are_the_same_function():
    (module, _), tensors = pair(), inputs()
    module.double()
    tensors = [x.double() for x in tensors]
    expected = module(*tensors, SHAPES)
    module.form = 'gather'
    # Places are found in float32 in either.
    assert_close(module(*tensors, SHAPES), expected, rtol=1e-6, atol=1e-6)


def test_initial_weights_are_mmcvs():
    ours, theirs = MultiScaleDeformableAttention(num_levels=3), MMCVAttention(num_levels=3)
    for name in ('sampling_offsets', 'attention_weights'):
        assert_close(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict())
    # Unlike mmcv's bias, which is the directions' max-norm 1 as well: four cells away at most.
    assert ours.sampling_offsets.bias.abs().max() == 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_stays_close(dtype):
    module, _ = pair()
    *tensors, reference = inputs()
    exact = module(*tensors, reference, SHAPES)
    half = module.to(dtype)(*(x.to(dtype) for x in tensors), reference, SHAPES)
    assert half.dtype == dtype
    assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('form', ['bags', 'gather'])
@pytest.mark.parametrize('far', [-1e30, -3., 4., 1e30, float('-inf'), float('inf')])
def test_far_outside_is_zero(far, form):
    value = torch.rand(1, LENGTH, 4, 2)
    locations = torch.full((1, 3, 4, 6, 2), far)
    assert not sample_multi_scale(value, SHAPES, locations, torch.ones(1, 3, 4, 6), form).any()


@pytest.mark.parametrize('form', ['bags', 'gather'])
def test_nan_stays_within_its_query(form):
    value, locations = torch.rand(1, LENGTH, 4, 2), torch.rand(1, 3, 4, 6, 2)
    locations[0, 1] = float('nan')
    sampled = sample_multi_scale(value, SHAPES, locations, torch.ones(1, 3, 4, 6), form)
    assert sampled[0, 1].isnan().all() and sampled[0, [0, 2]].isfinite().all()


@torch.no_grad()
def test_deploy_form_is_the_same_function():
    (module, _), tensors = pair(), inputs()
    expected = module(*tensors, SHAPES)
    for _ in range(2):
        module.switch_to_deploy()
    assert_close(module(*tensors, SHAPES), expected)


def test_channels_must_fit_the_heads():
    with pytest.raises(ValueError, match='embed_dims=30'):
        MultiScaleDeformableAttention(embed_dims=30, num_heads=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    (module, _), tensors = pair(), inputs()
    expected = module(*tensors, SHAPES)
    found = module.cuda()(*(x.cuda() for x in tensors), SHAPES)
    assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def golden():
    """What RT-DETRv2's attention computes."""
    return {name: torch.from_numpy(value)
            for name, value in np.load(GOLDEN / 'rtdetrv2_attention.npz').items()}


@pytest.mark.parametrize('form', ['bags', 'gather'])
@pytest.mark.parametrize('number', [number for number, case in enumerate(META['cases'])
                                    if case['method'] == 'default'])
def test_samples_as_version_2(golden, number, form):
    case = META['cases'][number]
    leaves = [golden[f'c{number}_{name}'].clone().requires_grad_()
              for name in ('value', 'locations', 'weights')]
    output = sample_multi_scale(leaves[0], [*map(tuple, case['maps'])], *leaves[1:], form,
                                case['points'])
    assert_close(output, golden[f'c{number}_output'], rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    for leaf, name in zip(leaves, ('value', 'locations', 'weights'), strict=True):
        assert_close(leaf.grad, golden[f'c{number}_grad_{name}'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('form', ['bags', 'gather'])
def test_points_by_level_are_version_2_s(golden, form):
    case = META['modules'][0]
    module = MultiScaleDeformableAttention(case['dims'], case['heads'], 2, case['points'])
    assert_close(module.sampling_offsets.bias, golden['m0_initial_offsets_bias'])
    module.form = form
    fill = runpy.run_path(str(GOLDEN / 'fill.py'))['fill_state_dict']
    module.load_state_dict({name.removeprefix('m0.'): torch.from_numpy(value)
                            for name, value in fill(case['shapes']).items()})
    query, reference, value = (golden[f'm0_{name}'] for name in ('query', 'reference', 'value'))
    for deploy in (False, True):
        if deploy:
            module.switch_to_deploy()
        output = module(query, torch.zeros(()), value, reference[:, :, 0],
                        [*map(tuple, case['maps'])], residual=False)
        assert_close(output, golden['m0_output'], rtol=1e-5, atol=1e-5)


def test_as_many_points_on_each_level_are_version_1():
    tensors, outputs = inputs(), []
    for points in (4, [4, 4, 4]):
        torch.manual_seed(0)
        module = MultiScaleDeformableAttention(16, 4, 3, points)
        outputs.append(module(*tensors, SHAPES))
    assert_close(*outputs, rtol=0, atol=0)


def test_a_number_of_points_for_each_level():
    with pytest.raises(ValueError, match=r'num_points=\(3, 6\) .* the 3 maps'):
        MultiScaleDeformableAttention(num_points=[3, 6])
