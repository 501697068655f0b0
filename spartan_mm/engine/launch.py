"""From command line flags to a runner: what the commands that train and test share.

A function that takes a config, ``cfg``, and returns nothing changes it in place.
"""

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from ..datasets.check import build_loader
from ..datasets.evaluators import find_metrics
from ..datasets.settings import check_loaders
from ..errors import ExplainedError, UsageError
from ..files import check_writable
from ..model_index import find_config
from ..text import count, printable
from ..weights.initialize import without_pretrained
from .claim import claim_work_dir
from .explain import explain
from .resume import find_resumable, read_resumable
from .settings import check_run, settle
from .signals import Interrupted

# Per visualization hook: the switch that makes it draw, and the folder it draws into.
VISUALIZATION_HOOKS = {
    'DetVisualizationHook': ('draw', 'test_out_dir'),
    'VisualizationHook': ('enable', 'out_dir'),
}

#: What the whole config is called in a work dir whose own config lies there.
WHOLE_CONFIG = 'whole_config.py'

#: How long one process waits for another before it gives up, in seconds, unless the config's
#: env_cfg.dist_cfg.timeout says otherwise. The evaluation of a large dataset in one process, which
#: the others wait for, has to fit in.
TIMEOUT = 1800

#: What the system says of a file that is not there, or of one that is in the way of another.
IN_THE_WAY = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
              PermissionError)


def load_config(path: str, work_dir: str | None = None, options: dict[str, Any] | None = None,
                launcher: str = 'none', split: str | None = None) -> Config:
    """Read a config and apply the flags that every command has.

    Args:
        path: The config file, or the name of a model, see :func:`spartan_mm.list_models`.
        work_dir: Folder for logs and results; None for the config's own, else
            ``./work_dirs/<name of the config>``.
        options: Settings to override, with dots in the keys.
        launcher: What started the processes: 'none', 'pytorch', 'slurm' or 'mpi'.
        split: What it is for, 'train' or 'test'; None for neither.

    Raises:
        UsageError: There is no such file or model, a setting has a form that nobody reads, or the
            config lacks what is needed.
    """
    try:
        cfg = Config.fromfile(find_config(path))
    except ModuleNotFoundError as error:
        if error.name != 'pkg_resources':
            raise
        # mmengine 0.10.7 and older find the package of a base such as mmdet::... with it.
        raise UsageError(f'reading {path} needs pkg_resources, which setuptools has no more from '
                         "82 on; install 'setuptools<82' or a newer mmengine") from error
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError) as error:
        raise UsageError(f'--cfg-options do not fit {path}: {error.args[0]}') from error
    settle(cfg, options or {})
    if split is not None:
        check_run(cfg, split)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    elif _is_own(cfg):
        # mmengine's runner writes the whole config under this name.
        object.__setattr__(cfg, '_filename', str(Path(cfg.work_dir, WHOLE_CONFIG)))
        cfg.setdefault('experiment_name', Path(cfg.work_dir).name)
    return cfg


def choose_device(device: str | None = None) -> str:
    """Check that there is a device, or choose one.

    Args:
        device: Such as 'cpu' or 'cuda:0'; None for a GPU if there is one, else the CPU.

    Raises:
        UsageError: If torch has no such device.
    """
    device = device or get_device()
    try:
        torch.empty(0, device=device)
    # Of what torch is built without, an AssertionError or a NotImplementedError.
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        if not device.startswith('cuda'):
            reason = "torch cannot use it here; take one such as 'cpu' or 'cuda:0'"
        elif gpus:
            reason = f'torch finds {count(gpus, "GPU")}, counted from 0'
        else:
            reason = "torch finds no GPU; take 'cpu'"
        raise UsageError(f'device {device!r}: {reason}') from error
    return device


def use_amp(cfg: Config, dtype: str = 'float16') -> None:
    """Train in automatic mixed precision.

    Args:
        dtype: 'float16', with dynamic loss scaling, or 'bfloat16', which needs none.

    Raises:
        UsageError: There is no GPU, or the config's optimizer wrapper is neither ``OptimWrapper``
            nor ``AmpOptimWrapper``.
    """
    if get_device() == 'cpu':
        raise UsageError('--amp needs a GPU, and torch finds none; drop the flag to train in '
                         'float32')
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UsageError(f'--amp replaces OptimWrapper by AmpOptimWrapper, but the config has '
                         f'{wrapper}; drop the flag and set the precision in the config')
    # bfloat16 has float32's range: gradients do not underflow.
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype,
                             loss_scale='dynamic' if dtype == 'float16' else 1.0)


