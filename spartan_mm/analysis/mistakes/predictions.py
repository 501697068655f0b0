"""The predictions that ``spartan-mm test --out`` wrote, with the dataset that they belong to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ...datasets.data_errors import DataError
from ...errors import UsageError
from ...inference import Detections
from ...requirements import require

_REMEDY = 'make it with `spartan-mm test CONFIG CHECKPOINT --out FILE.pkl`'


class DetectionDataset(Protocol):
    """What is asked of a dataset; mmdet's have it."""

    metainfo: Mapping[str, Any]

    def __len__(self) -> int: ...

    def get_data_info(self, idx: int) -> dict[str, Any]: ...


@dataclass
class Truth:
    """What is annotated in an image.

    Args:
        boxes: Corners x1, y1, x2, y2 in pixels, shape (N, 4).
        labels: Class indices, shape (N,).
        crowds: Regions with many objects of a class, which evaluation leaves out: class index and
            mask, shape (H, W), True inside.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: list[tuple[int, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of pictures whose class is known.

    Args:
        paths: The files, N of them.
        truths: Class indices, shape (N,).
        scores: Of each class, from 0 to 1, shape (N, K).
    """

    paths: tuple[str, ...]
    truths: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def predicted(self) -> np.ndarray:
        """Class indices of the highest scores, shape (N,)."""
        return self.scores.argmax(1)


@dataclass(frozen=True)
class DetectorResults:
    """What a detector found.

    Args:
        dataset: The one it was tested on.
        predictions: By image id.
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
        outcomes: Predictions beside the truth.
        classes: Names by class index.
    """

    outcomes: Outcomes
    classes: tuple[str, ...]


def read_results(config: Config, path: str | Path) -> DetectorResults | ClassifierResults:
    """Read predictions, and the test dataset of the config.

    The file is a pickle, which can hold code: read none from strangers.

    Args:
        config: A detector's, whose ``default_scope`` is 'mmdet', or else a classifier's.
        path: The file that ``spartan-mm test CONFIG CHECKPOINT --out FILE.pkl`` wrote.

    Raises:
        FileNotFoundError: There is no such file, or a file of the dataset is missing.
        UsageError: The file holds something else or is damaged, the config has no test dataset or
            one that cannot be built, or the dataset names another number of classes than there are
            scores.
    """
    scope = config.get('default_scope') or 'mmengine'
    found = read_predictions(path) if scope == 'mmdet' else read_outcomes(path)
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


def read_predictions(path: str | Path) -> dict[Any, Detections]:
    """Read a detector's predictions by image id from what ``spartan-mm test --out`` wrote.

    The file is a pickle, which can hold code: read none from strangers.

    Raises:
        FileNotFoundError: There is no such file.
        UsageError: The file holds something else, nothing, or is damaged.
    """
    return _read(path, 'detector', {'img_id', 'pred_instances'}, collect_predictions)


def read_outcomes(path: str | Path) -> Outcomes:
    """Read a classifier's predictions, as :func:`read_predictions` does a detector's."""
    return _read(path, 'classifier', {'img_path', 'gt_label', 'pred_score'}, collect_outcomes)


def collect_predictions(samples: Iterable[Mapping[str, Any]]) -> dict[Any, Detections]:
    """Arrange a detector's predictions by image id.

    Args:
        samples: Mmdet's ``DetDataSample`` of a model's ``test_step``, or the dicts of the pickle
            file that ``spartan-mm test --out`` writes.
    """
    predictions = {}
    for sample in samples:
        found = sample.get('pred_instances')
        predictions[sample.get('img_id')] = Detections(
            *(torch.as_tensor(found.get(key)).detach().cpu().numpy()
              for key in ('bboxes', 'labels', 'scores')))
    return predictions


def collect_outcomes(samples: Iterable[Mapping[str, Any]]) -> Outcomes:
    """Arrange a classifier's predictions.

    Args:
        samples: Mmpretrain's ``DataSample`` of a model's ``test_step``, or the dicts of the pickle
            file that ``spartan-mm test --out`` writes; of one class each.
    """
    paths, truths, scores = [], [], []
    for sample in samples:
        paths.append(str(sample.get('img_path')))
        truths.append(int(sample.get('gt_label')))
        scores.append(torch.as_tensor(sample.get('pred_score')).detach().cpu().float().numpy())
    return Outcomes(tuple(paths), np.array(truths, dtype=int), np.array(scores))


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


def found_in(info: Mapping[str, Any], predictions: Mapping[Any, Detections]) -> Detections:
    """Take out what was found in an image.

    Args:
        info: What ``dataset.get_data_info(index)`` returns.
        predictions: By image id.

    Raises:
        UsageError: There is no prediction for it.
    """
    if info['img_id'] not in predictions:
        raise UsageError(f'there is no prediction for image {info["img_id"]!r} '
                         f'({info["img_path"]}): the predictions belong to another dataset')
    return predictions[info['img_id']]


def read_truth(info: Mapping[str, Any], shape: tuple[int, int]) -> Truth:
    """Take the annotations out of what mmdet's datasets say of an image.

    Args:
        info: What ``dataset.get_data_info(index)`` returns.
        shape: Height and width of the image in pixels.
    """
    objects = [item for item in info['instances'] if not item['ignore_flag']]
    crowds = [(item['bbox_label'], _crowd_mask(item, shape))
              for item in info['instances'] if item['ignore_flag']]
    boxes = np.array([item['bbox'] for item in objects], dtype=float).reshape(-1, 4)
    return Truth(boxes, np.array([item['bbox_label'] for item in objects], dtype=int), crowds)


def fill_box(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Make the mask of a box, (H, W) bool."""
    mask = np.zeros(shape, dtype=bool)
    left, top, right, bottom = np.round(box).astype(int).clip(0)
    mask[top:bottom, left:right] = True
    return mask


def _crowd_mask(item: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Decode the region of a crowd, (H, W) bool: run lengths, polygons, or else its box."""
    region = item.get('mask')
    if not region:
        return fill_box(item['bbox'], shape)
    require('pycocotools', '2.0', 'detection')
    from pycocotools import mask as coco_mask
    if isinstance(region, list) or isinstance(region['counts'], list):
        region = coco_mask.frPyObjects(region, *shape)
    if isinstance(region, list):
        region = coco_mask.merge(region)
    return coco_mask.decode(region).astype(bool)


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
