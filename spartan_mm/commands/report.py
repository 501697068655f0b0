"""Write a report of a training: one HTML file with all its pictures, to look at or to send.

    spartan-mm report work_dirs/rtdetr_spartan_t --test

Curves, metrics, classes, ground truth beside predictions, the worst errors, machine and config; by
default in WORK_DIR/report.html. The predictions are those that a test with --out FILE.pkl wrote
anywhere in WORK_DIR, the latest ones. Such a file can hold code: take none from strangers. A
training in progress has its report, too; a part whose data is missing says so.
"""
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..files import check_writable, write_whole
from ..text import printable
from .arguments import add


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument('work_dir', type=Path, metavar='WORK_DIR',
                        help='the folder of the training')
    parser.add_argument('--predictions', type=Path, metavar='FILE.pkl',
                        help='what a test with --out wrote, if it lies elsewhere')
    parser.add_argument('--test', action='store_true',
                        help='where there are no predictions, test the last checkpoint')
    parser.add_argument('--out', type=Path, metavar='FILE.html',
                        help='where to write (default: WORK_DIR/report.html)')
    add(parser, '--score-thr', help='least score of a detection that counts in pictures and as '
                                    'an error (default: %(default)s)')
    add(parser, '--images', default=8,
        help='images beside their ground truth (default: %(default)s)')


def run(args: Namespace) -> None:
    """Make the page."""
    from rich.console import Console

    from ..analysis.report.report import make_report
    from ..analysis.report.work_dir import Run, find_predictions, make_predictions
    out = args.out or args.work_dir / 'report.html'
    check_writable(out, *filter(None, [args.predictions]))
    run = Run(args.work_dir)
    predictions = args.predictions
    if args.test and predictions is None and not find_predictions(run):
        predictions = make_predictions(run)
    report = make_report(run, predictions, args.score_thr, args.images)
    with Console(stderr=True).status('') as status:
        page = report.render(lambda title: status.update(f'{title} ...'))
    with write_whole(out) as file:
        file.write(page.encode(errors='backslashreplace'))
    print(printable(f'{out} ({len(page) / 1e6:.1f} MB)'))
