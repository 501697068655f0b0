"""Measure the standard table of this machine, and show it in docs/performance.md.

    make benchmark                                    all of it; an hour on two cores
    make benchmark ARGS="--only 'backbone_*'"         some jobs; earlier results of others are kept
    make benchmark ARGS="--no-measuring --docs"       put results that are there into the page
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from readme_tables import insert_tables

from spartan_mm.analysis.benchmark import (
    Form,
    Group,
    Summary,
    Workload,
    default_device,
    machine_line,
    measuring,
    parts_table,
    run_group,
    speedup,
    throughput,
    write_sizes,
)
from spartan_mm.analysis.input_speed import input_table, measure_input
from spartan_mm.analysis.style import COLOURS, Figure, finish, new_figure
from spartan_mm.demo import run_process
from spartan_mm.errors import UsageError
from spartan_mm.text import Console, markdown

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / 'docs' / 'performance.md'
INPUT = 'input'

BACKBONES = {'xt': 'SpaRTAN-XT', 't': 'SpaRTAN-T'}
DETECTORS = {
    'rtdetr_spartan_xt': 'RT-DETR, SpaRTAN-XT',
    'rtdetr_spartan_t': 'RT-DETR, SpaRTAN-T',
    'rtdetr_r18vd': 'RT-DETR-R18',
    'rtdetr_r34vd': 'RT-DETR-R34',
    'rtdetr_r50vd': 'RT-DETR-R50',
}
INPUTS = ('rtdetr_spartan_t', 'spartan_t_224')

#: Kinds of machines, each with tables of its own.
KINDS = ('cpu', 'gpu')

_NONE = '–'  # what nobody measured
_QUICK_SIZE = 64


@dataclass(frozen=True)
class Job:
    """What is measured in a process of its own.

    Args:
        name: Of the job, and of the file with its results.
        groups: Measured one after the other.
    """

    name: str
    groups: tuple[Group, ...]


def standard_jobs(kind: str, quick: bool = False) -> list[Job]:
    """List what the standard table consists of.

    Args:
        kind: 'cpu' or 'gpu'. A CPU gets as much work as it can do in some time.
        quick: Whether to take a look at everything only, on small images and without compiling, on
            a CPU also if the kind is 'gpu'; the numbers mean nothing.
    """
    gpu = kind == 'gpu'
    device = 'cuda' if gpu and not quick else 'cpu'
    models = slice(1) if quick else slice(None)

    # The forms that run on a GPU are those that would be chosen there.
    layout = dict(channels_last=gpu)
    mode = 'reduce-overhead' if gpu else 'default'
    dtype = dict(amp='bfloat16' if quick else 'float16') if gpu else {}

    def group(workload: dict[str, Any], forms: Sequence[Form], **options: Any) -> Group:
        if quick:
            workload = dict(workload, batch=2, sizes=((_QUICK_SIZE, _QUICK_SIZE), ),
                            multi_scale=False)
            forms = [form for form in forms if form.compile is None]
            options |= dict(rounds=1, warm_up=0)
        return Group(Workload(device=device, **workload), tuple(forms), **options)

    jobs = []
    work = dict(batch=256 if gpu else 16, sizes=((224, 224), ), amp='bfloat16' if gpu else None)
    for model in list(BACKBONES)[models]:
        authors = [Form(model, authors=True), Form(model, authors=True, compile='default')]
        # A backbone lays its maps out itself on a CPU.
        layouts = (False, True) if gpu else (False, )
        jobs.append(Job(f'backbone_{model}_inference', (group(work, [
            *(Form(model, deploy=deploy, channels_last=channels_last)
              for deploy in (False, True) for channels_last in layouts),
            Form(model, deploy=True, compile='default', **layout), *authors], seconds=60.), )))
        jobs.append(Job(f'backbone_{model}_training', (group(dict(work, train=True), [
            *(Form(model, channels_last=channels_last) for channels_last in layouts),
            *([] if gpu else [Form(model, fused=True)]),
            Form(model, compile='default', **layout), *authors], seconds=90.), )))

    inference = dict(batch=1, sizes=((640, 640), ), **dtype)
    training = dict(inference, batch=16, sizes=None, multi_scale=True) if gpu else inference
    for model in list(DETECTORS)[models]:
        name = Path(model).stem
        jobs.append(Job(f'detector_{name}_inference', (group(inference, [
            Form(model), Form(model, deploy=True),
            Form(model, deploy=True, compile=mode, **layout)], seconds=30.), )))
        # CUDA graphs are for a size that stays.
        jobs.append(Job(f'detector_{name}_training', (
            group(dict(training, train=True), [Form(model), Form(model, compile='default')],
                  seconds=30., parts=True), )))

    jobs.append(Job('growth', tuple(_growth_groups(device, gpu, quick))))
    return jobs


def _growth_groups(device: str, gpu: bool, quick: bool) -> Iterator[Group]:
    """Larger and larger images, and more and more of them."""
    if quick:
        plans = [('xt', False, (32, 64), 2, (2, 4), 32)]
    elif gpu:
        plans = [('t', True, (128, 192, 256, 320, 384), 64, (32, 64, 128, 256), 224),
                 ('rtdetr_spartan_t', False, (320, 480, 640, 800, 960), 8, (1, 4, 8, 16), 640)]
    else:
        plans = [('t', True, (96, 128, 160, 192, 224), 4, (2, 4, 8, 16), 128),
                 ('rtdetr_spartan_t', False, (320, 416, 512, 640), 1, (1, 2, 3, 4), 320)]
    for model, train, sides, batch, batches, side in plans:
        for count, length in [*product([batch], sides), *product(batches, [side])]:
            yield Group(Workload(train, device, None, count, ((length, length), )),
                        (Form(model), ), rounds=1 if quick else 7, warm_up=0 if quick else 3)


def read_results(folder: Path) -> dict[str, Any]:
    """Collect the results of the jobs.

    Args:
        folder: With a file NAME.json for each job and, for the input, 'input.json'.

    Returns:
        A dict fit for JSON: 'jobs', for each a list of what ``run_group`` returned, and 'input'.

    Raises:
        FileNotFoundError: There are no results.
    """
    jobs = {path.stem: json.loads(path.read_text(encoding='utf-8'))
            for path in sorted(folder.glob('*.json'))}
    if not jobs:
        raise FileNotFoundError(f'{folder} holds no results; measure first')
    measured = jobs.pop('input', [])
    return dict(jobs=jobs, input=measured)


def make_tables(kind: str, results: Mapping[str, Any] | None) -> dict[str, str]:
    """Lay out results.

    Args:
        kind: 'cpu' or 'gpu'.
        results: What :func:`read_results` returned, or None for nothing measured.

    Returns:
        Tables in Markdown by name, the names beginning with the kind. One of which nothing was
        measured is empty; the first one says how to measure if there are no results at all.
    """
    jobs = (results or {}).get('jobs', {})
    rows = list(_rows(kind, jobs))
    machines = [group['machine'] for groups in jobs.values() for group in groups]
    newest = max(machines, key=lambda machine: machine['date'], default=None)
    return {
        f'{kind}_machine': f'{machine_line(newest)}\n' if newest else (
            f'Not measured yet; on a machine with a {kind.upper()}: '
            f'`make benchmark ARGS="--kind {kind} --docs"`.\n'),
        f'{kind}_backbones': _backbones_table(rows),
        f'{kind}_detectors': _detectors_table(rows),
        f'{kind}_parts': _parts_tables(jobs),
        f'{kind}_limit': _limit_table(rows),
        f'{kind}_growth': _growth_text(kind, jobs),
        f'{kind}_input': input_table((results or {}).get('input', ())),
    }


def write_docs(document: Path, kind: str, results: Mapping[str, Any]) -> None:
    """Put results into the document: tables, plot, and the results themselves beside it.

    Args:
        document: With marks for the tables of all kinds. What was measured on machines of the
            other kinds stays.
        kind: 'cpu' or 'gpu'.
        results: What :func:`read_results` returned.
    """
    folder = document.with_suffix('')
    folder.mkdir(exist_ok=True)
    (folder / f'{kind}.json').write_text(json.dumps(_rounded(results)) + '\n', encoding='utf-8')
    if 'growth' in results['jobs']:
        draw_growth(results['jobs']['growth']).savefig(folder / f'{kind}_growth.png')
    text = fill_in(document)
    document.write_text(text, encoding='utf-8')


def fill_in(document: Path) -> str:
    """Write the document anew, with the tables of the results that lie beside it."""
    tables = {}
    for kind in KINDS:
        file = document.with_suffix('') / f'{kind}.json'
        results = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None
        tables |= make_tables(kind, results)
    return insert_tables(document.read_text(encoding='utf-8'), tables)


@dataclass(frozen=True)
class _Row:
    """A form of a model that was measured."""

    workload: Mapping[str, Any]
    result: Mapping[str, Any]
    # All results of the same run by the label of their form.
    others: Mapping[str, Mapping[str, Any]]

    @property
    def model(self) -> str:
        return self.result['form']['model']

    @property
    def step(self) -> str:
        return 'training' if self.workload['train'] else 'inference'

    def compared(self, form: Form, write: Callable[[Any, Any], str]) -> str:
        """Write something of the result and of the one of another form of the same run."""
        other = self.others.get(form.label)
        return _NONE if other is None else write(self.result, other)


def _rows(kind: str, jobs: Mapping[str, Any]) -> Iterator[_Row]:
    """What was measured, in the order of the standard jobs."""
    for job in standard_jobs(kind):
        if job.name in jobs and job.name != 'growth':
            group = jobs[job.name][-1]
            others = {result['label']: result for result in group['results']}
            for result in group['results']:
                yield _Row(group['workload'], result, others)


def _backbones_table(rows: Sequence[_Row]) -> str:
    authors = Form('', authors=True)
    compiled = Form('', authors=True, compile='default')
    head = ['backbone', 'step', 'form', 'ms (quartiles)', 'images/s', "times the authors' code",
            'times it compiled', 'peak, MiB', "of the authors' code's, %"]
    return _table(rows, BACKBONES, head, lambda row: [
        Summary.of(row.result['times']).write(1e3), f'{throughput(row.result):.1f}',
        row.compared(authors, lambda *pair: speedup(*pair).write(digits=2)),
        row.compared(compiled, lambda *pair: speedup(*pair).write(digits=2)),
        _memory(row), row.compared(authors, _memory_share)])


def _detectors_table(rows: Sequence[_Row]) -> str:
    head = ['detector', 'step', 'form', 'ms (quartiles)', 'p90, ms', 'images/s',
            'of eager time, %', 'peak, MiB']
    return _table(rows, DETECTORS, head, lambda row: [
        Summary.of(row.result['times']).write(1e3),
        f"{1e3 * np.percentile(row.result['times'], 90):.1f}", f'{throughput(row.result):.2f}',
        row.compared(Form(''), lambda *pair: f'{100 / speedup(*pair).median:.0f}'), _memory(row)])


def _limit_table(rows: Sequence[_Row]) -> str:
    """What is counted holds for the form as PyTorch runs it operation by operation."""
    head = ['model', 'step', 'form', 'operations, G', 'read and written, GiB',
            'limit, ms', 'of it, %', 'limit if all is fused, ms', 'of it, %']

    def write(row: _Row) -> list[str]:
        work, typical = row.result['work'], median(row.result['times'])
        return [f"{work['operations'] / 1e9:.1f}", f"{work['bytes'] / 2**30:.2f}",
                *(text for name in ('seconds', 'fused_seconds')
                  for text in (f'{1e3 * work[name]:.1f}', f'{100 * work[name] / typical:.0f}'))]

    # There is no one limit of steps of several sizes.
    rows = [row for row in rows if len(row.result['sizes']) == 1]
    return _table(rows, BACKBONES | DETECTORS, head, write, with_work=False)


def _table(rows: Sequence[_Row], names: Mapping[str, str], head: list[str],
           write: Callable[[_Row], list[str]], with_work: bool = True) -> str:
    """The rows of some models below each other, and what the work was; nothing if there are none.

    Args:
        rows: All rows.
        names: The models with the names to show.
        head: Of the columns: model, step, form, and what `write` gives.
        write: The cells of a row after the first three.
        with_work: Whether to say what the work was.
    """
    rows = [row for row in rows if row.model in names]
    if not rows:
        return ''
    table = markdown([head, *([names[row.model], row.step, row.result['label'], *write(row)]
                              for row in rows)])
    if not with_work:
        return table
    texts = {}
    for row in rows:
        sizes = ('multi-scale' if row.workload['multi_scale']
                 else write_sizes(row.workload['sizes']))
        texts[row.step] = (f"{row.step}: a batch of {row.workload['batch']}, {sizes}, "
                           f"{row.workload['amp'] or 'float32'}")
    return f"{'; '.join(texts.values()).capitalize()}.\n\n{table}"


def _parts_tables(jobs: Mapping[str, Any]) -> str:
    texts = []
    for model, title in DETECTORS.items():
        for group in jobs.get(f'detector_{Path(model).stem}_training', ()):
            texts += [f"{title}, a batch of {result['batch']}, {write_sizes(result['sizes'])}, "
                      f"{group['workload']['amp'] or 'float32'}\n\n{parts_table(result['parts'])}"
                      for result in group['results'] if 'parts' in result]
    return '\n'.join(texts)


def _memory(row: _Row) -> str:
    return f"{row.result['peak_memory'] / 2**20:.0f}"


def _memory_share(result: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    return f"{100 * result['peak_memory'] / reference['peak_memory']:.0f}"


@dataclass(frozen=True)
class Growth:
    """How something grows with the size of the work.

    Args:
        model: The model and its step, in words.
        along: 'pixels of an image' or 'images in a batch'.
        what: 'ms' or 'peak, MiB'.
        points: (work, value) of each measurement.
    """

    model: str
    along: str
    what: str
    points: tuple[tuple[float, float], ...]

    def fit(self) -> tuple[float, float, float]:
        """Fit a line; return its slope, its value at zero, and the share of variance it leaves."""
        x, y = np.array(self.points).T
        slope, start = np.polyfit(x, y, 1)
        variance = y.var() or 1.
        return float(slope), float(start), float((y - slope * x - start).var() / variance)


def growths(groups: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """Sort out what the job of this name measured.

    Args:
        groups: What ``run_group`` returned for each of its groups.
    """
    runs: dict[str, list[tuple[int, int, float, float]]] = {}
    names = BACKBONES | DETECTORS
    for group in groups:
        result, = group['results']
        (height, width), = result['sizes']
        step = 'training step' if group['workload']['train'] else 'inference'
        runs.setdefault(f"{names[result['form']['model']]}, {step}", []).append((
            height * width, result['batch'], 1e3 * median(result['times']),
            result['peak_memory'] / 2**20))

    found = []
    for model, points in runs.items():
        # The plan has two sweeps; each keeps what the other one changes.
        for axis, along in enumerate(('pixels of an image', 'images in a batch')):
            kept = [point[1 - axis] for point in points]
            fixed = max(set(kept), key=kept.count)
            sweep = sorted({point[axis]: point for point in points
                            if point[1 - axis] == fixed}.values())
            found += [Growth(model, along, what,
                             tuple((point[axis], point[index]) for point in sweep))
                      for what, index in (('ms', 2), ('peak, MiB', 3))]
    return found


def draw_growth(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw time and peak memory against pixels and against batch, with the lines that fit.

    Args:
        groups: What ``run_group`` returned for the groups of the job 'growth'.

    Returns:
        The figure; its ``savefig`` writes it.
    """
    panels = growths(groups)
    columns = 4
    rows = -(-len(panels) // columns)
    figure = new_figure(16, 3.6 * rows)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.add_gridspec(rows, columns)
    for index, growth in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        x, y = np.array(growth.points).T
        slope, start, rest = growth.fit()
        ends = np.array([0, x.max()])
        axes.plot(ends, start + slope * ends, color=COLOURS[1], linestyle='--', linewidth=1.6,
                  label=f'line, R² = {1 - rest:.4f}')
        axes.plot(x, y, 'o', color=COLOURS[0], markersize=6, label='measured')
        finish(axes, growth.model)
        axes.set_xlabel(growth.along, fontsize=10)
        axes.set_ylabel(growth.what, fontsize=10)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=min(0, start))
        axes.legend(frameon=False, fontsize=9, loc='upper left')
    return figure


