import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVAttention
from torch.testing import assert_close

from spartan_mm.detection import MultiScaleDeformableAttention
from spartan_mm.detection.deformable_attention import sample_multi_scale

SHAPES = [(6, 9), (3, 5), (2, 3)]
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
