"""A run on one page: curves, metrics, pictures, machine and config in one HTML file."""

import math
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mmengine.utils.dl_utils import collect_env
from PIL import Image

from ...drawing import open_image
from ..mistakes.class_bars import draw_class_bars
from ..mistakes.confusion import (
    SURPLUS,
    count_confusions,
    count_detections,
    draw_confusion,
    measure_tops,
)
from ..mistakes.errors import (
    KINDS,
    DetectionError,
    count_kinds,
    describe_mistake,
    find_errors,
    find_mistakes,
    summarize_mistakes,
    worst_by_kind,
)
from ..mistakes.pictures import LEGEND, draw_error, draw_pair
from ..mistakes.predictions import (
    ClassifierResults,
    DetectorResults,
    Outcomes,
    read_results,
    spread,
)
from .curves import METRICS, draw_panels
from .html import (
    Element,
    Facts,
    Folded,
    Heading,
    Note,
    Pairs,
    Picture,
    Pictures,
    Section,
    Table,
    embed_figure,
    embed_image,
    render,
)
from .work_dir import Run, find_predictions, read_environment, read_span, time_of

if TYPE_CHECKING:
    from ..mistakes.coco_curves import CocoResults

# What a part that cannot be made raises: a file is missing, data is not what it should be.
_EXPECTED = (OSError, ValueError, ImportError)

_PAIR_SIDE, _CELL_SIDE = 560, 180  # pixels
_PER_KIND, _MAX_MISTAKES = 8, 48
# Up to so many rows, a table is not folded.
_MAX_ROWS = 12

_COCO_ROWS = {
    'AP': 'AP, IoU 0.50 to 0.95', 'AP50': 'AP50, IoU 0.50', 'AP75': 'AP75, IoU 0.75',
    'AP small': 'AP of small objects, area up to 32²',
    'AP medium': 'AP of medium objects, up to 96²', 'AP large': 'AP of large objects, beyond',
    'AR 1': 'recall with 1 detection an image', 'AR 10': 'recall with 10 detections',
    'AR 100': 'recall with 100 detections', 'AR small': 'recall of small objects',
    'AR medium': 'recall of medium objects', 'AR large': 'recall of large objects'}

# What the columns of the validations are called.
_COLUMNS = {**METRICS, 'coco/bbox_mAP_75': 'AP75', 'coco/bbox_mAP_s': 'AP small',
            'coco/bbox_mAP_m': 'AP medium', 'coco/bbox_mAP_l': 'AP large'}

_PACKAGES = ('mmcv', 'mmdet', 'mmpretrain', 'spartan_mm')


