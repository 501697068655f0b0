"""Measure time and memory of a model, alone or beside another one or another form of it.

    benchmark.py rtdetr_spartan_t --deploy --compile          latency of a detector
    benchmark.py t --train --batch 16 --against authors       a backbone beside its authors' code
    benchmark.py t --train --batch 256 --count                its kernels and their bytes, untimed
    benchmark.py rtdetr_spartan_t --data                      its training pipeline
    benchmark.py --standard                                   the standard table of this machine

CONFIG is a config file, the name of a model, the arch of a SpaRTAN backbone (xt, t), or a model of
another package: timm:NAME, mmpretrain:NAME, mmdet:NAME. Forms that are measured beside each other
take turns, so that ratios do not depend on what else is running.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A checkout that is not installed; what is installed comes first.
sys.path.append(str(ROOT))

# What PyTorch's profiler, which measures memory on a CPU, says about itself.
os.environ.setdefault('KINETO_LOG_LEVEL', '6')

from spartan_mm.analysis import benchmark, kernels, performance  # noqa: E402
from spartan_mm.analysis.benchmark import (  # noqa: E402
    DTYPES,
    BenchmarkError,
    Form,
    Group,
    Workload,
)
from spartan_mm.demo import Console, find_home, run_process, shorten  # noqa: E402
from spartan_mm.zoo import UnknownModelError  # noqa: E402

AUTHORS = 'authors'
DOCUMENT = ROOT / 'docs' / 'performance.md'
INPUT = 'input'
MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', metavar='CONFIG')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results to it, too')
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")

    form = parser.add_argument_group('form')
    against = parser.add_argument_group('beside it')
    against.add_argument('--against', metavar='CONFIG',
                         help=f"another model, or the same one; '{AUTHORS}' for this one with its "
                              "SpaRTAN computed as the authors' code does it")
    for group, prefix, what in ((form, '', 'the model'), (against, 'against-', 'the other one')):
        group.add_argument(f'--{prefix}deploy', action='store_true',
                           help=f'switch {what} to the inference form')
        group.add_argument(f'--{prefix}compile', nargs='?', const='default', choices=MODES,
                           metavar='MODE',
                           help=f"compile {what}, in a mode of torch.compile: {', '.join(MODES)}")
        group.add_argument(f'--{prefix}channels-last', action='store_true',
                           help=f'lay {what} out with the channels last')
        group.add_argument(f'--{prefix}fused', action='store_true',
                           help=f'give the SpaRTAN of {what} blocks that train faster on a CPU')

    work = parser.add_argument_group('work')
    work.add_argument('--train', action='store_true',
                      help='forward and backward pass instead of inference')
    work.add_argument('--parts', action='store_true',
                      help='share out the time of a training step to its parts, too')
    work.add_argument('--count', action='store_true',
                      help='count the kernels of a step and what they read and write, whatever the '
                           'device, and time nothing')
    work.add_argument('--amp', choices=DTYPES, help='automatic mixed precision')
    work.add_argument('--device', help='cpu, cuda or such as cuda:1 (default: a GPU if there is '
                                       'one)')
    work.add_argument('--batch', type=int, metavar='N',
                      help='images in a step (default: 1; in training as in the config)')
    work.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                      help="of the images (default: as in the config's test pipeline)")
    work.add_argument('--multi-scale', action='store_true',
                      help="the sizes of the config's multi-scale training in turn")
    work.add_argument('--repeats', type=int, metavar='N',
                      help='steps of each form (default: what takes some 20 s)')

    data = parser.add_argument_group('training pipeline')
    data.add_argument('--data', action='store_true',
                      help='measure it, on the data of the config, or on made-up pictures if that '
                           'is not there')
    data.add_argument('--workers', type=int, default=2, metavar='N',
                      help='of the data loader (default: %(default)s)')

    table = parser.add_argument_group('standard table')
    table.add_argument('--standard', action='store_true',
                       help='measure all of it; an hour on two cores')
    table.add_argument('--only', default='*', metavar='PATTERN',
                       help="the jobs of these names alone, such as 'backbone_*'; earlier results "
                            'of the others are kept')
    table.add_argument('--quick', action='store_true',
                       help='a look at every step, on small images, in a folder of its own')
    table.add_argument('--kind', choices=performance.KINDS,
                       help='of machine (default: gpu if there is one)')
    table.add_argument('--out-dir', type=Path, metavar='DIR',
                       help='where results go (default: work_dirs/benchmark/<kind>)')
    table.add_argument('--docs', action='store_true',
                       help='put the results into docs/performance.md; without --standard, those '
                            'that are there')
    # What the standard table runs in processes of their own.
    parser.add_argument('--groups', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    tasks = [args.config is not None, args.standard or args.docs, args.groups is not None]
    if sum(tasks) != 1:
        parser.error('give either CONFIG or --standard or, with results that are there, --docs')
    if not args.against and (args.against_deploy or args.against_compile
                             or args.against_channels_last or args.against_fused):
        parser.error('--against-deploy, --against-compile, --against-channels-last and '
                     '--against-fused say how --against CONFIG runs')
    if args.threads is not None and args.threads < 1:
        parser.error(f'--threads {args.threads}: must be at least 1')
    return args


def make_group(args: argparse.Namespace) -> Group:
    """Read from the flags what to measure."""
    import torch
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    workload = Workload(args.train, device, args.amp, args.batch,
                        (tuple(args.size), ) if args.size else None, args.multi_scale)
    forms = [Form(args.config, False, args.deploy, args.compile, args.channels_last, args.fused)]
    if args.against:
        authors = args.against == AUTHORS
        forms.append(Form(args.config if authors else args.against, authors, args.against_deploy,
                          args.against_compile, args.against_channels_last, args.against_fused))
    return Group(workload, tuple(forms), rounds=args.repeats, parts=args.parts)


def measure(args: argparse.Namespace, console: Console) -> None:
    """Measure one model, or two beside each other."""
    result = benchmark.run_group(make_group(args), console.status)
    console.line(f"{benchmark.machine_line(result['machine'])}\n\n{benchmark.table(result)}")
    write_json(args.json, result)


def count(args: argparse.Namespace, console: Console) -> None:
    """Count the kernels of one model, or of two."""
    counts = kernels.count_group(make_group(args))
    console.line(kernels.kernels_table(counts))
    write_json(args.json, {label: asdict(found) for label, found in counts.items()})


def measure_groups(args: argparse.Namespace, console: Console) -> None:
    """Measure the groups of a job; this is a process of its own."""
    groups = [Group.from_dict(group) for group in json.loads(args.groups.read_text())]
    results = []
    for index, group in enumerate(groups):
        def report(text: str, index: int = index) -> None:
            print(f'{index + 1} of {len(groups)}: {text}', flush=True)
        results.append(benchmark.run_group(group, report))
    write_json(args.json, results)


def measure_data(args: argparse.Namespace, console: Console) -> None:
    """Measure a training pipeline."""
    from spartan_mm.analysis.input_speed import input_table, measure_input
    console.status(f'{args.config}: its pipeline')
    result = measure_input(args.config, args.workers)
    console.line(input_table([result]))
    write_json(args.json, result)


def measure_standard(args: argparse.Namespace, console: Console, kind: str, out_dir: Path) -> None:
    """Measure the standard table, each job in a process of its own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in performance.standard_jobs(kind, args.quick)
            if fnmatch(job.name, args.only)]
    with_input = fnmatch(INPUT, args.only)
    if not jobs and not with_input:
        names = ', '.join(job.name for job in performance.standard_jobs(kind))
        raise BenchmarkError(f'--only {args.only} is none of {names}, {INPUT}')

    failed = []
    for index, job in enumerate(jobs):
        console.line(f'[{index + 1}/{len(jobs) + with_input}] {job.name}')
        start = time.monotonic()
        request, log = out_dir / 'logs' / f'{job.name}.json', out_dir / 'logs' / f'{job.name}.log'
        request.parent.mkdir(exist_ok=True)
        request.write_text(json.dumps([asdict(group) for group in job.groups]))
        command = [sys.executable, __file__, '--groups', str(request), '--json',
                   str(out_dir / f'{job.name}.json')]
        if args.threads:
            command += ['--threads', str(args.threads)]
        if run_process(command, log, lambda line: console.status(line.strip()), console):
            failed.append(job.name)
            last = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-1:]
            console.line(f'    failed: {"".join(last)} (all of it: {log})')
        else:
            console.line(f'    {time.monotonic() - start:.0f} s')
    if with_input:
        from spartan_mm.analysis.input_speed import measure_input
        console.line(f'[{len(jobs) + 1}/{len(jobs) + 1}] {INPUT}')
        quick = dict(seconds=0.5, num_images=8, workers=0) if args.quick else {}
        write_json(out_dir / f'{INPUT}.json', [
            measure_input(name, **{'workers': args.workers, **quick})
            for name in performance.INPUTS])
    if failed:
        raise BenchmarkError(f'{len(failed)} of {len(jobs)} jobs failed: {", ".join(failed)}')


