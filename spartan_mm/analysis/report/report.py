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

from ..mistakes.class_bars import draw_class_bars
from ..mistakes.confusion import (
    SURPLUS,
    Confusions,
    count_confusions,
    count_detections,
    measure_tops,
)
from ..mistakes.errors import KINDS, count_kinds, find_errors, summarize_mistakes, worst_by_kind
from ..mistakes.pictures import CELL_SIDE, LEGEND, draw_pair, show_errors, show_mistakes
from ..mistakes.predictions import ClassifierResults, DetectorResults, read_results, spread
from .curves import METRICS, draw_panels
from .html import (
    Block,
    Facts,
    Folded,
    Note,
    Pairs,
    Pictures,
    Section,
    Table,
    embed_figure,
    embed_image,
    render,
)
from .work_dir import Run, find_predictions, read_text_log, time_of

if TYPE_CHECKING:
    from ..mistakes.coco_curves import CocoResults

# What a part that cannot be made raises: a file is missing, data is not what it should be.
_EXPECTED = (OSError, ValueError, ImportError)

_PAIR_SIDE = 560  # pixels
_PER_KIND, _MAX_MISTAKES = 8, 48

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
        for path in [Path(predictions)] if predictions else find_predictions(run):
            try:
                self._results = read_results(run.config, path)
                self.predictions = path
                return
            except _EXPECTED as error:
                if predictions:
                    raise
                self._reason = _explain(error)

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

    def measure(self) -> dict[str, str]:
        """Measure what stands in large letters, on the predictions.

        Raises:
            ValueError: There are no predictions, or they do not belong to the data.
        """
        raise ValueError(self._reason)

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
        cards.append(self.run.progress)
        begun_ended = self._machine[1]
        if begun_ended:
            cards.append(('training and validation', _duration(begun_ended[1] - begun_ended[0])))
        return cards

    def show_results(self) -> list[Block]:
        """Show what was measured, and the validations of the training."""
        return [*_try(self.show_measured), *self.show_validations()]

    def show_measured(self) -> list[Block]:
        """Show what is measured on the predictions."""
        raise ValueError(self._reason)

    def show_validations(self) -> list[Block]:
        """Show the metrics of each validation."""
        records, names = self.run.log.evaluations, self.run.log.metrics
        if not records:
            return [Note('no validation in the log so far', 'missing')]
        rows = [[str(record['step']), *(_number(record.get(name)) for name in names)]
                for record in records]
        caption, best = 'Validations during the training', None
        goal = next((name for name in METRICS if name in names), None)
        values = np.nan_to_num([record.get(goal, -1) for record in records], nan=-1, posinf=-1)
        if values.max() >= 0:
            best = int(values.argmax())
            caption += f', the best {_COLUMNS[goal]} in bold'
        header = ['epoch' if self.run.log.by_epoch else 'iteration',
                  *(_COLUMNS.get(name, name) for name in names)]
        return [Table(caption, header, rows, best)]

    def show_curves(self) -> list[Block]:
        """Show loss, metrics and learning rate."""
        return [Pictures([embed_figure(figure) for figure in draw_panels(self.run.log)])]

    def show_environment(self) -> list[Block]:
        """Show machine, versions, seed and checkpoints."""
        run = self.run
        logged, begun_ended = self._machine
        rows = [('work dir', str(run.folder)), ('log', str(run.log_path)),
                ('state', ', '.join(run.progress))]
        if begun_ended:
            begun, ended = begun_ended
            rows.append(('time', f'{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M}, '
                                 f'{_duration(ended - begun)}'))
        memory = [record['memory'] for record in run.log.train if 'memory' in record]
        if memory:
            rows.append(('memory of the GPU', f'{max(memory):,} MB at most'))
        here = {name: str(value) for name, value in collect_env().items()
                if name != 'PyTorch compiling details'}
        here |= {name: sys.modules[name].__version__ for name in _PACKAGES if name in sys.modules}
        files = [(path.name, _kind_of(path, run.last), f'{path.stat().st_size / 1e6:.1f} MB',
                  f'{datetime.fromtimestamp(time_of(path)):%Y-%m-%d %H:%M}')
                 for path in run.checkpoints]
        return [
            Facts(rows), Note('Machine of the training', 'heading'),
            Facts([*logged.items()]) if logged else Note(
                f'no text log beside {run.log_path} that describes the machine', 'missing'),
            Note('Machine of this report', 'heading'), Facts([*here.items()]),
            Note('Checkpoints', 'heading'),
            Table('In the order of writing', ['file', '', 'size', 'written'], files) if files
            else Note(f'no checkpoint in {run.folder} so far', 'missing')]

    def show_config(self) -> list[Block]:
        """Show the whole config as it was written."""
        path = self.run.config_file
        text = path.read_text(encoding='utf-8', errors='replace')
        return [Folded(f'{path} ({len(text.splitlines())} lines)', text)]

    def describe_predictions(self, what: str) -> Note:
        """Say where the numbers come from."""
        path, last = self.predictions, self.run.last
        if path.is_relative_to(self.run.folder):
            path = path.relative_to(self.run.folder)
        text = f'{what}; predictions: {path}'
        if last and time_of(self.predictions) < time_of(last):
            text += (f', which are older than {last.name}: make new ones with '
                     f'`{self.run.test_command}`')
        return Note(text)

    @cached_property
    def _machine(self) -> tuple[dict[str, str], list[datetime]]:
        return read_text_log(self.run.text_log) if self.run.text_log else ({}, [])


