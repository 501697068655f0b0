"""What the flags of the commands do to a config."""

import io
import logging

import pytest
import torch
from mmengine.config import Config

from spartan_mm.engine import launch
from spartan_mm.engine.signals import Interrupted
from spartan_mm.errors import CheckpointError


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / 'my_config.py'
    path.write_text('optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=0.1))\n')
    return str(path)


@pytest.fixture(params=['cuda'])
def device(request, monkeypatch):
    monkeypatch.setattr(launch, 'get_device', lambda: request.param)


WITHOUT_GPU = pytest.mark.parametrize('device', ['cpu'], indirect=True)


class TestLoadConfig:

    def test_work_dir(self, config_file):
        assert launch.load_config(config_file).work_dir == 'work_dirs/my_config'
        options = dict(work_dir='from config')
        assert launch.load_config(config_file, options=options).work_dir == 'from config'
        assert launch.load_config(config_file, 'flag', options).work_dir == 'flag'

    def test_options(self, config_file):
        cfg = launch.load_config(config_file, options={'optim_wrapper.optimizer.lr': 0.5},
                                 launcher='pytorch')
        assert cfg.optim_wrapper.optimizer.lr == 0.5
        assert cfg.launcher == 'pytorch'

    def test_old_mmengine_with_new_setuptools(self, config_file, monkeypatch):
        def fail(path):
            raise ModuleNotFoundError("No module named 'pkg_resources'", name='pkg_resources')

        monkeypatch.setattr(launch.Config, 'fromfile', fail)
        with pytest.raises(launch.UsageError, match=r"needs pkg_resources.*'setuptools<82'"):
            launch.load_config(config_file)

    def test_settings_that_nobody_reads(self, config_file):
        with pytest.raises(launch.UsageError, match='nobody reads total_epochs=3'):
            launch.load_config(config_file, options=dict(total_epochs=3))

    def test_no_file(self):
        with pytest.raises(FileNotFoundError, match='config no_such.py does not exist'):
            launch.load_config('no_such.py')


class TestAmp:

    @pytest.mark.parametrize('dtype, loss_scale', [('float16', 'dynamic'), ('bfloat16', 1.0)])
    def test_wrapper(self, config_file, device, dtype, loss_scale):
        cfg = launch.load_config(config_file)
        launch.use_amp(cfg, dtype)
        assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', optimizer=dict(lr=0.1),
                                         dtype=dtype, loss_scale=loss_scale)

    def test_other_wrapper(self, config_file, device):
        cfg = launch.load_config(config_file, options={'optim_wrapper.type': 'ApexOptimWrapper'})
        with pytest.raises(launch.UsageError, match='but the config has ApexOptimWrapper'):
            launch.use_amp(cfg)

    @WITHOUT_GPU
    def test_without_gpu(self, config_file, device):
        with pytest.raises(launch.UsageError, match='^--amp needs a GPU, and torch finds none'):
            launch.use_amp(launch.load_config(config_file))


@pytest.mark.parametrize('hooks', [[], [dict(type='EMAHook')]])
def test_channels_last(config_file, hooks):
    cfg = launch.load_config(config_file, options=dict(custom_hooks=hooks) if hooks else None)
    launch.use_channels_last(cfg)
    assert cfg.custom_hooks == [*hooks, dict(type='ChannelsLastHook', priority='VERY_HIGH')]


def test_learning_rate_scaling(config_file):
    cfg = launch.load_config(config_file)
    with pytest.raises(launch.UsageError, match='base_batch_size'):
        launch.scale_learning_rate(cfg)
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=16)
    launch.scale_learning_rate(cfg)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)


class TestMakeResumable:

    @pytest.mark.parametrize('loop', [dict(type='EpochBasedTrainLoop'), dict(by_epoch=True)])
    def test_mmengine_s_parts_are_replaced(self, loop):
        cfg = Config(dict(
            train_cfg=dict(loop, max_epochs=3), custom_hooks=[dict(type='EMAHook')],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2))))
        launch.make_resumable(cfg, 100)
        assert cfg.train_cfg == dict(type='ResumableTrainLoop', max_epochs=3)
        assert cfg.default_hooks.checkpoint == dict(
            type='ResumableCheckpointHook', interval=2, every_iters=100)
        assert cfg.custom_hooks == [dict(type='EMAHook'), dict(type='LeaveOnSignalHook')]

    def test_the_config_that_an_earlier_run_left(self):
        cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=3)))
        launch.make_resumable(cfg)
        again = Config.fromstring(cfg.dump(), '.py')
        launch.make_resumable(again)
        assert again.to_dict() == cfg.to_dict()

    def test_nothing_is_configured(self, config_file):
        cfg = launch.load_config(config_file)
        launch.make_resumable(cfg)
        assert cfg.default_hooks.checkpoint == dict(type='ResumableCheckpointHook', interval=1)

    def test_the_config_s_own_parts_stay(self):
        own = dict(train_cfg=dict(by_epoch=False, max_iters=3),
                   default_hooks=dict(checkpoint=dict(type='OwnHook')))
        cfg = Config(own)
        launch.make_resumable(cfg)
        assert cfg.train_cfg == own['train_cfg']
        assert cfg.default_hooks == own['default_hooks']
        with pytest.raises(launch.UsageError, match='--save-every needs .*CheckpointHook'):
            launch.make_resumable(Config(own), 5)

    def test_save_every_nothing(self, config_file):
        with pytest.raises(launch.UsageError, match='--save-every 0: must be at least 1'):
            launch.make_resumable(launch.load_config(config_file), 0)