class RunReport:
    """The page of a run; subclasses are for a task each.

    A part whose data is missing says in a line what is missing.

    Args:
        run: The run.
        predictions: The file that ``spartan-mm test --out`` wrote, a pickle, which can hold code:
            take none from strangers. None for the latest one in the folder of the run.
        score_threshold: The least score of a detection that is drawn, or counts as an error.
        images: Number of images beside their ground truth.

    Raises:
        FileNotFoundError: ``predictions`` does not exist.
        UsageError: ``predictions`` holds something else.
    """

    #: Titles of those parts that depend on the task; ``show_<name>`` makes each.
    own_parts: ClassVar[Mapping[str, str]] = {}

    def __init__(self, run: Run, predictions: str | Path | None = None,
                 score_threshold: float = 0.3, images: int = 8) -> None:
        self.run = run
        self.predictions: Path | None = None
        self.score_threshold = score_threshold
        self.images = images
        self._results: DetectorResults | ClassifierResults | None = None
        # Why there are none.
        self._reason = f'no predictions in {run.folder}' + (
            f': `spartan-mm report {shlex.quote(str(run.folder))} --test` makes them'
            if run.last else ', and no checkpoint yet to make them with')
        if predictions is not None:
            self._take(Path(predictions))
            return
        for path in find_predictions(run):
            try:
                self._take(path)
                return
            except _EXPECTED as error:
                self._reason = _explain(error)

    def _take(self, path: Path) -> None:
        self._results = read_results(self.run.config, path)
        self.predictions = path

    @property
    def results(self) -> Any:
        """The predictions, and what belongs to them.

        Raises:
            ValueError: There are none; the message says what to do.
        """
        if self._results is None:
            raise ValueError(self._reason)
        return self._results

    def render(self, show: Callable[[str], None] = lambda title: None) -> str:
        """Write the page.

        Args:
            show: Called with the title of each part before it is made.

        Returns:
            HTML.
        """
        titles = dict(results='Results', curves='Curves', **self.own_parts,
                      environment='Environment', config='Config')
        sections = []
        for name, title in titles.items():
            show(title)
            blocks = _try(getattr(self, f'show_{name}'))
            sections.append(Section(name.replace('_', '-'), title, blocks))
        return render(self.run.name, self.describe(), self.cards(), sections)

    def measure(self) -> dict[str, str]:
        """Measure what stands in large letters, on the predictions.

        Raises:
            ValueError: There are no predictions, or they do not belong to the data.
        """
        raise ValueError(self._reason)

    def describe(self) -> str:
        """Say in a line what was trained."""
        try:
            model = self.run.config.model
        except (*_EXPECTED, AttributeError):
            return str(self.run.folder)
        backbone = model.get('backbone') or {}
        arch = backbone.get('arch')
        name = ' '.join([str(backbone.get('type', '')), *([arch] if isinstance(arch, str) else [])])
        return f'{model.get("type", "")}, backbone {name}' if name else str(model.get('type', ''))

    def cards(self) -> list[tuple[str, str]]:
        """List what stands in large letters: names and values."""
        try:
            measured = self.measure()
        except _EXPECTED:
            last = self.run.log.evaluations[-1:]
            measured = {f'{name}, last validation': _number(record[key])
                        for record in last for key, name in METRICS.items() if key in record}
        cards = list(measured.items())
        losses = self.run.log.training('loss')[1]
        if len(losses):
            cards.append(('last training loss', _number(losses[-1])))
        progress = self.run.progress
        if progress.finished:
            cards.append((f'{progress.unit}s', str(progress.total)))
        elif progress.total:
            cards.append((f'{progress.unit}, unfinished', f'{progress.done} of {progress.total}'))
        else:
            cards.append((progress.unit, str(progress.done)))
        span = self._read_span()
        if span:
            cards.append(('training and validation', _duration(span[1] - span[0])))
        return cards

    def show_results(self) -> list[Element]:
        """Show what was measured, and the validations of the training."""
        return [*_try(self.show_measured), *self.show_validations()]

    def show_measured(self) -> list[Element]:
        """Show what is measured on the predictions."""
        raise ValueError(self._reason)

    def show_validations(self) -> list[Element]:
        """Show the metrics of each validation."""
        records = self.run.log.evaluations
        if not records:
            return [Note('no validation in the log so far', missing=True)]
        unit = 'epoch' if self.run.log.by_epoch else 'iteration'
        names = self.run.log.metrics
        rows = [[str(record['step']), *(_number(record.get(name)) for name in names)]
                for record in records]
        goal = next((name for name in METRICS if name in names), None)
        values = [_value(record.get(goal)) for record in records]
        best = int(np.argmax(values)) if goal and max(values) >= 0 else None
        caption = 'Validations during the training'
        if best is not None:
            caption += f', the best {_COLUMNS[goal]} in bold'
        header = [unit, *(_COLUMNS.get(name, name) for name in names)]
        return [_fold(Table(caption, header, rows, best))]

    def show_curves(self) -> list[Element]:
        """Show loss, metrics and learning rate."""
        return [Pictures([embed_figure(figure) for figure in draw_panels(self.run.log)])]

    def show_environment(self) -> list[Element]:
        """Show machine, versions, seed and checkpoints."""
        run = self.run
        rows = [('work dir', str(run.folder)), ('log', str(run.log_path)),
                ('state', str(run.progress))]
        span = self._read_span()
        if span:
            rows.append(('time', f'{span[0]:%Y-%m-%d %H:%M} to {span[1]:%Y-%m-%d %H:%M}, '
                                 f'{_duration(span[1] - span[0])}'))
        memory = [record['memory'] for record in run.log.train if 'memory' in record]
        if memory:
            rows.append(('memory of the GPU', f'{max(memory):,} MB at most'))
        blocks: list[Element] = [Facts(rows), Heading('Machine of the training')]
        logged = read_environment(run.text_log) if run.text_log else {}
        if logged:
            blocks.append(Facts(list(logged.items())))
        else:
            blocks.append(Note(f'no text log beside {run.log_path} that describes the machine',
                               missing=True))
        blocks += [Heading('Machine of this report'), Facts(list(_describe_here().items())),
                   Heading('Checkpoints')]
        if run.checkpoints:
            rows = [(path.name, _kind_of(path, run.last), f'{path.stat().st_size / 1e6:.1f} MB',
                     f'{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}')
                    for path in run.checkpoints]
            blocks.append(Table('In the order of writing', ['file', '', 'size', 'written'], rows))
        else:
            blocks.append(Note(f'no checkpoint in {run.folder} so far', missing=True))
        return blocks

    def show_config(self) -> list[Element]:
        """Show the whole config as it was written."""
        path = self.run.config_file
        text = path.read_text(encoding='utf-8', errors='replace')
        return [Folded(f'{path} ({len(text.splitlines())} lines)', text)]

    def describe_predictions(self, what: str) -> Note:
        """Say where the numbers come from."""
        path = self.predictions
        if path.is_relative_to(self.run.folder):
            path = path.relative_to(self.run.folder)
        text = f'{what}; predictions: {path}'
        if self.run.last and time_of(self.predictions) < time_of(self.run.last):
            text += (f', which are older than {self.run.last.name}: make new ones with '
                     f'`{self.run.test_command}`')
        return Note(text)

    def _read_span(self) -> tuple[datetime, datetime] | None:
        return read_span(self.run.text_log) if self.run.text_log else None


