import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVAttention
from torch.testing import assert_close

from spartan_mm.detection import MultiScaleDeformableAttention
from spartan_mm.detection.deformable_attention import sample_multi_scale

SHAPES = [(6, 9), (3, 5), (2, 3)]
LENGTH = sum(height * width for height, width in SHAPES)


def pair(batch_first):
    kwargs = dict(embed_dims=16, num_heads=4, num_levels=3, num_points=2, dropout=0.,
                  batch_first=batch_first)
    ours, theirs = MultiScaleDeformableAttention(**kwargs), MMCVAttention(**kwargs)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize('ends_in', [2, 4])
@pytest.mark.parametrize('batch_first', [True, False])
def test_equals_mmcv_in_values_and_gradients(ends_in, batch_first):
    ours, theirs = pair(batch_first)
    query, memory = torch.randn(2, 7, 16), torch.randn(2, LENGTH, 16)
    position, mask = torch.randn(2, 7, 16), torch.rand(2, LENGTH) < 0.2
    # Beyond the border, too, where the samples are zero.
    reference = torch.rand(2, 7, 3, ends_in) * 1.4 - 0.2
    if not batch_first:
        query, memory, position = (x.transpose(0, 1) for x in (query, memory, position))

    grads, outputs = [], []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in (query, memory, reference)]
        output = module(
            leaves[0], value=leaves[1], query_pos=position, key_padding_mask=mask,
            reference_points=leaves[2], spatial_shapes=torch.tensor(SHAPES),
            level_start_index=torch.tensor([0, 54, 69]))
        output.square().sum().backward()
        outputs.append(output)
        grads.append([x.grad for x in (*leaves, *module.parameters())])
    assert_close(*outputs)
    assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_initial_weights_are_mmcvs():
    ours, theirs = MultiScaleDeformableAttention(num_levels=3), MMCVAttention(num_levels=3)
    for name in ('sampling_offsets', 'attention_weights'):
        assert_close(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict())
    # Unlike mmcv's bias, which is the directions' max-norm 1 as well: four cells away at most.
    assert ours.sampling_offsets.bias.abs().max() == 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_stays_close(dtype):
    module = pair(True)[0]
    query, memory = torch.randn(1, 5, 16), torch.randn(1, LENGTH, 16)
    call = dict(reference_points=torch.rand(1, 5, 1, 4), spatial_shapes=SHAPES)
    exact = module(query, value=memory, **call)
    half = module.to(dtype)(query.to(dtype), value=memory.to(dtype), **call)
    assert half.dtype == dtype
    assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('far', [-1e30, -3., 4., 1e30, float('-inf'), float('inf')])
def test_far_outside_is_zero(far):
    value = torch.rand(1, LENGTH, 4, 2)
    locations = torch.full((1, 3, 4, 3, 2, 2), far)
    assert not sample_multi_scale(value, SHAPES, locations, torch.ones(1, 3, 4, 3, 2)).any()


def test_nan_stays_within_its_query():
    value, locations = torch.rand(1, LENGTH, 4, 2), torch.rand(1, 3, 4, 3, 2, 2)
    locations[0, 1] = float('nan')
    sampled = sample_multi_scale(value, SHAPES, locations, torch.ones(1, 3, 4, 3, 2))
    assert sampled[0, 1].isnan().all() and sampled[0, [0, 2]].isfinite().all()


@torch.no_grad()
def test_deploy_form_is_the_same_function():
    module = pair(True)[0]
    call = dict(query=torch.randn(1, 5, 16), value=torch.randn(1, LENGTH, 16),
                reference_points=torch.rand(1, 5, 1, 4), spatial_shapes=SHAPES)
    expected = module(**call)
    for _ in range(2):
        module.switch_to_deploy()
    assert_close(module(**call), expected)


def test_one_reference_serves_all_levels():
    module = pair(True)[0]
    call = dict(query=torch.randn(1, 5, 16), value=torch.randn(1, LENGTH, 16),
                spatial_shapes=SHAPES)
    reference = torch.rand(1, 5, 1, 4)
    assert_close(module(reference_points=reference, **call),
                 module(reference_points=reference.expand(-1, -1, 3, -1), **call))


@pytest.mark.parametrize('change, message', [
    (dict(spatial_shapes=SHAPES[:2]), 'num_levels=3'),
    (dict(spatial_shapes=[(6, 9), (3, 5), (2, 2)]), '75 tokens'),
    (dict(reference_points=torch.rand(1, 5, 1, 3)), 'must end in 2'),
])
def test_bad_input_is_named(change, message):
    call = dict(query=torch.randn(1, 5, 16), value=torch.randn(1, LENGTH, 16),
                reference_points=torch.rand(1, 5, 1, 4), spatial_shapes=SHAPES)
    with pytest.raises(ValueError, match=message):
        pair(True)[0](**(call | change))


def test_channels_must_fit_the_heads():
    with pytest.raises(ValueError, match='embed_dims=30'):
        MultiScaleDeformableAttention(embed_dims=30, num_heads=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    module = pair(True)[0]
    query, memory = torch.randn(1, 5, 16), torch.randn(1, LENGTH, 16)
    reference = torch.rand(1, 5, 1, 4)
    expected = module(query, value=memory, reference_points=reference, spatial_shapes=SHAPES)
    found = module.cuda()(query.cuda(), value=memory.cuda(), reference_points=reference.cuda(),
                          spatial_shapes=SHAPES)
    assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
