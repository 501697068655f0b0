"""Every fast form of the backbone against the oracle: outputs, gradients and statistics."""
import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from spartan_mm.backbones import SpaRTAN, functional, gradients
from spartan_mm.backbones.spartan import CMixer, LayerNorm, SMixer

SMALL = dict(
    stem_channels=8,
    depths=(1, 2, 1, 1),
    channels=(16, 24, 40, 64),
    expand_ratios=(4, 4, 2, 2),
    conv_types=('full', 'full', 'depthwise', 'depthwise'))
# A block of either type: compilers take a while.
TINY = dict(stem_channels=8, depths=(1, 1), channels=(8, 16), expand_ratios=(4, 2),
            conv_types=('full', 'depthwise'))
LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


def randomise(model):
    """Weights and statistics of a size at which an error behind them would show."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or name.endswith('gamma'):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith('squeeze.bias'):
            nn.init.uniform_(parameter, 1, 2)
        elif 'norm' in name or name.endswith('bias'):
            nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


def make(dtype=torch.float64, arch=SMALL, **options):
    options = dict(out_indices=(0, 1, 2, 3)) | options
    return randomise(SpaRTAN(arch, **options)).to(dtype)


def images(*size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(model, x):
    """Outputs, and the gradients of the input and of all parameters."""
    torch.manual_seed(2)  # of the drop path
    x = x.clone().requires_grad_()
    maps = model(x)
    model.zero_grad()
    sum((y * images(*y.shape, dtype=y.dtype)).sum() for y in maps).backward()
    return maps, x.grad, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(actual, expected, tolerance):
    """Differences as a part of the largest value, unless that is all but 0."""
    largest = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual / largest, expected / largest, rtol=0, atol=tolerance)


def compare_steps(oracle, model, x, tolerance):
    literal = oracle.make_oracle(model)
    maps, grad_x, grads = step(model, x)
    expected_maps, expected_grad_x, expected_grads = step(literal, x)

    for y, expected in zip(maps, expected_maps, strict=True):
        assert_close(y, expected, tolerance)
    assert_close(grad_x, expected_grad_x, tolerance)
    grads = oracle.to_literal(grads)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], tolerance)
    expected_buffers = dict(literal.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------- training, eager


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(3, 64, 96), (2, 33, 47), (1, 100, 64)])
def test_float64_step_equals_the_oracle(oracle, training, size):
    samples, *sides = size
    model = make(drop_path_rate=0.5).train(training)
    compare_steps(oracle, model, images(samples, 3, *sides), 1e-10)


def test_float32_step_equals_the_oracle(oracle):
    # Not in training: batch statistics of few positions magnify the rounding of what is before.
    compare_steps(oracle, make(torch.float32).eval(), images(2, 3, 96, 128, dtype=torch.float32),
                  1e-5)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_a_batch_in_parts_equals_the_oracle(oracle, monkeypatch, training):
    monkeypatch.setattr(functional, '_SLICE_BYTES', 1)  # a sample at a time
    compare_steps(oracle, make().train(training), images(5, 3, 48, 64), 1e-10)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('expand_ratio, conv_type', [
    (4, 'full'), (2, 'depthwise'), (4, 'depthwise'), (1, 'depthwise'), (3, 'depthwise')])
def test_cmixer_in_both_layouts(oracle, layout, expand_ratio, conv_type):
    """The backbone itself takes one layout on a CPU; a mixer takes what it gets."""
    mixer = randomise(CMixer(8, expand_ratio, conv_type)).double()
    nn.init.normal_(mixer.complex_weight)
    literal = oracle.CMixer(8, expand_ratio, conv_type).double()
    literal.load_state_dict({name.removeprefix('.cmixer.'): value for name, value in
                             oracle.to_literal({f'.cmixer.{name}': value for name, value in
                                                mixer.state_dict().items()}).items()})
    x = images(3, 8, 5, 7).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = mixer(x)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    assert_close(y, literal(x), 1e-10)

    cotangent = images(3, 8, 5, 7).flip(0)
    wanted = [x, mixer.complex_weight, mixer.proj_out.weight, mixer.refine.conv.weight]
    expected = [x, literal.complex_weight, literal.proj_out.weight, literal.refine.conv.weight]
    for grad, expected_grad in zip(torch.autograd.grad(y, wanted, cotangent),
                                   torch.autograd.grad(literal(x), expected, cotangent),
                                   strict=True):
        assert_close(grad, expected_grad.reshape(grad.shape), 1e-10)


def test_smixer_in_both_layouts():
    mixer = randomise(SMixer(16, 'depthwise')).double()
    steps = []
    for layout in LAYOUTS.values():
        x = images(3, 16, 5, 7).contiguous(memory_format=layout).requires_grad_()
        y = mixer(x)
        assert y.is_contiguous(memory_format=layout)
        steps.append([y, *torch.autograd.grad(
            y, [x, *mixer.parameters()], images(3, 16, 5, 7).flip(0))])
    for actual, expected in zip(*steps, strict=True):
        assert_close(actual, expected, 1e-10)


def test_convolutions_by_the_code_of_other_devices(oracle, monkeypatch):
    """Neither larger groups nor mirrored kernels."""
    for module in (functional, gradients):
        monkeypatch.setattr(module, 'is_on_x86', lambda x: False)
    compare_steps(oracle, make().train(), images(2, 3, 64, 96), 1e-10)


@pytest.mark.parametrize('options', [
    dict(spatial_mixer='conv'), dict(channel_mixer='mlp_se'), dict(conv_norm='LN'),
    dict(block_norm='BN'), dict(block_act='SiLU')], ids=str)
def test_what_has_no_hand_written_gradient_agrees_with_numerical_ones(options):
    arch = dict(SMALL, depths=(1, ), channels=(8, ), expand_ratios=(2, ), conv_types=('full', ))
    model = make(arch=arch, out_indices=0, drop_path_rate=0., **options).eval()
    x = images(1, 3, 8, 8).requires_grad_()
    model.min_size = 4
    assert torch.autograd.gradcheck(lambda x: model(x)[0], x)


def test_saves_less_than_the_oracle(oracle):
    def saved_bytes(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = model(images(2, 3, 128, 128, dtype=torch.float32))
        del maps
        return sum(storages.values())

    model = SpaRTAN('xt')
    assert saved_bytes(model) < 0.65 * saved_bytes(oracle.make_oracle(model))


def test_a_graph_can_be_used_twice():
    """Nothing that is saved is overwritten."""
    model = make().train()
    loss = sum(y.square().mean() for y in model(images(2, 3, 48, 64)))
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


@pytest.mark.parametrize('channels_last', [False, True])
def test_layer_norm_of_other_devices(channels_last):
    """Where PyTorch has no group norm for the layout there is one of ours."""
    norm = LayerNorm(6, 1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = images(3, 6, 5, 4).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.autograd.gradcheck(
        lambda *inputs: functional._LayerNorm.apply(*inputs, 1e-6),
        (x.requires_grad_(), norm.weight, norm.bias))
    torch.testing.assert_close(functional._LayerNorm.apply(x, norm.weight, norm.bias, 1e-6),
                               nn.functional.group_norm(x, 1, norm.weight, norm.bias, 1e-6))


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
@pytest.mark.parametrize('backward_inside', [True, False])
def test_autocast_stays_near_the_oracle_in_float32(oracle, dtype, tolerance, backward_inside):
    """Bounds: one block; about 4 units of the type's precision in the output, 8 in gradients."""
    arch = dict(SMALL, depths=(1, ), channels=(16, ), expand_ratios=(4, ), conv_types=('full', ))
    model = make(torch.float32, arch, out_indices=0).eval()
    literal = oracle.make_oracle(model)
    x = images(2, 3, 48, 64, dtype=torch.float32)
    if backward_inside:
        with torch.autocast('cpu', dtype):
            maps, _, grads = step(model, x)
    else:
        def forward(x):
            with torch.autocast('cpu', dtype):
                return model(x)

        forward.zero_grad, forward.named_parameters = model.zero_grad, model.named_parameters
        maps, _, grads = step(forward, x)
    expected_maps, _, expected = step(literal, x)
    # The strongest channel can change where two are nearly equal: a few positions are off by more.
    difference = (maps[0].float() - expected_maps[0]).abs() / expected_maps[0].abs().max()
    assert difference.quantile(0.99) < tolerance
    grads = oracle.to_literal(grads)
    block = 'stages.0.blocks.0.'
    names = [name for name in expected
             if name.startswith(block + 'smixer') and '.norm.' not in name]
    assert len(names) > 10
    for name in (*names, block + 'cmixer.proj_out.weight', 'stem.1.conv.weight'):
        assert nn.functional.cosine_similarity(
            grads[name].flatten(), expected[name].flatten(), dim=0) > 1 - tolerance


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
def test_bfloat16_weights(deploy):
    model = make(torch.float32, TINY, out_indices=1).eval()
    x = images(2, 3, 48, 64, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)[0]
        if deploy:
            model.switch_to_deploy()
        y = model.bfloat16()(x.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    difference = (y.float() - expected).abs() / expected.abs().max()
    assert difference.median() < 0.02


def test_bfloat16_training_step():
    model = make(torch.float32, TINY, out_indices=1, drop_path_rate=0.).eval()
    x = images(2, 3, 48, 64, dtype=torch.float32)
    _, _, expected = step(model, x)
    _, _, grads = step(model.bfloat16(), x.bfloat16())
    for name in ('smixer.gamma', 'smixer.proj_in.weight', 'smixer.high_freq.conv.weight',
                 'cmixer.refine.conv.weight', 'cmixer.complex_weight'):
        name = f'stages.1.blocks.0.{name}'
        assert grads[name].dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(
            grads[name].float().flatten(), expected[name].flatten(), dim=0) > 0.98


def test_step_on_the_meta_device():
    model = make(torch.float32, TINY, out_indices=1).to('meta')
    model(torch.empty(2, 3, 48, 64, device='meta'))[0].sum().backward()


# ------------------------------------------------------------------------------------- deploy form


OPTIONS = [
    dict(), dict(low_freq_kernel=5), dict(conv_types='full'), dict(conv_types='depthwise'),
    dict(spatial_mixer='conv'), dict(channel_mixer='mlp'), dict(channel_mixer='mlp_se'),
    dict(spatial_mixer='conv', channel_mixer='mlp'), dict(block_norm='BN'),
    dict(block_norm='BN', channel_mixer='mlp'), dict(block_norm='LN2d'), dict(conv_norm='LN'),
    dict(conv_norm='LN2d'), dict(block_act='SiLU', stem_act='SiLU', patch_act='GELU')]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_deploy_form_equals_the_training_form(options):
    model = make(**options).eval()
    x = images(2, 3, 48, 64)
    with torch.no_grad():
        expected = model(x)
        deployed = copy.deepcopy(model)
        deployed.switch_to_deploy()
        for y, wanted in zip(deployed(x), expected, strict=True):
            assert_close(y, wanted, 1e-10)

        deployed.float()
        for y, wanted in zip(deployed(x.float()), expected, strict=True):
            assert_close(y.double(), wanted, 1e-5)


def test_deploy_form_equals_the_oracle(oracle):
    model = make(arch='t', out_indices=3, dtype=torch.float32).eval()
    # In double, so that no tie of two channels is decided by rounding.
    literal = oracle.make_oracle(model.double())
    model.switch_to_deploy()
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(model(x)[0], literal(x)[0], 1e-10)


def test_deploy_form_has_no_batch_norm_and_less_to_do():
    model = make().eval()
    tensors = len(model.state_dict())
    model.switch_to_deploy()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm)
                   for module in model.modules())
    assert len(model.state_dict()) < 0.7 * tensors
    assert not any(name.endswith(('layer_scale1', 'gamma')) for name in model.state_dict())


