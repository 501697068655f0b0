"""Loss, metrics, learning rate and memory of trainings, read from mmengine's logs and drawn."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ..style import COLOURS, Axes, Figure, finish, new_figure, ticker

#: Metrics that are drawn where a run has them, by their name in the log.
METRICS = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50', 'accuracy/top1': 'top-1 in %',
           'accuracy/top5': 'top-5 in %'}

_STYLES = ('-', '--', ':', '-.')
_LEGEND = dict(frameon=False, fontsize=11, handlelength=2.6)

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

@dataclass(frozen=True)
class RunLog:
    """What a training logged.

    Args:
        train: One dict for each logged iteration, with its number under 'step' and the hours of
            training until then under 'hours'.
        evaluations: One dict for each validation, with 'step' and 'hours'.
        by_epoch: Whether 'step' of the evaluations counts epochs, else iterations.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    by_epoch: bool

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers that validations gave, such as 'coco/bbox_mAP'."""
        return list(dict.fromkeys(name for record in self.evaluations for name in record
                                  if name not in ('step', 'hours', 'time', 'data_time')))

    def training(self, pattern: str, axis: str = 'step') -> tuple[np.ndarray, np.ndarray]:
        """Sum the training values whose whole name matches a regular expression.

        Args:
            pattern: The expression.
            axis: One of ``AXES``.

        Returns:
            Iterations or hours, and sums; no elements if no name matches.
        """
        found = [(record[axis], [value for name, value in record.items()
                                 if re.fullmatch(pattern, name)]) for record in self.train]
        return _as_arrays([(place, sum(values)) for place, values in found if values])

    def evaluation(self, name: str, axis: str = 'step') -> tuple[np.ndarray, np.ndarray]:
        """Get a metric of the evaluations.

        Args:
            name: Of the metric.
            axis: One of ``AXES``.

        Returns:
            Epochs, iterations or hours, and values, without those where COCO's -1 says that there
            was nothing to evaluate.
        """
        return _as_arrays([(record[axis], record[name]) for record in self.evaluations
                           if record.get(name, -1) >= 0])


def _as_arrays(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    places, values = np.array(points, dtype=float).reshape(-1, 2).T
    return places, values


def read_log(path: str | Path) -> RunLog:
    """Read the log of a training.

    Args:
        path: The work dir of the training, of whose runs the latest is read, joined to those that
            it resumed; or the folder of one run; or the log itself, ``vis_data/scalars.json`` in
            that folder.

    Raises:
        FileNotFoundError: There is no such file, or no log in the folder.
        UsageError: The log is empty, or is none.
    """
    logs = find_logs(Path(path))
    records: list[dict[str, Any]] = []
    for log in logs:
        records = _join(records, _read_records(log))
    if not records:
        raise UsageError(f'{logs[-1]} is empty: the run ended before it logged an iteration')

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


def find_logs(path: Path) -> list[Path]:
    """Find the latest log of a training, the last, and those of the runs that it went on from.

    Args:
        path: What :func:`read_log` takes.

    Raises:
        FileNotFoundError: There is no such file, or no log in the folder.
    """
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


def _read_records(path: Path) -> list[dict[str, Any]]:
    remedy = "the log that mmengine's LocalVisBackend writes has one JSON dict a line"
    try:
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UsageError(f'{path} is no record of a training ({error}); {remedy}') from error
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
            raise UsageError(f'line {number} of {path} is no record of a training ({error}); '
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


@dataclass(frozen=True)
class _Panel:
    """What is drawn into one pair of axes: name, places and values of each line."""

    title: str
    x_label: str
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]]
    marker: str = ''
    # Whether the last value of each line stands beside the axes.
    values_beside: bool = False

    def draw(self, axes: Axes, size: float = 13) -> None:
        """Draw it, with letters of a size for the title."""
        finish(axes, self.title, size)
        axes.set_xlabel(self.x_label, fontsize=11)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(
            steps=[1, 2, 5, 10], min_n_ticks=1, integer=self.x_label != AXES['hours']))
        # A run that diverged has numbers that are none.
        known = [values[np.isfinite(values)] for _, _, values in self.lines]
        for number, (label, places, values) in enumerate(self.lines):
            if len(known[number]):
                # Another style for each line, too: of two that coincide, both are seen. A dot shows
                # a single value, which makes no line.
                axes.plot(places, values, label=label, linewidth=1.8, markersize=5, clip_on=False,
                          color=COLOURS[number % len(COLOURS)],
                          linestyle=_STYLES[number % len(_STYLES)],
                          marker='o' if len(places) == 1 else self.marker)
        if not axes.lines:
            axes.text(0.5, 0.5, 'nothing in the log', transform=axes.transAxes, ha='center',
                      fontsize=11, color='0.4')
            return
        # With zero, so that heights compare.
        values = np.concatenate(known)
        lowest, highest = values.min(initial=0), values.max(initial=0)
        room = 0.08 * (highest - lowest) or 1
        axes.set_ylim(lowest - room * (lowest < 0), highest + room)
        if self.x_label in ('epoch', AXES['hours']):
            axes.set_xlim(left=0)
        axes.ticklabel_format(axis='y', scilimits=(-2, 6))
        if self.values_beside:
            _name_last_values(axes)


def draw_curves(runs: RunLog | Mapping[str, RunLog], metrics: Sequence[str] | None = None,
                axis: str = 'step') -> Figure:
    """Draw loss, metrics, learning rate and, where it was logged, memory.

    Of a single run, the loss is drawn with its parts, the terms of the last layer together, and the
    metrics together; of several, each apart, with a colour for each run, and the last value of each
    metric beside its line.

    Args:
        runs: A run, or several by name.
        metrics: The metrics to draw, by their name in the log; None for those of ``METRICS`` that
            there are.
        axis: What to draw against, one of ``AXES``.

    Returns:
        The figure; its ``savefig`` writes it.

    Raises:
        ValueError: There are no runs, or there is no such axis.
        UsageError: No run has one of the metrics.
    """
    panels = _list_panels(runs, metrics, axis)
    rows = (len(panels) + 1) // 2
    figure = new_figure(15, 4.2 * rows)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    grid = figure.add_gridspec(rows, 2)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        panel.draw(axes)
        if isinstance(runs, RunLog) and axes.lines:
            # Beside the axes, where it covers nothing.
            axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), **_LEGEND)
    if not isinstance(runs, RunLog):
        # The same for all panels.
        _draw_legend(figure, 'outside upper left', columns=4)
    return figure


def draw_panels(runs: RunLog | Mapping[str, RunLog]) -> list[Figure]:
    """Draw each panel of :func:`draw_curves` in a figure of its own, for a narrow screen."""
    figures = []
    for panel in _list_panels(runs):
        figure = new_figure(5.4, 3.9)
        panel.draw(figure.add_subplot(), 11)
        # Below, so that the lines have the whole width.
        longest = max((len(name) for name, *_ in panel.lines), default=0)
        _draw_legend(figure, 'outside lower center', columns=2 if longest < 22 else 1)
        figures.append(figure)
    return figures


def _list_panels(runs: RunLog | Mapping[str, RunLog], metrics: Sequence[str] | None = None,
                 axis: str = 'step') -> list[_Panel]:
    """List what there is to draw; arguments and errors as of :func:`draw_curves`."""
    if axis not in AXES:
        raise ValueError(f'axis={axis!r} must be one of {", ".join(map(repr, AXES))}')
    single = isinstance(runs, RunLog)
    runs = {'': runs} if single else dict(runs)
    if not runs:
        raise ValueError('runs is empty: there is nothing to draw')

    def trained(title: str, patterns: Mapping[str, str]) -> _Panel:
        """Sums of what each run logged by the patterns, each called by its key or its run."""
        return _Panel(title, AXES[axis], [(run or name, *log.training(pattern, axis))
                                         for run, log in runs.items()
                                         for name, pattern in patterns.items()])

    def measured(title: str, keys: Mapping[str, str]) -> _Panel:
        """Metrics of a single run, or one metric of several."""
        lines = []
        for run, log in runs.items():
            for key, name in keys.items():
                places, values = log.evaluation(key, axis)
                last = f' ({values[-1]:.3f} at the end)' if len(values) else ''
                lines.append((run or f'{name}{last}', places, values))
        by_epoch = axis == 'step' and all(log.by_epoch for log in runs.values())
        return _Panel(title, 'epoch' if by_epoch else AXES[axis], lines, 'o', not single)

    measurable = sorted({name for log in runs.values() for name in log.metrics})
    unknown = [name for name in metrics or () if name not in measurable]
    if unknown:
        raise UsageError(f'no validation has {", ".join(unknown)}; there is '
                         f'{", ".join(measurable) or "none at all"}')
    titles = {name: METRICS.get(name, name) for name in metrics or METRICS
              if any(len(log.evaluation(name)[0]) for log in runs.values())}
    names = {name for log in runs.values() for record in log.train for name in record}
    terms = {name: re.escape(name) for name in sorted(names) if re.fullmatch(r'loss_\w+', name)}
    layers = any(re.fullmatch(_LOSS_GROUPS['other decoder layers'], name) for name in names)
    last = ' of the last decoder layer' if layers else ''

    panels = [trained('Training loss', {'total': 'loss', **(_LOSS_GROUPS if single else {})})]
    if len(terms) > 1:
        panels += [trained(f'Training loss, terms{last}', terms)] if single else [
            trained(f'{term}{last}', {term: pattern}) for term, pattern in terms.items()]
    # Of several runs each apart: runs of other tasks have other metrics.
    panels += [measured('Validation', titles)] if single or not titles else [
        measured(f'Validation: {name}', {key: name}) for key, name in titles.items()]
    panels.append(trained('Learning rate', {'first parameter group': 'lr'}))
    if 'memory' in names:
        panels.append(trained('Largest GPU memory in use, MiB', {'first process': 'memory'}))
    return panels


def _draw_legend(figure: Figure, place: str, columns: int) -> None:
    """Explain the lines of all axes of a figure, each name once."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    if lines:
        figure.legend(lines.values(), lines, loc=place, ncols=columns, **_LEGEND)


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
