"""The datasets of a config, checked before a long run: ``spartan-mm check-data``.

A training refuses what is an error here, in the same words: annotation files when they are loaded,
the rest by ``PreflightHook``.
"""

import os
import signal
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..errors import ExplainedError
from .classes import (
    classes_of,
    describe_class_count,
    describe_other_classes,
    find_heads,
    name_dataset,
)
from .coco_file import NOTHING_LEFT, CocoFile, read_json
from .data_errors import (
    MARKS,
    MAX_NAMED,
    DataError,
    Finding,
    MissingDataError,
    UndecodableError,
    join,
    name_culprits,
    show,
)
from .evaluators import find_evaluator_faults, find_metrics
from .images import (
    MISSING_REMEDY,
    decoding_of,
    describe_image,
    find_max_pixels,
    hint_at_name,
    load_image,
)
from .settings import (
    SPLITS,
    explain_build,
    find_dataset_faults,
    find_datasets,
    find_loader_faults,
    raise_first,
)

# Images that a task of a worker process decodes.
_CHUNK = 32
_MAX_SUSPECTS = 100
# Settings that say what a dataset holds.
_TRUTH = ('type', 'data_root', 'ann_file', 'data_prefix', 'metainfo', 'part')

Progress = Callable[[Iterable, str, int], Iterable]


def no_progress(items: Iterable, description: str, total: int) -> Iterable:
    """Show no progress."""
    return items


@dataclass
class Content:
    """What a dataset holds.

    Args:
        infos: Of each image a dict with ``img_path`` and, where they are known, ``img_id``,
            ``width``, ``height``, ``ann_file``, ``gt_label``.
        classes: Names of the classes.
        image_index: Of each object, the index of its image, (A,).
        labels: Of each object, (A,); -1 for a class that is not in use.
        crowds: Whether it is a region with many objects, (A,).
        boxes: x1, y1, x2, y2 in pixels, (A, 4); None where objects are whole images.
    """

    infos: list[dict[str, Any]] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    image_index: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    crowds: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    boxes: np.ndarray | None = None

    @property
    def paths(self) -> list[str]:
        """Where the images are."""
        return [info['img_path'] for info in self.infos]

    def count_objects(self) -> np.ndarray:
        """Count the objects of each class, crowds left out, (C,)."""
        counted = (self.labels >= 0) & (self.labels < len(self.classes)) & ~self.crowds
        return np.bincount(self.labels[counted], minlength=len(self.classes))

    def count_empty(self) -> int:
        """Count the images without an object."""
        counted = self.image_index[(self.labels >= 0) & ~self.crowds]
        return len(self.infos) - len(np.unique(counted))


