"""The SpaRTAN backbone: structure, arithmetic, options and the paper's counts."""
import copy
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spartan_mm.analysis.complexity import measure_complexity
from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.functional import modulate
from spartan_mm.backbones.spartan import (
    Block,
    CMixer,
    ConvMixer,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    SMixer,
)

# As few blocks as a stage can have, two where their order matters, and no two widths the same.
SMALL = dict(
    stem_channels=8,
    depths=(1, 2, 1, 1),
    channels=(16, 24, 40, 64),
    expand_ratios=(4, 4, 2, 2),
    conv_types=('full', 'full', 'depthwise', 'depthwise'))
ALL_STAGES = (0, 1, 2, 3)


def small(**options):
    torch.manual_seed(0)
    return SpaRTAN(arch=SMALL, **options)


def randomise(model):
    """Give what starts near zero a size at which an error behind it would show."""
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or name.endswith('gamma'):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith('squeeze.bias'):
            nn.init.uniform_(parameter, 1, 2)  # of two hidden units both are dead all too often
        elif 'norm' in name or name.endswith('bias'):
            nn.init.normal_(parameter, std=0.5)
    return model


def images(*size, dtype=torch.float32):
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize('arch, total', [('xt', 2_222_792), ('t', 3_820_296)])
def test_parameters_with_imagenet_head(arch, total):
    backbone = SpaRTAN(arch)
    head = nn.Linear(backbone.out_channels[-1], 1000)
    assert count_parameters(backbone) + count_parameters(head) == total


def complexity(backbone, size):
    """Of one image through the backbone and a 1000-class head."""
    with torch.device('meta'):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(backbone.out_channels[-1], 1000))

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone.to('meta'), head

        def forward(self, x):
            return self.head(self.backbone(x)[-1])

    return measure_complexity(Classifier(), size, size)


@pytest.mark.parametrize('arch, size, giga', [
    ('xt', 224, 0.631), ('xt', 256, 0.824), ('t', 224, 0.818), ('t', 256, 1.069)])
def test_multiply_adds_as_fvcore_counts_them(arch, size, giga):
    assert complexity(SpaRTAN(arch), size).operations / 1e9 == pytest.approx(giga, rel=0.002)


@pytest.mark.parametrize('conv_types, params, macs', [
    ('full', 3.3e6, 754.2e6), ('depthwise', 2.2e6, 539.2e6), (None, 2.2e6, 614.4e6)])
def test_table_8_convolution_types(conv_types, params, macs):
    backbone = SpaRTAN('xt', conv_types=conv_types)
    head = nn.Linear(192, 1000)
    assert count_parameters(backbone) + count_parameters(head) == pytest.approx(params, abs=0.05e6)
    assert complexity(backbone, 224).multiply_adds == pytest.approx(macs, rel=5e-4)


@pytest.mark.parametrize('kernel, params, giga', [(3, 2.07e6, 0.64), (5, 2.10e6, 0.68)])
def test_table_5_low_frequency_kernel(kernel, params, giga):
    """The table's parameters are not those of a 1000-class model, which has 2.22 and 2.25 M.

    The paper does not say what they include. With a head for 200 classes both come out to the last
    digit, and the difference of the two rows, which no head touches, is right in any case.
    """
    backbone = SpaRTAN('xt', low_freq_kernel=kernel)
    head = nn.Linear(192, 200)
    assert count_parameters(backbone) + count_parameters(head) == pytest.approx(params, abs=5e3)
    assert complexity(backbone, 224).operations / 1e9 == pytest.approx(giga, abs=0.02)


@pytest.mark.parametrize('spatial_mixer', ['smixer', 'conv'])
@pytest.mark.parametrize('channel_mixer', ['cmixer', 'mlp', 'mlp_se'])
def test_table_4_mixers(spatial_mixer, channel_mixer):
    backbone = small(spatial_mixer=spatial_mixer, channel_mixer=channel_mixer)
    names = [name for name, _ in backbone.named_parameters()]
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    assert all(isinstance(block.smixer, SMixer if spatial_mixer == 'smixer' else ConvMixer)
               for block in blocks)
    assert any('cmixer.se.' in name for name in names) == (channel_mixer != 'mlp')
    assert any('cmixer.complex_weight' in name for name in names) == (channel_mixer == 'cmixer')
    assert all(block.cmixer.proj_out.in_channels == 4 * 24
               for block in backbone.stages[1].blocks)


