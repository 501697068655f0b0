"""Trainings in TensorBoard, MLflow and the like, through mmengine's backends."""
import os
import re
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine import dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, VISBACKENDS, VISUALIZERS
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend, Visualizer
from mmengine.visualization.vis_backend import force_init_env

from ..datasets.images import load_image
from ..errors import UsageError
from ..requirements import require
from ..text import first_line

#: What the runs belong to, where programs sort them.
PROJECT = 'spartan-mm'
#: What MLflow takes as the value of a parameter in all its versions.
_LONGEST = 250


class Logger(NamedTuple):
    """Where a training is shown.

    Attributes:
        backend: mmengine's class, or one made of it.
        module: What has to be installed.
        minimum: Its oldest version, if an extra of this package installs it.
    """

    backend: str
    module: str
    minimum: str | None = None


LOGGERS = {
    'tensorboard': Logger('TensorboardVisBackend', 'tensorboard', '2.12'),
    'mlflow': Logger('ResumableMLflowVisBackend', 'mlflow', '2.10'),
    'wandb': Logger('WandbVisBackend', 'wandb'),
    'clearml': Logger('ClearMLVisBackend', 'clearml'),
    'neptune': Logger('NeptuneVisBackend', 'neptune'),
    'dvclive': Logger('DVCLiveVisBackend', 'dvclive'),
    'aim': Logger('AimVisBackend', 'aim'),
}


def require_loggers(names: Sequence[str]) -> None:
    """Insist that what loggers need is installed.

    Raises:
        RequirementError: The package of one is missing, or too old.
        UsageError: One is not known, or its package is missing, which no extra installs.
    """
    for name in names:
        if name not in LOGGERS:
            raise UsageError(f'logger {name}: must be one of {", ".join(LOGGERS)}')
        _, module, minimum = LOGGERS[name]
        if minimum is not None:
            require(module, minimum, 'loggers')
        elif find_spec(module) is None:
            raise UsageError(f'the logger {name} needs {module}, which is not installed; install '
                             f'it with `pip install {module}`')


def add_loggers(runner: Runner, names: Sequence[str]) -> None:
    """Show a training in other programs, too, under the name of its work dir.

    They get the config, all that is logged, and pictures of predictions. A resumed training goes on
    with its run in TensorBoard, MLflow and Weights & Biases. What they write without a server lies
    in the work dir.

    NOTE: The config stays as it is: mmengine's way, ``visualizer.vis_backends``, would log each
    test of a config from a work dir, too.

    Args:
        runner: The runner, before it trains.
        names: Of `LOGGERS`.
    """
    if not names:
        return
    backends = runner.visualizer._vis_backends
    for name in dict.fromkeys(names):
        kind = LOGGERS[name].backend
        if kind in backends:
            continue  # the config's own
        backends[kind] = VISBACKENDS.build(_settings(runner, name))
        if dist.is_main_process():
            backends[kind].add_config(runner.cfg)
    runner.register_hook(PredictionPicturesHook())


def _settings(runner: Runner, name: str) -> dict[str, Any]:
    """The settings of a backend."""
    work_dir, resume = Path(runner.work_dir).absolute(), runner._resume
    folder = work_dir / name
    settings: dict[str, Any] = dict(type=LOGGERS[name].backend, save_dir=str(folder))
    if name == 'mlflow':
        settings.update(exp_name=PROJECT, run_name=work_dir.name, resume=resume)
    elif name == 'wandb':
        run = _find_run(folder, resume) or _keep_run(folder, secrets.token_hex(4))
        settings['init_kwargs'] = dict(project=PROJECT, name=work_dir.name, resume='allow', id=run)
    elif name == 'clearml':
        settings['init_kwargs'] = dict(project_name=PROJECT, task_name=work_dir.name)
    elif name == 'neptune':
        settings['init_kwargs'] = dict(name=work_dir.name)
    return settings


def _find_run(folder: Path, resume: bool) -> str | None:
    """Find the run to go on with."""
    file = folder / 'run_id'
    return file.read_text('utf-8').strip() or None if resume and file.is_file() else None


def _keep_run(folder: Path, run: str) -> str:
    """Remember a run, in the first process, which alone writes to it."""
    if dist.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'run_id').write_text(run, 'utf-8')
    return run


