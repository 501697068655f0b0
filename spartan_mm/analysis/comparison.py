"""Models side by side: their sizes, their times in one run, and what accuracy is published."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import CheckpointError, UsageError
from ..requirements import require
from ..text import markdown
from .benchmark import (
    Form,
    Group,
    StepError,
    Summary,
    Workload,
    machine_line,
    run_group,
    throughput,
)
from .models import CannotRunError, find_entry, read_config, task_of
from .sizes import DEPLOY_FORM, Count, count_model
from .style import COLOURS, Axes, Bbox, Figure, new_figure, ticker

_NONE = '–'  # what nobody has published, or what could not be measured

# By the metafiles' names: what the tables call it.
_METRICS = {'Top 1 Accuracy': 'top-1, %', 'box AP': 'box AP'}
# Metafiles that name the part of a dataset mean the same figure as those that do not.
_DATASETS = {'COCO val2017': 'COCO'}
# What a figure that the user gives is of.
_GIVEN = {'classification': ('top-1, %', 'ImageNet-1k'), 'detection': ('box AP', 'COCO')}

NOTES = (
    'Multiply-adds of convolutions, linear layers and attention for one image; FLOPs are 2 for '
    'each. Activations are the elements of what convolutions and products of matrices give, as '
    'fvcore counts them.')
TIME_NOTES = 'Times have their quartiles in brackets; the models took turns.'


@dataclass(frozen=True)
class Accuracy:
    """A published figure.

    Args:
        value: The figure, in percent.
        metric: 'top-1, %' or 'box AP'.
        dataset: What it was measured on.
        source: Who says so.
    """

    value: float
    metric: str
    dataset: str
    source: str


@dataclass(frozen=True)
class Row:
    """A model in the comparison.

    Args:
        name: As it was given.
        count: Its size; None if it could not be run.
        accuracy: What is published; None if nothing is known.
        latency: Seconds for one image; None if not measured.
        rate: Images per second; None if not measured.
        problem: Why it could not be counted or measured; None if it could.
        shown: What the user calls it; None for its own name.
    """

    name: str
    count: Count | None = None
    accuracy: Accuracy | None = None
    latency: Summary | None = None
    rate: float | None = None
    problem: str | None = None
    shown: str | None = None

    @property
    def title(self) -> str:
        """What to call it."""
        return self.shown or (self.count.name if self.count else self.name)

    @property
    def has_spartan(self) -> bool:
        """Whether it is built on a SpaRTAN."""
        return self.count is not None and 'SpaRTAN' in self.count.kinds.values()


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Args:
        rows: The models.
        machine: What times were measured on, see :func:`describe_machine`; None if none were.
        batch: Images in the steps that the rates are of.
        dtype: Of the computation.
    """

    rows: tuple[Row, ...]
    machine: Mapping[str, Any] | None = None
    batch: int = 1
    dtype: str = 'float32'

    def call(self, shown: Mapping[str, str]) -> 'Comparison':
        """Call the models as the user does, by the names that they were given by."""
        rows = (replace(row, shown=shown.get(row.name)) for row in self.rows)
        return replace(self, rows=tuple(rows))


def compare(names: Sequence[str], shape: tuple[int, int] | None = None, deploy: bool = False,
            accuracies: Mapping[str, float] | None = None, workload: Workload | None = None,
            rounds: int | None = None,
            report: Callable[[str], None] = lambda text: None) -> Comparison:
    """Compare models.

    Args:
        names: See :func:`load_named_model`.
        shape: (H, W) of the images; None for what each model's test pipeline makes.
        deploy: Switch the models that have an inference form to it.
        accuracies: Figures by name, in percent, for models of which none is published or in the
            place of that: top-1 on ImageNet-1k, or box AP on COCO.
        workload: How to measure times: the device, the precision, and the batch of the rates;
            latencies are of one image. None to measure none.
        rounds: Steps of each model; None for as many as take some 20 s in all.
        report: Is told what is being done.

    Raises:
        UnknownModelError: If a name stands for no model.
        UsageError: If times cannot be measured as asked for, or an accuracy is given for a
            model that is not among the names.
    """
    accuracies = accuracies or {}
    unknown = accuracies.keys() - set(names)
    if unknown:
        raise UsageError(f'an accuracy is given for {", ".join(sorted(unknown))}, but the '
                         f'models are {", ".join(names)}')
    rows = []
    for name in dict.fromkeys(names):
        report(f'{name}: counting')
        accuracy = find_accuracy(name, accuracies.get(name))
        try:
            rows.append(Row(name, _count(name, shape, deploy), accuracy))
        except CannotRunError as error:
            rows.append(Row(name, accuracy=accuracy, problem=str(error)))
    if workload is None:
        return Comparison(tuple(rows))

    sizes = (shape, ) if shape else None
    single = replace(workload, batch=1, sizes=sizes)
    batch = workload.batch or 1
    rows, machine = _measure(rows, single, rounds, report)
    if batch > 1:
        rows, _ = _measure(rows, replace(single, batch=batch), rounds, report)
    return Comparison(tuple(rows), machine, batch, workload.amp or 'float32')


