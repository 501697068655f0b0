"""Draw the curves of one or several trainings side by side, from their logs.

    spartan-mm curves work_dirs/first work_dirs/second --out curves.png

Loss and its terms, metrics of the validations, learning rate and, on a GPU, memory. A training that
was interrupted and resumed in its work dir is drawn as one.
"""
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import UsageError
from ..files import check_writable, write_whole
from ..text import printable
from .arguments import add

SUFFIXES = ('.png', '.svg', '.pdf')


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN',
                        help='the work dir of a training, the folder of one of its runs, or a log '
                             '(scalars.json)')
    add(parser, '--names', help='what to call the runs (default: as their folders)')
    parser.add_argument('--metrics', nargs='+', metavar='METRIC',
                        help='metrics of the validations by their names in the log, such as '
                             'coco/bbox_mAP_s (default: AP, AP50, top-1 and top-5 accuracy)')
    parser.add_argument('--x', choices=('step', 'hours'), default='step',
                        help='what to draw against (default: %(default)s); hours are those of the '
                             'iterations, without validations')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), metavar='FILE',
                        help='where to write, a .png, .svg or .pdf (default: %(default)s)')


def run(args: Namespace) -> None:
    """Draw the curves."""
    from ..analysis.report.curves import draw_curves, read_log
    names = args.names or _name_runs(args.runs)
    if len(names) != len(args.runs):
        raise UsageError(f'--names: there are {len(args.runs)} runs, but {len(names)} names')
    if len(set(names)) < len(names):
        raise UsageError('two runs have the same name: tell them apart with --names')
    if args.out.suffix not in SUFFIXES:
        raise UsageError(f'--out {args.out}: the name must end in .png, .svg or .pdf')
    check_writable(args.out)
    runs = {name: read_log(path) for name, path in zip(names, args.runs, strict=True)}
    figure = draw_curves(runs if len(runs) > 1 else runs[names[0]], args.metrics, args.x)
    with write_whole(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(printable(f'see {args.out}'))


def _name_runs(paths: list[Path]) -> list[str]:
    """Call runs as their folders, where these differ, and else as they were given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
