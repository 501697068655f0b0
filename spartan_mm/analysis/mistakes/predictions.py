"""The predictions that ``spartan-mm test --out`` wrote, with the dataset that they belong to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from ...datasets.data_errors import DataError
from ...errors import UsageError
from ...inference import Detections

_REMEDY = 'make it with `spartan-mm test CONFIG CHECKPOINT --out FILE.pkl`'


@dataclass
class Truth:
    """What is annotated in an image.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels, shape (N, 4).
        labels: Class indices, shape (N,).
        crowds: Which are regions with many objects, which evaluation leaves out, shape (N,).
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray


@dataclass(frozen=True)
class DetectorResults:
    """What a detector found.

    Args:
        dataset: The one it was tested on, one of mmdet's.
        predictions: By image id.
    """

    dataset: BaseDataset
    predictions: dict[Any, Detections]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by class index."""
        return tuple(self.dataset.metainfo.get('classes') or ())

    def found_in(self, info: Mapping[str, Any]) -> Detections:
        """Take out what was found in an image.

        Args:
            info: What ``dataset.get_data_info(index)`` returns.

        Raises:
            UsageError: There is no prediction for it.
        """
        if info['img_id'] not in self.predictions:
            raise UsageError(f'there is no prediction for image {info["img_id"]!r} '
                             f'({info["img_path"]}): the predictions belong to another dataset')
        return self.predictions[info['img_id']]


@dataclass(frozen=True)
class ClassifierResults:
    """What a classifier made of pictures whose class is known.

    Args:
        paths: The files, N of them.
        truths: Class indices, shape (N,).
        scores: Of each class, from 0 to 1, shape (N, K).
        classes: Names by class index.
    """

    paths: tuple[str, ...]
    truths: np.ndarray
    scores: np.ndarray
    classes: tuple[str, ...]

    @property
    def predicted(self) -> np.ndarray:
        """Class indices of the highest scores, shape (N,)."""
        return self.scores.argmax(1)


def read_results(config: Config, path: str | Path) -> DetectorResults | ClassifierResults:
    """Read predictions, and the test dataset of the config.

    The file is a pickle, which can hold code: read none from strangers.

    Args:
        config: A detector's, whose ``default_scope`` is 'mmdet', or else a classifier's.
        path: The file that ``spartan-mm test CONFIG CHECKPOINT --out FILE.pkl`` wrote.

    Raises:
        FileNotFoundError: There is no such file, or a file of the dataset is missing.
        UsageError: The file holds something else, nothing, or is damaged; the config has no test
            dataset or one that cannot be built; or the dataset names another number of classes than
            there are scores.
    """
    scope = config.get('default_scope') or 'mmengine'
    detector = scope == 'mmdet'
    found = _read(path, 'detector', {'img_id', 'pred_instances'}, _collect_detections
                  ) if detector else _read(
        path, 'classifier', {'img_path', 'gt_label', 'pred_score'}, _collect_scores)
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
    if detector:
        return DetectorResults(dataset, found)
    results = ClassifierResults(*found, tuple(dataset.metainfo.get('classes') or ()))
    if len(results.classes) != results.scores.shape[1]:
        raise UsageError(f'{path} has scores of {results.scores.shape[1]} classes, but the test '
                         f'dataset names {len(results.classes)}')
    return results


def _read(path: str | Path, kind: str, keys: set[str],
          collect: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """Read samples that have all `keys`, and return what `collect` makes of them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'predictions {path} do not exist')
    try:
        content = fileio.load(str(path))
        if isinstance(content, list) and content and all(
                isinstance(sample, dict) and keys <= sample.keys() for sample in content):
            return collect(content)
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f'{path} cannot be read as predictions ({type(error).__name__}: {error}): '
                         f'{_REMEDY}') from error
    raise UsageError(f'{path} holds no predictions of a {kind}: {_REMEDY}')


def _collect_detections(samples: Iterable[Mapping[str, Any]]) -> dict[Any, Detections]:
    return {sample['img_id']: Detections(*(torch.as_tensor(sample['pred_instances'][key]).numpy()
                                           for key in ('bboxes', 'labels', 'scores')))
            for sample in samples}


def _collect_scores(samples: Sequence[Mapping[str, Any]]
                    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Arrange paths, class indices (N,) and scores (N, K) of pictures of one class each."""
    return (tuple(str(sample['img_path']) for sample in samples),
            np.array([int(sample['gt_label']) for sample in samples]),
            np.array([torch.as_tensor(sample['pred_score']).float().numpy()
                      for sample in samples]))


def read_truth(info: Mapping[str, Any]) -> Truth:
    """Take the annotations out of what ``get_data_info`` of mmdet's datasets says of an image."""
    boxes, labels, crowds = (np.array([item[key] for item in info['instances']], dtype=kind)
                             for key, kind in (('bbox', float), ('bbox_label', int),
                                               ('ignore_flag', bool)))
    return Truth(boxes.reshape(-1, 4), labels, crowds)


def spread(total: int, count: int) -> list[int]:
    """Choose indices spread evenly over a dataset, at most all.

    Example:
        >>> spread(200, 4)
        [25, 75, 125, 175]
        >>> spread(3, 8)
        [0, 1, 2]
    """
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