class TestResume:

    @pytest.fixture
    def checkpoint(self, tmp_path):
        path = tmp_path / 'run' / 'epoch_1.pth'
        path.parent.mkdir()
        torch.save(dict(meta=dict(epoch=1, iter=8, seed=11), optimizer={}, state_dict={}), path)
        return str(path)

    @pytest.mark.parametrize('how', ['by name', 'auto'])
    @pytest.mark.parametrize('seed', [None, 3])
    def test_from_a_checkpoint(self, config_file, checkpoint, tmp_path, how, seed):
        cfg = launch.load_config(config_file, str(tmp_path / 'run'))
        launch.set_randomness(cfg, seed, deterministic=True)
        launch.resume_from(cfg, 'auto' if how == 'auto' else checkpoint)
        assert (cfg.resume, cfg.load_from) == (True, checkpoint)
        assert cfg.randomness == dict(seed=11, deterministic=True)

    def test_from_the_beginning(self, config_file, tmp_path):
        options = dict(load_from='weights.pth')
        cfg = launch.load_config(config_file, str(tmp_path / 'empty'), options)
        launch.resume_from(cfg, 'auto')
        assert (cfg.resume, cfg.load_from) == (False, 'weights.pth')

    def test_damaged(self, config_file, checkpoint):
        with open(checkpoint, 'r+b') as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match=r'epoch_1\.pth'):
            launch.resume_from(launch.load_config(config_file), checkpoint)


@pytest.mark.parametrize('error, leaving, code, printed', [
    (launch.UsageError('no such thing'), SystemExit, 'error: no such thing', ''),  # the status is 1
    (Interrupted('SIGTERM received', 15), SystemExit, 143, 'SIGTERM received\n'),
    (KeyError('slip'), KeyError, None, ''),
], ids=['one that explains itself', 'a signal', 'another'])
def test_reporting(capsys, error, leaving, code, printed):
    with pytest.raises(leaving) as left, launch.reporting():
        raise error
    assert getattr(left.value, 'code', None) == code and capsys.readouterr().err == printed


def test_a_message_that_cannot_be_written_ends_nothing(capsys):
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(launch._make_printable)
    for message, arguments in (('%d%', (3, )), ('a\x1b[2J: %s', ('\x07', ))):
        handler.handle(logging.LogRecord('', 0, '', 0, message, arguments, None))
    assert handler.stream.getvalue() == 'a\\x1b[2J: \\x07\n'
    assert 'Logging error' in capsys.readouterr().err


@pytest.mark.parametrize('function', [launch.resume_from, launch.load_weights])
def test_no_checkpoint(config_file, function):
    with pytest.raises(FileNotFoundError, match='checkpoint no_such.pth does not exist'):
        function(launch.load_config(config_file), 'no_such.pth')


def test_randomness(config_file):
    cfg = launch.load_config(config_file)
    launch.set_randomness(cfg)
    assert cfg.randomness == dict(seed=None)
    launch.set_randomness(cfg, 3, deterministic=True)
    assert cfg.randomness == dict(seed=3, deterministic=True)
    launch.set_randomness(cfg)
    assert cfg.randomness == dict(seed=3, deterministic=True)


@pytest.mark.parametrize('scope, kind', [('mmdet', 'DumpDetResults'),
                                         ('mmpretrain', 'DumpResults')])
@pytest.mark.parametrize('several', [False, True])
def test_keep_predictions(scope, kind, several):
    metric = dict(type='SomeMetric')
    cfg = Config(dict(default_scope=scope, test_evaluator=[metric] if several else metric))
    launch.keep_predictions(cfg, 'out.pkl')
    metrics = [metric, dict(type=kind, out_file_path='out.pkl')]
    assert cfg.test_evaluator == metrics
    cfg.test_evaluator = dict(type='Own', metrics=metric)
    launch.keep_predictions(cfg, 'out.pkl')
    assert cfg.test_evaluator == dict(type='Own', metrics=metrics)


def test_settings_that_are_none(config_file):
    cfg = launch.load_config(config_file)
    cfg.auto_scale_lr = cfg.default_hooks = None
    with pytest.raises(launch.UsageError, match='set auto_scale_lr = dict'):
        launch.scale_learning_rate(cfg)
    with pytest.raises(launch.UsageError, match='need a visualization hook'):
        launch.visualize(cfg)


class TestVisualize:

    @pytest.mark.parametrize('kind, draw, folder', [
        ('DetVisualizationHook', 'draw', 'test_out_dir'),
        ('VisualizationHook', 'enable', 'out_dir'),
    ])
    def test_hook(self, kind, draw, folder):
        cfg = Config(dict(default_hooks=dict(visualization=dict(type=kind))))
        launch.visualize(cfg, show_dir='pictures')
        assert cfg.default_hooks.visualization == {
            'type': kind, draw: True, folder: 'pictures', 'show': False}

    def test_no_hook(self, config_file):
        with pytest.raises(launch.UsageError, match='need a visualization hook'):
            launch.visualize(launch.load_config(config_file), show=True)


class TestDistributed:

    def test_more_processes_than_gpus(self, config_file, device, monkeypatch):
        monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
        monkeypatch.setenv('LOCAL_RANK', '2')
        with pytest.raises(launch.UsageError, match=r'process 2 .* has no GPU: torch sees 2\.'):
            launch.build_runner(launch.load_config(config_file, launcher='pytorch'))

    @WITHOUT_GPU
    def test_slurm_launcher_needs_gpus(self, config_file, device):
        with pytest.raises(launch.UsageError, match='--launcher slurm needs GPUs'):
            launch.build_runner(launch.load_config(config_file, launcher='slurm'))
