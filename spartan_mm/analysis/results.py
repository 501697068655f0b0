"""The predictions that ``tools/test.py --out`` wrote, with the dataset that they belong to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..datasets.data_errors import DataError
from ..engine.launch import UsageError
from ..inference import Detections
from .confusion import Outcomes, read_outcomes
from .gallery import DetectionDataset, read_predictions


@dataclass(frozen=True)
class DetectorResults:
    """What a detector found.

    Args:
        dataset: the one it was tested on.
        predictions: by image id.
    """

    dataset: DetectionDataset
    predictions: dict[Any, Detections]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by class index."""
        return tuple(self.dataset.metainfo['classes'])


@dataclass(frozen=True)
class ClassifierResults:
    """What a classifier made of pictures.

    Args:
        outcomes: predictions beside the truth.
        classes: names by class index.
    """

    outcomes: Outcomes
    classes: tuple[str, ...]


def read_results(config: Config, path: str | Path) -> DetectorResults | ClassifierResults:
    """Read predictions, and the test dataset of the config.

    The file is a pickle, which can hold code: read none from strangers.

    Args:
        config: a detector's, whose ``default_scope`` is 'mmdet', or else a classifier's.
        path: the file that ``tools/test.py CONFIG CHECKPOINT --out FILE.pkl`` wrote.

    Raises:
        FileNotFoundError: there is no such file, or a file of the dataset is missing.
        UsageError: the file holds something else or is damaged, the config has no test dataset or
            one that cannot be built, or the dataset names another number of classes than there are
            scores.
    """
    scope = config.get('default_scope') or 'mmengine'
    try:
        found = read_predictions(path) if scope == 'mmdet' else read_outcomes(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not config.get('test_dataloader'):
        raise UsageError('the config has no test_dataloader, whose dataset the predictions belong '
                         'to')
    try:
        with DefaultScope.overwrite_default_scope(scope):
            dataset = DATASETS.build(config.test_dataloader.dataset)
    except (OSError, ImportError, DataError):
        raise
    except Exception as error:  # a dataset can raise anything about its files and arguments
        raise UsageError(f'the dataset of test_dataloader in the config cannot be built '
                         f'({type(error).__name__}: {error})') from error
    if scope == 'mmdet':
        return DetectorResults(dataset, found)
    classes = tuple(dataset.metainfo.get('classes') or ())
    if len(classes) != found.scores.shape[1]:
        raise UsageError(f'{path} has scores of {found.scores.shape[1]} classes, but the test '
                         f'dataset names {len(classes)}')
    return ClassifierResults(found, classes)