class DetectorReport(RunReport):
    """The page of a detector; everything is said of :class:`RunReport`."""

    own_parts = dict(classes='Classes', precision_recall='Precision and recall',
                     gallery='Ground truth and detections', errors='Misses and false alarms',
                     confusion='Confusion')

    @cached_property
    def _evaluation(self) -> 'CocoResults':
        from ..mistakes.coco_curves import evaluate
        metrics = self.run.config.get('test_evaluator') or []
        metrics = [metrics] if isinstance(metrics, Mapping) else metrics
        files = [metric['ann_file'] for metric in metrics if metric.get('ann_file')]
        dataset = self.results.dataset
        own = hasattr(dataset, 'examine') and not files
        truth = files[0] if files else dataset if own else getattr(dataset, 'ann_file', None)
        if not truth:
            raise ValueError("AP needs annotations in COCO's format: set ann_file in "
                             'test_evaluator of the config')
        return evaluate(self.results, truth)

    def measure(self) -> dict[str, str]:
        summary = self._evaluation.summary
        return {name: _number(summary[name]) for name in ('AP', 'AP50', 'AP75')}

    def show_measured(self) -> list[Block]:
        from ..mistakes.coco_curves import SUMMARY
        rows = [(SUMMARY[name], _number(value))
                for name, value in self._evaluation.summary.items()]
        predictions = self.results.predictions
        found = sum(len(detections.boxes) for detections in predictions.values())
        return [Table("COCO's metrics", ['metric', 'value'], rows),
                self.describe_predictions(
                    f'{len(predictions)} images, {self._evaluation.objects.sum()} objects, '
                    f'{found} detections of any score')]

    def show_classes(self) -> list[Block]:
        from ..mistakes.coco_curves import AREAS, draw_class_ap
        results = self._evaluation
        columns = [results.average_precision(iou) for iou in (None, 0.5, 0.75)]
        columns += [results.average_precision(area=area) for area in AREAS[1:]]
        rows = [[name, str(count), *map(_number, values)] for name, count, *values
                in zip(results.classes, results.objects, *columns, strict=True)]
        return [Pictures([embed_figure(draw_class_ap(results))]),
                Table('AP of each class', ['class', 'objects', 'AP', 'AP50', 'AP75', 'AP small',
                                           'AP medium', 'AP large'], rows)]

    def show_precision_recall(self) -> list[Block]:
        from ..mistakes.coco_curves import draw_class_precision_recall, draw_precision_recall
        return [Pictures([embed_figure(draw_precision_recall(self._evaluation)),
                          embed_figure(draw_class_precision_recall(self._evaluation))])]

    def show_gallery(self) -> list[Block]:
        number, pairs = len(self.results.dataset), []
        for index in spread(number, self.images):
            name, panels = draw_pair(self.results, index, self.score_threshold, _PAIR_SIDE)
            pairs.append((name, [embed_image(picture, (caption, ),
                                             f'{name}, {caption.partition(":")[0]}')
                                 for picture, caption in panels]))
        return [Note(f'images spread evenly over the {number}; detections with a score of '
                     f'{self.score_threshold:g} or more'), Pairs(pairs)]

    def show_errors(self) -> list[Block]:
        errors = find_errors(self.results, self.score_threshold)
        rows = [(KINDS[kind], str(count)) for kind, count in count_kinds(errors).items()]
        blocks: list[Block] = [
            Table(f'Errors at a score of {self.score_threshold:g} and an IoU of 0.5',
                  ['kind', 'number'], rows)]
        if errors:
            blocks.append(Note(LEGEND))
        for heading, worst in worst_by_kind(errors, _PER_KIND):
            blocks += [Note(heading, 'heading'),
                       Pictures([embed_image(*cell) for cell in show_errors(worst, self.results)],
                                'small')]
        return blocks

    def show_confusion(self) -> list[Block]:
        figure = count_detections(self.results, self.score_threshold).draw()
        return [Note(f'in the row {SURPLUS!r}: detections that no object is left for, duplicates '
                     'and second classes of one object among them, not only those on background'),
                Pictures([embed_figure(figure)], 'wide')]