@VISBACKENDS.register_module()
class ResumableMLflowVisBackend(MLflowVisBackend):
    """MLflow, where a resumed training goes on with its run.

    What it writes goes to the server that the variable MLFLOW_TRACKING_URI names, else to files in
    `save_dir`.

    NOTE: mmengine's backend starts a run at each start, ends a training whose config has a name or
    a text that MLflow refuses, gives every picture the same name, and copies all logs at the end,
    its own store's among them. Newer versions of MLflow write files only if a variable of the
    environment allows it.

    Args:
        save_dir: Folder for files.
        run_name: Name of a new run.
        resume: Whether to go on with the run before, if there is one.
        kwargs: Further arguments of mmengine's backend.
    """

    def __init__(self, save_dir: str, run_name: str | None = None, resume: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(save_dir, **kwargs)
        self._name = run_name
        self._resume = resume
        self._goes_on = False

    def _init_env(self) -> None:
        """Start a run, or go on with one.

        Raises:
            UsageError: There is no server, or no place for files.
        """
        self._tracking_uri = self._tracking_uri or os.environ.get('MLFLOW_TRACKING_URI')
        if self._tracking_uri is None:
            os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')
        from mlflow import MlflowException
        try:
            super()._init_env()
            self._mlflow.end_run()
            self._start_run()
        except MlflowException as error:
            raise UsageError(
                f'MLflow can start no run at {self._tracking_uri or self._save_dir}: '
                f'{first_line(error)}; correct MLFLOW_TRACKING_URI, or train without this logger'
                ) from error

    def _start_run(self) -> None:
        before = _find_run(Path(self._save_dir), self._resume)
        if before is not None:
            try:
                self._mlflow.start_run(run_id=before)
                self._goes_on = True
                return
            except self._mlflow.MlflowException as error:
                print_log(f'MLflow has no run {before} to go on with, a new one is started: '
                          f'{first_line(error)}', 'current')
        run = self._mlflow.start_run(run_name=self._name)
        _keep_run(Path(self._save_dir), run.info.run_id)

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Record the config as a text, and its values as parameters, which never change."""
        if not self._goes_on:
            self._mlflow.log_params({
                re.sub(r'[^\w\-. :/]', '_', key)[:_LONGEST]: str(value)[:_LONGEST]
                for key, value in self._flatten(config.to_dict()).items()})
        self._mlflow.log_text(config.pretty_text, 'config.py')

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Record a picture, (H, W, 3) RGB, by its name and step."""
        super().add_image(f'pictures/{name}_{step}.png', image, step)

    def close(self) -> None:
        """End the run."""
        if hasattr(self, '_mlflow'):
            self._mlflow.end_run()


@HOOKS.register_module()
class PredictionPicturesHook(Hook):
    """Draws what is predicted for the first pictures of each validation, the same ones every time.

    NOTE: mmdet's hook draws whatever batch its interval falls on, counted over the whole training.

    Args:
        number: How many, those of the first process.
        score_thr: Least score of a detection that is drawn.
    """

    priority = 'LOW'

    def __init__(self, number: int = 4, score_thr: float = 0.3) -> None:
        self.number = number
        self.score_thr = score_thr
        self._drawn = 0
        self._artist: Visualizer | None = None

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin with the first picture."""
        self._drawn = 0

    @dist.master_only
    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                       outputs: Sequence[Any] | None = None) -> None:
        """Draw, until there are enough."""
        for sample in (outputs or ())[:self.number - self._drawn]:
            self._drawn += 1
            image = load_image(sample.img_path, f'picture {sample.img_path}', 'put it back')
            detects = 'pred_instances' in sample
            if self._artist is None:
                # The config's own may be one that cannot draw, and write elsewhere.
                self._artist = VISUALIZERS.build(dict(
                    type='DetLocalVisualizer' if detects else 'UniversalVisualizer',
                    name=f'{runner.experiment_name} pictures'))
                self._artist.dataset_meta = runner.visualizer.dataset_meta
            if detects:
                self._artist.add_datasample('', image[..., ::-1].copy(), sample,
                                            pred_score_thr=self.score_thr)
            else:
                self._artist.visualize_cls(image[..., ::-1].copy(), sample)
            # By epochs, as the metrics.
            runner.visualizer.add_image(f'prediction_{self._drawn}', self._artist.get_image(),
                                        step=runner.epoch)