def find_accuracy(name: str, given: float | None = None) -> Accuracy | None:
    """Find what accuracy is published for a model: the first figure that its metafile has.

    Args:
        name: See :func:`load_named_model`.
        given: A figure to take instead, in percent; None to look it up.
    """
    if given is not None:
        config = read_config(name)
        metric, dataset = _GIVEN['classification' if config is None else task_of(config, name)]
        return Accuracy(given, metric, dataset, 'given by the user')
    entry, package = find_entry(name) or ({}, '')
    for result in entry.get('Results') or ():
        for key, metric in _METRICS.items():
            if key in (result.get('Metrics') or {}):
                # This package's metafiles say whose figure each is; the others' are their own.
                source = result.get('Source') or f'{package} {import_module(package).__version__}'
                dataset = _DATASETS.get(result['Dataset'], result['Dataset'])
                return Accuracy(float(result['Metrics'][key]), metric, dataset, source)
    return None


def make_markdown(comparison: Comparison) -> str:
    """Lay a comparison out in Markdown, with what it was measured on."""
    timed = comparison.machine is not None
    rows = [['model', 'from', 'form', 'input', 'parameters, M', 'multiply-adds, G', 'FLOPs, G',
             'activations, M']]
    if timed:
        rows[0] += ['latency, ms', f'images/s (batch {comparison.batch})']
    rows[0] += ['accuracy', 'of', 'said by']
    for row in comparison.rows:
        cells = [row.title]
        if row.count:
            size = row.count.total
            cells += [row.count.source, row.count.form, '{} x {}'.format(*row.count.shape),
                      f'{size.parameters / 1e6:.2f}', f'{size.multiply_adds / 1e9:.2f}',
                      f'{size.flops / 1e9:.2f}', f'{size.activations / 1e6:.2f}']
        else:
            cells += [_NONE] * 7
        if timed:
            cells += [row.latency.write(1e3) if row.latency else _NONE,
                      f'{row.rate:.1f}' if row.rate else _NONE]
        accuracy = row.accuracy
        cells += ([f'{accuracy.value:g}', f'{accuracy.metric}, {accuracy.dataset}',
                   accuracy.source] if accuracy else [_NONE] * 3)
        rows.append(cells)
    notes = f'{NOTES} {TIME_NOTES}' if timed else NOTES
    parts = [markdown(rows), f'{notes}\n']
    if timed:
        parts.append(f'{machine_line(comparison.machine)}; {comparison.dtype}\n')
    parts += [f'{row.problem}\n' for row in comparison.rows if row.problem]
    return '\n'.join(parts)


def make_csv(comparison: Comparison) -> str:
    """Lay a comparison out as comma-separated values, one model a line, nothing rounded."""
    records = []
    for row in comparison.rows:
        record = dict(model=row.title, name=row.name)
        if row.count:
            size, (height, width) = row.count.total, row.count.shape
            record |= dict(
                source=row.count.source, form=row.count.form, height=height, width=width,
                parameters=size.parameters, multiply_adds=size.multiply_adds, flops=size.flops,
                activations=size.activations)
        if row.latency:
            record |= dict(latency_ms=1e3 * row.latency.median,
                           latency_quartile1_ms=1e3 * row.latency.low,
                           latency_quartile3_ms=1e3 * row.latency.high)
        if row.rate:
            record |= dict(images_per_second=row.rate, batch=comparison.batch)
        if row.accuracy:
            record |= dict(accuracy=row.accuracy.value, metric=row.accuracy.metric,
                           dataset=row.accuracy.dataset, accuracy_source=row.accuracy.source)
        if row.latency:
            record |= dict(dtype=comparison.dtype, machine=machine_line(comparison.machine))
        if row.problem:
            record |= dict(problem=row.problem)
        records.append(record)
    fields = dict.fromkeys(field for record in records for field in record)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(fields), lineterminator='\n')
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


# ---- the plot ------------------------------------------------------------------------------------

# In points.
_TEXT_SIZE, _MARKER = 8, 9


