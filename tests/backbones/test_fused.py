"""SpaRTAN's form for training on a CPU against the plain one, and when it steps back."""
import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from spartan_mm.backbones import fused
from spartan_mm.backbones.fused import fuse
from spartan_mm.backbones.spartan import Block, ConvNormAct

from .toy import LowRank, assert_near, compare_steps, images, make, step


@pytest.fixture(autouse=True)
def messages(monkeypatch):
    """What is said; as if nothing had been said before."""
    said = []
    monkeypatch.setattr(fused.FusedBlock, 'told', False)
    monkeypatch.setattr(fused, 'print_log', lambda message, *_, **__: said.append(message))
    return said


def is_fused(y):
    """Whether one of the gradients that lead to a map is hand-written."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(type(node), '_forward_cls', Block).__module__ == fused.__name__:
            return True
        nodes += [before for before, _ in node.next_functions]
    return False


def fused_blocks(model):
    """Of each block, whether it is fused."""
    model = copy.deepcopy(model)  # a step changes statistics
    return [is_fused(block(images(2, channels, 6, 5).requires_grad_())) for stage, channels in zip(
        model.stages, model.arch['channels'], strict=True) for block in stage.blocks]


def make_pair(*args, **options):
    """A fused model and a plain one of the same weights."""
    return fuse(make(*args, **options)), make(*args, **options)


# ------------------------------------------------------------------------------------ same numbers


SETTINGS = [
    dict(), dict(low_freq_kernel=5), dict(low_freq_kernel=(11, 'dcls')),
    dict(low_freq_kernel='dcls_gaussian', with_cp=True), dict(conv_types='full'),
    dict(conv_types='depthwise'), dict(conv_types='depthwise', expand_ratios=(3, 1)),
    dict(conv_types='full', expand_ratios=(1, 3)),
    dict(block_act='SiLU'), dict(block_norm='BN'), dict(block_norm='LN2d'), dict(norm_eval=True),
    dict(frozen_stages=0), dict(frozen_stages=1), dict(with_cp=True), dict(drop_path_rate=0.9),
    dict(drop_path_rate=0.9, with_cp=True, low_freq_kernel=5, depths=(1, 2)),
    dict(hidden_channels=(22, 30), inner_channels=(5, 7)), dict(hidden_channels=(16, 24))]


@pytest.mark.parametrize('options', SETTINGS, ids=str)
def test_a_step_equals_the_plain_one(options, messages):
    model, plain = make_pair(**options)
    assert all(fused_blocks(model)) and not any(fused_blocks(plain))
    compare_steps(model, plain, images(3, 3, 32, 48))
    assert not messages


@pytest.mark.parametrize('size', [(2, 33, 47), (1, 100, 64), (5, 17, 8), (2, 8, 8)], ids=str)
def test_steps_of_any_size(size):
    samples, *sides = size
    model, plain = make_pair()
    for _ in range(2):
        compare_steps(model, plain, images(samples, 3, *sides))


@pytest.mark.parametrize('options, training', [
    ({}, True), ({}, False), (dict(low_freq_kernel=5, drop_path_rate=0.9), True),
    (dict(norm_eval=True), True), (dict(with_cp=True), True)], ids=str)
@pytest.mark.parametrize('part_bytes', [1, 200_000])
def test_a_batch_in_parts_equals_the_whole(part_bytes, options, training, monkeypatch):
    """Sample by sample, and two, two and one."""
    monkeypatch.setattr(fused, 'PART_BYTES', part_bytes)
    model, plain = make_pair(**options)
    compare_steps(model.train(training), plain.train(training), images(5, 3, 48, 64))


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_float32_step_is_near_the_plain_one_in_float64(training):
    x = images(2, 3, 96, 128, dtype=torch.float32)
    actual = step(fuse(make(torch.float32)).train(training), x)
    for name, expected in step(make().train(training), x.double()).items():
        assert_near(actual[name].double(), expected, 1e-5, name)


def test_evaluation_with_gradients_equals_the_plain_one():
    model, plain = make_pair()
    assert all(fused_blocks(model.eval()))
    compare_steps(model, plain.eval(), images(3, 3, 48, 64))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_block_takes_any_layout(layout):
    block, plain = (model.stages[0].blocks[0] for model in make_pair())
    x = images(2, 16, 7, 5).contiguous(memory_format=layout).requires_grad_()
    y, expected = block(x), plain(x)
    assert_near(y.detach(), expected.detach())
    cotangent = images(2, 16, 7, 5).flip(0).contiguous(memory_format=layout)
    assert_near(*(torch.autograd.grad(output, x, cotangent)[0] for output in (y, expected)))


def test_a_gradient_without_memory_of_its_own():
    model, plain = make_pair()
    x = images(2, 3, 32, 32)
    for one in (model, plain):
        one(x)[1].sum().backward()  # the same number everywhere, stored once
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(parameter.grad, other.grad)


@pytest.mark.parametrize('trained', ['bias', 'cmixer', 'smixer.proj_in', 'layer_scale1', 'norm2'])
def test_parameters_may_be_frozen_one_by_one(trained):
    pair = make_pair()
    for model in pair:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
    compare_steps(*pair, images(2, 3, 32, 32))


def test_gradient_of_the_images_alone():
    model, plain = (one.requires_grad_(False) for one in make_pair())
    compare_steps(model, plain, images(2, 3, 32, 32))


def test_a_graph_can_be_used_twice():
    """Nothing that is saved is overwritten."""
    model = fuse(make())
    loss = sum(y.square().mean() for y in model(images(2, 3, 48, 64)))
    parameters = [*model.parameters()]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


def test_inputs_are_left_alone():
    block = fuse(make()).stages[0].blocks[0]
    x = images(2, 16, 7, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    before, cotangent = x.detach().clone(), images(2, 16, 7, 5)
    block(x).backward(cotangent)
    assert_close(x.detach(), before, rtol=0, atol=0)
    assert_close(cotangent, images(2, 16, 7, 5), rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    x = images(2, 3, 32, 32).requires_grad_()
    slope, = torch.autograd.grad(fuse(make())(x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice'):
        slope.sum().backward()


def test_an_empty_batch():
    model, plain = make_pair()
    for training in (True, False):
        assert_close(model.train(training)(images(0, 3, 32, 32)), plain(images(0, 3, 32, 32)))


def test_stores_less_than_the_plain_form():
    def stored(model):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = model(images(2, 3, 128, 128))
        del maps
        return sum(storages.values())

    model, plain = make_pair()
    assert stored(model) < 0.8 * stored(plain)


# --------------------------------------------------------------------------------- still a SpaRTAN


def test_returns_the_model_and_reaches_into_larger_ones():
    model = nn.ModuleDict(dict(backbone=make()))
    for _ in range(2):
        assert fuse(model) is model
    assert all(fused_blocks(model['backbone']))
    assert sum(isinstance(module, Block) for module in model.modules()) == 2
    compare_steps(model['backbone'], make(), images(2, 3, 32, 32))


@pytest.mark.parametrize('fuse_source', [True, False])
def test_state_dict_loads_both_ways(fuse_source):
    source, target = make(), make()
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    fuse(source if fuse_source else target)
    target.load_state_dict(source.state_dict(), strict=True)
    assert list(source.state_dict()) == list(make().state_dict())
    compare_steps(target, source, images(2, 3, 32, 32))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('make_copy', [copy.deepcopy, through_pickle, through_file])
def test_copies_are_fused(make_copy):
    model, plain = make_pair()
    twin = make_copy(model)
    assert all(fused_blocks(twin))
    compare_steps(twin, plain, images(2, 3, 32, 32))
    # What the copy learns is its own.
    assert_close(dict(model.named_buffers()), dict(make().named_buffers()), rtol=0, atol=0)


def test_takes_the_deploy_form():
    model, plain = (one.eval() for one in make_pair())
    x = images(2, 3, 32, 32)
    expected = plain(x)
    for one in (model, plain):
        one.switch_to_deploy()
    for y, wanted in zip(model(x), expected, strict=True):
        assert_near(y, wanted.detach())
    compare_steps(model, plain, x)  # the gradients of the images


# ----------------------------------------------------------------------- where the plain form is it


def assert_plain(model, plain, x):
    """Two models compute the same, to the last bit."""
    values, expected = step(model, x), step(plain, x)
    assert_close(values, expected, rtol=0, atol=0)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, training, messages):
    model, plain = (one.train(training) for one in make_pair())
    with context():
        assert_close(model(images(2, 3, 32, 32)), plain(images(2, 3, 32, 32)), rtol=0, atol=0)
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert not messages


@pytest.mark.parametrize('dtype, autocast', [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, None)])
def test_half_precision(dtype, autocast, messages):
    model, plain = (one.eval() for one in make_pair(dtype))
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        assert_plain(model, plain, images(2, 3, 32, 32, dtype=dtype))
    assert not messages


def test_other_devices(messages):
    y = fuse(make()).to('meta')(torch.empty(2, 3, 32, 32, dtype=torch.float64, device='meta'))[-1]
    assert not is_fused(y)
    y.sum().backward()
    assert not messages


def test_compile(messages):
    model, plain = make_pair()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    compare_steps(compiled, plain, images(2, 3, 32, 32))
    torch.compiler.reset()
    assert not messages


def test_gradients_by_torch_func(messages):
    image = images(3, 32, 32)
    grads = []
    for model in make_pair():
        parameters = dict(model.eval().named_parameters())

        def loss(parameters, image, model=model):
            y = torch.func.functional_call(model, parameters, (image[None], ))[1]
            return y.square().sum()
        grads.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(
            parameters, torch.stack([image, image + 1])))
    assert_close(*grads)
    assert not messages


def test_a_counter_of_operations_counts_the_plain_form():
    counts = []
    for model in make_pair():
        with FlopCounterMode(display=False) as counter:
            model(images(2, 3, 32, 32))[1].sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0].keys() == counts[1].keys()
    assert counts[0]['Global'] == counts[1]['Global']


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@torch.no_grad()
def test_export_and_trace():
    model, plain = (one.eval() for one in make_pair())
    x = images(2, 3, 32, 32)
    exported = torch.export.export(model, (x, )).module()
    assert_close(exported(x), plain(x))
    assert_close(torch.jit.trace(model, x)(x), plain(x))


def test_symbolic_trace():
    model, plain = make_pair()
    compare_steps(torch.fx.symbolic_trace(model), plain, images(2, 3, 32, 32))


# ------------------------------------------------------------------------------ what others change


@pytest.mark.parametrize('options', [
    dict(conv_norm='LN'), dict(conv_norm='LN2d'), dict(spatial_mixer='conv'),
    dict(channel_mixer='mlp'), dict(channel_mixer='mlp_se')], ids=str)
def test_other_mixers_and_norms(options, messages):
    model, plain = make_pair(**options)
    assert not any(fused_blocks(model))
    assert_plain(model, plain, images(2, 3, 32, 32))
    assert len(messages) == 1


@pytest.mark.parametrize('register', [
    'register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook'])
def test_a_hook_anywhere_in_a_block_is_called(register):
    block = fuse(make()).stages[0].blocks[0]
    names = [name for name, _ in block.named_modules() if name]
    assert len(names) > 30
    x = images(2, 16, 6, 5).requires_grad_()
    for name in names:
        called = []
        handle = getattr(block.get_submodule(name), register)(
            lambda *_, called=called: called.append(1))
        block(x).sum().backward()
        assert called, name
        handle.remove()


def test_a_block_is_plain_while_it_has_a_hook(messages):
    model, plain = make_pair()
    handle = model.stages[0].blocks[0].cmixer.se.register_forward_hook(lambda *_: None)
    for _ in range(2):
        assert fused_blocks(model) == [False, True]
    compare_steps(model, plain, images(2, 3, 32, 32))
    handle.remove()
    assert fused_blocks(model) == [True, True]
    assert len(messages) == 1
    assert 'plain form' in messages[0] and 'cmixer.se has a hook' in messages[0]


def test_a_hook_of_the_block_itself_costs_nothing():
    model, plain = make_pair()
    called = []
    for stage in model.stages:
        stage.blocks[0].register_forward_hook(lambda *_: called.append(1))
    compare_steps(model, plain, images(2, 3, 32, 32))
    assert len(called) == 2
    assert all(fused_blocks(model))


def test_a_hook_of_all_modules_is_called():
    model, plain = make_pair()
    called = []
    with register_module_forward_hook(lambda module, *_: called.append(module)):
        compare_steps(model, plain, images(2, 3, 32, 32))
    assert {*model.stages[0].blocks[0].modules()} <= {*called}


class Halved(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize('name', [
    'smixer.proj_in', 'smixer.high_freq.conv', 'smixer.low_freq.0', 'smixer.low_freq.1.conv',
    'smixer.low_se.expand', 'smixer.proj_out', 'cmixer.proj_in', 'cmixer.refine.conv',
    'cmixer.se.squeeze', 'cmixer.proj_out'])
def test_a_subclass_is_called(name, messages):
    pair = make_pair()
    for model in pair:
        model.stages[0].blocks[0].get_submodule(name).__class__ = Halved
    assert fused_blocks(pair[0]) == [False, True]
    compare_steps(*pair, images(2, 3, 32, 32))
    assert len(messages) == 1
    assert f'{name} is a Halved' in messages[0]


def wrap(block):
    """Give a projection a method of its own."""
    conv = block.smixer.proj_out
    conv.forward = lambda x, forward=conv.forward: forward(x) / 2


conv = partial(nn.Conv2d, dtype=torch.float64)
norm = partial(nn.BatchNorm2d, dtype=torch.float64)


# What is done to a block, or the name of what is replaced in it and by what.
CHANGES = {
    'wrapped method': wrap,
    'pruned': lambda block: prune.l1_unstructured(block.smixer.proj_in, 'weight', 0.5),
    'weight norm': lambda block: parametrizations.weight_norm(block.smixer.low_freq[0]),
    'spectral norm': lambda block: parametrizations.spectral_norm(block.cmixer.proj_in),
    'branch with one more layer': lambda block: block.smixer.high_freq.append(nn.SiLU()),
    'norm in evaluation': lambda block: block.smixer.high_freq.norm.eval(),
    'adapter': ('smixer.proj_out', lambda: LowRank(conv(16, 16, 1))),
    'approximate GELU': ('cmixer.act', lambda: nn.GELU('tanh')),
    'another activation': ('cmixer.act', nn.Hardswish),
    'activations of two kinds': ('cmixer.act', nn.SiLU),
    'conv with bias': ('smixer.high_freq.conv', lambda: conv(8, 8, 3, 1, 1)),
    'conv that mirrors': ('smixer.high_freq.conv', lambda: conv(
        8, 8, 3, 1, 1, bias=False, padding_mode='reflect')),
    'conv that finds its padding': ('smixer.high_freq.conv', lambda: conv(
        8, 8, 3, padding='same', bias=False)),
    'another kernel': ('smixer.high_freq.conv', lambda: conv(8, 8, 5, padding=2, bias=False)),
    '3x3 projection in': ('smixer.proj_in', lambda: conv(16, 8, 3, padding=1)),
    '3x3 projection out': ('cmixer.proj_out', lambda: conv(64, 16, 3, padding=1)),
    'grouped projection': ('cmixer.proj_out', lambda: conv(64, 16, 1, groups=2)),
    'projection in two steps': ('smixer.proj_out', lambda: nn.Sequential(
        conv(16, 4, 1), conv(4, 16, 1))),
    'projection without bias': ('smixer.proj_in', lambda: conv(16, 8, 1, bias=False)),
    'gates without bias': ('cmixer.se.squeeze', lambda: conv(64, 4, 1, bias=False)),
    'no gates': ('smixer.high_se', nn.Identity),
    'branch of two': ('smixer.high_freq', lambda: nn.Sequential(
        *(ConvNormAct(8, 8, 3, padding=1).double() for _ in range(2)))),
    'norm without affine': ('cmixer.refine.norm', lambda: norm(64, affine=False)),
    'norm without statistics': ('cmixer.refine.norm', lambda: norm(64, track_running_stats=False)),
    'norm with plain averages': ('cmixer.refine.norm', lambda: norm(64, momentum=None)),
    'no norm': ('cmixer.refine.norm', nn.Identity),
    'another norm before': ('norm2', lambda: nn.InstanceNorm2d(16, dtype=torch.float64)),
    'no mixer': ('smixer', nn.Identity),
    'another drop path': ('drop_path', nn.Identity),
}


def make_changed_pair(change):
    """A fused model and a plain one whose first block was changed."""
    pair = make_pair()
    for model in pair:
        torch.manual_seed(3)  # of the weights of what is new
        block, done = model.stages[0].blocks[0], CHANGES[change]
        if callable(done):
            done(block)
        else:
            block.set_submodule(done[0], done[1]())
    return pair


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_block_is_computed_as_it_is(change):
    """In the plain form, or in the fused one where that knows the change."""
    model, plain = make_changed_pair(change)
    compare_steps(model, plain, images(2, 3, 32, 32))


@pytest.mark.parametrize('change', ['adapter', 'pruned', 'weight norm'])
def test_a_changed_block_learns(change, messages):
    model, plain = make_changed_pair(change)
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            one(images(2, 3, 32, 32))[1].square().mean().backward()
            optimizer.step()
    assert_close(model.state_dict(), plain.state_dict())
    assert len(messages) == 1


def test_the_message_is_said_once(messages):
    for _ in range(2):
        model = fuse(make(conv_norm='LN2d'))
        for _ in range(2):
            model(images(2, 3, 32, 32))
    assert len(messages) == 1
