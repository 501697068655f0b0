"""The switches for scaling, each in a few iterations of a user's classifier on the CPU."""

import shutil
from itertools import count

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.testing import assert_close

from spartan_mm.backbones.fused import FusedBlock
from spartan_mm.backbones.spartan import Block
from spartan_mm.cli import main
from spartan_mm.engine import launch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason='mixed precision needs a GPU, and there is none')


class Recorder(Hook):
    """Notes what the iterations of a training do."""

    def before_train(self, runner):
        self.losses, self.weights, self.maps = [], [self.weight()], []
        convolution = runner.model.backbone.stem[0].conv
        convolution.register_forward_hook(lambda *call: self.maps.append(call[-1]))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].detach().float())
        self.weights.append(self.weight())

    def weight(self):
        return self.runner.model.head.fc.weight.detach().clone()


@pytest.fixture
def train(user_project, monkeypatch, tmp_path):
    """Run the command in this process; return what was noted."""
    monkeypatch.chdir(user_project)
    build_runner, numbers = launch.build_runner, count()

    def train(*flags, options=()):
        recorder = Recorder()

        def build(cfg, split):
            # Runners have names of their own in a process.
            cfg.experiment_name = f'{tmp_path.name}_{next(numbers)}'
            recorder.runner = build_runner(cfg, split)
            recorder.runner.register_hook(recorder)
            return recorder.runner

        monkeypatch.setattr(launch, 'build_runner', build)
        assert main(['train', 'user_classifier.py', '--seed', '1', *flags,
                     '--work-dir', str(tmp_path / 'work_dir'), '--cfg-options',
                     'train_dataloader.batch_size=2', *options]) == 0
        return recorder

    return train


@pytest.fixture
def begin(train, monkeypatch):
    """Run the command, whose training ends before its first iteration."""
    monkeypatch.setattr(Runner, 'train', lambda runner: runner.call_hook('before_run'))
    return train


def read_checkpoint(tmp_path, name='epoch_1.pth'):
    return torch.load(tmp_path / 'work_dir' / name, weights_only=False)


def steps_taken(checkpoint):
    [steps] = {int(state['step']) for state in checkpoint['optimizer']['state'].values()}
    return steps


@pytest.mark.skipif(torch.cuda.is_available(), reason='of a machine without a GPU')
@pytest.mark.parametrize('flags, fused', [([], True), (['--no-fuse'], False)])
def test_blocks_are_fused_on_a_cpu(begin, flags, fused):
    blocks = [module for module in begin(*flags).runner.model.modules()
              if isinstance(module, Block)]
    assert blocks and {isinstance(block, FusedBlock) for block in blocks} == {fused}


@pytest.mark.parametrize('flags, options', [
    (['--compile'], []), (['--compile', 'default'], []), ([], ['compile=True']),
    ([], ['compile=default']), ([], ["compile.backend=aot_eager"])], ids=str)
def test_the_backbone_is_compiled(begin, monkeypatch, flags, options):
    asked = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kwargs: asked.append(
        (type(self).__name__, kwargs)))
    begin(*flags, options=options)
    assert [name for name, _ in asked] == ['SpaRTAN', 'GlobalAveragePooling']
    backend = 'aot_eager' if 'backend' in str(options) else None
    assert {kwargs.get('backend') for _, kwargs in asked} == {backend}


def test_gradients_accumulate(train, tmp_path):
    run = train(options=['optim_wrapper.accumulative_counts=2', 'train_cfg.max_epochs=2'])
    changed = [not torch.equal(before, after)
               for before, after in zip(run.weights, run.weights[1:], strict=False)]
    assert changed == [False, True, False, True]
    assert steps_taken(read_checkpoint(tmp_path, 'epoch_2.pth')) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='of a machine without a GPU')
def test_mixed_precision_needs_a_gpu(user_project, monkeypatch, capfd):
    monkeypatch.chdir(user_project)
    assert main(['train', 'user_classifier.py', '--amp']) == 2
    assert 'error: --amp needs a GPU, and torch finds none; drop' in capfd.readouterr().err


@NEEDS_GPU
@pytest.mark.parametrize('flags, dtype', [
    (['--amp'], torch.float16), (['--amp', 'bfloat16'], torch.bfloat16)])
def test_mixed_precision(train, tmp_path, flags, dtype):
    run = train(*flags)
    assert {computed.dtype for computed in run.maps[:2]} == {dtype}
    assert_close(run.losses[0], train().losses[0], rtol=0.05, atol=0)
    assert not torch.equal(run.weights[0], run.weights[-1])
    assert {weight.dtype for weight in run.runner.model.parameters()} == {torch.float32}
    # Only float16 has its loss scaled.
    scale = run.runner.optim_wrapper.loss_scaler.get_scale()
    assert (scale > 1) == (dtype == torch.float16)


@NEEDS_GPU
def test_mixed_precision_is_resumed(train, tmp_path):
    train('--amp')
    scale = read_checkpoint(tmp_path)['optimizer']['loss_scaler']['scale']
    assert scale > 1
    run = train('--amp', '--resume', options=['train_cfg.max_epochs=2'])
    assert len(run.losses) == 2
    checkpoint = read_checkpoint(tmp_path, 'epoch_2.pth')
    assert steps_taken(checkpoint) == 4
    assert checkpoint['optimizer']['loss_scaler']['_growth_tracker'] == 4


def test_channels_last(train):
    plain, run = train(), train('--channels-last')
    for convolution in (run.runner.model.backbone.stem[0].conv,
                        run.runner.model.backbone.stages[1].embedding.conv):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(computed.is_contiguous(memory_format=torch.channels_last) for computed in run.maps)
    assert_close(run.losses, plain.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile(train):
    """Traces the model and its gradients, all but the code for the machine."""
    check_compiled(train, 'compile.backend=aot_eager')


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'c++'))),
                    reason='torch.compile needs a C++ compiler on a CPU, and there is none')
def test_compile_to_machine_code(train):
    check_compiled(train, 'compile=True')


def check_compiled(train, option):
    # More blocks of the same would only take longer.
    arch = dict(depths=1, channels=8, expand_ratios=2, conv_types='full')
    options = [*(f'model.backbone.arch.{key}=[{value}]' for key, value in arch.items()),
               'model.backbone.out_indices=0', 'model.head.in_channels=8']
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train(options=[*options, option])
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    assert_close(run.losses, train(options=options).losses, rtol=1e-3, atol=1e-4)