def use_channels_last(cfg: Config) -> None:
    """Lay weights and maps out with the channels last."""
    _add_hook(cfg, type='ChannelsLastHook', priority='VERY_HIGH')


def use_compile(cfg: Config, mode: str | None = None) -> None:
    """Compile the model's parts with ``torch.compile``, see :class:`CompileHook`.

    A config asks for it with ``compile=True``, a mode, or a dict of torch.compile's options.

    Args:
        mode: A mode of torch.compile; None for what the config says.
    """
    wanted = mode or cfg.get('compile')
    if not wanted:
        return
    options = {} if wanted is True else dict(mode=wanted) if isinstance(wanted, str) else wanted
    cfg.compile = False
    _add_hook(cfg, **options, type='CompileHook')


def scale_learning_rate(cfg: Config) -> None:
    """Scale the learning rate by the ratio of the real total batch size to the one of the recipe.

    Raises:
        UsageError: If the config does not state the recipe's total batch size.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UsageError('--auto-scale-lr needs the total batch size that the learning rate is '
                         'meant for: set auto_scale_lr = dict(base_batch_size=...) in the config')
    cfg.auto_scale_lr.enable = True


def make_resumable(cfg: Config, every_iters: int | None = None) -> None:
    """Let a training be interrupted at any moment, and go on as if nothing had happened.

    mmengine's checkpoint hook and its loop by epochs are replaced by ``ResumableCheckpointHook``
    and ``ResumableTrainLoop``; others that the config names stay. ``LeaveOnSignalHook`` is added.

    Args:
        every_iters: Number of iterations between checkpoints in the middle of epochs; None for the
            config's.

    Raises:
        UsageError: ``every_iters`` is less than 1, or the config has a checkpoint hook of its own.
    """
    loop = dict(cfg.get('train_cfg') or {})
    if loop.get('type') == 'EpochBasedTrainLoop' or loop.pop('by_epoch', False):
        cfg.train_cfg = dict(loop, type='ResumableTrainLoop')
    checkpoint = _replace_hook(cfg, 'checkpoint', 'ResumableCheckpointHook',
                               type='CheckpointHook', interval=1)
    if every_iters is not None:
        if every_iters < 1:
            raise UsageError(f'--save-every {every_iters}: must be at least 1')
        if checkpoint is None or checkpoint.type != 'ResumableCheckpointHook':
            raise UsageError('--save-every needs default_hooks.checkpoint.type=CheckpointHook in '
                             'the config')
        checkpoint.every_iters = every_iters
    _add_hook(cfg, type='LeaveOnSignalHook')


def resume_from(cfg: Config, checkpoint: str) -> int | None:
    """Continue an interrupted training.

    Its seed is taken from the checkpoint.

    Args:
        checkpoint: A checkpoint of that training, or 'auto' for the latest whole one in
            ``work_dir``; if there is none, the training starts from the beginning.

    Returns:
        The config's seed, if it is another one.

    Raises:
        FileNotFoundError: If the checkpoint is a local path that does not exist.
        CheckpointError: If it is damaged, or with 'auto' all there are.
    """
    if checkpoint == 'auto':
        found = find_resumable(cfg.work_dir)
    else:
        _check_exists(checkpoint)
        found = read_resumable(checkpoint)
    cfg.resume = found is not None
    if found is None:
        print_log(f'no checkpoint in {cfg.work_dir} to resume from: starting from the beginning',
                  'current', logging.WARNING)
        return None
    print_log(f'resuming from {found.path}', 'current')
    cfg.load_from = found.path
    asked = (cfg.get('randomness') or {}).get('seed')
    set_randomness(cfg, found.seed)
    return None if found.seed is None or asked == found.seed else asked


def load_weights(cfg: Config, checkpoint: str) -> None:
    """Start from the weights of a checkpoint.

    Args:
        checkpoint: A local path or a URL.

    Raises:
        FileNotFoundError: If it is a local path that does not exist.
    """
    _check_exists(checkpoint)
    cfg.resume = False
    cfg.load_from = checkpoint


def set_randomness(cfg: Config, seed: int | None = None, deterministic: bool = False) -> None:
    """Fix the random numbers, as far as the arguments go beyond the config's own ``randomness``.

    Args:
        seed: Seed of Python's, NumPy's and torch's generators; None for the config's.
        deterministic: Whether torch uses deterministic algorithms wherever it has them.
    """
    settings = dict(seed=seed, deterministic=deterministic or None)
    cfg.randomness = dict(seed=None) | dict(cfg.get('randomness') or {}) | {
        name: value for name, value in settings.items() if value is not None}


def keep_predictions(cfg: Config, path: str) -> None:
    """Write the predictions of a test to a pickle file, beside evaluating them.

    Args:
        path: The file, ending in .pkl or .pickle.
    """
    kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
    evaluator = cfg.test_evaluator
    metrics = [*find_metrics(evaluator), dict(type=kind, out_file_path=path)]
    cfg.test_evaluator = dict(evaluator, metrics=metrics) if 'metrics' in evaluator else metrics


def use_tta(cfg: Config) -> None:
    """Test each image as it is and mirrored, and merge what is predicted, as the toolboxes do it.

    The config's ``tta_model`` and ``tta_pipeline`` say it otherwise.
    """
    detector = cfg.get('default_scope') == 'mmdet'
    if 'tta_model' not in cfg:
        kept = (cfg.model.get('test_cfg') or {}).get('max_per_img', 100)
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(
            nms=dict(type='nms', iou_threshold=0.5), max_per_img=kept)) if detector else dict(
                type='AverageClsScoreTTA')
    datasets = [cfg.test_dataloader.dataset]
    for dataset in datasets:
        parts = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
        datasets += parts
        if parts:
            continue
        *steps, pack = dataset.pipeline
        if detector:
            pack = dict(pack, meta_keys=(*pack.get('meta_keys', (
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')), *(
                    'flip', 'flip_direction')))
        flips = [dict(type='RandomFlip', prob=prob) for prob in (0., 1.)]
        views = dict(type='TestTimeAug', transforms=[flips, [pack]])
        dataset.pipeline = cfg.get('tta_pipeline') or [*steps, views]
    _add_hook(cfg, type='PrepareTTAHook', tta_cfg=cfg.tta_model)


def visualize(cfg: Config, show: bool = False, show_dir: str | None = None,
              wait_time: float = 2.) -> None:
    """Draw predictions while testing.

    Args:
        show: Whether to open a window for each picture.
        show_dir: Folder in ``work_dir`` to write the pictures to.
        wait_time: How long a window stays open, in seconds.

    Raises:
        UsageError: If the config has no visualization hook this function knows.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None or hook.type not in VISUALIZATION_HOOKS:
        raise UsageError(
            '--show and --show-dir need a visualization hook: set default_hooks = dict('
            f"visualization=dict(type=...)) in the config, one of {', '.join(VISUALIZATION_HOOKS)}")
    draw, out_dir = VISUALIZATION_HOOKS[hook.type]
    hook[draw] = True
    hook.show = show
    if show:
        hook.wait_time = wait_time
    if show_dir is not None:
        hook[out_dir] = show_dir