@pytest.mark.parametrize('stem_act, patch_act, block_act', [
    ('GELU', 'GELU', 'GELU'), ('GELU', 'GELU', 'SiLU'), ('SiLU', 'SiLU', 'GELU'),
    ('SiLU', 'SiLU', 'SiLU')])
def test_table_6_activations(stem_act, patch_act, block_act):
    backbone = small(stem_act=stem_act, patch_act=patch_act, block_act=block_act)
    stem, stages = backbone.stem, backbone.stages
    in_blocks = [module for stage in stages for module in stage.blocks.modules()
                 if isinstance(module, nn.GELU | nn.SiLU)]
    assert {type(layer.act).__name__ for layer in stem} == {stem_act}
    assert {type(stage.embedding.act).__name__ for stage in stages[1:]} == {patch_act}
    assert {type(module).__name__ for module in in_blocks} == {block_act}
    # Both branches of the spatial mixer, the phase and the refinement of the channel mixer.
    assert len(in_blocks) == 4 * sum(SMALL['depths'])


def test_default_activations_are_those_of_the_released_model():
    backbone = small()
    assert isinstance(backbone.stem[0].act, nn.GELU)
    assert isinstance(backbone.stages[1].embedding.act, nn.SiLU)
    assert isinstance(backbone.stages[0].blocks[0].cmixer.act, nn.GELU)


@pytest.mark.parametrize('block_norm', ['BN', 'LN', 'LN2d'])
@pytest.mark.parametrize('conv_norm', ['BN', 'LN', 'LN2d'])
def test_table_7_norms(conv_norm, block_norm):
    kinds = dict(BN=nn.BatchNorm2d, LN=LayerNorm, LN2d=LayerNorm2d)
    backbone = small(conv_norm=conv_norm, block_norm=block_norm)
    for name, module in backbone.named_modules():
        if name.endswith(('norm1', 'norm2')):
            assert type(module) is kinds[block_norm]
        elif name.endswith('norm'):
            assert type(module) is kinds[conv_norm]
        else:
            continue
        assert module.eps == 1e-6
        assert getattr(module, 'num_groups', 1) == 1


def test_layer_norm_2d_normalises_each_position():
    norm = LayerNorm2d(16)
    y = norm(5 * images(2, 16, 3, 4) + 2)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 3, 4), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------ arithmetic


def literal_cmixer(mixer, x):
    """The channel mixer word by word: two projections, two gathers, complex tensors."""
    hidden = mixer.proj_out.in_channels
    weights = mixer.proj_in.weight.split(hidden), mixer.proj_in.bias.split(hidden)
    theta, amplitude = (nn.functional.conv2d(x, weight, bias)
                        for weight, bias in zip(*weights, strict=True))
    theta = nn.functional.gelu(theta)

    strongest = x.argmax(1, keepdim=True)
    f = amplitude * theta + amplitude.gather(1, strongest) * theta.gather(1, strongest)

    pairs = f.unflatten(1, (hidden // 2, 2)).movedim(2, -1).contiguous()
    weight = torch.view_as_complex(mixer.complex_weight)[:, None, None]
    product = torch.view_as_real(torch.view_as_complex(pairs) * weight)
    f = product.movedim(-1, 2).flatten(1, 2)

    y = nn.functional.gelu(mixer.refine.norm(mixer.refine.conv(f)))
    gate = mixer.se.expand(nn.functional.relu(mixer.se.squeeze(y.mean((2, 3), keepdim=True))))
    return mixer.proj_out(torch.sigmoid(gate) * y)


@pytest.mark.parametrize('expand_ratio, conv_type', [(4, 'full'), (2, 'depthwise'), (3, 'full')])
def test_cmixer_equals_its_literal_form(expand_ratio, conv_type):
    torch.manual_seed(0)
    mixer = CMixer(8, expand_ratio, conv_type).double()
    nn.init.normal_(mixer.complex_weight)
    x = images(2, 8, 5, 7, dtype=torch.float64).requires_grad_()
    wanted = [x, *mixer.parameters()]
    cotangent = images(2, 8, 5, 7, dtype=torch.float64).flip(0)

    y, reference = mixer(x), literal_cmixer(mixer, x)
    torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, cotangent),
        torch.autograd.grad(reference, wanted, cotangent), rtol=1e-10, atol=1e-10)