class DetectorReport(RunReport):
    """The page of a detector; everything is said of :class:`RunReport`."""

    own_parts = dict(classes='Classes', precision_recall='Precision and recall',
                     gallery='Ground truth and detections', errors='Misses and false alarms',
                     confusion='Confusion')

    @cached_property
    def _evaluation(self) -> 'CocoResults':
        from ..mistakes.coco_curves import evaluate
        results = self.results
        metrics = self.run.config.get('test_evaluator') or []
        metrics = [metrics] if isinstance(metrics, Mapping) else metrics
        files = [metric['ann_file'] for metric in metrics if metric.get('ann_file')]
        ann_file = files[0] if files else getattr(results.dataset, 'ann_file', None)
        if not ann_file:
            raise ValueError("AP needs annotations in COCO's format: set ann_file in "
                             'test_evaluator of the config')
        return evaluate(results.predictions, ann_file, results.classes)

    def measure(self) -> dict[str, str]:
        summary = self._evaluation.summary
        return {name: _number(summary[name]) for name in ('AP', 'AP50', 'AP75')}

    def show_measured(self) -> list[Element]:
        rows = [(_COCO_ROWS[name], _number(value))
                for name, value in self._evaluation.summary.items()]
        predictions = self.results.predictions
        found = sum(len(detections.boxes) for detections in predictions.values())
        return [Table("COCO's metrics", ['metric', 'value'], rows),
                self.describe_predictions(
                    f'{len(predictions)} images, {self._evaluation.objects.sum()} objects, '
                    f'{found} detections of any score')]

    def show_classes(self) -> list[Element]:
        from ..mistakes.coco_curves import AREAS, draw_class_ap
        results = self._evaluation
        columns = [results.average_precision(), results.average_precision(0.5),
                   results.average_precision(0.75),
                   *(results.average_precision(area=area) for area in AREAS[1:])]
        rows = [[name, str(count), *map(_number, values)] for name, count, *values
                in zip(results.classes, results.objects, *columns, strict=True)]
        table = Table('AP of each class', ['class', 'objects', 'AP', 'AP50', 'AP75', 'AP small',
                                           'AP medium', 'AP large'], rows)
        return [Pictures([embed_figure(draw_class_ap(results))]), _fold(table)]

    def show_precision_recall(self) -> list[Element]:
        from ..mistakes.coco_curves import draw_class_precision_recall, draw_precision_recall
        return [Pictures([embed_figure(draw_precision_recall(self._evaluation)),
                          embed_figure(draw_class_precision_recall(self._evaluation))])]

    def show_gallery(self) -> list[Element]:
        dataset, pairs = self.results.dataset, []
        for index in spread(len(dataset), self.images):
            name, panels = draw_pair(dataset, self.results.predictions, index,
                                     self.score_threshold, _PAIR_SIDE)
            pairs.append((name, tuple(
                embed_image(picture, f'{name}, {caption.partition(":")[0]}', (caption, ))
                for picture, caption in panels)))
        return [Note(f'images spread evenly over the {len(dataset)}; detections with a score of '
                     f'{self.score_threshold:g} or more'), Pairs(pairs)]

    def show_errors(self) -> list[Element]:
        errors = find_errors(self.results.dataset, self.results.predictions, self.score_threshold)
        rows = [(KINDS[kind], str(count)) for kind, count in count_kinds(errors).items()]
        blocks: list[Element] = [
            Table(f'Errors at a score of {self.score_threshold:g} and an IoU of 0.5',
                  ['kind', 'number'], rows)]
        if errors:
            blocks.append(Note(LEGEND))
        for heading, worst in worst_by_kind(errors, _PER_KIND):
            pictures = [self._embed_error(error) for error in worst]
            blocks += [Heading(heading), Pictures(pictures, 'small')]
        return blocks

    def show_confusion(self) -> list[Element]:
        counts = count_detections(self.results.dataset, self.results.predictions,
                                  self.score_threshold)
        figure = draw_confusion(counts, self.results.classes, surplus=True)
        return [Note(f'in the row {SURPLUS!r}: detections that no object is left for, duplicates '
                     'and second classes of one object among them, not only those on background'),
                Pictures([embed_figure(figure)], 'wide')]

    def _embed_error(self, error: DetectionError) -> Picture:
        path = self.results.dataset.get_data_info(error.index)['img_path']
        lines = (*error.describe(self.results.classes), Path(path).name)
        return embed_image(draw_error(open_image(path), error, _CELL_SIDE), ', '.join(lines), lines)


