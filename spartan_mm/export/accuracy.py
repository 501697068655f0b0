"""What a file is worth on data with labels, beside the checkpoint that it was made of."""
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from ..datasets.evaluators import check_evaluator
from ..datasets.preflight import PreflightHook
from ..engine import launch
from ..engine.class_order import Match, OrderedCheckpointHook
from ..engine.hooks import BackboneCheckHook
from ..errors import UsageError
from ..runtime import SUFFIXES
from ..text import markdown
from .model import ExportedClassesHook, use_exported


def build_tester(cfg: Config, checkpoint: str, match_classes: Match = None) -> Runner:
    """Build what tests a checkpoint, or an exported file, as its config says.

    Args:
        cfg: The config, which is changed.
        checkpoint: File or URL; what ends in .onnx, .xml or .tflite is an exported file.
        match_classes: See :func:`spartan_mm.get_model`.
    """
    exported = checkpoint.lower().endswith(SUFFIXES)
    if exported:
        use_exported(cfg, checkpoint)
    else:
        launch.load_weights(cfg, checkpoint)
    runner = launch.build_runner(cfg)
    # Ahead of hooks that load the checkpoint themselves.
    runner.register_hook((ExportedClassesHook if exported else OrderedCheckpointHook)(
        match_classes), priority='HIGHEST')
    runner.register_hook(PreflightHook(), priority='HIGHEST')
    runner.register_hook(BackboneCheckHook(), priority='HIGHEST')
    return runner


def check_accuracy(config: str | Config, checkpoint: str | None, raw: bool, to: str) -> None:
    """Check ahead of an export whether :func:`measure_accuracy` can follow it.

    Raises:
        UsageError: It cannot.
    """
    fault = None
    if checkpoint is None or not isinstance(config, str | Path):
        fault = 'name a config file, or a model, and its checkpoint'
    elif raw:
        fault = 'drop --raw, which leaves out what makes predictions of the outputs'
    elif to not in ('onnx', 'openvino'):
        fault = f'files for {to} are not tested on the way; drop --accuracy'
    if fault:
        raise UsageError(f'--accuracy tests the file on the test data of its config: {fault}')
    _read(str(config))


def measure_accuracy(config: str, checkpoint: str, path: str | Path, match_classes: Match = None
                     ) -> dict[str, tuple[float, float]]:
    """Test a checkpoint and a file made of it on the test data of their config.

    Args:
        config: The config file, or the name of a model.
        checkpoint: The weights.
        path: The exported file.
        match_classes: See :func:`spartan_mm.get_model`.

    Returns:
        The checkpoint's value and the file's, by the names of the metrics.
    """
    results = []
    for subject in (checkpoint, str(path)):
        print(f'measuring the accuracy of {Path(subject).name}', flush=True)
        with tempfile.TemporaryDirectory() as work_dir:
            cfg = _read(config, work_dir)
            cfg.log_level, cfg.compile = 'ERROR', False
            # Runs of one name would share what writes into the first's folder.
            cfg.experiment_name = Path(work_dir).name
            if cfg.get('visualizer'):
                cfg.visualizer.name = cfg.experiment_name
            results.append(build_tester(cfg, subject, match_classes).test())
    return {name: (float(value), float(results[1][name])) for name, value in results[0].items()}


def _read(config: str, work_dir: str | None = None) -> Config:
    cfg = launch.load_config(config, work_dir, split='test')
    check_evaluator(cfg, 'test')
    return cfg


def print_accuracy(accuracy: Mapping[str, tuple[float, float]]) -> str:
    """Write the accuracy as a table for people."""
    return markdown([['metric', 'checkpoint', 'file'], *(
        [name, *(f'{value:.4g}' for value in values)] for name, values in accuracy.items())])
