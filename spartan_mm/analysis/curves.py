"""Loss, metrics, learning rate and memory of trainings, read from mmengine's logs and drawn."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import compat

compat.require('matplotlib', '3.6', 'analysis')

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

#: What curves can be drawn against, and how to call it: iterations (validations: epochs, where the
#: training counts them), or the hours that the iterations took, without validations and pauses.
AXES = {'step': 'iteration', 'hours': 'hours of training'}

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class RunLog:
    """What a training logged.

    Args:
        train: one dict for each logged iteration, with its number under 'step' and the hours of
            training until then under 'hours'.
        evaluations: one dict for each validation, with 'step' and 'hours'.
        by_epoch: whether 'step' of the evaluations counts epochs, else iterations.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    by_epoch: bool

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers that validations gave, such as 'coco/bbox_mAP'."""
        return list(dict.fromkeys(name for record in self.evaluations for name in record
                                  if name not in ('step', 'hours', 'time', 'data_time')))

    def training(self, pattern: str, axis: str = 'step') -> Series:
        """Sum the training values whose whole name matches a regular expression.

        Args:
            pattern: the expression.
            axis: one of ``AXES``.

        Returns:
            Iterations or hours, and sums; no elements if no name matches.
        """
        records = [(record[axis], [value for name, value in record.items()
                                   if re.fullmatch(pattern, name)]) for record in self.train]
        return _as_arrays([(place, sum(values)) for place, values in records if values])

    def evaluation(self, name: str, axis: str = 'step') -> Series:
        """Get a metric of the evaluations.

        Args:
            name: of the metric.
            axis: one of ``AXES``.

        Returns:
            Epochs, iterations or hours, and values, without those where COCO's -1 says that there
            was nothing to evaluate.
        """
        return _as_arrays([(record[axis], record[name]) for record in self.evaluations
                           if record.get(name, -1) >= 0])


def read_log(path: str | Path) -> RunLog:
    """Read the log of a training.

    Args:
        path: the work dir of the training, of whose runs the latest is read, joined to those that
            it resumed; or the folder of one run; or the log itself, ``vis_data/scalars.json`` in
            that folder.

    Raises:
        FileNotFoundError: there is no such file, or no log in the folder.
        ValueError: the log is empty, or is none.
    """
    logs = _find_logs(Path(path))
    records: list[dict[str, Any]] = []
    for log in logs:
        records = _join(records, _read_records(log))
    if not records:
        raise ValueError(f'{logs[-1]} is empty: the run ended before it logged an iteration')

    hours, step = 0., 0
    for record in records:
        if _is_training(record):
            # mmengine averages the seconds of an iteration over the last ones.
            hours += record.get('time', 0.) * (record['step'] - step) / 3600
            step = record['step']
        record['hours'] = hours
    train = [record for record in records if _is_training(record)]
    # A loop of epochs numbers evaluations by epoch, and iterations by both.
    by_epoch = any('epoch' in record for record in train)
    # What was evaluated again after resuming counts once.
    evaluations = {record['step']: record for record in records if not _is_training(record)}
    return RunLog(train, list(evaluations.values()), by_epoch)


def _read_records(path: Path) -> list[dict[str, Any]]:
    remedy = "the log that mmengine's LocalVisBackend writes has one JSON dict a line"
    try:
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no record of a training ({error}); {remedy}') from error
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
            raise ValueError(f'line {number} of {path} is no record of a training ({error}); '
                             f'{remedy}') from error
        records.append(record)
    return records


def _join(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the records of a resumed run in place of what it repeats, and after the rest."""
    first = next((record['step'] for record in later if _is_training(record)), None)
    if first is None:
        return earlier + later
    repeated = next((place for place, record in enumerate(earlier)
                     if _is_training(record) and record['step'] >= first), len(earlier))
    return earlier[:repeated] + later


def _is_training(record: Mapping[str, Any]) -> bool:
    # mmengine logs the learning rate with every iteration of training, and only there.
    return 'lr' in record