def draw_comparison(comparison: Comparison) -> Figure | None:
    """Draw accuracy against parameters, multiply-adds and latency, a row of axes a dataset.

    Models that are built on a SpaRTAN are orange stars.

    Returns:
        The plot; None if there is no model of which both accuracy and size are known.
    """
    rows = [row for row in comparison.rows if row.accuracy and row.count]
    if not rows:
        return None
    quantities: dict[str, Callable[[Row], float | None]] = {
        'parameters, M': lambda row: row.count.total.parameters / 1e6,
        'multiply-adds, G': lambda row: row.count.total.multiply_adds / 1e9}
    if any(row.latency for row in rows):
        quantities[f'latency of one image, ms ({comparison.dtype})'] = \
            lambda row: row.latency and 1e3 * row.latency.median
    measures: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        measures.setdefault((row.accuracy.metric, row.accuracy.dataset), []).append(row)

    # Room that grows with what is to be written in it.
    side = 3.6 * max(1., math.sqrt(max(map(len, measures.values())) / 9))
    size = side * len(quantities), side * len(measures) + 0.5
    figure = new_figure(*size, dpi=140)
    grid = figure.subplots(len(measures), len(quantities), squeeze=False, sharey='row')
    drawn = []
    for ((metric, dataset), mine), line in zip(measures.items(), grid, strict=True):
        line[0].set_ylabel(f'{metric} ({dataset})')
        for axes, (title, quantity) in zip(line, quantities.items(), strict=True):
            shown = [row for row in mine if quantity(row)]
            axes.set_xlabel(title)
            _scatter(axes, shown, [quantity(row) for row in shown])
            drawn.append((axes, shown, quantity))
    handles = {label: handle for axes in grid.flat
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=2,
                  fontsize=9)
    if comparison.machine:
        figure.supxlabel(machine_line(comparison.machine), fontsize=7)
    # Where everything stands is known only now.
    figure.draw_without_rendering()
    figure.set_layout_engine('none')
    for axes, shown, quantity in drawn:
        _place_labels(axes, [(quantity(row), row.accuracy.value, _label(row)) for row in shown])
    return figure


def _scatter(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    for ours, marker, size, colour, label in (
            (True, '*', 110, COLOURS[1], 'with SpaRTAN'), (False, 'o', 36, COLOURS[0], 'others')):
        points = [(value, row.accuracy.value) for value, row in zip(values, rows, strict=True)
                  if row.has_spartan == ours]
        if points:
            axes.scatter(*zip(*points, strict=True), s=size, marker=marker, color=colour,
                         edgecolors='white', linewidths=0.6, label=label, zorder=3)
    if values and max(values) > 8 * min(values):
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1., 2., 5.)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    # Room for the labels.
    axes.margins(0.3, 0.2)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.tick_params(labelsize=8)


def _label(row: Row) -> str:
    return f'{row.title} (deploy)' if row.count.form == DEPLOY_FORM else row.title


def _place_labels(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point, where it covers no other name and no point.

    Args:
        axes: Of the points, laid out already.
        points: For each its coordinates and its name.
    """
    adjust = require('adjustText', '1.3', 'analysis')
    # They are measured before the figure is drawn.
    labels = [axes.text(x, y, text, fontsize=_TEXT_SIZE, ha='center', va='center', zorder=4,
                        parse_math=False) for x, y, text in points]
    half = _MARKER * axes.figure.dpi / 72 / 2
    places = axes.transData.transform([point[:2] for point in points]) if points else []
    back = axes.transData.inverted()
    markers = [Bbox(back.transform([place - half, place + half])) for place in places]
    state = np.random.get_state()
    np.random.seed(0)
    adjust.adjust_text(labels, objects=markers, ax=axes, iter_lim=300, min_arrow_len=15,
                       arrowprops=dict(arrowstyle='-', color='0.5', linewidth=0.6))
    np.random.set_state(state)


# ---- measuring -----------------------------------------------------------------------------------


def _count(name: str, shape: tuple[int, int] | None, deploy: bool) -> Count:
    if deploy:
        try:
            return count_model(name, shape, deploy=True)
        except CheckpointError:
            pass  # the only form it has
    return count_model(name, shape)


def _measure(rows: Sequence[Row], workload: Workload, rounds: int | None,
             report: Callable[[str], None]) -> tuple[list[Row], Mapping[str, Any] | None]:
    """Measure the models that can run, in turns; note down why others cannot."""
    rows = list(rows)
    while True:
        forms = {Form(row.name, deploy=row.count.form == DEPLOY_FORM): index
                 for index, row in enumerate(rows) if not row.problem}
        if not forms:
            return rows, None
        try:
            measured = run_group(Group(workload, tuple(forms), rounds), report=report)
            break
        except StepError as error:
            index = forms[error.form]
            rows[index] = replace(rows[index], problem=str(error))
    for index, result in zip(forms.values(), measured['results'], strict=True):
        rows[index] = replace(rows[index], rate=throughput(result))
        if workload.batch == 1:
            rows[index] = replace(rows[index], latency=Summary.of(result['times']))
    return rows, measured['machine']