def test_modulation_of_half_precision_waves_is_computed_in_float32():
    wave = images(1, 8, 4, 4).bfloat16()
    weight = images(4, 2)
    assert modulate(wave, weight).dtype == torch.float32


def test_smixer_equals_its_literal_form():
    torch.manual_seed(0)
    mixer = randomise(SMixer(16, 'full').double())
    x = images(2, 16, 9, 7, dtype=torch.float64)

    z = mixer.proj_in(x)
    pooled = torch.stack([channel.mean() for image in z for channel in image]).view(2, 8, 1, 1)
    z = z + mixer.gamma * (z - pooled)
    conv = nn.functional.conv2d
    high = conv(z, mixer.high_freq.conv.weight, padding=1)
    low = conv(conv(z, mixer.low_freq[0].weight, padding=2, dilation=2),
               mixer.low_freq[1].conv.weight, padding=2, dilation=2)
    high = nn.functional.gelu(mixer.high_freq.norm(high))
    high = high * mixer.high_se(high.mean((2, 3)))[:, :, None, None]
    low = nn.functional.gelu(mixer.low_freq[1].norm(low))
    low = low * mixer.low_se(low.mean((2, 3)))[:, :, None, None]

    expected = conv(torch.cat([high, low], 1), mixer.proj_out.weight, mixer.proj_out.bias)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize('kernel', [3, 5])
def test_low_frequency_branch_sees_nine_positions(kernel):
    """The stacked pair of dilated 3x3 and the dilated 5x5 have the same receptive field."""
    branch = SMixer(8, low_freq_kernel=kernel).low_freq.eval()
    x = images(1, 4, 15, 15).requires_grad_()
    branch(x)[..., 7, 7].sum().backward()
    reached = x.grad.abs().sum((0, 1)).nonzero()
    assert reached.min().item() == 3 and reached.max().item() == 11


@pytest.mark.parametrize('conv_type, smixer_groups, cmixer_groups', [
    ('full', 1, 64), ('depthwise', 8, 16)])
def test_convolution_type_sets_both_mixers(conv_type, smixer_groups, cmixer_groups):
    backbone = small(conv_types=conv_type)
    assert backbone.arch['conv_types'] == (conv_type, ) * 4
    block = backbone.stages[0].blocks[0]
    assert block.smixer.high_freq.conv.groups == smixer_groups
    assert {conv.groups for conv in block.smixer.low_freq.modules()
            if isinstance(conv, nn.Conv2d)} == {smixer_groups}
    assert block.cmixer.refine.conv.groups == cmixer_groups


# -------------------------------------------------------------------------- inputs and numerics


