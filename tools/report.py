"""Write a report of a training: one HTML file with all its pictures, to look at or to send.

Curves, metrics, classes, ground truth beside predictions, the worst errors, machine and config; by
default in WORK_DIR/report.html. The predictions are those that tools/test.py --out FILE.pkl wrote
anywhere in WORK_DIR, the latest ones. Such a file can hold code: take none from strangers. A
training in progress has its report, too; a part whose data is missing says so.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout that is not installed; what is installed comes first.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rich.console import Console  # noqa: E402

from spartan_mm.engine import launch  # noqa: E402
from spartan_mm.files import check_writable, write_whole  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dir', type=Path, help='the folder of the training')
    parser.add_argument('--predictions', type=Path, metavar='FILE.pkl',
                        help='what tools/test.py --out wrote, if it lies elsewhere')
    parser.add_argument('--test', action='store_true',
                        help='where there are no predictions, test the last checkpoint')
    parser.add_argument('--out', type=Path, metavar='FILE.html',
                        help='where to write (default: WORK_DIR/report.html)')
    parser.add_argument('--score-thr', type=launch.read_share, default=0.3, metavar='SCORE',
                        help='least score of a detection that counts in pictures and as an error '
                             '(default: %(default)s)')
    parser.add_argument('--images', type=int, default=8, metavar='N',
                        help='images beside their ground truth (default: %(default)s)')
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images {args.images}: must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    with launch.reporting():
        from spartan_mm.analysis.report import make_report
        from spartan_mm.analysis.runs import find_predictions, find_run, make_predictions
        out = args.out or args.work_dir / 'report.html'
        check_writable(out)
        try:
            run = find_run(args.work_dir)
            predictions = args.predictions
            if args.test and predictions is None and not find_predictions(run):
                predictions = make_predictions(run)
            report = make_report(run, predictions, args.score_thr, args.images)
        except ValueError as error:
            raise launch.UsageError(str(error)) from error
        console = Console(stderr=True)
        with console.status('') as status:
            page = report.render(lambda title: status.update(f'{title} ...'))
        with write_whole(out) as file:
            file.write(page.encode())
    print(f'{out} ({len(page) / 1e6:.1f} MB)')


if __name__ == '__main__':
    main()