def show_results(args: argparse.Namespace, console: Console, kind: str, out_dir: Path) -> None:
    """Lay out the results that are there, and put them into the document if that is asked for."""
    results = performance.read_results(out_dir)
    home = find_home(ROOT)
    tables = performance.make_tables(kind, results)
    text = '\n'.join(f'## {name}\n\n{table}' for name, table in tables.items())
    (out_dir / 'tables.md').write_text(text, encoding='utf-8')
    if 'growth' in results['jobs']:
        performance.draw_growth(results['jobs']['growth']).savefig(out_dir / 'growth.png')
    console.line(f"Tables, plot and results lie in {shorten(out_dir, home)}")
    if args.docs:
        performance.write_docs(DOCUMENT, kind, results)
        console.line(f'{shorten(DOCUMENT, home)} has them, too')


def write_json(path: Path | None, content: Mapping[str, Any] | list) -> None:
    """Write results, if there is a file to write them to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + '\n', encoding='utf-8')


def main() -> None:
    args = parse_args()
    import torch
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    try:
        if args.groups:
            measure_groups(args, console)
        elif args.data:
            measure_data(args, console)
        elif args.config is not None:
            (count if args.count else measure)(args, console)
        else:
            if args.docs and not DOCUMENT.is_file():
                raise BenchmarkError(f'{DOCUMENT} is not there: --docs is for a checkout')
            if args.docs and args.quick:
                raise BenchmarkError('what --quick measures is not for --docs')
            kind = args.kind or ('gpu' if torch.cuda.is_available() else 'cpu')
            name = f'{kind}_quick' if args.quick else kind
            out_dir = args.out_dir or find_home(ROOT) / 'work_dirs' / 'benchmark' / name
            if args.standard:
                measure_standard(args, console, kind, out_dir)
            show_results(args, console, kind, out_dir)
    except (BenchmarkError, UnknownModelError, FileNotFoundError) as error:
        console.line()
        sys.exit(f'error: {error}')
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f'error: out of memory, give a smaller --batch or --size ({error})')


if __name__ == '__main__':
    main()