def build_runner(cfg: Config, split: str = 'test') -> Runner:
    """Set up the processes and build the runner that the config describes.

    Args:
        split: 'train' for a training, which claims the work dir for itself, or 'test'.

    Raises:
        UsageError: Another training uses the work dir.
        UnwritableError: There can be no such work dir.
    """
    if cfg.launcher != 'none':
        _prepare_distributed(cfg)
    _check_work_dir(cfg)
    claim = claim_work_dir(cfg.work_dir) if split == 'train' else None
    if cfg.get('load_from'):
        # All weights come from there: those of a pretrained backbone would be read in vain.
        cfg.model = without_pretrained(cfg.model)
    _replace_hook(cfg, 'logger', 'OneWriterLoggerHook', type='LoggerHook')
    check_loaders(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.build_dataloader = partial(build_loader, runner.build_dataloader, cfg)
    for handler in runner.logger.handlers:
        handler.addFilter(_make_printable)
    if (cfg.get('randomness') or {}).get('deterministic'):
        # mmengine lets torch refuse what has no deterministic algorithm, such as the gradient of
        # grid_sample on a GPU, which deformable attention needs.
        torch.use_deterministic_algorithms(True, warn_only=True)
    # For as long as there is the runner.
    runner.claim = claim
    return runner


@contextmanager
def reporting() -> Iterator[None]:
    """Be the frame of a command: an error ends it with one line and status 1.

    A traceback goes before that line unless the error explains itself, as those of settings and of
    files in the way do, too. A process that is one of several ends at once, whatever it is doing,
    so that torchrun or Slurm end the others. What left on a signal, such as Ctrl-C, ends with
    status 128 + the signal's number.
    """
    try:
        yield
    except Interrupted as interruption:
        _leave(str(interruption), 128 + interruption.number)
    except KeyboardInterrupt:
        if dist.get_world_size() == 1:
            raise
        _leave('stopped by Ctrl-C', 128 + signal.SIGINT)
    except ExplainedError as error:
        _leave(f'error: {error}', 1)
    except IN_THE_WAY as error:
        _leave(f'error: {printable(error)}', 1)
    except Exception as error:
        if explanation := explain(error):
            _leave(f'error: {printable(explanation)}', 1)
        if dist.get_world_size() == 1:
            raise
        traceback.print_exc()
        _leave(f'error: process {dist.get_rank()} of {dist.get_world_size()} failed: '
               f'{type(error).__name__}: {printable(error)}', 1)
    else:
        if dist.is_distributed():
            torch.distributed.destroy_process_group()


def _leave(message: str, status: int) -> None:
    if dist.get_world_size() == 1 and status == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    if dist.get_world_size() == 1:
        sys.exit(status)
    # Leaving the process group in order could wait for the others, which wait for this process.
    sys.stdout.flush()
    os._exit(status)


def _replace_hook(cfg: Config, role: str, ours: str, **default: Any) -> dict[str, Any] | None:
    """Replace mmengine's hook for a role, which it adds by default; return what there is now."""
    hooks = {role: default, **(cfg.get('default_hooks') or {})}
    # None is for a run without.
    if hooks[role] is not None and hooks[role]['type'] == default['type']:
        hooks[role] = dict(hooks[role], type=ours)
    cfg.default_hooks = hooks
    return cfg.default_hooks[role]


def _add_hook(cfg: Config, **settings: Any) -> None:
    """Add a hook, unless the config has it: it may be what an earlier run left in its work dir."""
    hooks = cfg.get('custom_hooks') or []
    cfg.custom_hooks = [*hooks, *([] if settings in hooks else [settings])]


def _check_exists(checkpoint: str) -> None:
    if '://' not in checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'checkpoint {checkpoint} does not exist')