class ClassifierReport(RunReport):
    """The page of a classifier; everything is said of :class:`RunReport`."""

    own_parts = dict(classes='Classes', confusion='Confusion', mistakes='Mistakes')

    @property
    def _outcomes(self) -> Outcomes:
        return self.results.outcomes

    def measure(self) -> dict[str, str]:
        return {name: f'{100 * share:.2f} %'
                for name, share in measure_tops(self._outcomes).items()}

    def show_measured(self) -> list[Element]:
        counts = count_confusions(self._outcomes)
        by_class = self._accuracies(counts)
        rows = [*self.measure().items(),
                ('mean of the classes', f'{100 * np.nanmean(by_class):.2f} %'),
                ('right', f'{counts.trace()} of {counts.sum()}')]
        return [Table('Accuracy', ['metric', 'value'], rows),
                self.describe_predictions(f'{len(self._outcomes)} pictures of {len(counts)} classes'
                                          )]

    def show_classes(self) -> list[Element]:
        counts = count_confusions(self._outcomes)
        accuracies, totals, classes = self._accuracies(counts), counts.sum(1), self.results.classes
        rows = [[name, str(total), str(right), _percent(accuracy)] for name, total, right, accuracy
                in zip(classes, totals, counts.diagonal(), accuracies, strict=True)]
        table = Table('Accuracy of each class', ['class', 'pictures', 'right', 'accuracy'], rows)
        bars = draw_class_bars('Accuracy', accuracies, classes, totals, 'pictures')
        return [Pictures([embed_figure(bars)]), _fold(table)]

    def show_confusion(self) -> list[Element]:
        figure = draw_confusion(count_confusions(self._outcomes), self.results.classes)
        return [Pictures([embed_figure(figure)], 'wide')]

    def show_mistakes(self) -> list[Element]:
        outcomes = self._outcomes
        pictures = []
        for index in find_mistakes(outcomes)[:_MAX_MISTAKES]:
            image = open_image(outcomes.paths[index])
            image.thumbnail((_CELL_SIDE, _CELL_SIDE), Image.Resampling.LANCZOS)
            lines = (*describe_mistake(outcomes, index, self.results.classes),
                     Path(outcomes.paths[index]).name)
            pictures.append(embed_image(image, ', '.join(lines), lines))
        summary = summarize_mistakes(outcomes, _MAX_MISTAKES)
        if not pictures:
            return [Note(summary)]
        return [Note(f'{summary}; in brackets: the score of the class'),
                Pictures(pictures, 'small')]

    @staticmethod
    def _accuracies(counts: np.ndarray) -> np.ndarray:
        totals = counts.sum(1)
        return np.where(totals > 0, counts.diagonal() / np.maximum(totals, 1), np.nan)