@dataclass
class Report:
    """What was found in a dataset.

    Args:
        split: 'train', 'val' or 'test'.
        name: What to call the dataset: its type and file.
        content: What it holds, as far as it is sound.
        findings: What is wrong or worth knowing.
    """

    split: str
    name: str
    content: Content = field(default_factory=Content)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether there are errors."""
        return any(finding.level == 'error' for finding in self.findings)

    @property
    def knows_classes(self) -> bool:
        """Whether the classes are those that the file and the config mean."""
        return bool(self.content.classes) and not any(
            finding.level == 'error' and finding.kind.startswith(('categ', 'classes'))
            for finding in self.findings)

    def as_record(self) -> dict[str, Any]:
        """Describe it by a dict fit for JSON."""
        content = self.content
        return dict(
            split=self.split, dataset=self.name, images=len(content.infos),
            objects=int(content.count_objects().sum()), crowds=int(content.crowds.sum()),
            images_without_objects=content.count_empty(),
            objects_of_class=dict(zip(content.classes, content.count_objects().tolist(),
                                      strict=True)),
            findings=[asdict(finding) for finding in self.findings])

    def suspects(self) -> dict[str, str]:
        """Images to look at, each with the kind of finding that it belongs to."""
        found: dict[str, str] = {}
        for finding in self.findings:
            for path in finding.images:
                found.setdefault(path, finding.kind)
        return found


def check_config(cfg: Config, splits: Sequence[str] = SPLITS, decode: bool = False,
                 workers: int | None = None, progress: Progress = no_progress) -> list[Report]:
    """Check the datasets of a config, and how they go with its model and each other.

    A dataset that several splits share is checked once.

    Args:
        cfg: The config.
        splits: Those to check, of 'train', 'val' and 'test'; one that the config has not is left
            out.
        decode: Whether to decode every image, as the loader of the config's pipeline does.
        workers: Number of processes that decode; None for one for each CPU.
        progress: Wraps an iterable with a description and its length, to show how far it is.

    Returns:
        A report for each dataset; of a dataset that joins several, one for each.
    """
    reports: list[Report] = []
    done: list[tuple[dict, str]] = []
    model = cfg.get('model') or {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        tasks = []
        for split in splits:
            tasks += [(split, *found) for found in find_datasets(cfg, split)]
            if faults := list(find_loader_faults(cfg, split)):
                reports.append(Report(split, f'{split}_dataloader', findings=faults))
        for split, where, dataset in progress(tasks, 'datasets', len(tasks)):
            earlier = next((name for known, name in done if known == dataset), None)
            if earlier is not None:
                reports.append(Report(split, f'the same as {earlier}'))
                continue
            report = check_dataset(dataset, split, decode, workers, progress, where,
                                   model.get('num_queries'))
            done.append((dataset, f'{split}: {report.name}'))
            report.findings += _check_model(model, report)
            report.findings += _check_evaluator(cfg, split, dataset)
            reports.append(report)
        for split in splits:
            report = next((report for report in reports if report.split == split), None)
            if report is not None:
                report.findings += [Finding('error', 'evaluator', message)
                                    for message in find_evaluator_faults(cfg, split)]
    _compare(reports)
    return reports


def build_loader(build: Callable[..., Any], cfg: Config, loader: Any, **options: Any) -> Any:
    """Build a data loader whose settings are right; if it can't be built, say why if it is known.

    Args:
        build: Builds it, a runner's.
        cfg: The config.
        loader: The config of the data loader.
        options: Further arguments of ``build``.

    Raises:
        DataError: A setting is wrong, datasets of other classes are joined, or the loader cannot
            be built and :func:`check_config` finds why.
    """
    splits = [split for split in SPLITS if cfg.get(f'{split}_dataloader') == loader][:1]
    for split in splits:
        for where, dataset in find_datasets(cfg, split):
            raise_first(find_dataset_faults(dataset, where))
    try:
        built = build(loader, **options)
    except (ExplainedError, FileNotFoundError):
        raise
    except Exception as error:
        for report in check_config(cfg, splits):
            for finding in report.findings:
                if finding.level == 'error':
                    name = f'{report.split}_dataloader'
                    raise DataError(finding.message if finding.message.startswith(name) else
                                    f'{name}: {finding.message}') from error
        if not splits or _is_in_users_code(error):
            raise
        raise DataError(explain_build(error, f'{splits[0]}_dataloader').message) from error
    # Evaluators take the classes at once, before any hook looks at them.
    for split in splits:
        classes_of(built.dataset, f'{split}_dataloader')
    return built


def _is_in_users_code(error: Exception) -> bool:
    """Say whether an error comes out of code that is neither installed nor of this package."""
    ours = ('<frozen', *map(sysconfig.get_path, ('stdlib', 'purelib', 'platlib')),
            os.path.dirname(os.path.dirname(__file__)))
    return any(not frame.filename.startswith(ours)
               for frame in traceback.extract_tb(error.__traceback__))


def check_dataset(config: Mapping[str, Any], split: str, decode: bool = False,
                  workers: int | None = None, progress: Progress = no_progress,
                  where: str = 'dataset', queries: int | None = None) -> Report:
    """Check a dataset.

    Args:
        config: Its config; the default scope must be that of the config it comes from.
        split: What to call it.
        decode: Whether to decode every image.
        workers: Number of processes that decode; None for one for each CPU.
        progress: See :func:`check_config`.
        where: Where its config is, for messages.
        queries: How many objects of an image the model can find; None for any number.
    """
    report = Report(split, where, findings=list(find_dataset_faults(config, where)))
    if report.broken:
        return report
    config = dict(config)
    loader = next((step for step in config.get('pipeline', ()) if isinstance(step, Mapping)
                   and 'Image' in str(step['type']) and 'Load' in str(step['type'])), {})
    try:
        dataset = DATASETS.build(dict(config, pipeline=[], lazy_init=True))
        report.name = name_dataset(dataset)
        read = _read_coco if hasattr(dataset, 'COCOAPI') else _read_any
        report.content, findings = read(dataset)
        report.findings += findings
    except MissingDataError as error:
        report.findings.append(Finding('error', 'missing file', str(error)))
    except (ExplainedError, FileNotFoundError) as error:
        report.findings.append(Finding('error', 'dataset', ' '.join(str(error).split())))
    except Exception as error:  # whatever a dataset refuses its settings or files with
        report.findings.append(explain_build(error, where))
    report.findings += check_content(report.content, bool(config.get('test_mode')), queries,
                                     report.broken)
    if decode and report.content.infos:
        report.findings += decode_images(report.content, loader, workers, progress)
    return report


def read_built(dataset: Any) -> Content:
    """Collect what a dataset that is loaded holds."""
    infos, objects, has_boxes = [], [], False
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        if isinstance(info.get('img_path'), str | os.PathLike):
            infos.append({key: info[key] for key in (
                'img_id', 'width', 'height', 'ann_file', 'gt_label') if key in info}
                | dict(img_path=str(info['img_path'])))
        number, label = len(infos) - 1, info.get('gt_label')
        has_boxes |= 'instances' in info
        objects += [(number, item['bbox_label'], bool(item.get('ignore_flag')), item['bbox'])
                    for item in info.get('instances', ())
                    if 'bbox_label' in item and len(item.get('bbox', ())) == 4]
        if 'instances' not in info and isinstance(label, (int, np.integer)):
            objects.append((number, int(label), False, (0, 0, 0, 0)))
    image_index, labels, crowds, boxes = zip(*objects, strict=True) if objects else ((),) * 4
    return Content(infos, tuple((getattr(dataset, 'metainfo', None) or {}).get('classes') or ()),
                   np.array(image_index, dtype=int), np.array(labels, dtype=int),
                   np.array(crowds, dtype=bool),
                   np.array(boxes, dtype=float).reshape(-1, 4) if has_boxes else None)


def check_content(content: Content, evaluation: bool = False, queries: int | None = None,
                  broken: bool = False) -> list[Finding]:
    """Check what can be checked without opening an image.

    Args:
        content: What the dataset holds.
        evaluation: Whether it is not for training.
        queries: How many objects of an image the model can find; None for any number.
        broken: Whether faults have left something out, so that nothing can be said of what is
            missing.
    """
    return [*_check_files(content), *_check_objects(content, queries),
            *(() if broken else _count_objects(content, evaluation))]


def _check_files(content: Content) -> Iterator[Finding]:
    """Look for files that do not exist, are empty, or are listed with different labels.

    One listing of a folder costs less than a question for each file in it, above all where the
    folder lies on another machine. Paths with a protocol, such as s3://, are left alone.
    """
    present: dict[str, set[str]] = {}
    missing, labels = [], {}
    for info in content.infos:
        path = info['img_path']
        labels.setdefault(path, set()).add(info.get('gt_label'))
        if '://' in path:
            continue
        folder, name = os.path.split(path)
        if folder not in present:
            try:
                present[folder] = set(os.listdir(folder or '.'))
            except OSError:
                present[folder] = set()
        if name not in present[folder]:
            missing.append(path)
    yield from _of_files('error', 'missing images', missing,
                         f'of {len(content.infos)} images do not exist',
                         f': {MISSING_REMEDY}{hint_at_name(missing[:_MAX_SUSPECTS])}')
    # What a full disk leaves of a copy.
    yield from _of_files('error', 'empty file', [path for path in content.paths if _is_empty(path)],
                         'images are empty files')
    yield from _of_files('warning', 'several labels',
                         [path for path, found in labels.items() if len(found) > 1],
                         'images are listed with several labels')


def _of_files(level: str, kind: str, paths: Sequence[str], message: str, remedy: str = ''
              ) -> Iterator[Finding]:
    """Make a finding of images, if there are any."""
    if paths:
        yield Finding(level, kind,
                      f'{len(paths)} {message} ({join(paths, MAX_NAMED)}){remedy}',
                      len(paths), tuple(paths[:_MAX_SUSPECTS]))


def _is_empty(path: str) -> bool:
    try:
        return os.stat(path).st_size == 0
    except OSError:
        return False  # missing ones are found elsewhere


def _check_objects(content: Content, queries: int | None) -> Iterator[Finding]:
    """Look at labels and boxes that are valid and yet strange."""
    if content.boxes is not None:
        sides = content.boxes[:, 2:] - content.boxes[:, :2]
        yield from _of_objects(
            content, (sides < 1).any(1) & (content.labels >= 0), 'warning', 'box below a pixel',
            '{count} boxes have a side below 1 pixel and are not trained on')
        order = np.lexsort((*content.boxes.T, content.labels, content.image_index))
        rows = np.column_stack([content.image_index, content.labels, content.boxes])[order]
        same = np.zeros(len(rows), dtype=bool)
        same[order[1:]] = (rows[1:] == rows[:-1]).all(1)
        yield from _of_objects(content, same, 'warning', 'object listed twice',
                               '{count} objects have class and box of another one of their image')
        if crowds := int(content.crowds.sum()):
            yield Finding('note', 'crowds', f'{crowds} objects are crowds (`iscrowd`), which are '
                          'not trained on and ignored in evaluation', crowds)
        per_image = np.bincount(content.image_index[(content.labels >= 0) & ~content.crowds],
                                minlength=len(content.infos))
        if isinstance(queries, int) and (full := (per_image > queries).nonzero()[0]).size:
            yield from _of_files(
                'warning', 'more objects than queries', [content.paths[i] for i in full],
                f'images have more objects than the model has queries ({queries})',
                f': up to {per_image.max()}, of which some are neither learned nor found')
    number = len(content.classes)
    yield from _of_objects(
        content, (content.labels >= number) & (number > 0), 'error', 'label without a class',
        f'{{count}} labels are {number} or more, but there are only {number} classes')


def _count_objects(content: Content, evaluation: bool) -> Iterator[Finding]:
    """Look for images and classes without objects, and at the balance of the classes."""
    classes, counts = content.classes, content.count_objects()
    empty = content.count_empty()
    if empty and content.boxes is not None:
        yield Finding('note', 'images without objects',
                      f'{empty} of {len(content.infos)} images have no object', empty)
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if 0 < len(absent) < len(classes):
        yield Finding(
            'note' if evaluation else 'warning', 'classes without objects',
            f'{len(absent)} of {len(classes)} classes have no object: {join(absent)}', len(absent))
    if len(classes) - len(absent) > 1:
        order = np.argsort(counts, kind='stable')
        least, most = order[len(absent)], order[-1]
        yield Finding(
            'note', 'class balance', f'from {counts[least]} objects ({classes[least]}) to '
            f'{counts[most]} ({classes[most]}), {counts[most] / counts[least]:.3g} to 1')


def decode_images(content: Content, loader: Mapping[str, Any], workers: int | None = None,
                  progress: Progress = no_progress) -> list[Finding]:
    """Decode every image as a pipeline's loader does, and compare sizes with the annotations.

    Args:
        content: The images.
        loader: The config of the pipeline's step that loads images.
        workers: Number of processes; None for one for each CPU.
        progress: See :func:`check_config`.
    """
    find_max_pixels()  # a limit of no number is no image's fault
    options = dict(decoding_of(loader), backend_args=loader.get('backend_args'))
    task = partial(_decode_chunk, classes=content.classes, options=options)
    chunks = [content.infos[start:start + _CHUNK]
              for start in range(0, len(content.infos), _CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    faults: dict[str, list[tuple[str, str]]] = {}
    # Ctrl-C is for the process that waits for them.
    deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(workers, **deaf) if workers > 1 else nullcontext() as pool:
        results = (pool.map if pool else map)(task, chunks)
        for kind, path, message in chain.from_iterable(progress(results, 'decoding', len(chunks))):
            faults.setdefault(kind, []).append((path, message))
    return [Finding('error', kind, name_culprits(found, lambda fault: fault[1].rstrip('.')),
                    len(found), tuple(path for path, _ in found[:_MAX_SUSPECTS]))
            for kind, found in faults.items()]


def _decode_chunk(infos: list[dict], classes: Sequence[str], options: dict[str, Any]
                  ) -> list[tuple[str, str, str]]:
    """Decode some images; return kind of fault, path and message of those that fail."""
    faults = []
    for info in infos:
        size = (info.get('width'), info.get('height'))
        try:
            load_image(info['img_path'], describe_image(info, classes), '', annotated_size=(
                None if None in size else size), **options)
        except MissingDataError:
            continue  # found before, without decoding
        except UndecodableError as error:
            if _is_empty(info['img_path']):
                continue  # found before, too
            faults.append(('undecodable image', info['img_path'], str(error)))
        except DataError as error:
            faults.append(('image of another size', info['img_path'], str(error)))
    return faults


def _read_coco(dataset: Any) -> tuple[Content, list[Finding]]:
    """Read a COCO annotation file."""
    if hasattr(dataset, 'examine'):
        file = dataset.examine()
    else:
        # mmdet's own, which drops invalid boxes without a word.
        file = CocoFile(read_json(dataset.ann_file, dataset.backend_args), dataset.ann_file,
                        dataset.metainfo.get('classes'), dataset.test_mode, 'drop',
                        allow_no_objects=True)
        with fileio.get_local_path(dataset.ann_file, dataset.backend_args) as path:
            with open(path, 'rb') as content:
                marked = content.read(2) in MARKS
        if marked:
            file.findings.append(Finding(
                'error', 'byte order mark', 'begins with a byte order mark, which '
                f'{type(dataset).__name__} does not read: save it as UTF-8 without one, or take '
                'CheckedCocoDataset'))
    prefix = dataset.data_prefix.get('img', '')
    infos = [dict(img_path=os.path.join(prefix, image['file_name']), img_id=image['id'],
                  width=image['width'], height=image['height'], ann_file=file.name)
             for image in file.images]
    findings = [Finding(finding.level, finding.kind, f'{file.name}: {finding.message}',
                        finding.count,
                        tuple(os.path.join(prefix, name) for name in finding.images))
                for finding in file.findings]
    crowds = np.array([bool(item.get('iscrowd')) for item in file.annotations], dtype=bool)
    boxes = file.boxes if len(file.boxes) else np.zeros((len(file.annotations), 4))
    wanted = {} if dataset.test_mode else dataset.filter_cfg or {}
    full = {*file.image_index[file.labels >= 0].tolist()}
    if not file.broken and not any(
            min(image['width'], image['height']) >= wanted.get('min_size', 0)
            and (index in full or not wanted.get('filter_empty_gt'))
            for index, image in enumerate(file.images)):
        findings.append(Finding('error', 'nothing left',
                                f'{file.name}: {NOTHING_LEFT.format(dataset.filter_cfg)}'))
    return Content(infos, file.classes, file.image_index, file.labels, crowds, boxes), findings


def _read_any(dataset: Any) -> tuple[Content, list[Finding]]:
    """Read a dataset by loading it."""
    dataset.full_init()
    content = read_built(dataset)
    if content.infos or not len(dataset):
        return content, []
    return content, [Finding('note', 'no files', 'its images are no files, which cannot be checked '
                             'one by one')]


def _of_objects(content: Content, chosen: np.ndarray, level: str, kind: str, message: str
                ) -> Iterator[Finding]:
    """Make a finding of objects, with the images they are in, if there are any."""
    if chosen.any():
        images = dict.fromkeys(content.image_index[chosen].tolist())
        paths = [content.infos[i]['img_path'] for i in islice(images, _MAX_SUSPECTS)]
        count = int(chosen.sum())
        names = join((os.path.basename(path) for path in paths), MAX_NAMED)
        yield Finding(level, kind, f'{message.format(count=count)} ({names})', count, tuple(paths))


def _check_model(model: Mapping[str, Any], report: Report) -> Iterator[Finding]:
    """Compare a dataset with the heads of the model."""
    content = report.content
    if not report.knows_classes:
        return
    for head in find_heads(model):
        if head.num_classes != len(content.classes):
            yield Finding('error', 'classes of the head', describe_class_count(
                head, content.classes, f'{report.split}_dataloader', report.name,
                'num_classes' in (model.get('data_preprocessor') or {})))


def _check_evaluator(cfg: Config, split: str, dataset: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the annotation file of the evaluator with that of the dataset."""
    for evaluator in find_metrics(cfg.get(f'{split}_evaluator')):
        truth = evaluator.get('dataset') if isinstance(evaluator, Mapping) else None
        if isinstance(truth, Mapping) and isinstance(dataset, Mapping) and any(
                truth.get(key) != dataset.get(key) for key in _TRUTH):
            yield Finding('warning', 'other evaluator', f'{split}_evaluator takes the truth of '
                          f'another dataset than that of {split}_dataloader')
        theirs = evaluator.get('ann_file') if isinstance(evaluator, Mapping) else None
        own = dataset.get('ann_file') if isinstance(dataset, Mapping) else None
        if not (theirs and isinstance(theirs, str)):
            continue
        if not evaluator.get('backend_args') and not os.path.isfile(theirs):
            yield Finding('error', 'missing file',
                          f'{split}_evaluator: there is no annotation file {theirs}')
            continue
        if not (own and isinstance(own, str)):
            continue
        own = own if os.path.isabs(own) else os.path.join(dataset.get('data_root') or '', own)
        if os.path.normpath(theirs) != os.path.normpath(own):
            yield Finding('warning', 'other evaluator',
                          f'{split}_evaluator reads {theirs}, but the dataset {own}')


def _compare(reports: list[Report]) -> None:
    """Compare the datasets with each other: classes, and images in training and evaluation."""
    train = [report for report in reports if report.split == 'train' and report.content.infos]
    known = {os.path.abspath(path) for other in train for path in other.content.paths}
    for report in reports:
        # Those that are joined with it, and for validation the training.
        others = [other for other in reports if other.split == report.split]
        if report.split == 'val':
            others = train + others
        first = next((other for other in others if other.knows_classes), report)
        ours, theirs = first.content.classes, report.content.classes
        if report.knows_classes and ours != theirs:
            report.findings.append(Finding('error', 'other classes', describe_other_classes(
                ours, f'the dataset of {first.split}_dataloader, {first.name},', theirs,
                f'that of {report.split}_dataloader, {report.name},')))
        if report.split == 'train' or not report.content.infos:
            continue
        shared = [path for path in report.content.paths if os.path.abspath(path) in known]
        if shared:
            report.findings.append(Finding(
                'warning', 'trained on', f'{len(shared)} of {len(report.content.infos)} images are '
                f'in the training dataset, too ({show(shared[0])})', len(shared)))