def _make_printable(record: logging.LogRecord) -> bool:
    """Escape what would steer a terminal in a line of the log; tables keep their lines."""
    try:
        text = record.getMessage()
    except Exception:
        return True  # for logging to report, which does not end the run
    record.msg, record.args = re.sub(r'[^\n\t]+', lambda part: printable(part[0]), text), ()
    return True


def _check_work_dir(cfg: Config) -> None:
    """Check that there is a work dir, and that the config that goes there replaces no other."""
    source = Path(cfg.filename or 'config.py')
    target = check_writable(Path(cfg.work_dir, source.name))
    if target.exists() and source.exists() and target.samefile(source) and _is_written(source):
        raise UsageError(f'work dir {cfg.work_dir}: the whole config, which is kept there, '
                         f'would replace {source}; name another folder')


def _is_own(cfg: Config) -> bool:
    """Whether a config that somebody wrote lies in the work dir that it names."""
    source = Path(cfg.filename)
    return Path(cfg.work_dir).resolve() == source.resolve().parent and _is_written(source)


def _is_written(source: Path) -> bool:
    """Whether a config was written by somebody: one that a run wrote has none of these."""
    return any(line.startswith(('_base_', '#', 'import ', 'from '))
               for line in source.read_text('utf-8').splitlines())


def _prepare_distributed(cfg: Config) -> None:
    dist_cfg = dict((cfg.get('env_cfg') or {}).get('dist_cfg') or {})
    dist_cfg.setdefault('timeout', TIMEOUT)
    if get_device() != 'cpu':
        local_rank = int(os.environ.get('LOCAL_RANK', 0))
        gpus = torch.cuda.device_count()
        if gpus and local_rank >= gpus:
            raise UsageError(f'process {local_rank} of this node has no GPU: torch sees {gpus}. '
                             'Start as many processes as there are GPUs')
        cfg.merge_from_dict({'env_cfg.dist_cfg': dist_cfg})
        # As mmengine does, which keeps what is there, but before anything is written.
        set_multi_processing(**cfg.env_cfg.get('mp_cfg', {}), distributed=True)
        dist.init_dist(cfg.launcher, **dist_cfg)
        return

    if cfg.launcher != 'pytorch':
        raise UsageError(f'--launcher {cfg.launcher} needs GPUs, and torch finds none; to run '
                         'several processes on CPUs, use tools/dist_train.sh or dist_test.sh')
    # mmengine sets a CUDA device before it joins the group, so the group is made here: it keeps
    # one that is there.
    dist_cfg['backend'] = 'gloo'
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=dist_cfg['timeout']))
    cfg.merge_from_dict({'env_cfg.dist_cfg': dist_cfg})

    # mmengine's own default wrapper names a device id, which torch refuses for a model on the CPU.
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel', broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)

    if cfg.get('sync_bn') is not None:
        print_log('sync_bn is ignored: synchronized batch norm needs GPUs', 'current')
        cfg.sync_bn = None
