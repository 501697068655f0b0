"""A NaN never reaches the weights, and the batch that made it can be run again."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPERS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from spartan_mm.cli import main
from spartan_mm.engine import nan_guard
from spartan_mm.engine.nan_guard import FiniteNumbersHook, NonFiniteError
from spartan_mm.engine.replay import pack, read_dump, replay, unpack
from spartan_mm.errors import UsageError

BAD = 5  # the image that makes trouble; batches of 2, so in the third iteration


@MODELS.register_module()
class Toy(BaseModel):
    """A small model with running statistics and random numbers, that fails as it is told to.

    Args:
        fault: 'loss' for a NaN loss, 'gradient' for a finite loss with an infinite gradient.
    """

    def __init__(self, fault='loss'):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)
        self.fault = fault

    def forward(self, inputs, data_samples, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        bad = torch.tensor([sample.img_id == BAD for sample in data_samples])
        if self.fault == 'loss':
            inputs = inputs.masked_fill(bad[:, None], float('nan'))
        out = self.linear(self.norm(inputs + 0.1 * torch.randn_like(inputs))).squeeze(1)
        loss = out.float().square().mean()
        if self.fault == 'gradient' and bad.any():
            # sqrt is 0 at 0, and its slope is infinite.
            loss = loss + (self.linear.weight * 0).abs().sqrt().sum()
        return dict(loss_square=loss, loss_other=self.linear.bias.square().mean(),
                    seen=bad.float().sum())


@OPTIM_WRAPPERS.register_module()
class AmpOnCPU(AmpOptimWrapper):
    """Mixed precision, which mmengine leaves to GPUs."""

    def __init__(self, dtype, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler('cpu', enabled=dtype == 'float16')
        self._scale_update_param = None

    @contextmanager
    def optim_context(self, model):
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield


@DATASETS.register_module()
class ToyImages(BaseDataset):

    def load_data_list(self):
        generator = torch.Generator().manual_seed(0)
        return [dict(number=number, values=torch.rand(3, generator=generator).tolist())
                for number in range(12)]

    def prepare_data(self, idx):
        info = self.get_data_info(idx)
        sample = BaseDataElement(metainfo=dict(img_id=idx, img_path=f'image {idx}.png'))
        return dict(inputs=torch.tensor(info['values']), data_samples=sample)


@pytest.fixture
def config(tmp_path):
    config = Config(dict(
        model=dict(type='Toy', fault='loss'),
        train_dataloader=dict(batch_size=2, num_workers=0, dataset=dict(type='ToyImages'),
                              sampler=dict(type='DefaultSampler', shuffle=False),
                              collate_fn=dict(type='pseudo_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        custom_hooks=[dict(type='FiniteNumbersHook')],
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=100)),
        randomness=dict(seed=0), experiment_name=tmp_path.name, work_dir=str(tmp_path / 'work')))
    config.dump(tmp_path / 'config.py')
    return config


def train(config):
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def find_hook(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, FiniteNumbersHook))


def is_finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize('clip', [None, dict(max_norm=1.)], ids=str)
@pytest.mark.parametrize('fault, words', [('loss', r'the loss is not finite \(loss_square=nan\)'),
                                          ('gradient', 'the gradient is not finite')])
def test_stops_before_the_weights_are_touched(config, tmp_path, fault, words, clip):
    config.model.fault, config.optim_wrapper.clip_grad = fault, clip
    runner = Runner.from_cfg(config)
    with pytest.raises(NonFiniteError, match=rf'iteration 3: {words}.*; images: image 4\.png, '
                                             r'image 5\.png; replay it with .*iter_3_rank_0.pth'):
        runner.train()
    assert is_finite(runner.model)
    about, weights, batches, states = read_dump(tmp_path / 'work/nonfinite/iter_3_rank_0.pth')
    torch.testing.assert_close(weights, runner.model.state_dict())
    assert about['passes'][0]['images'] == ['image 4.png', 'image 5.png']
    assert batches[0]['data_samples'][1].img_id == BAD and len(states) == 1


@pytest.mark.parametrize('fault', ['loss', 'gradient'])
def test_skipping_is_as_if_there_had_been_no_such_batch(config, fault):
    config.model.fault = fault
    config.custom_hooks[0].action = 'skip'
    runner = train(config)
    assert find_hook(runner).skipped == 1 and is_finite(runner.model)
    steps = runner.optim_wrapper.optimizer.state[runner.model.linear.weight]['step']
    assert int(steps) == 5 and int(runner.model.norm.num_batches_tracked) == 5


def test_skipping_has_an_end(config):
    config.custom_hooks[0].update(action='skip', max_consecutive=1)
    with pytest.raises(NonFiniteError, match='iteration 3'):
        train(config)


def test_finite_training_is_left_alone(config):
    config.model.fault = 'none'
    watched = train(config).model.state_dict()
    config.custom_hooks = []
    config.experiment_name += ' 2'
    torch.testing.assert_close(train(config).model.state_dict(), watched, rtol=0, atol=0)


def test_accumulation_names_all_images_of_the_update(config, tmp_path):
    config.optim_wrapper.accumulative_counts = 3
    with pytest.raises(NonFiniteError, match=r'iteration 3: .*image 0\.png.*image 5\.png'):
        train(config)
    about, _, batches, _ = read_dump(tmp_path / 'work/nonfinite/iter_3_rank_0.pth')
    assert len(batches) == len(about['passes']) == 3


class TestLossScale:

    @staticmethod
    def make_scaled(config, scale, **settings):
        config.model.fault = 'none'
        config.custom_hooks[0].update(settings)
        config.optim_wrapper.update(type='AmpOnCPU', dtype='float16')
        runner = Runner.from_cfg(config)
        runner.optim_wrapper = runner.build_optim_wrapper(config.optim_wrapper)
        runner.optim_wrapper.loss_scaler._init_scale = scale
        return runner

    def test_overflow_of_the_scaled_gradient_is_no_reason(self, config):
        runner = self.make_scaled(config, 2.**40)
        runner.train()
        assert find_hook(runner).skipped == 0 and is_finite(runner.model)
        assert runner.optim_wrapper.loss_scaler.get_scale() < 2.**40

    def test_overflow_that_never_ends_is(self, config):
        runner = self.make_scaled(config, 2.**60, max_overflows=2)
        with pytest.raises(NonFiniteError, match='2 times in a row whatever the loss scale'):
            runner.train()

    @pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
    def test_nan_in_the_loss(self, config, dtype):
        config.optim_wrapper.update(type='AmpOnCPU', dtype=dtype)
        runner = Runner.from_cfg(config)
        with pytest.raises(NonFiniteError, match='iteration 3: the loss .*image 5'):
            runner.train()
        assert is_finite(runner.model)


class TestReplay:

    @pytest.mark.parametrize('fault, broken, gradients', [
        ('loss', ['norm (BatchNorm1d)'], ['norm.weight', 'norm.bias', 'linear.weight',
                                          'linear.bias']),
        ('gradient', [], ['linear.weight']),
    ])
    def test_gives_the_same_terms(self, config, tmp_path, fault, broken, gradients):
        config.model.fault = fault
        config.dump(tmp_path / 'config.py')
        with pytest.raises(NonFiniteError):
            train(config)
        with DefaultScope.overwrite_default_scope('mmengine'):
            result = replay(str(tmp_path / 'config.py'),
                            tmp_path / 'work/nonfinite/iter_3_rank_0.pth')
        assert result.differences() == [] and result.broken_gradients == gradients
        assert [name for name in result.first_broken if name in broken] == result.first_broken
        assert set(result.terms[0]) == {'loss_square', 'loss_other', 'seen'}

    def test_another_file_is_refused(self, config, tmp_path):
        (tmp_path / 'text.pth').write_text('no dump')
        # Code in a pickle is not run.
        torch.save(dict(about=Path), tmp_path / 'code.pth')
        for name in ('text.pth', 'code.pth'):
            with pytest.raises(UsageError, match=rf'{name} is no dump of a batch: '):
                read_dump(tmp_path / name)
        with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
            read_dump(tmp_path / 'none.pth')

    def test_command(self, config, tmp_path, capsys):
        assert main(['replay', 'none.py', 'x']) == 2
        assert capsys.readouterr().err.startswith('error: config none.py')
        config.dump(tmp_path / 'config.py')
        (tmp_path / 'text.pth').write_text('no dump')
        assert main(['replay', str(tmp_path / 'config.py'), str(tmp_path / 'text.pth')]) == 2
        with pytest.raises(NonFiniteError):
            train(config)
        capsys.readouterr()
        dump = tmp_path / 'work/nonfinite/iter_3_rank_0.pth'
        assert main(['replay', str(tmp_path / 'config.py'), str(dump)]) == 0
        written = capsys.readouterr().out
        assert 'iteration 3 of epoch 1: the loss was not finite' in written
        assert 'image 5.png' in written and 'the terms are those of the training' in written
        assert 'first output that is not finite: norm (BatchNorm1d)' not in written
        assert '4 gradients are not finite' in written


def test_another_process_may_be_the_one(config, tmp_path, monkeypatch):
    """All stop together; only the process concerned keeps its batch."""
    config.model.fault = 'none'
    runner = Runner.from_cfg(config)
    hook, reduced = find_hook(runner), []

    def all_reduce(flag, op):
        reduced.append(op)
        flag.fill_(runner.iter < 1)

    monkeypatch.setattr(nan_guard.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(nan_guard.dist, 'all_reduce', all_reduce)
    other = [dict(images=['theirs.png'], terms=dict(loss_square=float('inf')))]
    monkeypatch.setattr(nan_guard.dist, 'all_gather_object', lambda value: [
        value, (True, other, 'nonfinite/iter_2_rank_1.pth')])
    with pytest.raises(NonFiniteError, match=r'iteration 2: the loss is not finite '
                                             r'\(loss_square=inf\); images: theirs\.png; replay '
                                             r'it with .*iter_2_rank_1\.pth'):
        runner.train()
    assert set(reduced) == {'min'} and hook.skipped == 1
    assert not (tmp_path / 'work/nonfinite').exists()


def test_packing_keeps_batches(tmp_path):
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    sample = DetDataSample(
        metainfo=dict(img_path='ä.png', scale_factor=(0.5, 2.), matrix=np.eye(2, dtype=np.float32),
                      unknown=object()),
        gt_instances=InstanceData(bboxes=HorizontalBoxes(torch.rand(2, 4)),
                                  labels=torch.tensor([1, 2])))
    batch = dict(inputs=[torch.rand(3, 2, 2)], data_samples=[sample])
    torch.save(pack(batch), tmp_path / 'batch.pth')
    again = unpack(torch.load(tmp_path / 'batch.pth', weights_only=True))
    torch.testing.assert_close(again['inputs'], batch['inputs'])
    found = again['data_samples'][0]
    assert isinstance(found, DetDataSample) and found.scale_factor == (0.5, 2.)
    assert found.matrix.dtype == np.float32 and found.unknown is None
    torch.testing.assert_close(found.gt_instances.bboxes.tensor, sample.gt_instances.bboxes.tensor)
    torch.testing.assert_close(found.gt_instances.labels, sample.gt_instances.labels)


@pytest.mark.parametrize('settings, words', [
    (dict(action='go'), "action='go' must be"), (dict(max_consecutive=0), 'max_consecutive=0')])
def test_bad_arguments(settings, words):
    with pytest.raises(ValueError, match=words):
        FiniteNumbersHook(**settings)