def _growth_text(kind: str, jobs: Mapping[str, Any]) -> str:
    if 'growth' not in jobs:
        return ''
    rows = [['model', 'along', 'grows', 'by', 'R² of a line']]
    for growth in growths(jobs['growth']):
        slope, _, rest = growth.fit()
        pixels = growth.along.startswith('pixels')
        by = f'{1e6 * slope:.3g} for 10⁶ pixels' if pixels else f'{slope:.3g} for an image'
        rows.append([growth.model, growth.along, growth.what, by, f'{1 - rest:.4f}'])
    return (f'![Time and peak memory against pixels and batch]'
            f'(performance/{kind}_growth.png)\n\n{markdown(rows)}')


def _rounded(value: Any) -> Any:
    """Drop digits that no clock has."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f'{value:.6g}') if isinstance(value, float) else value


# ---- the command ---------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='*', metavar='PATTERN',
                        help="the jobs of these names alone, such as 'backbone_*'")
    parser.add_argument('--quick', action='store_true',
                        help='a look at every step, on small images, in a folder of its own')
    parser.add_argument('--kind', choices=KINDS, help='of machine (default: gpu if there is one)')
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    parser.add_argument('--workers', type=int, default=2, metavar='N',
                        help='of the data loader (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, metavar='DIR',
                        help='where results go (default: work_dirs/benchmark/<kind>)')
    parser.add_argument('--no-measuring', action='store_true',
                        help='show the results that are there')
    parser.add_argument('--docs', action='store_true',
                        help='put the results into docs/performance.md')
    # What runs in processes of their own: a request, and the file for its results.
    parser.add_argument('--groups', type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads is not None and args.threads < 1:
        parser.error(f'--threads {args.threads}: must be at least 1')
    return args


def measure_groups(request: Path, target: Path) -> None:
    """Measure the groups of a job; this is a process of its own."""
    groups = [Group(**{**group, 'workload': Workload(**group['workload']),
                       'forms': tuple(Form(**form) for form in group['forms'])})
              for group in json.loads(request.read_text())]
    results = []
    for index, group in enumerate(groups):
        def report(text: str, index: int = index) -> None:
            print(f'{index + 1} of {len(groups)}: {text}', flush=True)
        results.append(run_group(group, report))
    target.write_text(json.dumps(results) + '\n', encoding='utf-8')


def measure_all(args: argparse.Namespace, console: Console, kind: str, out_dir: Path) -> None:
    """Measure the standard table, each job in a process of its own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in standard_jobs(kind, args.quick)
            if fnmatch(job.name, args.only)]
    with_input = fnmatch(INPUT, args.only)
    if not jobs and not with_input:
        names = ', '.join(job.name for job in standard_jobs(kind))
        raise UsageError(f'--only {args.only} is none of {names}, {INPUT}')

    failed = []
    for index, job in enumerate(jobs):
        console.line(f'[{index + 1}/{len(jobs) + with_input}] {job.name}')
        start = time.monotonic()
        request, log = out_dir / 'logs' / f'{job.name}.json', out_dir / 'logs' / f'{job.name}.log'
        request.parent.mkdir(exist_ok=True)
        request.write_text(json.dumps([asdict(group) for group in job.groups]))
        command = [sys.executable, __file__, '--groups', str(request),
                   str(out_dir / f'{job.name}.json')]
        if args.threads:
            command += ['--threads', str(args.threads)]
        if run_process(command, log, lambda line: console.status(line.strip())):
            failed.append(job.name)
            last = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-1:]
            console.line(f'    failed: {"".join(last)} (all of it: {log})')
        else:
            console.line(f'    {time.monotonic() - start:.0f} s')
    if with_input:
        console.line(f'[{len(jobs) + 1}/{len(jobs) + 1}] {INPUT}')
        quick = dict(seconds=0.5, num_images=8, workers=0) if args.quick else {}
        found = [measure_input(name, **{'workers': args.workers, **quick}) for name in INPUTS]
        (out_dir / f'{INPUT}.json').write_text(json.dumps(found) + '\n', encoding='utf-8')
    if failed:
        raise UsageError(f'{len(failed)} of {len(jobs)} jobs failed: {", ".join(failed)}')


