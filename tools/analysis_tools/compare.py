"""Compare models: sizes, times on this machine, published accuracy; as table, CSV and plot.

    compare.py spartan_t mmpretrain:resnet18_8xb32_in1k timm:mobilenetv3_large_100 \\
        --accuracy timm:mobilenetv3_large_100=75.8
    compare.py rtdetr_spartan_t mmdet:retinanet_r18_fpn_1x_coco --deploy --no-times

A MODEL is one of this package by its name, a config file or a checkpoint that holds its config, xt
or t (the backbone alone), timm:NAME, mmpretrain:NAME or mmdet:NAME, or a config of theirs such as
mmdet::detr/detr_r50_8xb2-150e_coco.py. Models take turns while times are measured, so that whatever
else slows the machine slows all of them. Published accuracies come from this package's metafiles
and those that mmpretrain and mmdet come with; timm comes with none.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(ROOT))

# What PyTorch's profiler, which measures memory on a CPU, says about itself.
os.environ.setdefault('KINETO_LOG_LEVEL', '6')

from spartan_mm.engine import launch  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL')
    parser.add_argument('--names', nargs='+', metavar='NAME',
                        help='what to call the models (default: their own names)')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help="of the images (default: as in each config's test pipeline)")
    parser.add_argument('--deploy', action='store_true',
                        help='the inference form of the models that have one')
    parser.add_argument('--accuracy', type=read_accuracy, nargs='+', default=[],
                        metavar='MODEL=PERCENT',
                        help='top-1 on ImageNet-1k or box AP on COCO, for models of which none '
                             'is published here, or in the place of that')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/compare'), metavar='DIR',
                        help='where compare.md, .csv and .png go (default: %(default)s)')
    work = parser.add_argument_group('times')
    work.add_argument('--no-times', action='store_true', help='measure none')
    work.add_argument('--device', help='cpu, cuda or such as cuda:1 (default: a GPU if there is '
                                       'one)')
    work.add_argument('--amp', choices=('float16', 'bfloat16'), help='automatic mixed precision')
    work.add_argument('--batch', type=int, default=1, metavar='N',
                      help='images in a step for images/s; latencies are of one (default: '
                           '%(default)s)')
    work.add_argument('--rounds', type=int, metavar='N',
                      help='steps of each model (default: what takes some 20 s)')
    work.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    args = parser.parse_args()
    if args.names and len(args.names) != len(args.models):
        parser.error(f'--names: {len(args.names)} names for {len(args.models)} models')
    if args.shape and min(args.shape) < 1:
        parser.error(f'--shape {args.shape[0]} {args.shape[1]}: must be at least 1')
    if args.threads is not None and args.threads < 1:
        parser.error(f'--threads {args.threads}: must be at least 1')
    return args


def read_accuracy(text: str) -> tuple[str, float]:
    """Read MODEL=PERCENT."""
    name, _, value = text.rpartition('=')
    try:
        if name and 0 <= float(value) <= 100:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text!r} is no MODEL=PERCENT, such as timm:resnet18=69.8')


def main() -> None:
    args = parse_args()
    import torch

    from spartan_mm.analysis.benchmark import BenchmarkError, Workload
    from spartan_mm.analysis.comparison import (
        compare,
        draw_comparison,
        make_csv,
        make_markdown,
    )
    from spartan_mm.demo import Console
    from spartan_mm.files import check_writable, write_whole
    from spartan_mm.zoo import UnknownModelError

    if args.threads:
        torch.set_num_threads(args.threads)
    check_writable(args.out_dir / 'compare.md')
    console = Console()
    try:
        device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        workload = None if args.no_times else Workload(device=device, amp=args.amp,
                                                       batch=args.batch)
        comparison = compare(args.models, tuple(args.shape) if args.shape else None, args.deploy,
                             dict(args.accuracy), workload, args.rounds, console.status)
    except (BenchmarkError, UnknownModelError, ImportError) as error:
        console.line()
        sys.exit(f'error: {error}')
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f'error: out of memory, give a smaller --batch or --shape ({error})')

    if args.names:
        comparison = comparison.call(dict(zip(args.models, args.names, strict=True)))
    text = make_markdown(comparison)
    console.line(text)
    for name, content in (('compare.md', text), ('compare.csv', make_csv(comparison))):
        with write_whole(args.out_dir / name) as file:
            file.write(content.encode())
    figure = draw_comparison(comparison)
    if figure is not None:
        with write_whole(args.out_dir / 'compare.png') as file:
            figure.savefig(file, format='png')
    console.line(f'Written to {args.out_dir}: compare.md, compare.csv'
                 + (', compare.png' if figure else '; no plot, for no accuracy is known'))
    problems = [row.problem for row in comparison.rows if row.problem]
    if problems:
        sys.exit(f'error: {len(problems)} of {len(comparison.rows)} models could not be run: '
                 f'{"; ".join(problems)}')


if __name__ == '__main__':
    with launch.reporting():
        main()
