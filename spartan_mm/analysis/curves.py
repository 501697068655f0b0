"""Loss, metrics and learning rate of a training, read from mmengine's log and drawn."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import compat

compat.require('matplotlib', '3.6', 'demo')

# ruff: noqa: E402 - the version is checked before anything of matplotlib is touched
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Metrics that are drawn where a run has them, by their name in the log.
METRICS = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50', 'accuracy/top1': 'top-1 in %',
           'accuracy/top5': 'top-5 in %'}

# The colours that Okabe and Ito chose to be told apart by everybody; yellow, which is too pale for
# a line on white, left out.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_STYLES = ('-', '--', ':', '-.')

# The loss terms of a detector of the DETR family, by the part of the model that they train.
_LOSS_GROUPS = {
    'last decoder layer': r'loss_\w+',
    'other decoder layers': r'd\d+\.loss_\w+',
    'encoder': r'enc_loss_\w+',
    'denoising': r'(d\d+\.)?dn_loss_\w+',
}

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class RunLog:
    """What a training logged.

    Args:
        train: one dict for each logged iteration, with its number under 'step'.
        evaluations: one dict for each validation, with 'step'.
        by_epoch: whether 'step' of the evaluations counts epochs, else iterations.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    by_epoch: bool

    def training(self, pattern: str) -> Series:
        """Sum the training values whose whole name matches a regular expression.

        Returns:
            Iterations and sums; no elements if no name matches.
        """
        records = [(record['step'], [value for name, value in record.items()
                                     if re.fullmatch(pattern, name)]) for record in self.train]
        return _as_arrays([(step, sum(values)) for step, values in records if values])

    def evaluation(self, name: str) -> Series:
        """Get a metric of the evaluations.

        Returns:
            Epochs or iterations, and values, without those where COCO's -1 says that there was
            nothing to evaluate.
        """
        return _as_arrays([(record['step'], record[name]) for record in self.evaluations
                           if record.get(name, -1) >= 0])


def read_log(path: str | Path) -> RunLog:
    """Read the log of a training.

    Args:
        path: the work dir of the training, of whose runs the latest is read; or the folder of one
            run; or the log itself, ``vis_data/scalars.json`` in that folder.

    Raises:
        FileNotFoundError: there is no such file, or no log in the folder.
        ValueError: the log is empty, or is none.
    """
    path = _find_log(Path(path))
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or 'step' not in record:
                raise ValueError("not a dict with 'step'")
        except ValueError as error:
            # What a run that was killed, or one that is writing just now, leaves.
            if number == len(lines) and not line.endswith('\n'):
                break
            raise ValueError(f'line {number} of {path} is no record of a training ({error}); the '
                             "log that mmengine's LocalVisBackend writes has one JSON dict a line"
                             ) from error
        records.append(record)
    if not records:
        raise ValueError(f'{path} is empty: the run ended before it logged an iteration')

    # mmengine logs the learning rate with every iteration of training, and only there.
    train = [record for record in records if 'lr' in record]
    evaluations = [record for record in records if 'lr' not in record]
    # A loop of epochs numbers evaluations by epoch, and iterations by both.
    by_epoch = any('epoch' in record for record in train)
    return RunLog(train, evaluations, by_epoch)


