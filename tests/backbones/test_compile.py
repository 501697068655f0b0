"""SpaRTAN in the hands of PyTorch's compiler, exporter and tracer."""
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from .toy import assert_near, compare_steps, images, make


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """What earlier tests compiled counts as recompilation."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize('options', [
    {}, dict(low_freq_kernel=5, block_act='SiLU', block_norm='BN', conv_norm='LN2d'),
    dict(frozen_stages=1)], ids=str)
def test_compiled_training_step_equals_the_eager_one(options):
    model, other = make(**options), make(**options)
    compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
    compare_steps(compiled, model, images(2, 3, 48, 64))


def test_compiled_drop_path_drops():
    model = make(drop_path_rate=0.9)
    compiled = torch.compile(model.stages[1].blocks[0], backend='aot_eager', fullgraph=True)
    x = images(64, 24, 3, 5)
    changed = (compiled(x) != x).flatten(1).any(1)
    assert 0 < changed.sum() < 64


def count_frames(model, expected):
    """How often a compiled model is compiled for images of three sizes."""
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for side in (64, 96, 128):
        x = images(2, 3, side, side + 32)
        for y, wanted in zip(compiled(x), expected(x), strict=True):
            assert_near(y.detach(), wanted.detach())
    return counter.frame_count


def test_sizes_do_not_compile_anew_in_training():
    assert count_frames(make(), make()) == 1


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
def test_sizes_do_not_compile_anew_in_evaluation(deploy):
    model = make().eval()
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad():
        assert count_frames(model, model) == 1


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@pytest.mark.parametrize('strict', [False, True], ids=['', 'strict'])
@torch.no_grad()
def test_exported_model_is_the_same(deploy, strict):
    model, x = make().eval(), images(2, 3, 48, 64)
    if deploy:
        model.switch_to_deploy()
    exported = torch.export.export(model, (x, ), strict=strict)
    assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize('strict', [False, True], ids=['', 'strict'])
@torch.no_grad()
def test_exported_graph_is_small_and_its_convolutions_have_constant_weights(strict):
    """What fuses and quantises graphs finds a weight only where it is a parameter itself."""
    model = make().eval()
    exported = torch.export.export(model, (images(2, 3, 48, 64), ), strict=strict)
    calls = [node for node in exported.graph.nodes if node.op == 'call_function']
    convs = [node for node in calls if node.target is torch.ops.aten.conv2d.default]
    parameters = exported.graph_signature.inputs_to_parameters
    assert len(convs) == sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 31
    assert all(conv.args[1].name in parameters for conv in convs)
    assert len(calls) <= 150


@pytest.mark.slow
@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@torch.no_grad()
def test_batch_and_size_of_an_exported_model_are_free(deploy):
    model = make().eval()
    if deploy:
        model.switch_to_deploy()
    batch, rows, columns = map(torch.export.Dim, ('batch', 'rows', 'columns'))
    exported = torch.export.export(
        model, (images(2, 3, 64, 96), ),
        dynamic_shapes=((batch, None, 8 * rows, 8 * columns), )).module()
    for size in ((1, 3, 64, 64), (3, 3, 96, 48), (5, 3, 40, 104)):
        assert_close(exported(images(*size)), model(images(*size)))


@pytest.mark.parametrize('deploy', [False, True], ids=['training form', 'deploy form'])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # of the check of the image's size
@torch.no_grad()
def test_traced_model_is_the_same(deploy):
    model, x = make().eval(), images(2, 3, 48, 64)
    if deploy:
        model.switch_to_deploy()
    traced = torch.jit.trace(model, x)
    # Nothing of the images was baked in, nor of their size.
    for other in (x, x.flip(0), images(3, 3, 72, 40)):
        assert_close(traced(other), model(other))