class ClassifierReport(RunReport):
    """The page of a classifier; everything is said of :class:`RunReport`."""

    own_parts = dict(classes='Classes', confusion='Confusion', mistakes='Mistakes')

    @cached_property
    def _confusions(self) -> Confusions:
        return count_confusions(self.results)

    @property
    def _accuracies(self) -> np.ndarray:
        """Share that is right of each class, NaN for a class without pictures, (K,)."""
        totals = self._confusions.counts.sum(1)
        return np.where(totals > 0, self._confusions.counts.diagonal() / np.maximum(totals, 1),
                        np.nan)

    def measure(self) -> dict[str, str]:
        return {name: f'{100 * share:.2f} %' for name, share in measure_tops(self.results).items()}

    def show_measured(self) -> list[Block]:
        counts = self._confusions.counts
        rows = [*self.measure().items(),
                ('mean of the classes', f'{100 * np.nanmean(self._accuracies):.2f} %'),
                ('right', f'{counts.trace()} of {counts.sum()}')]
        return [Table('Accuracy', ['metric', 'value'], rows),
                self.describe_predictions(f'{counts.sum()} pictures of {len(counts)} classes')]

    def show_classes(self) -> list[Block]:
        counts, classes, accuracies = (self._confusions.counts, self.results.classes,
                                       self._accuracies)
        rows = [[name, str(total), str(right),
                 f'{100 * accuracy:.1f} %' if math.isfinite(accuracy) else '–']
                for name, total, right, accuracy
                in zip(classes, counts.sum(1), counts.diagonal(), accuracies, strict=True)]
        bars = draw_class_bars('Accuracy', accuracies, classes, counts.sum(1), 'pictures')
        return [Pictures([embed_figure(bars)]),
                Table('Accuracy of each class', ['class', 'pictures', 'right', 'accuracy'], rows)]

    def show_confusion(self) -> list[Block]:
        return [Pictures([embed_figure(self._confusions.draw())], 'wide')]

    def show_mistakes(self) -> list[Block]:
        pictures = []
        for image, lines in show_mistakes(self.results, _MAX_MISTAKES):
            image.thumbnail((CELL_SIDE, CELL_SIDE), Image.Resampling.LANCZOS)
            pictures.append(embed_image(image, lines))
        summary = summarize_mistakes(self.results, _MAX_MISTAKES)
        if not pictures:
            return [Note(summary)]
        return [Note(f'{summary}; in brackets: the score of the class'),
                Pictures(pictures, 'small')]


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


def _try(make: Callable[[], list[Block]]) -> list[Block]:
    """Make a part, or say why it cannot be made."""
    try:
        return make()
    except _EXPECTED as error:
        return [Note(_explain(error), 'missing')]


def _explain(error: Exception) -> str:
    """Say in one line what is wrong."""
    path = getattr(error, 'filename', None)
    if isinstance(error, FileNotFoundError) and path:
        text = f'{path} does not exist'
        return text if Path(path).is_absolute() else (
            f'{text} here: run this in the folder that the training was started in')
    return ' '.join(str(error).split())


def _kind_of(path: Path, last: Path | None) -> str:
    kinds = ['last'] if last and path.name == last.name else []
    return ', '.join([*kinds, *(['best'] if path.name.startswith('best_') else [])])


def _number(value: Any) -> str:
    """Write a number; a dash for none, and for COCO's -1."""
    if isinstance(value, (int, float, np.number)):
        if math.isfinite(value) and value != -1:
            return f'{value:.3f}' if abs(value) < 10 else f'{value:.2f}'
        return '–' if value == -1 or math.isnan(value) else str(value)
    return '–' if value is None else str(value)


def _duration(span: timedelta) -> str:
    seconds = round(span.total_seconds())
    if seconds < 60:
        return f'{seconds} s'
    hours, minutes = divmod(round(seconds / 60), 60)
    return f'{hours} h {minutes:02} min' if hours else f'{minutes} min'