def draw_curves(runs: RunLog | Mapping[str, RunLog],
                metrics: Mapping[str, str] = METRICS) -> Figure:
    """Draw loss, metrics and learning rate.

    Of a single run, the loss is drawn with its parts, and the terms of the last layer apart; of
    several, the total alone, a colour each.

    Args:
        runs: a run, or several by name.
        metrics: what to call the metrics to draw, by their name in the log; those that no run has
            are left out.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there are no runs.
    """
    single = isinstance(runs, RunLog)
    runs = {'': runs} if single else dict(runs)
    if not runs:
        raise ValueError('runs is empty: there is nothing to draw')

    terms = sorted({name for run in runs.values() for record in run.train for name in record
                    if re.fullmatch(r'loss_\w+', name)})
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _draw_loss(axes, runs, parts=single),
        lambda axes: _draw_metrics(axes, runs, metrics),
        lambda axes: _draw_learning_rate(axes, runs),
    ]
    if single and len(terms) > 1:
        panels.insert(1, lambda axes: _draw_terms(axes, runs[''], terms))

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(15, 4.2 * rows), dpi=100, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    grid = figure.add_gridspec(rows, 2)
    for index, draw in enumerate(panels):
        draw(figure.add_subplot(grid[index // 2, index % 2]))
    return figure


def _draw_loss(axes: Axes, runs: Mapping[str, RunLog], parts: bool) -> None:
    lines = []
    for name, run in runs.items():
        lines.append((name or 'total', *run.training('loss')))
        if parts:
            lines += [(part, *run.training(pattern)) for part, pattern in _LOSS_GROUPS.items()]
    _draw(axes, 'Training loss', 'iteration', lines)


def _draw_terms(axes: Axes, run: RunLog, terms: list[str]) -> None:
    _draw(axes, 'Training loss, terms of the last decoder layer', 'iteration',
          [(term, *run.training(re.escape(term))) for term in terms])


def _draw_metrics(axes: Axes, runs: Mapping[str, RunLog], metrics: Mapping[str, str]) -> None:
    metrics = {key: metric for key, metric in metrics.items()
               if any(len(run.evaluation(key)[0]) for run in runs.values())}
    lines = []
    for name, run in runs.items():
        for key, metric in metrics.items():
            steps, values = run.evaluation(key)
            last = f' ({values[-1]:.3f} at the end)' if len(values) else ''
            lines.append((f'{name} {metric}{last}'.strip(), steps, values))
    # Of several runs, a colour for each run and a style for each metric.
    several = len(runs) > 1
    styles = [dict(color=COLOURS[(i if several else j) % len(COLOURS)],
                   linestyle=_STYLES[j % len(_STYLES)])
              for i in range(len(runs)) for j in range(len(metrics))]
    by_epoch = all(run.by_epoch for run in runs.values())
    _draw(axes, 'Validation', 'epoch' if by_epoch else 'iteration', lines, styles, marker='o')


def _draw_learning_rate(axes: Axes, runs: Mapping[str, RunLog]) -> None:
    _draw(axes, 'Learning rate', 'iteration',
          [(name or 'first parameter group', *run.training('lr')) for name, run in runs.items()])
    axes.ticklabel_format(axis='y', scilimits=(-2, 3))


def _draw(axes: Axes, title: str, x_label: str, lines: list[tuple[str, np.ndarray, np.ndarray]],
          styles: list[dict[str, str]] | None = None, **line_style: Any) -> None:
    """Draw lines, each with its legend entry beside the axes, where it covers nothing."""
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel(x_label, fontsize=11)
    axes.grid(color='0.88')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    # Another style for each line, too: of two that coincide, both are seen.
    styles = styles or [dict(color=COLOURS[i % len(COLOURS)], linestyle=_STYLES[i % len(_STYLES)])
                        for i in range(len(lines))]
    for (label, steps, values), style in zip(lines, styles, strict=True):
        # A run that diverged has numbers that are none.
        if np.isfinite(values).any():
            # A dot shows a single value, which makes no line.
            marker = dict(marker='o') if len(steps) == 1 else {}
            axes.plot(steps, values, label=label, linewidth=1.8, markersize=5, clip_on=False,
                      **{**marker, **line_style, **style})
    if axes.lines:
        # With zero, so that heights compare.
        values = np.concatenate([values[np.isfinite(values)] for _, _, values in lines])
        lowest, highest = values.min(initial=0), values.max(initial=0)
        room = 0.08 * (highest - lowest) or 1
        axes.set_ylim(lowest - room * (lowest < 0), highest + room)
        if x_label == 'epoch':
            axes.set_xlim(left=0)
        axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11,
                    handlelength=2.6)
    else:
        axes.text(0.5, 0.5, 'nothing in the log', transform=axes.transAxes, ha='center',
                  fontsize=11, color='0.4')


def _find_log(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist')
    if path.is_file():
        return path
    # Names of runs are times: the last is the latest.
    folders = [path, path / 'vis_data', *sorted(path.glob('*/vis_data'), reverse=True)]
    found = next((log for folder in folders if (log := folder / 'scalars.json').is_file()), None)
    if found is None:
        raise FileNotFoundError(f'{path} has no log of a training: none of it, its vis_data/ and '
                                'its <time>/vis_data/ holds a scalars.json')
    return found


def _as_arrays(points: list[tuple[float, float]]) -> Series:
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values
