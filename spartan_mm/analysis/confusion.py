"""What a classifier takes for what: its predictions beside the truth, counted and drawn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import fileio

from .. import compat

compat.require('matplotlib', '3.6', 'demo')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib.figure import Figure

# Up to so many classes, each cell has its number and each row and column its name.
_MAX_WRITTEN = 30


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of pictures whose class is known.

    Args:
        paths: the files, N of them.
        truths: class indices, shape (N,).
        scores: of each class, from 0 to 1, shape (N, K).
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


def collect_outcomes(samples: Iterable[Mapping[str, Any]]) -> Outcomes:
    """Arrange predictions.

    Args:
        samples: mmpretrain's ``DataSample`` of a model's ``test_step``, or the dicts of the pickle
            file that ``tools/test.py --out`` writes; of one class each.
    """
    paths, truths, scores = [], [], []
    for sample in samples:
        paths.append(str(sample.get('img_path')))
        truths.append(int(sample.get('gt_label')))
        scores.append(torch.as_tensor(sample.get('pred_score')).detach().cpu().float().numpy())
    return Outcomes(tuple(paths), np.array(truths, dtype=int), np.array(scores))


def read_outcomes(path: str | Path) -> Outcomes:
    """Read predictions from the file that ``tools/test.py --out`` writes.

    The file is a pickle, which can hold code: read none from strangers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or nothing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'predictions {path} do not exist')
    content = fileio.load(str(path))
    if not isinstance(content, list) or not content or not all(
            isinstance(sample, dict) and {'img_path', 'gt_label', 'pred_score'} <= sample.keys()
            for sample in content):
        raise ValueError(f'{path} holds no predictions of a classifier: make it with '
                         '`tools/test.py CONFIG CHECKPOINT --out FILE.pkl`')
    return collect_outcomes(content)


def count_confusions(outcomes: Outcomes) -> np.ndarray:
    """Count how often each class is taken for each.

    Returns:
        Counts (K, K), a row for each true class and a column for each predicted one.
    """
    num_classes = outcomes.scores.shape[1]
    counts = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(counts, (outcomes.truths, outcomes.predicted), 1)
    return counts


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw who is taken for whom.

    Args:
        counts: see :func:`count_confusions`.
        classes: names by class index.

    Returns:
        The figure; its ``savefig`` writes it. A cell is the darker, the larger its share of the
        pictures of its true class.

    Raises:
        ValueError: there is another number of names than of classes.
    """
    if len(classes) != len(counts):
        raise ValueError(f'there are {len(counts)} classes in the counts, but {len(classes)} names')
    total = counts.sum(1)
    shares = counts / np.maximum(total, 1)[:, None]
    correct = counts.trace() / max(counts.sum(), 1)
    written = len(classes) <= _MAX_WRITTEN

    side = 3 + 0.55 * len(classes) if written else 12
    figure = Figure(figsize=(side + 1.5, side), dpi=100, layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, label='share of the true class', shrink=0.8)
    axes.set_title(f'{counts.trace()} of {counts.sum()} right ({100 * correct:.2f} %)', loc='left',
                   fontsize=13, fontweight='bold')
    axes.set_xlabel('predicted', fontsize=11)
    axes.set_ylabel('true', fontsize=11)
    if written:
        positions = range(len(classes))
        axes.set_xticks(positions, classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        axes.set_yticks(positions, [f'{name} ({count})' for name, count
                                    in zip(classes, total, strict=True)])
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, str(counts[row, column]), ha='center', va='center',
                      color='white' if shares[row, column] > 0.5 else 'black')
    return figure