def show_results(args: argparse.Namespace, console: Console, kind: str, out_dir: Path) -> None:
    """Lay out the results that are there, and put them into the document if that is asked for."""
    results = read_results(out_dir)
    tables = make_tables(kind, results)
    text = '\n'.join(f'## {name}\n\n{table}' for name, table in tables.items())
    (out_dir / 'tables.md').write_text(text, encoding='utf-8')
    if 'growth' in results['jobs']:
        draw_growth(results['jobs']['growth']).savefig(out_dir / 'growth.png')
    console.line(f"Tables, plot and results lie in {out_dir}")
    if args.docs:
        write_docs(DOCUMENT, kind, results)
        console.line(f'{DOCUMENT} has them, too')


def main() -> None:
    args = parse_args()
    console = Console()
    try:
        if args.docs and args.quick:
            raise UsageError('what --quick measures is not for --docs')
        with measuring(args.threads):
            if args.groups:
                measure_groups(*args.groups)
                return
            kind = args.kind or ('gpu' if default_device() == 'cuda' else 'cpu')
            name = f'{kind}_quick' if args.quick else kind
            out_dir = args.out_dir or ROOT / 'work_dirs' / 'benchmark' / name
            if not args.no_measuring:
                measure_all(args, console, kind, out_dir)
            show_results(args, console, kind, out_dir)
    except (UsageError, FileNotFoundError) as error:
        console.line()
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