@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (64, 100), (63, 39)])
def test_any_height_and_width(height, width):
    backbone = small(out_indices=ALL_STAGES).eval()
    with torch.no_grad():
        maps = backbone(images(1, 3, height, width))
    size = [math.ceil(math.ceil(side / 2) / 2) for side in (height, width)]
    for x, channels in zip(maps, SMALL['channels'], strict=True):
        assert x.shape == (1, channels, *size)
        size = [side // 2 for side in size]


@pytest.mark.parametrize('height, width', [(31, 64), (64, 31), (8, 8)])
def test_too_small_input(height, width):
    with pytest.raises(ValueError, match=f'{height} x {width} .*at least 32 x 32'):
        small()(images(1, 3, height, width))


def test_other_number_of_input_channels():
    assert small(in_channels=1).eval()(images(1, 1, 32, 32))[0].shape == (1, 64, 1, 1)


def test_channels_last_gives_the_same_and_stays():
    backbone = randomise(small(out_indices=ALL_STAGES)).double().eval()
    x = images(2, 3, 64, 96, dtype=torch.float64)
    expected = backbone(x)

    backbone = backbone.to(memory_format=torch.channels_last)
    maps = backbone(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(maps, expected)
    for y in maps:
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert modulate(maps[0], backbone.stages[0].blocks[0].cmixer.complex_weight[:8]).is_contiguous(
        memory_format=torch.channels_last)


def test_float64_agrees_with_float32():
    backbone = randomise(small(out_indices=ALL_STAGES)).eval()
    x = images(1, 3, 64, 64)
    single = backbone(x)
    double = backbone.double()(x.double())
    assert {y.dtype for y in double} == {torch.float64}
    # The strongest channel may change with rounding at a few positions of a later stage.
    torch.testing.assert_close(single[0], double[0].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('device', [
    'cpu',
    pytest.param('cuda', marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason='needs a CUDA device'))])
def test_autocast_training_step_is_finite(device, dtype):
    backbone = small(out_indices=ALL_STAGES).to(device)
    with torch.autocast(device, dtype):
        maps = backbone(images(2, 3, 64, 64).to(device))
        loss = sum(y.float().square().mean() for y in maps)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize('options', [
    {},
    dict(conv_types='full'),
    dict(conv_types='depthwise', low_freq_kernel=5),
    dict(spatial_mixer='conv', channel_mixer='mlp'),
    dict(channel_mixer='mlp_se'),
    dict(spatial_mixer='conv', conv_norm='LN2d', block_norm='BN'),
    dict(conv_norm='LN', block_norm='LN2d', block_act='SiLU', stem_act='SiLU', patch_act='GELU'),
], ids=lambda options: ','.join(f'{key}={value}' for key, value in options.items()) or 'default')
def test_every_parameter_gets_a_finite_gradient(options):
    backbone = randomise(small(**options, drop_path_rate=0))
    backbone(images(2, 3, 64, 64))[-1].square().mean().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_checkpointing_changes_neither_result_gradient_nor_statistics():
    plain = randomise(small(out_indices=ALL_STAGES, drop_path_rate=0.3)).double()
    checkpointed = copy.deepcopy(plain)
    for module in checkpointed.modules():
        if isinstance(module, Block):
            module.with_cp = True

    outputs = []
    for backbone in (plain, checkpointed):
        torch.manual_seed(3)
        maps = backbone(images(4, 3, 32, 64, dtype=torch.float64))
        sum(y.square().mean() for y in maps).backward()
        outputs.append(maps)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        [parameter.grad for parameter in plain.parameters()],
        [parameter.grad for parameter in checkpointed.parameters()], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(checkpointed.named_buffers()))


def test_with_cp_reaches_every_block():
    assert all(module.with_cp for module in small(with_cp=True).modules()
               if isinstance(module, Block))


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain'])
def test_builds_in_every_scope(scope):
    registry = MODELS if scope == 'mmengine' else pytest.importorskip(f'{scope}.registry').MODELS
    backbone = registry.build(dict(type='SpaRTAN', arch='t', out_indices=(1, 2, 3)))
    assert isinstance(backbone, SpaRTAN)
    assert backbone.out_channels == (64, 128, 256)
    assert backbone.strides == (8, 16, 32)


@pytest.mark.parametrize('out_indices, stages', [
    ((0, ), (0, )), (1, (1, )), ([1, 2, 3], (1, 2, 3)), ((-1, ), (3, )), ((0, -2, -1), (0, 2, 3))])
def test_out_indices(out_indices, stages):
    backbone = small(out_indices=out_indices).eval()
    complete = small(out_indices=ALL_STAGES).eval()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(backbone(x), tuple(complete(x)[stage] for stage in stages))
    assert backbone.out_channels == tuple(SMALL['channels'][stage] for stage in stages)
    assert backbone.strides == tuple((4, 8, 16, 32)[stage] for stage in stages)


def test_stages_after_the_last_wanted_are_not_computed():
    backbone = small(out_indices=(0, 1))
    backbone.stages[2] = nn.Linear(1, 1)
    assert len(backbone(images(2, 3, 32, 32))) == 2


@pytest.mark.parametrize('out_indices', [(4, ), (-5, ), (2, 1), (1, 1), (0, -4), ()])
def test_bad_out_indices(out_indices):
    with pytest.raises(ValueError, match='out_indices=.*ascending order'):
        small(out_indices=out_indices)


@pytest.mark.parametrize('option, value, allowed', [
    ('arch', 'b', "'xt', 't' or a dict with stem_channels, depths, "),
    ('spatial_mixer', 'attention', "'smixer', 'conv'"),
    ('channel_mixer', 'wave', "'cmixer', 'mlp', 'mlp_se'"),
    ('low_freq_kernel', 7, '3, 5'),
    ('stem_act', 'ReLU', "'GELU', 'SiLU'"),
    ('patch_act', dict(type='SiLU'), "'GELU', 'SiLU'"),
    ('block_act', None, "'GELU', 'SiLU'"),
    ('conv_norm', 'SyncBN', "'BN', 'LN', 'LN2d'"),
    ('block_norm', 'IN', "'BN', 'LN', 'LN2d'"),
    ('conv_types', ('full', 'full', 'half', 'full'), "'full', 'depthwise'"),
    ('frozen_stages', 5, '-1, 0, 1, 2, 3, 4'),
])
def test_unknown_value_of_an_option(option, value, allowed):
    with pytest.raises(ValueError, match=f'{option}.* is not available, choose from: {allowed}'):
        SpaRTAN(**{option: value})


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_bad_drop_path_rate(rate):
    with pytest.raises(ValueError, match=f'drop_path_rate={rate}'):
        small(drop_path_rate=rate)


@pytest.mark.parametrize('change, message', [
    (dict(channels=(16, 24, 40, 60)), 'stage 4 has 60 channels.*divisible by 8; take 56 or 64'),
    (dict(channels=(4, 24, 40, 64)), 'stage 1 has 4 channels.*take 8'),
    (dict(depths=(1, 2, 1)), "one entry in every list.*'depths': 3"),
    (dict(depths=(1, 2, 0, 1)), r'depths=\(1, 2, 0, 1\) must be positive integers'),
    (dict(expand_ratios=(4, 4, 2, 1.5)), 'expand_ratios=.* must be positive integers'),
    (dict(stem_channels=0), 'stem_channels=0 must be positive'),
    (dict(widths=(1, 2, 3, 4)), r"missing \[\], unknown \['widths'\]"),
    (dict(conv_types=None), r"missing \['conv_types'\], unknown \[\]"),
])
def test_bad_arch_dict(change, message):
    arch = {key: value for key, value in (SMALL | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        SpaRTAN(arch)


def test_arch_dict_sets_depths_widths_and_ratios():
    backbone = small(out_indices=ALL_STAGES)
    assert [len(stage.blocks) for stage in backbone.stages] == [1, 2, 1, 1]
    assert backbone.out_channels == SMALL['channels']
    assert backbone.stem[0].conv.out_channels == 8
    assert [stage.blocks[0].cmixer.proj_out.in_channels // channels for stage, channels
            in zip(backbone.stages, SMALL['channels'], strict=True)] == [4, 4, 2, 2]
    assert backbone.arch == SMALL


def test_arch_may_come_from_a_config():
    config = ConfigDict(arch={key: list(value) if isinstance(value, tuple) else value
                              for key, value in SMALL.items()})
    assert SpaRTAN(config.arch).arch == SMALL


def test_drop_path_rate_rises_by_block():
    backbone = SpaRTAN('xt', drop_path_rate=0.36)
    rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * block for block in range(18)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = DropPath(0.25)
    layer_scale = torch.rand(3)
    channels, samples = drop_path(layer_scale, 400)
    assert channels is layer_scale
    assert samples.unique().tolist() == pytest.approx([0, 4 / 3])
    assert samples.mean().item() == pytest.approx(1, abs=0.1)
    assert drop_path.eval()(layer_scale, 400) == (layer_scale, None)


def test_dropped_samples_pass_a_block_unchanged():
    torch.manual_seed(1)
    block = randomise(small(drop_path_rate=0.9)).stages[-1].blocks[0]
    x = images(8, 64, 3, 5)
    changed = (block(x) != x).flatten(1).any(1)
    assert 0 < changed.sum() < 8


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    backbone = small(frozen_stages=frozen_stages)
    backbone.train()
    for index, part in enumerate([backbone.stem, *backbone.stages]):
        frozen = index <= frozen_stages
        assert all(parameter.requires_grad != frozen for parameter in part.parameters())
        assert all(module.training != frozen for module in part.modules())

    if frozen_stages < 4:
        before = copy.deepcopy(dict(backbone.named_buffers()))
        backbone(images(2, 3, 64, 64))[-1].square().sum().backward()
        moved = [name for name, buffer in backbone.named_buffers()
                 if name.endswith('running_mean') and not buffer.equal(before[name])]
        assert all(parameter.grad is None for parameter in backbone.parameters()
                   if not parameter.requires_grad)
        assert any(name.startswith('stem') for name in moved) == (frozen_stages < 0)
        assert any(name.startswith('stages.3') for name in moved)


def test_norm_eval_keeps_batch_norms_in_evaluation():
    backbone = small(norm_eval=True).train()
    assert backbone.training
    for module in backbone.modules():
        assert module.training != isinstance(module, _BatchNorm)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_train_and_eval_return_the_backbone():
    backbone = small()
    assert backbone.eval() is backbone and backbone.train() is backbone


# ---------------------------------------------------------------------------------- initialisation


def test_initialisation():
    torch.manual_seed(0)
    backbone = SpaRTAN('xt')
    backbone.init_weights()
    for name, parameter in backbone.named_parameters():
        values = parameter.detach()
        if name.endswith('bias'):
            assert not values.any(), name
        elif name.endswith('gamma') or 'layer_scale' in name:
            torch.testing.assert_close(values, torch.full_like(values, 1e-5))
        elif 'norm' in name:
            torch.testing.assert_close(values, torch.ones_like(values))
    for name, conv in backbone.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 2000:
            fan_out = conv.kernel_size[0]**2 * conv.out_channels / conv.groups
            if name.endswith('cmixer.proj_in'):
                fan_out /= 2  # phase and amplitude are initialised as the two layers they stand for
            assert conv.weight.std().item() == pytest.approx((2 / fan_out)**0.5, rel=0.1), name
    weights = torch.cat([module.complex_weight.flatten() for module in backbone.modules()
                         if isinstance(module, CMixer)])
    assert weights.mean().item() == pytest.approx(0, abs=0.1)
    assert weights.std().item() == pytest.approx(1, rel=0.1)


def test_names_that_a_weight_decay_rule_selects_by():
    """Decayed as released: layer scales and complex weights, not gamma; none of them is 1-d."""
    shapes = {name.rsplit('.', 1)[-1]: parameter.ndim for name, parameter
              in small().stages[0].blocks[0].named_parameters()
              if not name.endswith(('weight', 'bias')) or 'complex' in name}
    assert shapes == dict(layer_scale1=4, layer_scale2=4, gamma=4, complex_weight=2)


def save(model, path, prefix='backbone.'):
    torch.save(dict(state_dict={prefix + name: value
                                for name, value in model.state_dict().items()}), path)
    return str(path)


@pytest.mark.parametrize('prefix', ['backbone.', None])
def test_pretrained_weights_are_loaded(tmp_path, prefix):
    source = randomise(small())
    path = save(source, tmp_path / 'weights.pth', prefix or '')
    backbone = SpaRTAN(SMALL, init_cfg=dict(type='Pretrained', checkpoint=path, prefix=prefix))
    backbone.init_weights()
    backbone.init_weights()
    torch.testing.assert_close(backbone.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('change, message', [
    (dict(channels=(16, 24, 48, 64)), r'another SpaRTAN.*stages\.2\.embedding\.conv\.weight is '
     r'\(40, 24, 2, 2\) instead of \(48, 24, 2, 2\)'),
    (dict(depths=(1, 2, 3, 1)), 'stage 3 has 1 blocks instead of 3'),
    (dict(depths=(1, 1, 1, 1)), 'stage 2 has 2 blocks instead of 1'),
])
def test_pretrained_weights_of_another_architecture(tmp_path, change, message):
    path = save(small(), tmp_path / 'weights.pth')
    backbone = SpaRTAN(SMALL | change, init_cfg=dict(
        type='Pretrained', checkpoint=path, prefix='backbone.'))
    with pytest.raises(RuntimeError, match=message):
        backbone.init_weights()


def test_pretrained_weights_of_something_else(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path / 'weights.pth')
    backbone = SpaRTAN(SMALL, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(RuntimeError, match="begins with 'state_dict'"):
        backbone.load_state_dict(torch.load(path))
    with pytest.raises(RuntimeError, match=r"begins with 'backbone\.weight'.*spartan_to_mm\.py"):
        backbone.init_weights()


def test_loading_into_a_larger_model_checks_the_architecture_too():
    model = nn.ModuleDict(dict(backbone=small(), neck=nn.Linear(2, 2)))
    other = nn.ModuleDict(dict(backbone=SpaRTAN(SMALL | dict(depths=(2, 2, 1, 1)))))
    model.load_state_dict(nn.ModuleDict(dict(neck=nn.Linear(2, 2))).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match='stage 1 has 2 blocks instead of 1'):
        model.load_state_dict(other.state_dict(), strict=False)
