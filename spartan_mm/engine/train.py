"""A training, from its config to its last checkpoint; and one on data alone."""
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from ..backbones.fused import fuse
from ..datasets.evaluators import check_evaluator
from ..datasets.preflight import PreflightHook, check_batches
from ..errors import UsageError
from ..model_index import root
from . import launch
from .agreement import ResumeCheckHook
from .data_config import prepare
from .finetune import FineTuneHook
from .hooks import BackboneCheckHook, ClampPositionsHook
from .loggers import add_loggers


def train_config(cfg: Config, *, amp: str | None = None, channels_last: bool = False,
                 compile: str | None = None, auto_scale_lr: bool = False, seed: int | None = None,
                 deterministic: bool = False, save_every: int | None = None,
                 resume: str | None = None, fused: bool = True,
                 loggers: Sequence[str] = ()) -> Runner:
    """Train as a config describes.

    Args:
        cfg: The config, as :func:`.load_config` gives it; changed in place.
        amp: 'float16' or 'bfloat16' for automatic mixed precision.
        channels_last: Whether weights and maps are laid out with the channels last.
        compile: A mode of torch.compile; None for what the config says.
        auto_scale_lr: Whether the learning rate is scaled to the real total batch size.
        seed: Of all random numbers; None for the config's.
        deterministic: Whether torch uses deterministic algorithms wherever it has them.
        save_every: Number of iterations between checkpoints in the middle of epochs.
        resume: A checkpoint to go on from, or 'auto' for the latest of the work dir.
        fused: Whether blocks take the form that is fast to train on a CPU, there.
        loggers: What else shows the training, see :func:`.add_loggers`.

    Returns:
        The runner, after its last epoch.
    """
    if amp:
        launch.use_amp(cfg, amp)
    if channels_last:
        launch.use_channels_last(cfg)
    launch.use_compile(cfg, compile)
    if auto_scale_lr:
        launch.scale_learning_rate(cfg)
    launch.set_randomness(cfg, seed, deterministic)
    launch.make_resumable(cfg, save_every)
    check_evaluator(cfg, 'val')
    overruled = None
    if resume or cfg.get('resume'):
        overruled = launch.resume_from(cfg, resume or cfg.get('load_from') or 'auto')
    runner = launch.build_runner(cfg, 'train')
    add_loggers(runner, loggers)
    # Ahead of hooks that load the checkpoint themselves.
    runner.register_hook(FineTuneHook(), priority='HIGHEST')
    runner.register_hook(ResumeCheckHook(overruled), priority='HIGHEST')
    runner.register_hook(PreflightHook(), priority='HIGHEST')
    runner.register_hook(BackboneCheckHook(), priority='HIGHEST')
    runner.register_hook(ClampPositionsHook())
    if fused and get_device() == 'cpu':
        fuse(runner.model)
    # Here, since a schedule that counts in epochs cannot be built for epochs of no iterations.
    check_batches(runner.train_loop.dataloader, 'train')
    runner.train()
    return runner


def train(model: str | None = None, data: str | Path | None = None, *,
          work_dir: str | Path | None = None, epochs: int | None = None,
          weights: str | Path | None = None, gpus: int = 1, batch_size: int | str | None = None,
          size: int | None = None, seed: int | None = None, deterministic: bool = False,
          resume: bool = False, options: Mapping[str, Any] | None = None) -> Path:
    """Train a model on a folder of data, as ``spartan-mm train DATA`` does.

    Args:
        model: The name of a model, or a config; None for one that the data is for.
        data: A folder in COCO's, Roboflow's, YOLO's or Pascal VOC's format, or with a folder of
            pictures for each class; or a COCO file, or YOLO's ``data.yaml``.
        work_dir: Where the config, the logs and the checkpoints go; None for
            ``work_dirs/<model>_<name of the data>``.
        epochs: Number of epochs; None for those of the recipe.
        weights: What to start from, a detector's checkpoint or a classifier's.
        gpus: Number of processes, one for each GPU.
        batch_size: Images a step of a process; 'auto' for as many as fit on the GPU.
        size: Side of the images in pixels.
        seed: Of the training and of the pictures that are held out for validation.
        deterministic: Whether torch uses deterministic algorithms wherever it has them.
        resume: Whether to go on from the latest checkpoint of the work dir, if there is one.
        options: Other settings of the config, with dots in the keys.

    Returns:
        The checkpoint to use: the best in validation, or else the last.

    Raises:
        DataError: The data is not what it should be.
        UsageError: Arguments do not go together, or the work dir has another config.

    Example:
        >>> checkpoint = train(data='my_pictures', epochs=20)  # doctest: +SKIP
    """
    if data is None:
        raise UsageError("train needs data, such as train(data='my_pictures')")
    config = prepare(data, model, work_dir=work_dir, epochs=epochs, weights=weights, gpus=gpus,
                     batch_size=batch_size, size=size, seed=seed, deterministic=deterministic,
                     options=options)
    flags = ['--resume'] if resume else []
    if gpus > 1:
        command, environment = torchrun(gpus, [str(config), *flags])
        if status := subprocess.run(command, env=environment).returncode:
            raise UsageError(f'the training of {gpus} processes ended with status {status}; what '
                             'it printed says why')
    else:
        train_config(launch.load_config(str(config), split='train'),
                     resume='auto' if resume else None)
    return find_best(config.parent)


def find_best(work_dir: Path) -> Path:
    """Find the checkpoint of a training to use: the best in validation, or else the last."""
    best = sorted(work_dir.glob('best_*.pth'), key=os.path.getmtime)
    last = work_dir / 'last_checkpoint'
    return best[-1] if best else work_dir / Path(last.read_text().strip()).name


def torchrun(gpus: int, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that trains in several processes, and its environment.

    Args:
        gpus: Number of processes.
        words: What follows ``spartan-mm train``.
    """
    script = root() / 'tools' / 'torchrun.sh'
    return (['bash', str(script), 'train.py', str(gpus), *words],
            dict(os.environ, PYTHON=sys.executable))