def draw_curves(runs: RunLog | Mapping[str, RunLog], metrics: Mapping[str, str] = METRICS,
                axis: str = 'step') -> Figure:
    """Draw loss, metrics, learning rate and, where it was logged, memory.

    Of a single run, the loss is drawn with its parts, the terms of the last layer together, and the
    metrics together; of several, each apart, with a colour for each run, and the last value of each
    metric beside its line.

    Args:
        runs: a run, or several by name.
        metrics: what to call the metrics to draw, by their name in the log; those that no run has
            are left out.
        axis: what to draw against, one of ``AXES``.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: there are no runs, or there is no such axis.
    """
    panels = _list_panels(runs, metrics, axis)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(15, 4.2 * rows), dpi=100, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    grid = figure.add_gridspec(rows, 2)
    for index, draw in enumerate(panels):
        draw(figure.add_subplot(grid[index // 2, index % 2]))
    if not isinstance(runs, RunLog):
        # The same for all panels.
        _draw_legend(figure, 'outside upper left', columns=4)
    return figure


def draw_panels(runs: RunLog | Mapping[str, RunLog], metrics: Mapping[str, str] = METRICS,
                axis: str = 'step') -> list[Figure]:
    """Draw what :func:`draw_curves` draws, each in a figure of its own, for a narrow screen.

    Args:
        runs: a run, or several by name.
        metrics: what to call the metrics to draw, by their name in the log.
        axis: what to draw against, one of ``AXES``.

    Raises:
        ValueError: there are no runs, or there is no such axis.
    """
    figures = []
    for draw in _list_panels(runs, metrics, axis):
        figure = Figure(figsize=(5.4, 3.9), dpi=100, layout='constrained')
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(axes.get_title(loc='left'), loc='left', fontsize=11, fontweight='bold')
        if axes.get_legend() is not None:
            axes.get_legend().remove()
        # Below, so that the lines have the whole width.
        longest = max((len(line.get_label()) for line in axes.lines), default=0)
        _draw_legend(figure, 'outside lower center', columns=2 if longest < 22 else 1)
        figures.append(figure)
    return figures


def _draw_legend(figure: Figure, place: str, columns: int) -> None:
    """Explain the lines of all axes of a figure, each name once."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    if lines:
        figure.legend(lines.values(), lines, loc=place, ncols=columns, frameon=False, fontsize=11,
                      handlelength=2.6)


def _list_panels(runs: RunLog | Mapping[str, RunLog], metrics: Mapping[str, str], axis: str
                 ) -> list[Callable[[Axes], None]]:
    """List what there is to draw, each item a function that draws it into axes."""
    if axis not in AXES:
        raise ValueError(f'axis={axis!r} must be one of {", ".join(map(repr, AXES))}')
    single = isinstance(runs, RunLog)
    runs = {'': runs} if single else dict(runs)
    if not runs:
        raise ValueError('runs is empty: there is nothing to draw')

    names = {name for run in runs.values() for record in run.train for name in record}
    terms = sorted(name for name in names if re.fullmatch(r'loss_\w+', name))
    layers = any(re.fullmatch(_LOSS_GROUPS['other decoder layers'], name) for name in names)
    last = ' of the last decoder layer' if layers else ''
    draw_values = partial(_draw_training, runs=runs, axis=axis)

    panels = [partial(_draw_loss, runs=runs, axis=axis, parts=single)]
    if single and len(terms) > 1:
        panels.append(partial(_draw_terms, run=runs[''], terms=terms, axis=axis,
                              title=f'Training loss, terms{last}'))
    elif len(terms) > 1:
        panels += [partial(draw_values, pattern=re.escape(term), title=f'{term}{last}')
                   for term in terms]
    measured = {key: metric for key, metric in metrics.items()
                if any(len(run.evaluation(key)[0]) for run in runs.values())}
    if single or not measured:
        panels.append(partial(_draw_metrics, runs=runs, metrics=measured, axis=axis))
    else:
        # Each apart: runs of other tasks have other metrics.
        panels += [partial(_draw_metrics, runs=runs, metrics={key: metric}, axis=axis,
                           title=f'Validation: {metric}') for key, metric in measured.items()]
    panels.append(partial(_draw_learning_rate, runs=runs, axis=axis))
    if 'memory' in names:
        panels.append(partial(draw_values, pattern='memory', alone='first process',
                              title='Largest GPU memory in use, MiB'))
    return panels


def _draw_loss(axes: Axes, runs: Mapping[str, RunLog], axis: str, parts: bool) -> None:
    lines = []
    for name, run in runs.items():
        lines.append((name or 'total', *run.training('loss', axis)))
        if parts:
            lines += [(part, *run.training(pattern, axis))
                      for part, pattern in _LOSS_GROUPS.items()]
    _draw(axes, 'Training loss', AXES[axis], lines, legend='' in runs)


def _draw_terms(axes: Axes, run: RunLog, terms: Sequence[str], axis: str, title: str) -> None:
    _draw(axes, title, AXES[axis],
          [(term, *run.training(re.escape(term), axis)) for term in terms])


def _draw_training(axes: Axes, runs: Mapping[str, RunLog], axis: str, pattern: str, title: str,
                   alone: str = '') -> None:
    """Draw a value of each run; a single one is called ``alone``."""
    _draw(axes, title, AXES[axis],
          [(name or alone, *run.training(pattern, axis)) for name, run in runs.items()],
          legend='' in runs)


def _draw_metrics(axes: Axes, runs: Mapping[str, RunLog], metrics: Mapping[str, str], axis: str,
                  title: str = 'Validation') -> None:
    """Draw metrics of a single run, or one metric of several."""
    by_epoch = axis == 'step' and all(run.by_epoch for run in runs.values())
    lines = []
    for name, run in runs.items():
        for key, metric in metrics.items():
            places, values = run.evaluation(key, axis)
            last = f' ({values[-1]:.3f} at the end)' if len(values) else ''
            lines.append((name or f'{metric}{last}', places, values))
    _draw(axes, title, 'epoch' if by_epoch else AXES[axis], lines, legend='' in runs, marker='o')
    if '' not in runs:
        _name_last_values(axes)


def _name_last_values(axes: Axes) -> None:
    """Write the last value of each line beside the axes, at its height as far as there is room."""
    low, high = axes.get_ylim()
    least = 0.
    for line in sorted(axes.lines, key=lambda line: line.get_ydata()[-1]):
        value = line.get_ydata()[-1]
        height = max((value - low) / (high - low), least)
        least = height + 0.07  # of the axes' height, a line of text
        axes.text(1.02, height, f'{value:.3f}', color=line.get_color(), fontsize=11, va='center',
                  transform=axes.transAxes)


def _draw_learning_rate(axes: Axes, runs: Mapping[str, RunLog], axis: str) -> None:
    _draw_training(axes, runs, axis, 'lr', 'Learning rate', 'first parameter group')
    axes.ticklabel_format(axis='y', scilimits=(-2, 3))


def _draw(axes: Axes, title: str, x_label: str, lines: list[tuple[str, np.ndarray, np.ndarray]],
          legend: bool = True, **line_style: Any) -> None:
    """Draw lines, each with its legend entry beside the axes, where it covers nothing."""
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel(x_label, fontsize=11)
    axes.grid(color='0.88')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], min_n_ticks=1,
                                             integer=x_label != AXES['hours']))
    for i, (label, steps, values) in enumerate(lines):
        # Another style for each line, too: of two that coincide, both are seen.
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=_STYLES[i % len(_STYLES)])
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
        if x_label in ('epoch', AXES['hours']):
            axes.set_xlim(left=0)
        if legend:
            axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11,
                        handlelength=2.6)
    else:
        axes.text(0.5, 0.5, 'nothing in the log', transform=axes.transAxes, ha='center',
                  fontsize=11, color='0.4')


def find_log(path: str | Path) -> Path:
    """Find the log of a training, of several runs that of the latest.

    Args:
        path: what :func:`read_log` takes.

    Raises:
        FileNotFoundError: there is no such file, or no log in the folder.
    """
    return _find_logs(Path(path))[-1]


def _find_logs(path: Path) -> list[Path]:
    """Find the latest log of a training, after those of the runs that it went on from."""
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist')
    if path.is_file():
        return [path]
    own = next((log for folder in (path, path / 'vis_data')
                if (log := folder / 'scalars.json').is_file()), None)
    if own is not None:
        return [own]
    # Names of runs are times: the last is the latest.
    logs = sorted(path.glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(f'{path} has no log of a training: none of it, its vis_data/ and '
                                'its <time>/vis_data/ holds a scalars.json')
    started = max((place for place, log in enumerate(logs) if not _has_resumed(log)), default=0)
    return logs[started:]


def _has_resumed(log: Path) -> bool:
    """Tell from the config that mmengine writes beside a log whether the run was resumed."""
    config = log.with_name('config.py')
    return config.is_file() and bool(
        re.search(r'^resume = True$', config.read_text(encoding='utf-8'), re.MULTILINE))


def _as_arrays(points: list[tuple[float, float]]) -> Series:
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values
