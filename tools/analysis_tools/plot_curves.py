"""Draw the curves of one or several trainings side by side, from their logs.

Loss and its terms, metrics of the validations, learning rate and, on a GPU, memory. A training that
was interrupted and resumed in its work dir is drawn as one.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.fspath(Path(__file__).resolve().parents[2]))

from spartan_mm.analysis.curves import AXES, METRICS, draw_curves, read_log  # noqa: E402
from spartan_mm.engine.launch import UsageError, reporting  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN',
                        help='the work dir of a training, the folder of one of its runs, or a log '
                             '(scalars.json)')
    parser.add_argument('--names', nargs='+', metavar='NAME',
                        help='what to call the runs (default: as their folders)')
    parser.add_argument('--metrics', nargs='+', metavar='METRIC',
                        help='metrics of the validations by their names in the log, such as '
                             f'coco/bbox_mAP_s (default: {", ".join(METRICS)})')
    parser.add_argument('--x', choices=AXES, default='step',
                        help='what to draw against (default: %(default)s); hours are those of the '
                             'iterations, without validations')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), metavar='FILE',
                        help='where to write, a .png, .svg or .pdf (default: %(default)s)')
    args = parser.parse_args()
    args.names = args.names or name_runs(args.runs)
    if len(args.names) != len(args.runs):
        parser.error(f'--names: there are {len(args.runs)} runs, but {len(args.names)} names')
    if len(set(args.names)) < len(args.names):
        parser.error('two runs have the same name: tell them apart with --names')
    if args.out.suffix not in ('.png', '.svg', '.pdf'):
        parser.error(f'--out {args.out}: the name must end in .png, .svg or .pdf')
    return args


def name_runs(paths: list[Path]) -> list[str]:
    """Call runs as their folders, where these differ, and else as they were given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def main() -> None:
    args = parse_args()
    with reporting():
        run(args)


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    try:
        runs = {name: read_log(path) for name, path in zip(args.names, args.runs, strict=True)}
    except ValueError as error:
        raise UsageError(str(error)) from error
    metrics = METRICS
    if args.metrics:
        known = sorted({name for run in runs.values() for name in run.metrics})
        unknown = [name for name in args.metrics if name not in known]
        if unknown:
            raise UsageError(f'no validation has {", ".join(unknown)}; there is '
                             f'{", ".join(known) or "none at all"}')
        metrics = {name: METRICS.get(name, name) for name in args.metrics}

    figure = draw_curves(runs if len(runs) > 1 else next(iter(runs.values())), metrics, args.x)
    with write_whole(args.out) as file:
        figure.savefig(file, format=args.out.suffix[1:])
    print(f'see {args.out}')


if __name__ == '__main__':
    main()
