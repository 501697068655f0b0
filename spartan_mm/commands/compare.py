"""Compare models: sizes, times on this machine, published accuracy; as table, CSV and plot.

    spartan-mm compare spartan_t mmpretrain:resnet18_8xb32_in1k timm:mobilenetv3_large_100
    spartan-mm compare rtdetr_spartan_t mmdet:retinanet_r18_fpn_1x_coco --deploy --no-times

Models take turns while times are measured, so that whatever else slows the machine slows all of
them. Published accuracies come from this package's metafiles and those that mmpretrain and mmdet
come with; timm comes with none: give those by --accuracy.
"""
import argparse
from argparse import ArgumentParser, Namespace

from ..analysis.benchmark import Workload, default_device, measuring
from ..analysis.comparison import compare, draw_comparison, make_csv, make_markdown
from ..analysis.style import write_figure
from ..files import check_writable, write_whole
from ..text import Console
from .arguments import add, add_any_model, add_work, report_failures


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    add_any_model(parser, 'models', nargs='+')
    add(parser, '--names')
    add(parser, '--size', '--shape',
        help="of the images (default: as in each config's test pipeline)")
    parser.add_argument('--deploy', action='store_true',
                        help='the inference form of the models that have one')
    parser.add_argument('--accuracy', type=read_accuracy, nargs='+', default=[],
                        metavar='MODEL=PERCENT',
                        help='top-1 on ImageNet-1k or box AP on COCO, for models of which none '
                             'is published here, or in the place of that')
    add(parser, '--out-dir', default='work_dirs/compare')
    parser.add_argument('--no-times', action='store_true', help='measure no times')
    add_work(parser)
    add(parser, '--batch-size', '--batch', default=1,
        help='images in a step for images/s; latencies are of one (default: %(default)s)')
    add(parser, '--rounds')


def read_accuracy(text: str) -> tuple[str, float]:
    """Read MODEL=PERCENT."""
    name, _, value = text.rpartition('=')
    try:
        if name and 0 <= float(value) <= 100:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text!r} is no MODEL=PERCENT, such as timm:resnet18=69.8')


def run(args: Namespace) -> int:
    """Compare, and write table, CSV and plot."""
    if args.names and len(args.names) != len(args.models):
        args.parser.error(f'--names: {len(args.names)} names for {len(args.models)} models')
    check_writable(args.out_dir / 'compare.md')
    console = Console()
    workload = None if args.no_times else Workload(
        device=args.device or default_device(), amp=args.amp, batch=args.batch_size)
    with measuring(args.threads):
        comparison = compare(args.models, args.size, args.deploy, dict(args.accuracy), workload,
                             args.rounds, console.status)
    if args.names:
        comparison = comparison.call(dict(zip(args.models, args.names, strict=True)))
    text = make_markdown(comparison)
    console.line(text)
    for name, content in (('compare.md', text), ('compare.csv', make_csv(comparison))):
        with write_whole(args.out_dir / name) as file:
            file.write(content.encode(errors='backslashreplace'))
    figure = draw_comparison(comparison)
    if figure is not None:
        write_figure(args.out_dir / 'compare.png', figure)
    console.line(f'Written to {args.out_dir}: compare.md, compare.csv'
                 + (', compare.png' if figure else '; no plot, for no accuracy is known'))
    problems = [row.problem for row in comparison.rows if row.problem]
    return report_failures(problems and [
        f'{len(problems)} of {len(comparison.rows)} models could not be run: '
        f'{"; ".join(problems)}'])
