"""The steps of an export."""
import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from .. import runtime
from ..datasets.classes import find_names
from ..errors import UsageError
from ..files import UnwritableError, check_writable
from ..inference import find_weights
from ..weights.forms import switch_to_deploy
from ..weights.safe_load import local_file
from ..weights.stored_config import find_test_dataset
from ..zoo import get_model
from .accuracy import check_accuracy, measure_accuracy, print_accuracy
from .check import Run, check_export, print_check
from .formats import find_format
from .graph import Classify, Detect, make_graph
from .metadata import MIN_SIDE, MULTIPLE, as_properties, describe, find_size
from .onnx import write_onnx
from .pictures import Pictures, find_pictures
from .preprocessing import describe_resize


@dataclass
class Job:
    """An export, as those who write a format are given it.

    Args:
        model: As it was trained.
        graph: What to export, of the model in deploy form.
        cfg: The model's config.
        path: The file to write, beside which others may lie; the writer may give it another name.
        size: Height and width of the images.
        dynamic: Free axes, of 'batch' and 'size'.
        precision: One of the format's.
        metadata: What the file is to say of itself.
        calibration: Images to measure ranges with, as :func:`~.pictures.find_pictures` takes them.
    """

    model: nn.Module
    graph: Classify | Detect
    cfg: Config
    path: Path
    size: tuple[int, int]
    dynamic: tuple[str, ...]
    precision: str
    metadata: dict[str, Any]
    calibration: int | str

    @property
    def graph_file(self) -> Path:
        """Where :meth:`onnx` lies."""
        return self.path.with_name('.graph.onnx')

    def onnx(self) -> Path:
        """An ONNX file of the graph in float32, without metadata; it is made once."""
        if not self.graph_file.exists():
            write_onnx(self.graph, self.graph_file, self.size, self.dynamic)
        return self.graph_file

    def pictures(self) -> Pictures:
        """Images to measure ranges with."""
        return find_pictures(self.cfg, self.calibration)


def export_model(config: str | Config, checkpoint: str | None = None, to: str = 'onnx',
                 out_dir: str | Path = 'exported', size: Sequence[int] | None = None,
                 dynamic: Iterable[str] | None = None, raw: bool = False, precision: str = 'fp32',
                 calibration: int | str = 64, check: int | str | None = 8,
                 match_classes: str | None = None, accuracy: bool = False) -> Path:
    """Export a classifier or a RT-DETR, and compare what was written with the model.

    Args:
        config: A config file or the name of a model; or a checkpoint that holds its config.
        checkpoint: The weights, path or URL; None if `config` is a checkpoint.
        to: The format, see :mod:`.formats`.
        out_dir: Where to write; ``runtime.py``, for what it can run, is copied there, too.
        size: Height and width of the images; None for those of the config's test pipeline.
        dynamic: Axes that stay free, of 'batch' and 'size'; None for the batch, where the format
            has it.
        raw: Whether to give logits (and boxes of all queries) in place of results.
        precision: 'fp32', 'fp16', 'bf16' or 'int8', as far as the format has it.
        calibration: What int8 measures ranges with: how many of the config's test data, or a file
            or folder of images.
        check: Images to compare with: how many of the config's test data, or a file or folder; None
            not to compare.
        match_classes: See :func:`spartan_mm.get_model`.
        accuracy: Whether to test checkpoint and file on the config's test data, too.

    Returns:
        The file.

    Raises:
        UsageError: Arguments do not go together, or the model cannot be exported.
        CheckpointError: Checkpoint and config do not fit.
        RequirementError: What the format needs is not installed.
        CheckError: What was written gives something else than the model; the file is not there.
        RuntimeFileError: What runs the file is missing or doesn't take it.
    """
    target, dynamic = find_format(to, precision, dynamic)
    if accuracy:
        check_accuracy(config, checkpoint, raw, to)
    cfg, name, weights, match_classes = find_weights(config, checkpoint, match_classes)
    name = Path(name).stem
    model = get_model(cfg, pretrained=weights, match_classes=match_classes)
    graph = make_graph(switch_to_deploy(copy.deepcopy(model)), raw)
    resize = None if raw and size else describe_resize(cfg, size)
    size = find_size(resize, size)
    _check_size(model, size, dynamic)
    classes = find_names(model, _names_of(model), find_test_dataset(cfg), weights)
    metadata = describe(graph, cfg, name, classes, local_file(weights), resize, size, dynamic,
                        precision)
    suffix = '' if precision == 'fp32' else f'_{precision}'
    final = Path(out_dir) / f'{name}{suffix}{target.suffix}'
    if not (final / 'Manifest.json').is_file():  # a .mlpackage of before is a folder
        check_writable(final)
    with _workplace(out_dir) as folder:
        job = Job(model, graph, cfg, folder / final.name, size, dynamic, precision, metadata,
                  calibration)
        run = target.load('write')(job)
        if check is not None:
            metadata['check'] = _check(job, run, check)
        final = final.with_name(job.path.name)
        set_metadata = target.load('set_metadata')
        set_metadata(job.path, as_properties(metadata))
        if accuracy:
            measured = measure_accuracy(str(config), weights, job.path, match_classes)
            print(print_accuracy(measured))
            metadata['accuracy'] = measured
            set_metadata(job.path, as_properties(metadata))
        if target.suffix in runtime.SUFFIXES:
            shutil.copy(runtime.__file__, folder / 'runtime.py')
        job.graph_file.unlink(missing_ok=True)
        for path in folder.iterdir():
            _replace(path, final.with_name(path.name))
    return final


def _names_of(model: nn.Module) -> Sequence[str]:
    """What the checkpoint calls the classes."""
    meta = getattr(model, 'dataset_meta', None) or getattr(model, '_dataset_meta', None) or {}
    return meta.get('classes') or ()


def _check_size(model: nn.Module, size: tuple[int, int], dynamic: tuple[str, ...]) -> None:
    """Refuse what the data preprocessor would pad, and what free sides don't reach."""
    if 'size' in dynamic and any(side % MULTIPLE or side < MIN_SIDE for side in size):
        raise UsageError(f'--dynamic size: sides are multiples of {MULTIPLE} from {MIN_SIDE} on, '
                         f'and {size[0]}x{size[1]} is not; give another --size')
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1) or 1
    if any(side % divisor for side in size):
        raise UsageError(f'--size {size[0]} {size[1]}: the data preprocessor of the config pads to '
                         f'multiples of {divisor} (pad_size_divisor), which no export does; give '
                         'such a size')


@contextmanager
def _workplace(out_dir: str | Path) -> Iterator[Path]:
    """A folder beside the results, gone at the end."""
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix='.export_', dir=out_dir)
    except OSError as error:
        raise UnwritableError(error.errno, error.strerror, str(out_dir)) from error
    with place as folder:
        yield Path(folder)


def _replace(path: Path, final: Path) -> None:
    """Give a file or folder its place, which another export may have."""
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    os.replace(path, check_writable(final))


def _check(job: Job, run: Run | None, wanted: int | str) -> dict[str, Any]:
    """Compare what was written with the model, and print what was found."""
    if run is None:
        print(f'{job.path.name} was not compared: it cannot run on this machine')
        return dict(compared=False)
    pictures = find_pictures(job.cfg, wanted)
    result = check_export(job.model, run, job.metadata, pictures, job.path,
                          job.graph_file if job.graph_file.exists() else None)
    print(print_check(result))
    return result