def test_switching_twice_changes_nothing():
    model = make().eval()
    model.switch_to_deploy()
    before = copy.deepcopy(model.state_dict())
    model.switch_to_deploy()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_deploy_form_refuses_training():
    model = make()
    model.switch_to_deploy()
    assert not model.training
    with pytest.raises(RuntimeError, match='deploy form.*cannot be trained'):
        model.train()
    model.eval()


def test_deploy_weights_load_into_a_deployed_model_only():
    model = make().eval()
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    weights = deployed.state_dict()

    fresh = SpaRTAN(SMALL, out_indices=(0, 1, 2, 3)).double()
    with pytest.raises(RuntimeError, match='deploy form'):
        fresh.load_state_dict(weights)
    fresh.switch_to_deploy()
    fresh.load_state_dict(weights)
    x = images(1, 3, 48, 64)
    torch.testing.assert_close(fresh(x), deployed(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='deploy form'):
        fresh.load_state_dict(model.state_dict())


# ---------------------------------------------------------------------------------------- compiler


def test_compiled_training_step_equals_the_oracle(oracle):
    model = make(arch=TINY, out_indices=(0, 1), drop_path_rate=0.).train()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    literal = oracle.make_oracle(model)
    x = images(2, 3, 48, 64)
    maps, grad_x, grads = step(compiled, x)
    expected_maps, expected_grad_x, expected = step(literal, x)
    for y, wanted in zip(maps, expected_maps, strict=True):
        assert_close(y, wanted, 1e-10)
    assert_close(grad_x, expected_grad_x, 1e-10)
    for name, grad in oracle.to_literal(
            {name.removeprefix('_orig_mod.'): grad for name, grad in grads.items()}).items():
        assert_close(grad, expected[name], 1e-10)


@pytest.mark.parametrize('opaque', [False, True], ids=['compiled', 'opaque'])
@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
def test_sizes_do_not_compile_anew(deploy, opaque, monkeypatch):
    monkeypatch.setattr('spartan_mm.backbones.opaque.has_fast_kernels', lambda x: opaque)
    model = make(torch.float32, TINY, out_indices=(0, 1)).eval()
    if deploy:
        model.switch_to_deploy()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for side in (64, 96, 128):
            x = images(2, 3, side, side + 32, dtype=torch.float32)
            for y, expected in zip(compiled(x), model(x), strict=True):
                assert_close(y, expected, 1e-5)
    assert counter.frame_count == 1


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """What earlier tests compiled counts as recompilation."""
    yield
    torch.compiler.reset()


def compile_and_collect(model):
    """A compiled model, and the operators of its graphs."""
    found = []

    def collect(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    return torch.compile(model, backend=collect, fullgraph=True), found


@pytest.mark.skipif(not functional._HAS_AVX, reason='needs oneDNN on a CPU with AVX')
class TestOpaque:

    def test_compiled_inference_leaves_blocks_alone(self):
        model = make(torch.float32, TINY, out_indices=(0, 1)).eval()
        compiled, found = compile_and_collect(model)
        x = images(2, 3, 32, 32, dtype=torch.float32)
        with torch.no_grad():
            compiled(x)
            assert sum('spartan_mm.run' in name for name in found) == len(model.stages)
            # In place, as an optimizer or a checkpoint does it.
            model.stages[1].blocks[0].cmixer.proj_out.weight.mul_(2)
            for y, expected in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(y, expected)
        found.clear()
        compiled.train()(x)
        assert found and not any('spartan_mm.run' in name for name in found)

    def test_copies_run_their_own_weights(self):
        x = images(1, 3, 32, 32, dtype=torch.float32)
        model = make(torch.float32, TINY, out_indices=(0, 1)).eval()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.stages[0].blocks[0].cmixer.proj_out.weight.mul_(2)
            expected = [y.clone() for y in twin(x)]
            compile_and_collect(model)[0](x)
            for y, wanted in zip(compile_and_collect(twin)[0](x), expected, strict=True):
                torch.testing.assert_close(y, wanted)

    @pytest.mark.parametrize('size', [(1, 3, 32, 32), (3, 3, 64, 32), (1, 3, 320, 352)])
    def test_inductor_gets_the_layout_it_was_told(self, size):
        # The operator's result is used by code that was generated for a certain layout.
        blocks = make(torch.float32, TINY, out_indices=(0, 1)).eval().stages[0].blocks
        x = images(*size, dtype=torch.float32)[:, :1].expand(-1, 8, -1, -1)
        for layout in LAYOUTS.values():
            torch.library.opcheck(
                torch.ops.spartan_mm.run.default,
                (x.contiguous(memory_format=layout), blocks._number),
                test_utils=('test_schema', 'test_faketensor'))


# ------------------------------------------------------------------------- what others may change


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
def test_a_wrong_number_of_channels_is_refused(deploy):
    model = make(torch.float32).eval()
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad(), pytest.raises(RuntimeError, match='to have 3 channels'):
        model(images(1, 6, 64, 64, dtype=torch.float32))


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@pytest.mark.parametrize('recorded', [False, True])
def test_hooks_of_convolutions_are_called(deploy, recorded):
    model = make(torch.float32).eval()
    if deploy:
        model.switch_to_deploy()
    conv = model.stages[0].blocks[0].smixer.high_freq.conv
    shapes = []
    conv.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    x = images(1, 3, 64, 64, dtype=torch.float32)
    with torch.set_grad_enabled(recorded):
        y = model(x)[-1]
        conv._forward_hooks.clear()
        torch.testing.assert_close(y, model(x)[-1], rtol=1e-5, atol=1e-5)
    assert shapes == [(1, conv.out_channels, 16, 16)]


@pytest.mark.parametrize('low_freq_kernel', [3, 5])
def test_hooks_do_not_change_gradients(low_freq_kernel):
    """With hooks a spatial mixer is left to autograd."""
    model = make(low_freq_kernel=low_freq_kernel).train()
    hooked = copy.deepcopy(model)
    called = []
    for name, module in hooked.named_modules():
        if 'smixer' in name and isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    x = images(2, 3, 64, 96)
    maps, grad_x, grads = step(model, x)
    expected_maps, expected_grad_x, expected_grads = step(hooked, x)
    assert any(name.endswith('high_freq.conv') for name in called)
    for actual, expected in zip([*maps, grad_x, *grads.values()],
                                [*expected_maps, expected_grad_x, *expected_grads.values()],
                                strict=True):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize('options', [
    dict(padding=1, bias=True), dict(padding=1, bias=False, padding_mode='reflect'),
    dict(padding='same', bias=False)], ids=str)
def test_another_convolution_is_computed_as_it_is(options):
    mixer = randomise(SMixer(16)).eval()
    mixer.high_freq.conv = nn.Conv2d(8, 8, 3, **options)
    x = images(2, 16, 6, 6, dtype=torch.float32)
    y = mixer(x)
    assert y.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), y)


@pytest.mark.parametrize('recorded', [False, True])
def test_another_activation_is_computed_as_it_is(recorded):
    class Shrunk(nn.GELU):
        def forward(self, x):
            return super().forward(x) / 2

    mixer = randomise(CMixer(8, 2, 'depthwise')).eval()
    nn.init.normal_(mixer.complex_weight)
    x = images(2, 8, 6, 6, dtype=torch.float32)
    with torch.set_grad_enabled(recorded):
        mixer.act = Shrunk()
        y = mixer(x)
        mixer.act = nn.GELU()
        # Half the activation is half the wave.
        mixer.complex_weight.data /= 2
        torch.testing.assert_close(y, mixer(x))


def test_a_counter_around_the_forward_pass_alone(oracle):
    """What recomputes is outside of it."""
    model = make(torch.float32, with_cp=True).train()
    with FlopCounterMode(display=False) as counter:
        y = model(images(2, 3, 64, 64, dtype=torch.float32))[-1]
    y.sum().backward()
    assert counter.get_total_flops() > 0


def test_an_empty_batch():
    model = make(torch.float32).eval()
    with torch.no_grad():
        assert len(model(torch.empty(0, 3, 64, 64))[-1]) == 0