def make_report(run: Run, predictions: str | Path | None = None, score_threshold: float = 0.3,
                images: int = 8) -> RunReport:
    """Choose the page of a run by its task; arguments and errors as of :class:`RunReport`."""
    try:
        scope = run.config.get('default_scope')
    except _EXPECTED:
        scope = None
        if predictions is not None:
            raise
    task = {'mmdet': DetectorReport, 'mmpretrain': ClassifierReport}.get(scope, RunReport)
    return task(run, predictions, score_threshold, images)


def _try(make: Callable[[], list[Element]]) -> list[Element]:
    """Make a part, or say why it cannot be made."""
    try:
        return make()
    except _EXPECTED as error:
        return [Note(_explain(error), missing=True)]


def _explain(error: Exception) -> str:
    """Say in one line what is wrong."""
    path = getattr(error, 'filename', None)
    if isinstance(error, FileNotFoundError) and path:
        text = f'{path} does not exist'
        return text if Path(path).is_absolute() else (
            f'{text} here: run this in the folder that the training was started in')
    return ' '.join(str(error).split())


def _describe_here() -> dict[str, str]:
    """Describe the machine as mmengine does at the start of a log, and the packages in use."""
    facts = {name: str(value) for name, value in collect_env().items()
             if name != 'PyTorch compiling details'}
    return facts | {name: sys.modules[name].__version__ for name in _PACKAGES
                    if name in sys.modules}


def _fold(table: Table) -> Element:
    """Fold a long table, under its caption."""
    if len(table.rows) <= _MAX_ROWS:
        return table
    return Folded(f'{table.caption} ({len(table.rows)})', blocks=[table])


def _kind_of(path: Path, last: Path | None) -> str:
    kinds = ['last'] if last and path.name == last.name else []
    return ', '.join([*kinds, *(['best'] if path.name.startswith('best_') else [])])


def _value(value: Any) -> float:
    """Take a number, or -1 for what is none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else -1.


def _number(value: Any) -> str:
    """Write a number; a dash for none, and for COCO's -1."""
    if isinstance(value, (int, float, np.number)):
        if math.isfinite(value) and value != -1:
            return f'{value:.3f}' if abs(value) < 10 else f'{value:.2f}'
        return '–' if value == -1 or math.isnan(value) else str(value)
    return '–' if value is None else str(value)


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %' if math.isfinite(share) else '–'


def _duration(span: timedelta) -> str:
    seconds = round(span.total_seconds())
    if seconds < 60:
        return f'{seconds} s'
    minutes = round(seconds / 60)
    if minutes < 60:
        return f'{minutes} min'
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes:02} min'
